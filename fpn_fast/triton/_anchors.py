# SPDX-License-Identifier: Apache-2.0
"""Anchors, and boxes decoded from them: the counterpart of csrc/common/anchors.h and exponential.h, with their names.

Selection depends on these values, so kernels that use them are compiled without contraction to fused multiply-adds
(:data:`fpn_fast.triton._roi_align.EXACT`).
"""

import triton
import triton.language as tl

from fpn_fast.triton._arguments import decode_float
from fpn_fast.triton._resample import divide


@triton.jit
def power_of_two(exponent):
    return ((1023 + exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponential(x, ACC: tl.constexpr):
    """Return exp(x), the same value on every machine; 0 for NaN."""
    x = x.to(tl.float64)
    x = tl.where(x > -746.0, tl.where(x < 710.0, x, 710.0), -746.0)
    n = (x * 1.4426950408889634 + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int32)
    powers = n.to(tl.float64)
    r = x - powers * 6.93147180369123816490e-01 - powers * 1.90821492927058770002e-10
    total = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    total = total * r + 1.0 / 39916800.0
    total = total * r + 1.0 / 3628800.0
    total = total * r + 1.0 / 362880.0
    total = total * r + 1.0 / 40320.0
    total = total * r + 1.0 / 5040.0
    total = total * r + 1.0 / 720.0
    total = total * r + 1.0 / 120.0
    total = total * r + 1.0 / 24.0
    total = total * r + 1.0 / 6.0
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    half = n // 2
    return (total * power_of_two(half) * power_of_two(n - half)).to(ACC)


@triton.jit
def logistic(x, ACC: tl.constexpr):
    """Return 1 / (1 + exp(-x)) with every step rounded."""
    return divide(tl.full((), 1, ACC), 1 + exponential(-x, ACC), ACC)


@triton.jit
def is_finite(x1, y1, x2, y2):
    return (x1 - x1 == 0) & (y1 - y1 == 0) & (x2 - x2 == 0) & (y2 - y2 == 0)


@triton.jit
def box_at(boxes, index, mask):
    row = boxes + index.to(tl.int64) * 4
    return (
        tl.load(row, mask=mask, other=0.0),
        tl.load(row + 1, mask=mask, other=0.0),
        tl.load(row + 2, mask=mask, other=0.0),
        tl.load(row + 3, mask=mask, other=0.0),
    )


@triton.jit
def anchor_at(cell, cells, y, x, stride_y, stride_x, offset, ACC: tl.constexpr):
    """Compute anchors (x1, y1, x2, y2) from `cells`, a tuple of (x1, y1, x2, y2), at index `cell`."""
    x1 = tl.zeros(cell.shape, dtype=ACC)
    y1, x2, y2 = x1, x1, x1
    for i in tl.static_range(len(cells)):
        here = cell == i
        x1 = tl.where(here, decode_float(cells[i][0], ACC), x1)
        y1 = tl.where(here, decode_float(cells[i][1], ACC), y1)
        x2 = tl.where(here, decode_float(cells[i][2], ACC), x2)
        y2 = tl.where(here, decode_float(cells[i][3], ACC), y2)
    shift_y = (y.to(ACC) + offset) * stride_y.to(ACC)
    shift_x = (x.to(ACC) + offset) * stride_x.to(ACC)
    return shift_x + x1, shift_y + y1, shift_x + x2, shift_y + y2


@triton.jit
def decode_side(
    lo, hi, move, scale, scale_clamp, center_clamp, SYMMETRIC: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr
):
    size = hi - lo
    if MEAN:
        center = (lo + hi) * 0.5
    else:
        center = lo + 0.5 * size
    # tl.where, not tl.minimum and tl.maximum, which may drop a NaN.
    if SYMMETRIC:
        scale = tl.where(scale < -scale_clamp, -scale_clamp, scale)
    scale = tl.where(scale > scale_clamp, scale_clamp, scale)
    shift = move * size
    shift = tl.where(shift < -center_clamp, -center_clamp, shift)
    shift = tl.where(shift > center_clamp, center_clamp, shift)
    moved = shift + center
    reach = 0.5 * (tl.where(scale == scale, exponential(scale, ACC), scale) * size)
    return moved - reach, moved + reach


@triton.jit
def code_of(delta, weight, mean, std, ACC: tl.constexpr):
    weight = tl.full(delta.shape, decode_float(weight, ACC), ACC)
    return divide(delta, weight, ACC) * decode_float(std, ACC) + decode_float(mean, ACC)


@triton.jit
def decode(
    x1, y1, x2, y2, dx, dy, dw, dh, coding, SYMMETRIC: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Decode anchors and deltas to (x1, y1, x2, y2). coding: see `coding_of` in _head_decoding.py."""
    dx = code_of(dx, coding[0], coding[4], coding[8], ACC)
    dy = code_of(dy, coding[1], coding[5], coding[9], ACC)
    dw = code_of(dw, coding[2], coding[6], coding[10], ACC)
    dh = code_of(dh, coding[3], coding[7], coding[11], ACC)
    scale_clamp, center_clamp = decode_float(coding[12], ACC), decode_float(coding[13], ACC)
    left, right = decode_side(x1, x2, dx, dw, scale_clamp, center_clamp, SYMMETRIC, MEAN, ACC)
    top, bottom = decode_side(y1, y2, dy, dh, scale_clamp, center_clamp, SYMMETRIC, MEAN, ACC)
    return left, top, right, bottom


@triton.jit
def decode_distances(x1, y1, x2, y2, left, top, right, bottom):
    """Decode anchors and distances from their centres, in anchor sides, to (x1, y1, x2, y2)."""
    x, y = 0.5 * (x1 + x2), 0.5 * (y1 + y2)
    width, height = x2 - x1, y2 - y1
    return x - left * width, y - top * height, x + right * width, y + bottom * height


@triton.jit
def clamp(value, largest):
    value = tl.where(value > 0, value, 0.0)
    return tl.where(value < largest, value, largest)


@triton.jit
def clip(x1, y1, x2, y2, height, width):
    return clamp(x1, width), clamp(y1, height), clamp(x2, width), clamp(y2, height)


@triton.jit
def is_large_enough(x1, y1, x2, y2, min_size, STRICT: tl.constexpr):
    if STRICT:
        return (x2 - x1 > min_size) & (y2 - y1 > min_size)
    else:
        return (x2 - x1 >= min_size) & (y2 - y1 >= min_size)
