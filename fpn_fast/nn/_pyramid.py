# SPDX-License-Identifier: Apache-2.0
"""What the members of the pyramid family share: named blocks, levels, extra levels, and the fused steps between them.

Every original has its own names for the same block of a convolution, a norm and an activation. Here a block is a
Sequential of named layers, so that a member says its keys where it says its layers, and its forward is its graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast import ops

Norm = Callable[[int], nn.Module]

#: Activations by the names of timm and mmcv.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU,
    "hard_swish": nn.Hardswish, "mish": nn.Mish, "gelu": nn.GELU,
}  # fmt: skip
#: Those that :func:`fpn_fast.ops.fuse_maps` applies to the sum.
_FUSED_ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.ReLU6: "relu6"}


def block(**layers: nn.Module | None) -> nn.Sequential:
    """Layers that run one after another; the names are their checkpoint keys. None leaves one out."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution whose output has ceil(size / stride) pixels, for an odd kernel."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, **options)


def size_of(x: Tensor) -> tuple[int, int]:
    """(height, width) of a map [N, C, H, W]."""
    return x.shape[2], x.shape[3]


def check_count(maps: Sequence[Tensor], count: int, what: str) -> None:
    """Raises ValueError unless there are `count` maps."""
    if len(maps) != count:
        raise ValueError(f"{what} must be {count} maps, finest first, got {len(maps)}")


def add(maps: Sequence[Tensor], size: tuple[int, int], resample: Sequence[str], **options: Any) -> Tensor:
    """One node of a graph: the sum of `maps`, each resampled to `size` by its form of :func:`ops.fuse_maps`."""
    return ops.fuse_maps(list(maps), size, resample=list(resample), **options)


def fused_activation(layer: nn.Module | None) -> str | None:
    """The name under which the op applies `layer` to its sum; None where it does not."""
    return None if layer is None else _FUSED_ACTIVATIONS.get(type(layer))


def bilinear(corners: bool) -> str:
    """The form of bilinear resampling with F.interpolate's align_corners."""
    return "bilinear_align_corners" if corners else "bilinear"


def crop_to(x: Tensor, like: Tensor) -> Tensor:
    """The top left corner of `x` with the size of `like`."""
    height, width = size_of(like)
    return x if size_of(x) == (height, width) else x[:, :, :height, :width]


def add_blocks(lateral: Tensor, blocks: Tensor) -> Tensor:
    """``lateral + crop(pixel_shuffle(blocks, 2))``, [N, C, H, W] and [N, 4C, h, w]: one pass for H = 2h and W = 2w."""
    n, channels, height, width = lateral.shape
    h, w = size_of(blocks)
    if (height, width) != (2 * h, 2 * w):
        return lateral + crop_to(F.pixel_shuffle(blocks, 2), lateral)
    # Where pixel_shuffle writes a block, the addition reads it.
    scattered = blocks.reshape(n, channels, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return (lateral.reshape(n, channels, h, 2, w, 2) + scattered).reshape(lateral.shape)


def blocks_of(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor | None:
    """The deconvolution of a CPU's map as 2x2 blocks [N, 4C, h, w]; None where `layer` is not of kernel and stride 2.

    Such a one never overlaps, so it is a 1x1 convolution. On one thread of a CPU ``lateral + layer(x)`` took 1.9 to 2.8
    times as long as :func:`add_blocks` of this, at 256 and 64 channels. ``layer(x)`` took 1.1 to 1.7 times as long as
    its pixel_shuffle at 768 and 384 channels, and 0.9 times at 64 channels of 16x16 pixels. No GPU was measured.
    """
    if x.device.type != "cpu" or layer.kernel_size != (2, 2) or layer.stride != (2, 2):
        return None
    weight = layer.weight.permute(1, 2, 3, 0).reshape(4 * layer.out_channels, layer.in_channels, 1, 1)
    return F.conv2d(x, weight, None if layer.bias is None else layer.bias.repeat_interleave(4))


class Deconvolution(nn.ConvTranspose2d):
    """A deconvolution of kernel 2 and stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, 2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, in_channels, h, w] -> [N, out_channels, 2h, 2w]"""
        blocks = blocks_of(input, self)
        return super().forward(input) if blocks is None else F.pixel_shuffle(blocks, 2)


def climb(x: Tensor, convs: Iterable[Callable[[Tensor], Tensor]], corners: bool = False) -> Tensor:
    """A ladder of a semantic branch without its last step: convolutions and, between them, bilinear upsampling by 2."""
    for i, layer in enumerate(convs):
        if i:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=corners)
        x = layer(x)
    return x


def sum_of_ladders(tops: Sequence[Tensor], size: tuple[int, int], rounding: str, corners: bool = False) -> Tensor:
    """The last step of all ladders: each map has `size` already or is upsampled to it, and all are summed."""
    forms = ["identity" if size_of(top) == size else bilinear(corners) for top in tops]
    return add(tops, size, forms, rounding=rounding)


class ChannelNorm(nn.Module):
    """A layer norm over the channels of every pixel, computed in the map's dtype: detectron2's LayerNorm."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same"""
        centred = x - x.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]
