# SPDX-License-Identifier: Apache-2.0
"""mmdetection's NASFPN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn import _pyramid
from fpn_fast.nn._pyramid import size_of
from fpn_fast.nn.mmdet._neck import CAFFE2_XAVIER, Neck, stages_of
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["CELLS", "NASFPN"]

#: The cells of a stage in their order: name, result, first input, second input. A name starts with its kind, "sum" or
#: "gp" (global pooling), and ends with the level of its result. "t" marks the results that only later cells read.
CELLS = (
    ("gp_64_4", "t4", "p6", "p4"), ("sum_44_4", "u4", "t4", "p4"), ("sum_43_3", "p3", "u4", "p3"),
    ("sum_34_4", "p4", "p3", "u4"), ("gp_43_5", "t5", "p4", "p3"), ("sum_55_5", "p5", "p5", "t5"),
    ("gp_54_7", "t7", "p5", "u4"), ("sum_77_7", "p7", "p7", "t7"), ("gp_75_6", "p6", "p7", "p5"),
)  # fmt: skip
#: They have no convolution.
_BARE = ("gp_43_5", "gp_54_7")


class _Cell(nn.Module):
    """A sum of two maps at the size of a third, or, if `gated`, ``x2 + sigmoid(mean(x2)) * x1``."""

    def __init__(self, gated: bool, out_conv: ConvModule | None) -> None:
        super().__init__()
        self.gated = gated
        self.out_conv = out_conv

    def forward(self, x1: Tensor, x2: Tensor, size: tuple[int, int]) -> Tensor:
        (x1, form1), (x2, form2) = _resampled(x1, size), _resampled(x2, size)
        options: dict[str, Any] = {}
        if self.gated:
            if form2 != "identity":
                x2, form2 = _pyramid.add([x2], size, [form2]), "identity"
            options["gate"] = F.adaptive_avg_pool2d(x2, 1).sigmoid()
        # The activation comes before the convolution.
        options["activation"] = None if self.out_conv is None else "relu"
        merged = _pyramid.add([x1, x2], size, [form1, form2], rounding="sequential", **options)
        return merged if self.out_conv is None else self.out_conv(merged)


def _resampled(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """`x`, pooled where no form of the op does it, and the form that brings it to `size`.

    mmcv compares sizes as tuples, so the height decides. Larger maps are padded with zeros to a multiple of `size`,
    half of them before, and pooled by the quotient.
    """
    height, width = size_of(x)
    if (height, width) == size:
        return x, "identity"
    if (height, width) < size:
        return x, "nearest"
    if (height, width) == (2 * size[0], 2 * size[1]):
        return x, "max_pool_2x2"
    rows, columns = -(-height // size[0]), -(-width // size[1])
    down, across = rows * size[0] - height, columns * size[1] - width
    padded = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
    return F.max_pool2d(padded, (rows, columns)), "identity"


class NASFPN(Neck):
    """NAS-FPN (Ghiasi et al., 2019), the architecture 7 @ 256: drop-in for mmdetection's ``NASFPN`` neck.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. One call of :func:`fpn_fast.ops.fuse_maps` per cell
    resamples, gates and sums its maps and applies the ReLU. The constructor draws the weights that mmdetection draws in
    ``init_weights()``.

    Args:
        in_channels: channels of every stage of the backbone, finest first.
        out_channels: channels of every output.
        num_outs: must make five levels, with the extra ones by 1x1 convolution and 2x2 max pooling.
        stack_times: number of stages of cells.
        start_level, end_level: first and last stage of the backbone to use; -1 is the last.
        norm_cfg: for every convolution, see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        init_cfg: mmdetection's default, or None to keep mmcv's initialisation of convolutions.

    Raises:
        ValueError: num_outs is not 5, or another argument is none of these.

    Source: mmdet/models/necks/nas_fpn.py, mmcv/ops/merge_cells.py.

    >>> import torch
    >>> neck = NASFPN([4, 6, 8], 4, num_outs=5, stack_times=1)
    >>> [tuple(map.shape[2:]) for map in neck([torch.rand(1, c, 64 // c, 64 // c) for c in (4, 6, 8)])]
    [(16, 16), (10, 10), (8, 8), (4, 4), (2, 2)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        stack_times: int,
        start_level: int = 0,
        end_level: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = CAFFE2_XAVIER,
    ) -> None:
        layers: dict[str, Any] = {"norm_cfg": norm_cfg}
        super().__init__(in_channels, out_channels, num_outs, start_level, end_level, init_cfg, CAFFE2_XAVIER, layers)
        if num_outs != 5:
            raise ValueError(f"num_outs must be 5, for P3 to P7, got {num_outs}")
        self.stack_times = stack_times
        self.norm_cfg = norm_cfg
        self.extra_downsamples = nn.ModuleList(
            nn.Sequential(ConvModule(out_channels, out_channels, 1, **layers), nn.MaxPool2d(2, 2))
            for _ in range(num_outs - len(self.lateral_convs))
        )
        self.fpn_stages = nn.ModuleList()
        for _ in range(stack_times):
            stage = nn.ModuleDict()
            for name, *_ in CELLS:
                out_conv = None if name in _BARE else ConvModule(out_channels, out_channels, 3, bias=True, **layers)
                stage[name] = _Cell(name.startswith("gp"), out_conv)
            self.fpn_stages.append(stage)
        self.init_weights()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of all stages [N, in_channels[i], H_i, W_i], finest first -> five maps [N, out_channels, H_l, W_l].

        Raises:
            ValueError: the number of maps differs from that of in_channels; others: see :func:`fpn_fast.ops.fuse_maps`.
        """
        stages = stages_of(self, inputs)
        levels = [conv(stage) for conv, stage in zip(self.lateral_convs, stages, strict=True)]
        for downsample in self.extra_downsamples:
            levels.append(downsample(levels[-1]))
        maps = {f"p{level}": x for level, x in enumerate(levels, start=3)}
        sizes = {name[-1]: size_of(x) for name, x in maps.items()}
        cells: Any = self.fpn_stages
        for stage in cells:
            for name, result, first, second in CELLS:
                maps[result] = stage[name](maps[first], maps[second], sizes[name[-1]])
        return tuple(maps[f"p{level}"] for level in range(3, 8))
