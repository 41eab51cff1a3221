# SPDX-License-Identifier: Apache-2.0
"""mmdetection's YOLOXPAFPN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn._pyramid import block, check_count, size_of
from fpn_fast.nn.mmdet._neck import KAIMING, Drawn
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["YOLOXPAFPN"]


def _separable(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **layers: Any) -> nn.Sequential:
    """mmcv's DepthwiseSeparableConvModule."""
    return block(
        depthwise_conv=ConvModule(in_channels, in_channels, kernel_size, stride, groups=in_channels, **layers),
        pointwise_conv=ConvModule(in_channels, out_channels, 1, **layers),
    )


class _CSPLayer(nn.Module):
    """Cross-stage partial layer: half of the channels pass the blocks."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, depthwise: bool, **layers: Any) -> None:
        super().__init__()
        middle = out_channels // 2
        conv = _separable if depthwise else ConvModule
        self.main_conv = ConvModule(in_channels, middle, 1, **layers)
        self.short_conv = ConvModule(in_channels, middle, 1, **layers)
        self.final_conv = ConvModule(2 * middle, out_channels, 1, **layers)
        self.blocks = nn.Sequential(
            *(
                block(conv1=ConvModule(middle, middle, 1, **layers), conv2=conv(middle, middle, 3, **layers))
                for _ in range(num_blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        short = self.short_conv(x)
        return self.final_conv(torch.cat([self.blocks(self.main_conv(x)), short], 1))


class YOLOXPAFPN(Drawn):
    """YOLOX's path aggregation (Ge et al., 2021): drop-in for mmdetection's ``YOLOXPAFPN`` neck.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. :func:`fpn_fast.ops.resize_cat` upsamples and
    concatenates in one call. Both paths concatenate where PANet adds.

    Args:
        in_channels: channels of every map, finest first.
        out_channels: channels of every output.
        num_csp_blocks: bottlenecks of each cross-stage layer.
        use_depthwise: takes depthwise separable convolutions in bottlenecks and for downsampling.
        upsample_cfg: must be mmdetection's default, nearest by 2.
        conv_cfg, norm_cfg, act_cfg: see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        init_cfg: mmdetection's default, or None to keep mmcv's initialisation of convolutions.

    Raises:
        ValueError: an argument is none of these.

    Source: mmdet/models/necks/yolox_pafpn.py, mmdet/models/layers/csp_layer.py.

    >>> neck = YOLOXPAFPN([4, 8, 16], 6, num_csp_blocks=1)
    >>> [tuple(map.shape) for map in neck([torch.rand(1, c, 64 // c, 32 // c) for c in (4, 8, 16)])]
    [(1, 6, 16, 8), (1, 6, 8, 4), (1, 6, 4, 2)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_csp_blocks: int = 3,
        use_depthwise: bool = False,
        upsample_cfg: Mapping[str, Any] = {"scale_factor": 2, "mode": "nearest"},
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = {"type": "BN", "momentum": 0.03, "eps": 0.001},
        act_cfg: Mapping[str, Any] | None = {"type": "Swish"},
        init_cfg: Mapping[str, Any] | None = KAIMING,
    ) -> None:
        super().__init__(init_cfg, KAIMING)
        if dict(upsample_cfg) != {"scale_factor": 2, "mode": "nearest"}:
            raise ValueError(f"upsample_cfg must be nearest with scale_factor 2, got {dict(upsample_cfg)}")
        self.in_channels = widths = list(in_channels)
        self.out_channels = out_channels
        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        conv = _separable if use_depthwise else ConvModule
        pairs = list(itertools.pairwise(widths))
        self.reduce_layers = nn.ModuleList(ConvModule(high, low, 1, **layers) for low, high in reversed(pairs))
        self.top_down_blocks = nn.ModuleList(
            _CSPLayer(2 * low, low, num_csp_blocks, use_depthwise, **layers) for low, _ in reversed(pairs)
        )
        self.downsamples = nn.ModuleList(conv(low, low, 3, 2, **layers) for low, _ in pairs)
        self.bottom_up_blocks = nn.ModuleList(
            _CSPLayer(2 * low, high, num_csp_blocks, use_depthwise, **layers) for low, high in pairs
        )
        self.out_convs = nn.ModuleList(ConvModule(width, out_channels, 1, **layers) for width in widths)
        self.init_weights()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [N, in_channels[i], H_i, W_i], finest first -> as many maps [N, out_channels, H_i, W_i].

        Raises:
            ValueError: the number of maps differs from that of in_channels; others: see
                :func:`fpn_fast.ops.resize_cat`.
        """
        check_count(inputs, len(self.in_channels), "inputs")
        inner = [inputs[-1]]
        for low, reduce, merge in zip(inputs[-2::-1], self.reduce_layers, self.top_down_blocks, strict=True):
            inner[0] = reduce(inner[0])
            inner.insert(0, merge(ops.resize_cat([inner[0], low], size_of(low), mode="nearest")))
        outs = [inner[0]]
        for high, down, merge in zip(inner[1:], self.downsamples, self.bottom_up_blocks, strict=True):
            outs.append(merge(torch.cat([down(outs[-1]), high], 1)))
        return tuple(conv(out) for conv, out in zip(self.out_convs, outs, strict=True))
