# SPDX-License-Identifier: Apache-2.0
"""PANet's pyramid as its paper and its author's code have it; mmdetection's PAFPN is another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn._pyramid import block, check_count, conv
from fpn_fast.nn._shared import initialise, merge_pyramid

__all__ = ["PANet"]


def _layer(in_channels: int, out_channels: int, size: int, gn: bool, *, stride: int = 1, up: bool = False) -> nn.Module:
    """A convolution, alone or with group norm; one of the bottom-up path then has a bias and ReLU too."""
    layer = conv(in_channels, out_channels, size, stride, bias=up or not gn)
    if not gn:
        return layer
    return nn.Sequential(layer, nn.GroupNorm(32, out_channels), *([nn.ReLU(inplace=True)] if up else []))


class PANet(nn.Module):
    """Path aggregation (Liu et al., 2018) in the paper's form: ``N_2 = P_2, N_{l+1} = conv(P_{l+1} + down(N_l))``.

    The next level is made of the convolved map. :class:`fpn_fast.nn.mmdet.PAFPN` makes it of the sum, so that its
    weights give other results here. ``state_dict`` keys and initialisation are those of the author's code, without its
    backbone.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        out_channels: channels of every output.
        group_norm: adds group norm of 32 groups to every convolution, and ReLU to those of the bottom-up path.
        extra_level: adds every second pixel of the coarsest output.

    Source: arXiv 1803.01534, section 3.1; lib/modeling/FPN.py of ShuLiu1993/PANet.

    >>> import torch
    >>> pyramid = PANet([4, 6], 8)
    >>> [tuple(map.shape) for map in pyramid([torch.rand(1, 4, 8, 12), torch.rand(1, 6, 4, 6)])]
    [(1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3)]
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, group_norm: bool = False, extra_level: bool = True
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.num_inputs = len(in_channels)
        self.extra_level = extra_level
        # The author's lists start at the coarsest level, except for those of the bottom-up path.
        self.conv_top = _layer(coarsest, out_channels, 1, group_norm)
        self.topdown_lateral_modules = nn.ModuleList(
            block(conv_lateral=_layer(channels, out_channels, 1, group_norm)) for channels in reversed(finer)
        )
        self.posthoc_modules = nn.ModuleList(_layer(out_channels, out_channels, 3, group_norm) for _ in in_channels)
        self.panet_buttomup_conv1_modules, self.panet_buttomup_conv2_modules = (
            nn.ModuleList(_layer(out_channels, out_channels, 3, group_norm, stride=s, up=True) for _ in finer)
            for s in (2, 1)
        )
        initialise(self)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, in_channels[i], H_i, W_i], finest first -> as many [N, out_channels, H_i, W_i], and the extra one.

        Raises:
            ValueError: there are more or fewer maps; others: see :func:`fpn_fast.ops.top_down`.
        """
        check_count(x, self.num_inputs, "x")
        laterals = [*self.topdown_lateral_modules[::-1], self.conv_top]
        _, levels = merge_pyramid(x, laterals, self.posthoc_modules[::-1])
        outs = levels[:1]
        up = zip(levels[1:], self.panet_buttomup_conv1_modules, self.panet_buttomup_conv2_modules, strict=True)
        for level, down, output in up:
            outs.append(output(level + down(outs[-1])))
        if self.extra_level:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return outs
