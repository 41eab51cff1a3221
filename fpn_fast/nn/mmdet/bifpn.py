# SPDX-License-Identifier: Apache-2.0
"""BiFPN as in mmdetection's EfficientDet project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast.nn import _pyramid
from fpn_fast.nn._pyramid import block, check_count, conv, size_of
from fpn_fast.nn.effdet import graph
from fpn_fast.nn.mmdet.conv_module import make_norm

__all__ = ["BiFPN"]

_LEVELS = 5
#: The project's pooling, which pads with zeros: borders are at least 0.
_DOWN = "max_pool_same_zero"


def _block(in_channels: int, out_channels: int, depthwise: bool, options: Mapping[str, Any]) -> nn.Sequential:
    """A depthwise separable 3x3 convolution, or one of 1x1, with its norm and activation."""
    if depthwise:
        layers = {
            "depthwise_conv": conv(in_channels, in_channels, 3, groups=in_channels, bias=False),
            "pointwise_conv": conv(in_channels, out_channels, 1),
        }
    else:
        layers = {"down_conv": conv(in_channels, out_channels, 1)}
    norm = make_norm(options["norm_cfg"], out_channels)[1] if options["apply_bn_for_resampling"] else None
    return block(**layers, bn=norm, swish=nn.SiLU() if options["conv_bn_act_pattern"] else None)


class _Stage(nn.Module):
    """The nodes of effdet's bifpn_ graph, under the names of the project."""

    def __init__(self, in_channels: Sequence[int] | None, out_channels: int, options: Mapping[str, Any]) -> None:
        """in_channels: of P3 to P5 from the backbone; None for a later stage."""
        super().__init__()
        self.first = in_channels is not None
        self.epsilon = options["epsilon"]
        self.activation = None if options["conv_bn_act_pattern"] else "silu"
        self.nodes = graph("bifpn_sum", _LEVELS)
        for i, node in enumerate(self.nodes):
            self.register_parameter(self._weight_of(i), nn.Parameter(torch.ones(len(node.inputs))))
        if in_channels is not None:
            p3, p4, p5 = in_channels
            self.p5_down_channel = _block(p5, out_channels, False, options)
            self.p4_down_channel = _block(p4, out_channels, False, options)
            self.p3_down_channel = _block(p3, out_channels, False, options)
            self.p5_to_p6 = nn.Sequential(_block(p5, out_channels, False, options))
            self.p4_level_connection = _block(p4, out_channels, False, options)
            self.p5_level_connection = _block(p5, out_channels, False, options)
        for i in range(len(self.nodes)):
            self.add_module(self._conv_of(i), _block(out_channels, out_channels, True, options))

    def _weight_of(self, i: int) -> str:
        return f"p{self.nodes[i].level + 3}_w{1 if i < _LEVELS - 1 else 2}"

    def _conv_of(self, i: int) -> str:
        return f"conv{self.nodes[i].level + 3}_{'up' if i < _LEVELS - 1 else 'down'}"

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        maps = self._inputs(x) if self.first else list(x)
        sizes = [size_of(each) for each in maps]
        for i, node in enumerate(self.nodes):
            if self.first and i == _LEVELS - 1:
                # The nodes from here on read C4 and C5 through convolutions of their own.
                maps[1], maps[2] = self.p4_level_connection(x[1]), self.p5_level_connection(x[2])
            raw = getattr(self, self._weight_of(i)).relu()
            levels = [k if k < _LEVELS else self.nodes[k - _LEVELS].level for k in node.inputs]
            forms = ["identity" if k == node.level else "nearest" if k > node.level else _DOWN for k in levels]
            fused = _pyramid.add(
                [maps[k] for k in node.inputs], sizes[node.level], forms,
                weights=raw / (raw.sum() + self.epsilon), rounding="sequential", activation=self.activation,
            )  # fmt: skip
            maps.append(getattr(self, self._conv_of(i))(fused))
        return maps[-_LEVELS:]

    def _inputs(self, x: Sequence[Tensor]) -> list[Tensor]:
        p3, p4, p5 = x
        maps = [self.p3_down_channel(p3), self.p4_down_channel(p4), self.p5_down_channel(p5)]
        for coarser in (self.p5_to_p6(p5), None):
            source = maps[-1] if coarser is None else coarser
            height, width = size_of(source)
            maps.append(_pyramid.add([source], (-(-height // 2), -(-width // 2)), [_DOWN]))
        return maps


class BiFPN(nn.Module):
    """BiFPN (Tan et al., 2020): drop-in for the ``BiFPN`` of mmdetection's EfficientDet project.

    Constructor, ``state_dict`` keys and outputs are the project's, which normalises weights before it multiplies, and
    pads its pooling with zeros; :class:`fpn_fast.nn.effdet.BiFpn` is effdet's form. Like there, convolutions are
    initialised by torch. Each map has half the size of the one before, rounded up; the project needs images of
    multiples of 128 pixels.

    Args:
        num_stages: number of cells.
        in_channels: channels of P3 to P5.
        out_channels: channels of every output.
        start_level: the first stage of the backbone to use; three follow.
        epsilon: added to the sum of a node's weights.
        apply_bn_for_resampling: adds a norm to every convolution.
        conv_bn_act_pattern: puts the activation behind the norm, not before the convolution.
        norm_cfg: see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        init_cfg: must be None.

    Raises:
        ValueError: in_channels are not three; init_cfg is given.

    Source: projects/EfficientDet/efficientdet/bifpn.py of mmdetection.

    >>> neck = BiFPN(1, [4, 8, 16], 8).eval()
    >>> maps = [torch.rand(1, 4, 12, 6), torch.rand(1, 8, 6, 3), torch.rand(1, 16, 3, 2)]
    >>> [tuple(map.shape[2:]) for map in neck(maps)]
    [(12, 6), (6, 3), (3, 2), (2, 1), (1, 1)]
    """

    def __init__(
        self,
        num_stages: int,
        in_channels: Sequence[int],
        out_channels: int,
        start_level: int = 0,
        epsilon: float = 1e-4,
        apply_bn_for_resampling: bool = True,
        conv_bn_act_pattern: bool = False,
        norm_cfg: Mapping[str, Any] = {"type": "BN", "momentum": 1e-2, "eps": 1e-3},
        init_cfg: None = None,
    ) -> None:
        super().__init__()
        if len(in_channels) != 3:
            raise ValueError(f"in_channels must be those of P3, P4 and P5, got {list(in_channels)}")
        if init_cfg is not None:
            raise ValueError(f"init_cfg must be None, got {init_cfg}")
        self.start_level = start_level
        options = {
            "epsilon": epsilon, "apply_bn_for_resampling": apply_bn_for_resampling,
            "conv_bn_act_pattern": conv_bn_act_pattern, "norm_cfg": norm_cfg,
        }  # fmt: skip
        self.bifpn = nn.Sequential(
            *(_Stage(in_channels if i == 0 else None, out_channels, options) for i in range(num_stages))
        )

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of all stages, finest first; P3 to P5 from start_level on -> P3 to P7 [N, out_channels, H_l, W_l].

        Raises:
            ValueError: there are not three maps from start_level on; others: see :func:`fpn_fast.ops.fuse_maps`.
        """
        used = x[self.start_level :]
        check_count(used, 3, "x from start_level on")
        return tuple(self.bifpn(used))
