# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for decoders of Hugging Face's transformers: UperNet's and MaskFormer's. transformers is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn._pyramid import block, check_count, conv, size_of
from fpn_fast.nn._shared import merge_pyramid

__all__ = ["MaskFormerFPNModel", "UperNetHead"]


def _upernet_block(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return block(
        conv=conv(in_channels, out_channels, kernel_size, bias=False),
        batch_norm=nn.BatchNorm2d(out_channels),
        activation=nn.ReLU(),
    )


class UperNetHead(nn.Module):
    """UPerNet's decoder (Xiao et al., 2018): drop-in for transformers' ``UperNetHead``.

    Constructor, ``state_dict`` keys and outputs are those of transformers. One call of :func:`fpn_fast.ops.top_down`
    merges all levels, and :func:`fpn_fast.ops.resize_cat` resizes and concatenates them without the resized copies,
    also in the pyramid pooling.

    Args:
        config: a ``UperNetConfig``, or an object with its ``pool_scales``, ``hidden_size``, ``num_labels`` and
            ``initializer_range``.
        in_channels: channels of every map of the backbone, finest first.

    Source: transformers/models/upernet/modeling_upernet.py.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(pool_scales=[1, 2], hidden_size=8, num_labels=3, initializer_range=0.02)
    >>> head = UperNetHead(config, [4, 6]).eval()
    >>> tuple(head([torch.rand(1, 4, 8, 12), torch.rand(1, 6, 4, 6)]).shape)
    (1, 3, 8, 12)
    """

    def __init__(self, config: Any, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.pool_scales = config.pool_scales
        self.in_channels = list(in_channels)
        self.channels = width = config.hidden_size
        *finer, coarsest = in_channels
        self.classifier = nn.Conv2d(width, config.num_labels, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _upernet_block(coarsest, width, 1)) for scale in self.pool_scales
        )
        self.bottleneck = _upernet_block(coarsest + len(self.pool_scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(_upernet_block(channels, width, 1) for channels in finer)
        self.fpn_convs = nn.ModuleList(_upernet_block(width, width, 3) for _ in finer)
        self.fpn_bottleneck = _upernet_block(len(in_channels) * width, width, 3)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, config.initializer_range)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Pyramid pooling of the coarsest map: [N, hidden_size, H, W] at its size."""
        x = inputs[-1]
        pooled = [pool(x) for pool in self.psp_modules]
        return self.bottleneck(ops.resize_cat([x, *pooled], size_of(x), mode="bilinear"))

    def forward(self, encoder_hidden_states: Sequence[Tensor]) -> Tensor:
        """Maps [N, in_channels[i], H_i, W_i], finest first -> logits [N, num_labels, H_0, W_0].

        Raises:
            ValueError: there are more or fewer maps; others: see :func:`fpn_fast.ops.top_down`.
        """
        check_count(encoder_hidden_states, len(self.in_channels), "encoder_hidden_states")
        # Pyramid pooling takes the place of the coarsest lateral, which has no convolution behind the merge.
        features = [*encoder_hidden_states[:-1], self.psp_forward(encoder_hidden_states)]
        kept = nn.Identity()
        _, levels = merge_pyramid(features, [*self.lateral_convs, kept], [*self.fpn_convs, kept], mode="bilinear")
        return self.classifier(self.fpn_bottleneck(ops.resize_cat(levels, size_of(levels[0]), mode="bilinear")))


def _maskformer_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(conv(in_channels, out_channels, 3, bias=False), nn.GroupNorm(32, out_channels), nn.ReLU())


class _MaskFormerLayer(nn.Module):
    """``block(proj(left) + nearest(down))``"""

    def __init__(self, channels: int, lateral_channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(conv(lateral_channels, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.block = _maskformer_block(channels, channels)

    def forward(self, down: Tensor, left: Tensor) -> Tensor:
        return self.block(ops.upsample_add(self.proj(left), down))


class MaskFormerFPNModel(nn.Module):
    """MaskFormer's pyramid (Cheng et al., 2021): drop-in for transformers' ``MaskFormerFPNModel``.

    Constructor, ``state_dict`` keys and outputs are those of transformers. A convolution comes between the levels, so
    that :func:`fpn_fast.ops.upsample_add` merges them one by one.

    Args:
        in_features: channels of the coarsest map.
        lateral_widths: channels of the other maps, finest first.
        feature_size: channels of every output, a multiple of 32.

    Source: transformers/models/maskformer/modeling_maskformer.py.

    >>> import torch
    >>> pyramid = MaskFormerFPNModel(8, [4, 6], feature_size=32)
    >>> [tuple(map.shape) for map in pyramid([torch.rand(1, c, 32 // c, 32 // c) for c in (4, 6, 8)])]
    [(1, 32, 5, 5), (1, 32, 8, 8)]
    """

    def __init__(self, in_features: int, lateral_widths: Sequence[int], feature_size: int = 256) -> None:
        super().__init__()
        self.stem = _maskformer_block(in_features, feature_size)
        self.layers = nn.Sequential(*(_MaskFormerLayer(feature_size, width) for width in reversed(lateral_widths)))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the backbone, finest first -> [N, feature_size, H_l, W_l] of all but the coarsest, coarse to fine.

        Raises:
            ValueError: there are not as many maps as widths; others: see :func:`fpn_fast.ops.upsample_add`.
        """
        check_count(features, len(self.layers) + 1, "features")
        down, outputs = self.stem(features[-1]), []
        for layer, left in zip(self.layers, features[-2::-1], strict=True):
            down = layer(down, left)
            outputs.append(down)
        return outputs
