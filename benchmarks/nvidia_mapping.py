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
from fpn_fast.bench.op import Function, on_device
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
def _read_or_add(pixel, mask, weight, value, BACKWARD: tl.constexpr):
    """Forward: `value` plus the weighted pixel. Backward: adds weighted `value` to the pixel."""
    if BACKWARD:
        tl.atomic_add(pixel, weight * value, mask=mask)
    else:
        value += weight * tl.load(pixel, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def nvidia_mapping_kernel(
    map0, map1, map2, map3, sizes, scales, rois, levels, pooled, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RATIO: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program is a bin of pooled [count, PH, PW, C].

    Forward writes it. Backward reads its gradient, and adds to the maps' float32 gradients, [N, H, W, C] each.
    """
    program = tl.program_id(0)
    k, ph, pw = program // (PH * PW), program // PW % PH, program % PW
    level = tl.load(levels + k).to(tl.int32)
    scale = tl.load(scales + level)
    roi = rois + k.to(tl.int64) * 5
    left, top = tl.load(roi + 1) * scale, tl.load(roi + 2) * scale
    bin_h = tl.maximum(tl.load(roi + 4) * scale - top, 1.0) / PH
    bin_w = tl.maximum(tl.load(roi + 3) * scale - left, 1.0) / PW
    if RATIO > 0:
        count_h, count_w = RATIO, RATIO
    else:
        count_h, count_w = tl.ceil(bin_h).to(tl.int32), tl.ceil(bin_w).to(tl.int32)
    samples = tl.maximum(count_h * count_w, 1)

    chosen = tl.where(level == 0, map0, tl.where(level == 1, map1, tl.where(level == 2, map2, map3)))
    height, width = tl.load(sizes + 2 * level), tl.load(sizes + 2 * level + 1)
    channels = tl.arange(0, BLOCK_C)
    mask = channels < C
    chosen += tl.load(roi).to(tl.int64) * height * width * C + channels
    pooled += program.to(tl.int64) * C + channels
    if BACKWARD:
        value = tl.load(pooled, mask=mask, other=0.0).to(tl.float32) / samples
    else:
        value = tl.zeros([BLOCK_C], tl.float32)
    for i in range(count_h):
        y0, y1, wy0, wy1 = _tap(top + ph * bin_h + (i + 0.5) * bin_h / count_h, height)
        for j in range(count_w):
            x0, x1, wx0, wx1 = _tap(left + pw * bin_w + (j + 0.5) * bin_w / count_w, width)
            value = _read_or_add(chosen + (y0 * width + x0) * C, mask, wy0 * wx0, value, BACKWARD)
            value = _read_or_add(chosen + (y0 * width + x1) * C, mask, wy0 * wx1, value, BACKWARD)
            value = _read_or_add(chosen + (y1 * width + x0) * C, mask, wy1 * wx0, value, BACKWARD)
            value = _read_or_add(chosen + (y1 * width + x1) * C, mask, wy1 * wx1, value, BACKWARD)
    if not BACKWARD:
        tl.store(pooled, (value / samples).to(pooled.dtype.element_ty), mask=mask)


def _levels(rois: Tensor) -> Tensor:
    """The level of each RoI, canonical level 4 of levels 2 to 5, by PyTorch as in theirs."""
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    return (4 + torch.log2(area.sqrt() / 224 + 1e-6)).floor().clamp(2, 5).int() - 2


class _Pool(torch.autograd.Function):
    @staticmethod
    def launch(maps: Sequence[Tensor], pooled: Tensor, tables: Sequence[Tensor], ratio: int, backward: bool) -> None:
        channels, *size = pooled.shape[1:]
        block = triton.next_power_of_2(channels)
        nvidia_mapping_kernel[(pooled.numel() // channels,)](
            *maps, *tables, pooled, C=channels, PH=size[0], PW=size[1], RATIO=ratio, BLOCK_C=block, BACKWARD=backward,
            num_warps=max(1, min(32, block // (CHANNELS_OF_A_THREAD * WARP))),
        )  # fmt: skip

    @staticmethod
    def forward(ctx: Any, tables: Sequence[Tensor], output_size: int, ratio: int, *maps: Tensor) -> Tensor:
        shape = len(tables[-1]), maps[0].shape[1], output_size, output_size
        pooled = torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=torch.channels_last)
        _Pool.launch(maps, pooled, tables, ratio, backward=False)
        ctx.tables, ctx.ratio, ctx.maps = tables, ratio, [(each.shape, each.dtype) for each in maps]
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        sums = [
            torch.empty(shape, device=grad.device, memory_format=torch.channels_last).zero_() for shape, _ in ctx.maps
        ]
        _Pool.launch(sums, grad, ctx.tables, ctx.ratio, backward=True)
        return None, None, None, *(each.to(dtype) for each, (_, dtype) in zip(sums, ctx.maps, strict=True))


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
    pooled: Tensor = _Pool.apply((sizes, scales, rois, _levels(rois)), output_size, sampling_ratio, *maps)
    return pooled


def rivals(case: Case) -> dict[str, Function]:
    """``nvidia`` for a pooler's case in channels_last."""
    if case.memory_format != "channels_last":
        return {}
    rois = on_device(random_rois(case.batch, case.rois, *image_size(case), case.clustered))
    tables = on_device((torch.tensor(scales(case)), torch.tensor(case.levels, dtype=torch.int32)))

    def function(maps: Sequence[Tensor]) -> Tensor:
        device = maps[0].device
        return pool(maps, rois(device), *tables(device), case.output_size, case.sampling_ratio)

    return {"nvidia": function}
