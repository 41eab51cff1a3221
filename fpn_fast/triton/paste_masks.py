# SPDX-License-Identifier: Apache-2.0
"""Mask pasting in Triton, one launch for all masks. A program owns a block of pixels of one image. Most blocks lie
outside the box and are only filled with zeros."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.triton import register
from fpn_fast.triton._arguments import decode_float, encode_float
from fpn_fast.triton._resample import BILINEAR, bilinear_source
from fpn_fast.triton._roi_align import EXACT

# Pixels of a program: 8 per thread of 4 warps.
BLOCK = 1024
NUM_WARPS = 4

FARTHEST_CORNER = tl.constexpr(2.0**29)


@triton.jit
def grow_axis(lo, hi, scale):
    """Return the box's (first, last) pixel along one axis; (0, -1), no pixel, if a corner is NaN or too far away."""
    half = (hi - lo) * 0.5 * scale
    centre = (hi + lo) * 0.5
    begin, end = centre - half, centre + half
    # A comparison with NaN is false.
    found = (tl.abs(begin) <= FARTHEST_CORNER) & (tl.abs(end) <= FARTHEST_CORNER)
    return tl.where(found, begin, 0.0).to(tl.int32), tl.where(found, end, -1.0).to(tl.int32)


@triton.jit
def axis_taps(pixel, first, last, inside, size, ACC: tl.constexpr):
    """Return (lo, hi, weight_lo, weight_hi) of pixels of the image; those of the box's first pixel if not `inside`."""
    resized = tl.maximum(last - first + 1, 1)
    lo, hi, weight = bilinear_source(tl.where(inside, pixel - first, 0), size, resized, BILINEAR, ACC)
    return lo, hi, 1 - weight, weight


@triton.jit
def read(mask, row, column, padding, size, wanted, ACC: tl.constexpr):
    row, column = row - padding, column - padding
    wanted = wanted & (row >= 0) & (row < size) & (column >= 0) & (column < size)
    return tl.load(mask + row * size + column, mask=wanted, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["size", "padding", "H", "W", "blocks"])
def paste_masks_kernel(
    masks, boxes, box_scale, threshold, out, size, padding, H, W, blocks,
    ABOVE: tl.constexpr, BOX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out [K, H, W]: values, or with ABOVE 1 where they are above the threshold."""
    k = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    y, x = (index // W).to(tl.int32), (index % W).to(tl.int32)
    corners, scale = boxes + k * 4, decode_float(box_scale, BOX)
    left, right = grow_axis(tl.load(corners), tl.load(corners + 2), scale)
    top, bottom = grow_axis(tl.load(corners + 1), tl.load(corners + 3), scale)
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom) & (index < H.to(tl.int64) * W)
    value = tl.zeros([BLOCK], dtype=ACC)
    if (begin // W <= bottom) & ((begin + BLOCK - 1) // W >= top):
        padded = size + 2 * padding
        x_lo, x_hi, x_weight_lo, x_weight_hi = axis_taps(x, left, right, inside, padded, ACC)
        y_lo, y_hi, y_weight_lo, y_weight_hi = axis_taps(y, top, bottom, inside, padded, ACC)
        mask = masks + k * size * size
        upper = x_weight_lo * read(mask, y_lo, x_lo, padding, size, inside, ACC)
        upper += x_weight_hi * read(mask, y_lo, x_hi, padding, size, inside, ACC)
        lower = x_weight_lo * read(mask, y_hi, x_lo, padding, size, inside, ACC)
        lower += x_weight_hi * read(mask, y_hi, x_hi, padding, size, inside, ACC)
        value = y_weight_lo * upper + y_weight_hi * lower
    if ABOVE:
        result = tl.where(inside & (value > decode_float(threshold, ACC)), 1, 0).to(tl.uint8)
    else:
        result = tl.where(inside, value, 0.0).to(out.dtype.element_ty)
    tl.store(out + k * H * W + index, result, mask=index < H.to(tl.int64) * W)


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None = None
) -> Tensor:
    count, size = masks.size(0), masks.size(3)
    dtype = masks.dtype if threshold is None else torch.bool
    out = masks.new_empty((count, 1, height, width), dtype=dtype)
    if out.numel() == 0:
        return out
    blocks = triton.cdiv(height * width, BLOCK)
    accumulate = torch.float64 if masks.dtype == torch.float64 else torch.float32
    types = {torch.float64: tl.float64, torch.float32: tl.float32}
    with torch.cuda.device_of(masks):
        paste_masks_kernel[count * blocks,](
            masks, boxes, encode_float((size + 2 * padding) / size, boxes.dtype),
            encode_float(threshold or 0.0, accumulate), out if threshold is None else out.view(torch.uint8),
            size, padding, height, width, blocks,
            ABOVE=threshold is not None, BOX=types[boxes.dtype], ACC=types[accumulate], BLOCK=BLOCK,
            num_warps=NUM_WARPS, **EXACT,
        )  # fmt: skip
    return out


register("paste_masks", paste_masks)
