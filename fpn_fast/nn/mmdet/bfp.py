# SPDX-License-Identifier: Apache-2.0
"""mmdetection's BFP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast.nn import _pyramid
from fpn_fast.nn._pyramid import check_count, size_of
from fpn_fast.nn.mmdet._neck import XAVIER, Drawn
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["BFP"]


class _NonLocal(nn.Module):
    """Every pixel's embedded-Gaussian mean over all pixels, added to the map: mmcv's NonLocal2d."""

    def __init__(self, channels: int, conv_cfg: Mapping[str, Any] | None, norm_cfg: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.g = ConvModule(channels, channels, 1, conv_cfg=conv_cfg)
        self.conv_out = ConvModule(channels, channels, 1, conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        self.theta = ConvModule(channels, channels, 1, conv_cfg=conv_cfg)
        self.phi = ConvModule(channels, channels, 1, conv_cfg=conv_cfg)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        weights = torch.matmul(theta.transpose(1, 2), phi).softmax(-1)
        mean = torch.matmul(weights, g.transpose(1, 2)).transpose(1, 2)
        return x + self.conv_out(mean.reshape(x.shape))


class BFP(Drawn):
    """Balanced feature pyramid (Pang et al., 2019): drop-in for mmdetection's ``BFP`` neck.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. One call of :func:`fpn_fast.ops.fuse_maps` gathers
    all levels into their mean, and one per level adds it back.

    Args:
        in_channels: channels of every map.
        num_levels: number of maps.
        refine_level: the level at whose size the mean is refined; finer maps are max pooled to it.
        refine_type: None, "conv" (3x3) or "non_local".
        conv_cfg, norm_cfg: of the refinement, see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        init_cfg: mmdetection's default, or None to keep mmcv's initialisation of convolutions.

    Raises:
        ValueError: an argument is none of these.

    Source: mmdet/models/necks/bfp.py, mmcv/cnn/bricks/non_local.py.

    >>> neck = BFP(4, 3, refine_level=1)
    >>> [tuple(map.shape) for map in neck([torch.rand(1, 4, 16 // 2**i, 12 // 2**i) for i in range(3)])]
    [(1, 4, 16, 12), (1, 4, 8, 6), (1, 4, 4, 3)]
    """

    def __init__(
        self,
        in_channels: int,
        num_levels: int,
        refine_level: int = 2,
        refine_type: str | None = None,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = XAVIER,
    ) -> None:
        super().__init__(init_cfg, XAVIER)
        if refine_type not in (None, "conv", "non_local"):
            raise ValueError(f"refine_type must be None, 'conv' or 'non_local', got {refine_type!r}")
        if not 0 <= refine_level < num_levels:
            raise ValueError(f"refine_level must be one of the {num_levels} levels, got {refine_level}")
        self.in_channels = in_channels
        self.num_levels = num_levels
        self.refine_level = refine_level
        self.refine_type = refine_type
        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg}
        if refine_type == "conv":
            self.refine: nn.Module = ConvModule(in_channels, in_channels, 3, act_cfg={"type": "ReLU"}, **layers)
        elif refine_type == "non_local":
            self.refine = _NonLocal(in_channels, **layers)
        self.init_weights()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """num_levels maps [N, in_channels, H_l, W_l], finest first -> as many of the same shapes.

        Raises:
            ValueError: there are more or fewer maps; others: see :func:`fpn_fast.ops.fuse_maps`.
        """
        check_count(inputs, self.num_levels, "inputs")
        finer = range(self.refine_level)
        gathered = ["adaptive_max" if level in finer else "nearest" for level in range(self.num_levels)]
        size = size_of(inputs[self.refine_level])
        mean = _pyramid.add(inputs, size, gathered, rounding="sequential", divide=self.num_levels)
        if self.refine_type is not None:
            mean = self.refine(mean)
        return tuple(
            _pyramid.add([mean, x], size_of(x), ["nearest" if level in finer else "adaptive_max", "identity"])
            for level, x in enumerate(inputs)
        )
