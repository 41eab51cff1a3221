# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for decoders of segmentation_models_pytorch (smp): FPN, PAN and UPerNet. The package is not needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn import _pyramid
from fpn_fast.nn._pyramid import block, climb, conv, size_of, sum_of_ladders
from fpn_fast.nn._shared import merge_pyramid

__all__ = ["FPNDecoder", "PANDecoder", "UPerNetDecoder"]


class _GroupNormBlock(nn.Module):
    """A 3x3 convolution with group norm and ReLU; `upsample`: bilinear upsampling by 2 follows."""

    def __init__(self, in_channels: int, out_channels: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        layers = conv(in_channels, out_channels, 3, bias=False), nn.GroupNorm(32, out_channels), nn.ReLU(inplace=True)
        self.block = nn.Sequential(*layers)


class FPNDecoder(nn.Module):
    """The decoder of ``smp.FPN``: drop-in for smp's ``FPNDecoder``.

    Constructor, ``state_dict`` keys and outputs are smp's. :func:`fpn_fast.ops.upsample_add` merges the levels, and one
    call of :func:`fpn_fast.ops.fuse_maps` or :func:`fpn_fast.ops.resize_cat` upsamples the branches a last time and
    merges them. Maps of any size serve, where smp needs exact halves.

    Args:
        encoder_channels: channels of the encoder's maps, finest first.
        encoder_depth: number of the encoder's stages, at least 3.
        pyramid_channels, segmentation_channels: of the pyramid, and of its branches: a multiple of 32.
        dropout: share of the channels that training drops.
        merge_policy: "add", or "cat" for the branches' concatenation, coarsest first.
        interpolation_mode: of the merge, "nearest" or "bilinear".

    Raises:
        ValueError: an argument is none of these.

    Source: segmentation_models_pytorch/decoders/fpn/decoder.py.

    >>> import torch
    >>> decoder = FPNDecoder([3, 4, 4, 6, 8, 10], pyramid_channels=8, segmentation_channels=32)
    >>> sizes = {3: 64, 4: 16, 6: 8, 8: 4, 10: 2}
    >>> tuple(decoder([torch.rand(1, c, size, size) for c, size in sizes.items()]).shape)
    (1, 32, 16, 16)
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        encoder_depth: int = 5,
        pyramid_channels: int = 256,
        segmentation_channels: int = 128,
        dropout: float = 0.2,
        merge_policy: str = "add",
        interpolation_mode: str = "nearest",
    ) -> None:
        super().__init__()
        _check_depth(encoder_depth)
        if merge_policy not in ("add", "cat"):
            raise ValueError(f"merge_policy must be 'add' or 'cat', got {merge_policy!r}")
        if interpolation_mode not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation_mode must be 'nearest' or 'bilinear', got {interpolation_mode!r}")
        self.merge_policy, self.interpolation_mode = merge_policy, interpolation_mode
        self.out_channels = segmentation_channels * (1 if merge_policy == "add" else 4)
        c5, c4, c3, c2 = list(encoder_channels)[::-1][:4]
        self.p5 = conv(c5, pyramid_channels, 1)
        self.p4, self.p3, self.p2 = (block(skip_conv=conv(width, pyramid_channels, 1)) for width in (c4, c3, c2))
        self.seg_blocks = nn.ModuleList()
        for steps in (3, 2, 1, 0):
            widths = [pyramid_channels, *[segmentation_channels] * max(1, steps)]
            layers = (_GroupNormBlock(a, b, steps > 0) for a, b in itertools.pairwise(widths))
            self.seg_blocks.append(block(block=nn.Sequential(*layers)))
        self.dropout = nn.Dropout2d(dropout, inplace=True)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's maps, finest first -> [N, out_channels, H, W] at the size of the finest of the last four."""
        *finer, c5 = features[-4:]
        maps = [self.p5(c5)]
        for layer, feature in zip((self.p4, self.p3, self.p2), reversed(finer), strict=True):
            maps.append(ops.upsample_add(layer(feature), maps[-1], self.interpolation_mode))
        branches: Any = self.seg_blocks
        tops = [
            climb(map, [step.block for step in branch[0]], corners=True)
            for map, branch in zip(maps, branches, strict=True)
        ]
        size = size_of(tops[-1])
        if self.merge_policy == "cat":
            merged = ops.resize_cat(tops, size, mode=_pyramid.bilinear(True))
        else:
            merged = sum_of_ladders(tops, size, rounding="once", corners=True)
        return self.dropout(merged)


class _Block(nn.Module):
    """A convolution with batch norm, and ReLU unless `relu` is False. The names are smp's."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, relu: bool = True) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class _Attention(nn.Module):
    """smp's feature pyramid attention (FPABlock), of PAN's coarsest map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2, 2)
        self.branch1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), _Block(in_channels, out_channels, 1))
        self.mid = nn.Sequential(_Block(in_channels, out_channels, 1))
        self.down1 = nn.Sequential(pool, _Block(in_channels, 1, 7))
        self.down2 = nn.Sequential(pool, _Block(1, 1, 5))
        self.down3 = nn.Sequential(pool, _Block(1, 1, 3), _Block(1, 1, 3))
        self.conv2 = _Block(1, 1, 5)
        self.conv1 = _Block(1, 1, 7)

    def forward(self, x: Tensor) -> Tensor:
        height, width = size_of(x)
        x1 = self.down1(x)
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        # One channel each: too small for a fused op to matter.
        y = self.conv2(x2) + _resized(x3, (height // 4, width // 4))
        y = self.conv1(x1) + _resized(y, (height // 2, width // 2))
        return _resized(y, (height, width)) * self.mid(x) + _resized(self.branch1(x), (height, width))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class _GatedBlock(nn.Module):
    """smp's global attention upsampling (GAUBlock): ``resample(high) + conv(low) * gate(high)``."""

    def __init__(self, in_channels: int, out_channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        gate = _Block(out_channels, out_channels, 1, relu=False)
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), gate, nn.Sigmoid())
        self.conv2 = _Block(in_channels, out_channels, 3)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        maps, forms = [self.conv2(low), high], ["identity", self.form]
        return _pyramid.add(maps, size_of(low), forms, gate=self.conv1(high), rounding="sequential")


class PANDecoder(nn.Module):
    """The decoder of ``smp.PAN`` (Li et al., 2018): drop-in for smp's ``PANDecoder``.

    Constructor, ``state_dict`` keys and outputs are smp's. One call of :func:`fpn_fast.ops.fuse_maps` per level
    upsamples, gates and adds.

    Args:
        encoder_channels: channels of the encoder's maps, finest first; the first two are not used.
        encoder_depth: number of the encoder's stages: 3, 4 or 5.
        decoder_channels: of the output.
        decoder_interpolation_mode: "bilinear" (with align_corners) or "nearest".

    Raises:
        ValueError: an argument is none of these.

    Source: segmentation_models_pytorch/decoders/pan/decoder.py.

    >>> import torch
    >>> decoder = PANDecoder([3, 4, 4, 6, 8], 4, 8).eval()
    >>> maps = [torch.rand(1, c, size, size) for c, size in zip((3, 4, 4, 6, 8), (64, 32, 32, 16, 8))]
    >>> tuple(decoder(maps).shape)
    (1, 8, 32, 32)
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        encoder_depth: int,
        decoder_channels: int,
        decoder_interpolation_mode: str = "bilinear",
    ) -> None:
        super().__init__()
        _check_depth(encoder_depth)
        if decoder_interpolation_mode not in ("bilinear", "nearest"):
            raise ValueError(f"decoder_interpolation_mode must be 'bilinear' or 'nearest', got "
                             f"{decoder_interpolation_mode!r}")  # fmt: skip
        form = "nearest" if decoder_interpolation_mode == "nearest" else _pyramid.bilinear(True)
        widths = list(encoder_channels)[2:]
        self.fpa = _Attention(widths[-1], decoder_channels)
        self.levels = range(encoder_depth - 2, 0, -1)
        for level in self.levels:
            self.add_module(f"gau{level}", _GatedBlock(widths[level - 1], decoder_channels, form))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's maps, finest first -> [N, decoder_channels, H, W] at the size of the third."""
        used = features[2:]
        out = self.fpa(used[-1])
        for level in self.levels:
            out = getattr(self, f"gau{level}")(used[level - 1], out)
        return out


def _norm_block(in_channels: int, out_channels: int, kernel_size: int, use_norm: Any) -> nn.Sequential:
    """smp's Conv2dReLU."""
    if use_norm in ("batchnorm", True):
        norm: nn.Module = nn.BatchNorm2d(out_channels)
    elif use_norm in ("identity", False):
        norm = nn.Identity()
    else:
        raise ValueError(f"use_norm must be 'batchnorm' or 'identity', got {use_norm!r}")
    layer = conv(in_channels, out_channels, kernel_size, bias=isinstance(norm, nn.Identity))
    return nn.Sequential(layer, norm, nn.ReLU(inplace=True))


class _LayerNorm(nn.LayerNorm):
    """A layer norm over the channels of every pixel; its output has the strides of channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _PyramidPooling(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, use_norm: Any) -> None:
        super().__init__()
        sizes = (1, 2, 3, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), _norm_block(in_channels, out_channels, 1, use_norm))
            for size in sizes
        )
        self.out_conv = _norm_block(in_channels + len(sizes) * out_channels, out_channels, 3, "batchnorm")

    def forward(self, x: Tensor) -> Tensor:
        pooled = [layer(x) for layer in self.blocks]
        return self.out_conv(ops.resize_cat([x, *pooled], size_of(x), mode="bilinear"))


class UPerNetDecoder(nn.Module):
    """The decoder of ``smp.UPerNet`` (Xiao et al., 2018): drop-in for smp's ``UPerNetDecoder``.

    Constructor, ``state_dict`` keys and outputs are smp's. One call of :func:`fpn_fast.ops.top_down` merges all levels,
    and :func:`fpn_fast.ops.resize_cat` resizes and concatenates them without the resized copies.

    Note:
        smp also resizes the finest level, to its own size, which makes NaN of the neighbour of an infinite value.

    Args:
        encoder_channels: channels of the encoder's maps, finest first; the first two are not used.
        encoder_depth: number of the encoder's stages, at least 3.
        decoder_channels: of the output.
        use_norm: "batchnorm" or True; "identity" or False for none.

    Raises:
        ValueError: an argument is none of these.

    Source: segmentation_models_pytorch/decoders/upernet/decoder.py.

    >>> import torch
    >>> decoder = UPerNetDecoder([3, 4, 4, 6, 8], 4, 8).eval()
    >>> maps = [torch.rand(1, c, size, size) for c, size in zip((3, 4, 4, 6, 8), (64, 32, 16, 8, 4))]
    >>> tuple(decoder(maps).shape)
    (1, 8, 16, 16)
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        encoder_depth: int = 5,
        decoder_channels: int = 256,
        use_norm: Any = "batchnorm",
    ) -> None:
        super().__init__()
        _check_depth(encoder_depth)
        widths = list(encoder_channels)[2:]
        *finer, coarsest = widths
        self.feature_norms = nn.ModuleList(_LayerNorm(width, eps=1e-6) for width in widths)
        self.psp = _PyramidPooling(coarsest, decoder_channels, use_norm)
        # Like smp's, from the second coarsest level on.
        self.fpn_lateral_blocks = nn.ModuleList(
            block(conv_norm_relu=_norm_block(width, decoder_channels, 1, use_norm)) for width in reversed(finer)
        )
        self.fpn_conv_blocks = nn.ModuleList(
            _norm_block(decoder_channels, decoder_channels, 3, use_norm) for _ in finer
        )
        self.fusion_block = _norm_block(len(widths) * decoder_channels, decoder_channels, 3, use_norm)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's maps, finest first -> [N, decoder_channels, H, W] at the size of the third."""
        normed = [norm(feature) for norm, feature in zip(self.feature_norms, features[2:], strict=True)]
        # Pyramid pooling takes the place of the coarsest lateral, which has no convolution behind the merge.
        laterals, outputs = [*self.fpn_lateral_blocks[::-1], self.psp], [*self.fpn_conv_blocks[::-1], nn.Identity()]
        _, levels = merge_pyramid(normed, laterals, outputs, mode="bilinear")
        return self.fusion_block(ops.resize_cat(levels, size_of(levels[0]), mode="bilinear"))


def _check_depth(encoder_depth: int) -> None:
    if encoder_depth < 3:
        raise ValueError(f"encoder_depth must be at least 3, got {encoder_depth}")
