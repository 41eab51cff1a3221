# SPDX-License-Identifier: Apache-2.0
"""Resampling along one axis: the counterpart of csrc/common/resample.h, with its names and Note [Axis resampling]."""

import triton
import triton.language as tl

NEAREST = tl.constexpr(0)
BILINEAR = tl.constexpr(1)
BILINEAR_ALIGN_CORNERS = tl.constexpr(2)


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """Return a / b in type ACC, correctly rounded. Triton's float32 division may be off by two units."""
    if ACC == tl.float64:
        return a.to(tl.float64) / b.to(tl.float64)
    else:
        return tl.div_rn(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def nearest_source(dst, size_in, size_out):
    scale = divide(size_in, size_out, tl.float32)
    return tl.minimum((dst.to(tl.float32) * scale).to(tl.int32), size_in - 1)


@triton.jit
def bilinear_scale(size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    if MODE == BILINEAR_ALIGN_CORNERS:
        # For an axis of one pixel tl.maximum prevents a division by zero; its result is not used.
        return tl.where(size_out > 1, divide(size_in - 1, tl.maximum(size_out - 1, 1), ACC), 0.0).to(ACC)
    else:
        return divide(size_in, size_out, ACC)


@triton.jit
def bilinear_source(dst, size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    """Return (lo, hi, weight_hi) of each destination."""
    scale = bilinear_scale(size_in, size_out, MODE, ACC)
    if MODE == BILINEAR_ALIGN_CORNERS:
        coordinate = dst.to(ACC) * scale
    else:
        coordinate = (dst.to(ACC) + 0.5) * scale - 0.5
    coordinate = tl.maximum(coordinate, 0.0)
    lo = tl.minimum(coordinate.to(tl.int32), size_in - 1)
    hi = tl.minimum(lo + 1, size_in - 1)
    weight_hi = tl.minimum(coordinate - lo.to(ACC), 1.0)
    return lo, hi, weight_hi


@triton.jit
def source_floor(dst, size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    if MODE == NEAREST:
        return nearest_source(dst, size_in, size_out)
    else:
        lo, _, _ = bilinear_source(dst, size_in, size_out, MODE, ACC)
        return lo


@triton.jit
def first_target(src, size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    """Return the first destination whose source is at least `src`, `size_out` if there is none."""
    if MODE == NEAREST:
        estimate = src.to(tl.float32) * divide(size_out, size_in, tl.float32)
    else:
        scale = bilinear_scale(size_in, size_out, MODE, ACC)
        inverse = tl.where(scale > 0, 1.0 / tl.maximum(scale, 1e-30), 0.0)
        if MODE == BILINEAR_ALIGN_CORNERS:
            estimate = src.to(ACC) * inverse
        else:
            estimate = (src.to(ACC) + 0.5) * inverse - 0.5
    # The estimate is off by at most one: start two below, and step up while the source is too low.
    dst = tl.maximum(tl.minimum(estimate, size_out.to(estimate.dtype)).to(tl.int32) - 2, 0)
    for _ in tl.static_range(5):
        low = source_floor(dst, size_in, size_out, MODE, ACC) < src
        dst = tl.where((dst < size_out) & low, dst + 1, dst)
    return tl.where(src <= 0, 0, tl.where(src >= size_in, size_out, dst))


@triton.jit
def target_range(src, size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    """Return the range [begin, end) of destinations that read source `src`."""
    first = src if MODE == NEAREST else src - 1
    begin = first_target(first, size_in, size_out, MODE, ACC)
    end = first_target(src + 1, size_in, size_out, MODE, ACC)
    return begin, end


@triton.jit
def target_weight(dst, src, size_in, size_out, MODE: tl.constexpr, ACC: tl.constexpr):
    lo, hi, weight_hi = bilinear_source(dst, size_in, size_out, MODE, ACC)
    return tl.where(lo == src, 1 - weight_hi, 0.0) + tl.where(hi == src, weight_hi, 0.0)


# csrc/common/fuse_maps.h: enum class Form. Resampling's mode is the form of nearest and bilinear sources less one.
IDENTITY = tl.constexpr(0)
NEAREST_FORM = tl.constexpr(1)
MAX_POOL = tl.constexpr(4)
MAX_POOL_SAME_ZERO = tl.constexpr(6)
MAX_POOL_2X2 = tl.constexpr(7)
ADAPTIVE_MAX = tl.constexpr(8)


@triton.jit
def window(dst, size_in, size_out, FORM: tl.constexpr):
    """Return the window [begin, end) of each destination, which may reach beyond the map: Note [Windows]."""
    if FORM == ADAPTIVE_MAX:
        dst = dst.to(tl.int64)
        begin = (dst * size_in // size_out).to(tl.int32)
        return begin, (((dst + 1) * size_in + size_out - 1) // size_out).to(tl.int32)
    elif FORM == MAX_POOL_2X2:
        return 2 * dst, 2 * dst + 2
    elif FORM == MAX_POOL:
        return 2 * dst - 1, 2 * dst + 2
    else:
        begin = 2 * dst - size_in % 2
        return begin, begin + 3


@triton.jit
def window_targets(src, size_in, size_out, FORM: tl.constexpr):
    """Return the range [begin, end) of destinations whose windows hold `src`."""
    if FORM == ADAPTIVE_MAX:
        src = src.to(tl.int64)
        begin = (src * size_out // size_in).to(tl.int32)
        return begin, (((src + 1) * size_out - 1) // size_in).to(tl.int32) + 1
    elif FORM == MAX_POOL_2X2:
        return src // 2, tl.minimum(src // 2 + 1, size_out)
    else:
        if FORM == MAX_POOL:
            padded = src + 1
        else:
            padded = src + size_in % 2
        begin = tl.where(padded < 3, 0, (padded - 3) // 2 + 1)
        return begin, tl.minimum(padded // 2 + 1, size_out)
