# SPDX-License-Identifier: Apache-2.0
"""Levels of RoIs and RoIAlign along one axis: the counterpart of csrc/common/levels.h and roi_align.h.

These functions choose the map, the number of samples and whether a sample is on the map. So a kernel that calls them is
compiled without contraction to fused multiply-adds (:data:`EXACT`); its sums call ``tl.fma``.

SAMPLES is the number of samples along each axis of a bin if it is a compile-time constant, and 0 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.triton._arguments import decode_float, decode_int, encode_float, encode_int
from fpn_fast.triton._resample import divide

#: Launch options of kernels that use this file. The interpreter, which contracts nothing, ignores them.
EXACT = {"enable_fp_fusion": False}

MAX_ADAPTIVE_SAMPLES = tl.constexpr(1 << 20)
SAMPLE_MARGIN = tl.constexpr(8)


@triton.jit
def roi_at(rois, k):
    """Load (image, x1, y1, x2, y2) of RoIs k, a scalar or a vector."""
    row = rois + k.to(tl.int64) * 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def map_of(features, geometry, scales, level, LEVELS: tl.constexpr, ACC: tl.constexpr):
    """Return (feature, scale, height, width, stride_n, stride_c, stride_h, stride_w) of map `level`; map 0 for -1."""
    feature, scale = features[0], decode_float(scales[0], ACC)
    height, width = decode_int(geometry[0][0]), decode_int(geometry[0][1])
    stride_n, stride_c = decode_int(geometry[0][2]).to(tl.int64), decode_int(geometry[0][3]).to(tl.int64)
    stride_h, stride_w = decode_int(geometry[0][4]).to(tl.int64), decode_int(geometry[0][5]).to(tl.int64)
    for i in tl.static_range(1, LEVELS):
        here = level == i
        feature, scale = tl.where(here, features[i], feature), tl.where(here, decode_float(scales[i], ACC), scale)
        height = tl.where(here, decode_int(geometry[i][0]), height)
        width = tl.where(here, decode_int(geometry[i][1]), width)
        stride_n = tl.where(here, decode_int(geometry[i][2]).to(tl.int64), stride_n)
        stride_c = tl.where(here, decode_int(geometry[i][3]).to(tl.int64), stride_c)
        stride_h = tl.where(here, decode_int(geometry[i][4]).to(tl.int64), stride_h)
        stride_w = tl.where(here, decode_int(geometry[i][5]).to(tl.int64), stride_w)
    return feature, scale, height, width, stride_n, stride_c, stride_h, stride_w


@triton.jit
def locate_roi(image, x1, y1, x2, y2, given, thresholds, batch, LEVELS: tl.constexpr, HAS_LEVELS: tl.constexpr):
    """Return (level, image) of each RoI; level -1 for none."""
    known = (image > -1) & (image < batch.to(image.dtype))
    known = known & (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    if HAS_LEVELS:
        level = tl.where((given >= 0) & (given < LEVELS), given, -1).to(tl.int32)
    elif LEVELS == 1:
        level = tl.zeros_like(image).to(tl.int32)
    else:
        area = (x2.to(tl.float32) - x1.to(tl.float32)) * (y2.to(tl.float32) - y1.to(tl.float32))
        level = tl.zeros_like(image).to(tl.int32)
        for i in tl.static_range(len(thresholds)):
            level += (area >= thresholds[i]).to(tl.int32)
        level = tl.where((area >= 0) & (level < LEVELS), level, -1)
    return tl.where(known, level, -1), tl.where(known, image, 0).to(tl.int32)


@triton.jit
def roi_extent(lo, hi, scale, ALIGNED: tl.constexpr):
    """Return (start, extent) of the RoI in map pixels."""
    if ALIGNED:
        start = lo * scale - 0.5
        return start, hi * scale - 0.5 - start
    else:
        start = lo * scale
        extent = hi * scale - start
        return start, tl.where(extent > 1, extent, 1.0)


@triton.jit
def adaptive_samples(bin_size, ACC: tl.constexpr):
    """Return the samples of a bin: its size, rounded up; 0 for a size that is not positive, or too large."""
    bin_size = tl.where((bin_size > 0) & (bin_size <= MAX_ADAPTIVE_SAMPLES), bin_size, 0.0)
    samples = bin_size.to(tl.int32)
    # Not tl.ceil, which flushes a subnormal size to 0.
    return samples + (samples.to(ACC) < bin_size).to(tl.int32)


@triton.jit
def make_roi_axis(
    lo, hi, scale, sampling_ratio, pooled: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr
):
    """Return (start, bin_size, samples): start of the first bin and size of a bin in map pixels, samples of a bin."""
    start, extent = roi_extent(lo, hi, scale, ALIGNED)
    bin_size = divide(extent, tl.full((), pooled, tl.int32), ACC)
    if SAMPLES > 0:
        samples = tl.full((), SAMPLES, tl.int32)
    else:
        samples = tl.where(sampling_ratio > 0, sampling_ratio, adaptive_samples(bin_size, ACC))
    return start, bin_size, samples


@triton.jit
def inverse_count(row_samples, col_samples, ACC: tl.constexpr):
    count = row_samples.to(ACC) * col_samples.to(ACC)
    return divide(tl.full((), 1, tl.int32), tl.maximum(count, 1.0), ACC)


@triton.jit
def sample_within(bin_size, samples, sample, SAMPLES: tl.constexpr, ACC: tl.constexpr):
    """Return the distance of a sample from the start of its bin."""
    within = (sample.to(ACC) + 0.5) * bin_size
    if SAMPLES == 1 or SAMPLES == 2 or SAMPLES == 4:
        # Equal to the quotient for powers of two, and cheaper.
        within = within * (1.0 / SAMPLES)
    else:
        within = divide(within, samples, ACC)
    return within


@triton.jit
def sample_coordinate(start, bin_size, samples, bin, sample, SAMPLES: tl.constexpr, ACC: tl.constexpr):
    return start + bin.to(ACC) * bin_size + sample_within(bin_size, samples, sample, SAMPLES, ACC)


@triton.jit
def sample_taps(start, bin_size, samples, size, bin, sample, SAMPLES: tl.constexpr, ACC: tl.constexpr):
    """Return (lo, hi, weight_lo, weight_hi, on_map) of a sample. Up to a pixel outside the map it reads the border."""
    coordinate = sample_coordinate(start, bin_size, samples, bin, sample, SAMPLES, ACC)
    on_map = (coordinate >= -1) & (coordinate <= size)
    coordinate = tl.where(on_map & (coordinate > 0), coordinate, 0.0)
    lo = tl.minimum(coordinate.to(tl.int32), size - 1)
    hi = tl.minimum(lo + 1, size - 1)
    weight_hi = tl.where(hi > lo, coordinate - lo.to(ACC), 0.0)
    return lo, hi, 1 - weight_hi, weight_hi, on_map


@triton.jit
def clamped(value, end):
    """Convert `value` to an integer in [0, end]; 0 for NaN."""
    return tl.where(value > 0, tl.where(value < end, value, end), 0.0).to(tl.int32)


@triton.jit
def samples_near_map(start, bin_size, samples, size, bin, ACC: tl.constexpr):
    """Return the range [first, last) of samples of `bin` that can be on the map."""
    all_of_them = (samples <= 2 * SAMPLE_MARGIN) | ~(bin_size > 0)
    base = start + bin.to(ACC) * bin_size
    per_pixel = divide(samples, tl.where(bin_size > 0, bin_size, 1.0), ACC)
    first = clamped((-1 - base) * per_pixel - SAMPLE_MARGIN, samples)
    last = clamped((size - base) * per_pixel + SAMPLE_MARGIN, samples)
    return tl.where(all_of_them, 0, first), tl.where(all_of_them, samples, last)


# The functions below are the inverse, for gathered gradients: they find the bins and samples that read a pixel. Ranges
# may be too large, because samples that do not read the pixel have weight zero, but never too small.


@triton.jit
def rounding_margin(start, extent):
    """Bound, in pixels, how far rounding moves a sample: coordinates are sums of these values, rounded to 24 bits."""
    return (tl.abs(start) + tl.abs(extent) + 1) * (1.0 / (1 << 20))


@triton.jit
def reads_between(start, extent, begin, end):
    """Return whether a sample of the RoI can read pixels in [begin, end]."""
    margin = rounding_margin(start, extent) + 1
    low, high = tl.minimum(start, start + extent) - margin, tl.maximum(start, start + extent) + margin
    # An infinite RoI has no coordinate on the map.
    return (low <= end) & (high >= begin) & (tl.abs(extent) < float("inf"))


@triton.jit
def bins_near_pixel(start, bin_size, pixel, pooled: tl.constexpr, ACC: tl.constexpr):
    """Return the range [first, last) of bins that can read `pixel`."""
    margin = rounding_margin(start, bin_size * pooled) + 1
    per_pixel = divide(tl.full((), 1, tl.int32), tl.where(bin_size > 0, bin_size, 1.0), ACC)
    # 1/1024 bin covers the rounding of the product, which is at most 1024 bins.
    first = clamped((pixel.to(ACC) - margin - start) * per_pixel - 1.0 / 1024, pooled)
    last = clamped((pixel.to(ACC) + margin - start) * per_pixel + (1 + 1.0 / 1024), pooled)
    return tl.where(bin_size > 0, first, 0), tl.where(bin_size > 0, last, pooled)


@triton.jit
def bin_weight(
    start, bin_size, samples, size, bin, pixel, pooled: tl.constexpr, SAMPLES: tl.constexpr, ACC: tl.constexpr
):
    """Sum the weights of :func:`sample_taps` with which the samples of `bin` read `pixel`."""
    base = start + bin.to(ACC) * bin_size
    before, after = (pixel - 1).to(ACC), (pixel + 1).to(ACC)
    first, last, most = tl.zeros_like(pixel), tl.zeros_like(pixel) + samples, samples
    if (samples > 2 * SAMPLE_MARGIN) & (bin_size > 0):
        first, last = samples_near_map(start, bin_size, samples, size, bin, ACC)
        # Narrow the range to samples near the pixel, and two more for the rounding of the product.
        margin = rounding_margin(start, bin_size * pooled)
        per_pixel = divide(samples, bin_size, ACC)
        first = tl.maximum(first, clamped((before - margin - base) * per_pixel - 2, samples))
        last = tl.minimum(last, clamped((after + margin - base) * per_pixel + 2, samples))
        most = tl.max(last - first)
    total = tl.zeros_like(before)
    for i in range(most):
        sample = first + i
        coordinate = base + sample_within(bin_size, samples, sample, SAMPLES, ACC)
        reads = (coordinate >= -1) & (coordinate <= size) & (sample < last)
        coordinate = tl.minimum(tl.maximum(coordinate, 0.0), (size - 1).to(ACC))
        # A tent over the pixel. Both sides are exact differences, like in sample_taps.
        weight = tl.maximum(tl.minimum(coordinate - before, after - coordinate), 0.0)
        total += tl.where(reads, weight, 0.0)
    return total


def map_arguments(features: Sequence[Tensor], scales: Sequence[float], thresholds: Sequence[float]) -> tuple[Any, ...]:
    """Return (features, geometry, scales, thresholds) for a forward kernel, which reads them with :func:`map_of`."""
    return (
        tuple(features),
        tuple(tuple(map(encode_int, (*feature.shape[2:], *feature.stride()))) for feature in features),
        tuple(encode_float(scale, features[0].dtype) for scale in scales),
        tuple(thresholds),
    )


def constants_of(
    tensor: Tensor, pooled: tuple[int, int], levels: Tensor | None, maps: int, sampling_ratio: int, aligned: bool
) -> dict[str, object]:
    """Return the constants of the kernels of both pool modes. `tensor` is a feature or the incoming gradient."""
    return {
        "PH": pooled[0],
        "PW": pooled[1],
        "LEVELS": maps,
        "HAS_LEVELS": levels is not None,
        "SAMPLES": sampling_ratio if 1 <= sampling_ratio <= 4 else 0,
        "ALIGNED": aligned,
        "ACC": tl.float64 if tensor.dtype == torch.float64 else tl.float32,
        **EXACT,
    }
