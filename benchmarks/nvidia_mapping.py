# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign as NVIDIA's MLPerf submission of Mask R-CNN maps it to a GPU, as a baseline for ours.

The mapping is that of its four-level channels_last kernels. PyTorch computes the RoIs' levels, and one launch serves
all levels: a block per bin of a RoI, a thread per four channels. Every thread computes the samples of its bin and reads
four pixels for each, again where samples share them. Backward scatters by atomic additions into zeroed float32
gradients, which are cast at the end. Written anew in Triton from that description; where theirs reads a thread's four
channels one by one, one load here reads all four.

For four maps on a GPU in channels_last. Needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.bench.cases import Case, image_size, scales
from fpn_fast.bench.op import Function, OnDevice
from fpn_fast.bench.rois import random_rois

CHANNELS_OF_A_THREAD = 4
WARP = 32


@triton.jit
def _tap(position, size):
    """(first pixel, second pixel, weight of the first, weight of the second) of a sample on one axis."""
    on_map = (position >= -1.0) & (position <= size)
    position = tl.maximum(position, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    high = tl.minimum(low + 1, size - 1)
    weight = tl.where(low < size - 1, position - low, 0.0)
    return low, high, tl.where(on_map, 1.0 - weight, 0.0), tl.where(on_map, weight, 0.0)


@triton.jit
def _bin_of_program(rois, levels, scales, PH: tl.constexpr, PW: tl.constexpr, RATIO: tl.constexpr):
    """(level, image, first row, rows of a bin, first column, columns of a bin, samples on either axis)."""
    program = tl.program_id(0)
    k, ph, pw = program // (PH * PW), program // PW % PH, program % PW
    level = tl.load(levels + k).to(tl.int32)
    scale = tl.load(scales + level)
    row = rois + k.to(tl.int64) * 5
    left, top = tl.load(row + 1) * scale, tl.load(row + 2) * scale
    bin_h = tl.maximum(tl.load(row + 4) * scale - top, 1.0) / PH
    bin_w = tl.maximum(tl.load(row + 3) * scale - left, 1.0) / PW
    if RATIO > 0:
        count_h, count_w = RATIO, RATIO
    else:
        count_h, count_w = tl.ceil(bin_h).to(tl.int32), tl.ceil(bin_w).to(tl.int32)
    image = tl.load(row).to(tl.int64)
    return level, image, top + ph * bin_h, bin_h, left + pw * bin_w, bin_w, count_h, count_w


@triton.jit
def _map_of_level(level, map0, map1, map2, map3, sizes):
    """(map, height, width)."""
    chosen = tl.where(level == 0, map0, tl.where(level == 1, map1, tl.where(level == 2, map2, map3)))
    return chosen, tl.load(sizes + 2 * level), tl.load(sizes + 2 * level + 1)


@triton.jit
def nvidia_mapping_kernel(
    map0, map1, map2, map3, sizes, scales, rois, levels, out, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [count, PH, PW, C]: a program is a bin."""
    level, image, top, bin_h, left, bin_w, count_h, count_w = _bin_of_program(rois, levels, scales, PH, PW, RATIO)
    source, height, width = _map_of_level(level, map0, map1, map2, map3, sizes)
    channels = tl.arange(0, BLOCK_C)
    source += image * height * width * C + channels
    mask = channels < C
    total = tl.zeros([BLOCK_C], tl.float32)
    for i in range(count_h):
        y_low, y_high, y_weight_low, y_weight_high = _tap(top + (i + 0.5) * bin_h / count_h, height)
        for j in range(count_w):
            x_low, x_high, x_weight_low, x_weight_high = _tap(left + (j + 0.5) * bin_w / count_w, width)
            a = tl.load(source + (y_low * width + x_low) * C, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + (y_low * width + x_high) * C, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(source + (y_high * width + x_low) * C, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(source + (y_high * width + x_high) * C, mask=mask, other=0.0).to(tl.float32)
            total += y_weight_low * (x_weight_low * a + x_weight_high * b)
            total += y_weight_high * (x_weight_low * c + x_weight_high * d)
    total /= tl.maximum(count_h * count_w, 1)
    tl.store(out + tl.program_id(0).to(tl.int64) * C + channels, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def nvidia_mapping_backward_kernel(
    map0, map1, map2, map3, sizes, scales, rois, levels, grad, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of grad [count, PH, PW, C] to the maps' float32 gradients, [N, H, W, C] each."""
    level, image, top, bin_h, left, bin_w, count_h, count_w = _bin_of_program(rois, levels, scales, PH, PW, RATIO)
    target, height, width = _map_of_level(level, map0, map1, map2, map3, sizes)
    channels = tl.arange(0, BLOCK_C)
    target += image * height * width * C + channels
    mask = channels < C
    share = tl.load(grad + tl.program_id(0).to(tl.int64) * C + channels, mask=mask, other=0.0).to(tl.float32)
    share /= tl.maximum(count_h * count_w, 1)
    for i in range(count_h):
        y_low, y_high, y_weight_low, y_weight_high = _tap(top + (i + 0.5) * bin_h / count_h, height)
        for j in range(count_w):
            x_low, x_high, x_weight_low, x_weight_high = _tap(left + (j + 0.5) * bin_w / count_w, width)
            tl.atomic_add(target + (y_low * width + x_low) * C, y_weight_low * x_weight_low * share, mask=mask)
            tl.atomic_add(target + (y_low * width + x_high) * C, y_weight_low * x_weight_high * share, mask=mask)
            tl.atomic_add(target + (y_high * width + x_low) * C, y_weight_high * x_weight_low * share, mask=mask)
            tl.atomic_add(target + (y_high * width + x_high) * C, y_weight_high * x_weight_high * share, mask=mask)


def _levels(rois: Tensor) -> Tensor:
    """The level of each RoI, canonical level 4 of levels 2 to 5, by PyTorch as in theirs."""
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    return (4 + torch.log2(area.sqrt() / 224 + 1e-6)).floor().clamp(2, 5).int() - 2


def _launch(kernel: Any, maps: Sequence[Tensor], scales: Tensor, rois: Tensor, levels: Tensor, pooled: Tensor,
            output_size: int, sampling_ratio: int, sizes: Tensor) -> None:  # fmt: skip
    channels = maps[0].shape[1]
    block = triton.next_power_of_2(channels)
    warps = max(1, min(32, block // (CHANNELS_OF_A_THREAD * WARP)))
    kernel[(len(rois) * output_size**2,)](
        *maps, sizes, scales, rois, levels, pooled, C=channels, PH=output_size, PW=output_size, RATIO=sampling_ratio,
        BLOCK_C=block, num_warps=warps,
    )  # fmt: skip


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rois: Tensor, scales: Tensor, sizes: Tensor, output_size: int, sampling_ratio: int,
                *maps: Tensor) -> Tensor:  # fmt: skip
        levels = _levels(rois)
        shape = len(rois), maps[0].shape[1], output_size, output_size
        pooled = torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=torch.channels_last)
        _launch(nvidia_mapping_kernel, maps, scales, rois, levels, pooled, output_size, sampling_ratio, sizes)
        ctx.save_for_backward(rois, scales, sizes, levels)
        ctx.options = output_size, sampling_ratio
        ctx.maps = [(each.shape, each.dtype) for each in maps]
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rois, scales, sizes, levels = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        sums = [
            torch.empty(shape, device=grad.device, memory_format=torch.channels_last).zero_() for shape, _ in ctx.maps
        ]
        output_size, sampling_ratio = ctx.options
        _launch(nvidia_mapping_backward_kernel, sums, scales, rois, levels, grad, output_size, sampling_ratio, sizes)
        found = [each.to(dtype) for each, (_, dtype) in zip(sums, ctx.maps, strict=True)]
        return None, None, None, None, None, *found


def pool(
    maps: Sequence[Tensor], rois: Tensor, scales: Tensor, sizes: Tensor, output_size: int, sampling_ratio: int
) -> Tensor:
    """Pools RoIs as ``ops.multiscale_roi_align`` does with torchvision's levels.

    Args:
        maps: four, ``[N, C, H_l, W_l]`` in channels_last.
        rois: float32 ``[K, 5]``, inside the image and not empty.
        scales: float32 ``[4]``.
        sizes: int32 ``[4, 2]`` of (H_l, W_l).
        sampling_ratio: samples per bin and axis; 0 for as many as the bin has pixels.

    Returns:
        ``[K, C, output_size, output_size]`` in channels_last, differentiable once with respect to the maps.
    """
    pooled: Tensor = _Pool.apply(rois, scales, sizes, output_size, sampling_ratio, *maps)
    return pooled


def rivals(case: Case) -> dict[str, Function]:
    """``nvidia`` for a pooler's case in channels_last."""
    if case.memory_format != "channels_last":
        return {}
    rois = OnDevice(random_rois(case.batch, case.rois, *image_size(case), case.clustered))
    tables = OnDevice((torch.tensor(scales(case)), torch.tensor(case.levels, dtype=torch.int32)))

    def function(maps: Sequence[Tensor]) -> Tensor:
        device = maps[0].device
        return pool(maps, rois(device), *tables(device), case.output_size, case.sampling_ratio)

    return {"nvidia": function}
