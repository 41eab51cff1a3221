# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in Triton: one launch for all maps forward, one per map backward; any strides.

Forward, a program owns some bins of one RoI and some channels. It finds the RoI's map and loops over the samples, for
all its bins at once. Backward, a program owns a tile of pixels of one image's gradient and some channels. It loops over
the RoIs in ascending order, skips those that do not read the tile, and gathers the few bins that read a pixel, for all
pixels at once. Every element is written once, in its final type, so two runs are equal.

The innermost axis of a program's elements is adjacent in memory: channels (channels_last), or bins and columns of a row
(channels_first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast._memory_format import is_channels_last
from fpn_fast.ops._outputs import empty_grads, empty_pooled
from fpn_fast.triton import register
from fpn_fast.triton._arguments import decode_float, encode_float
from fpn_fast.triton._roi_align import (
    bin_weight,
    bins_near_pixel,
    constants_of,
    inverse_count,
    locate_roi,
    make_roi_axis,
    map_arguments,
    map_of,
    reads_between,
    roi_at,
    roi_extent,
    sample_taps,
    samples_near_map,
)
from fpn_fast.triton.top_down import multiple

# Output of a program: 32 bytes per thread of 4 warps, so that the 4 taps of a sample are 8 accesses of 16 bytes in
# flight. In channels_first every element needs a pointer, so bfloat16 gets as many elements as float32.
BLOCK_BYTES = 4096
BLOCK_BINS = 64
NUM_WARPS = 4
# Samples of a bin's row at a time. The bins alone occupy a GPU.
BLOCK_SAMPLES = 1

# Gradient of a program: 64 bytes per thread of 8 warps, which stay in registers through all RoIs. That is 8 x 8 pixels
# of 128 bfloat16 channels, twice as many columns in channels_first.
BLOCK_GRAD_BYTES = 16384
TILE_SIZE = 8
NUM_WARPS_BACKWARD = 8
# RoIs whose level is found at a time: 2 per thread.
BLOCK_ROIS = 512


@triton.jit(do_not_specialize=["batch", "count", "C", "sampling_ratio"])
def multiscale_roi_align_kernel(
    features, geometry, scales, thresholds, rois, levels, out, batch, count, C, sampling_ratio,
    PH: tl.constexpr, PW: tl.constexpr, LEVELS: tl.constexpr, HAS_LEVELS: tl.constexpr, SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT_C: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write out [count, C, PH, PW] = Wy F Wx^T / samples for the map of each RoI; zero for a RoI without a map."""
    BIN_BLOCKS: tl.constexpr = (PH * PW + BLOCK_BINS - 1) // BLOCK_BINS
    k = tl.program_id(0) // BIN_BLOCKS
    first_bin = tl.program_id(0) % BIN_BLOCKS * BLOCK_BINS
    image, x1, y1, x2, y2 = roi_at(rois, k)
    given = k
    if HAS_LEVELS:
        given = tl.load(levels + k)
    level, image = locate_roi(image, x1, y1, x2, y2, given, thresholds, batch, LEVELS, HAS_LEVELS)

    feature, scale, height, width, stride_n, stride_c, stride_h, stride_w = map_of(
        features, geometry, scales, level, LEVELS, ACC
    )
    if UNIT_C:
        C = multiple(C, VEC)
        stride_n, stride_h, stride_w = multiple(stride_n, VEC), multiple(stride_h, VEC), multiple(stride_w, VEC)

    row_start, row_bin, row_samples = make_roi_axis(y1, y2, scale, sampling_ratio, PH, SAMPLES, ALIGNED, ACC)
    col_start, col_bin, col_samples = make_roi_axis(x1, x2, scale, sampling_ratio, PW, SAMPLES, ALIGNED, ACC)
    unit = inverse_count(row_samples, col_samples, ACC)

    bins = first_bin + tl.arange(0, BLOCK_BINS)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        bins, channels = bins[:, None, None], channels[None, None, :]
        total = tl.zeros([BLOCK_BINS, BLOCK_S, BLOCK_C], dtype=ACC)
    else:
        bins, channels = bins[None, None, :], channels[:, None, None]
        total = tl.zeros([BLOCK_C, BLOCK_S, BLOCK_BINS], dtype=ACC)
    inside = (bins < PH * PW) & (channels < C)
    ph, pw = bins // PW, bins % PW
    if SAMPLES > 0:
        row_first, row_last = tl.zeros_like(ph), row_samples
        col_first, col_last = tl.zeros_like(pw), col_samples
        row_most, col_most = row_samples, col_samples
    else:
        row_first, row_last = samples_near_map(row_start, row_bin, row_samples, height, ph, ACC)
        col_first, col_last = samples_near_map(col_start, col_bin, col_samples, width, pw, ACC)
        row_most, col_most = tl.max(row_last - row_first), tl.max(col_last - col_first)
    # A RoI without a level reads no sample.
    row_most = tl.where(level >= 0, row_most, 0)

    feature += image.to(tl.int64) * stride_n
    if UNIT_C:
        feature += channels
    else:
        feature += channels.to(tl.int64) * stride_c
    for i in range(row_most):
        sample = row_first + i
        y_lo, y_hi, y_weight_lo, y_weight_hi, y_on_map = sample_taps(
            row_start, row_bin, row_samples, height, ph, sample, SAMPLES, ACC
        )
        y_on_map = y_on_map & (sample < row_last)
        above, below = feature + y_lo.to(tl.int64) * stride_h, feature + y_hi.to(tl.int64) * stride_h
        # Each row is summed by itself: a sum of partial sums has a smaller rounding error.
        row = tl.zeros_like(total)
        for j in range(0, col_most, BLOCK_S):
            sample = col_first + j + tl.arange(0, BLOCK_S)[None, :, None]
            x_lo, x_hi, x_weight_lo, x_weight_hi, x_on_map = sample_taps(
                col_start, col_bin, col_samples, width, pw, sample, SAMPLES, ACC
            )
            mask = inside & y_on_map & x_on_map & (sample < col_last)
            left, right = x_lo.to(tl.int64) * stride_w, x_hi.to(tl.int64) * stride_w
            a = tl.load(above + left, mask=mask, other=0.0).to(ACC)
            b = tl.load(above + right, mask=mask, other=0.0).to(ACC)
            c = tl.load(below + left, mask=mask, other=0.0).to(ACC)
            d = tl.load(below + right, mask=mask, other=0.0).to(ACC)
            row = tl.fma(y_weight_lo * x_weight_lo, a, row)
            row = tl.fma(y_weight_lo * x_weight_hi, b, row)
            row = tl.fma(y_weight_hi * x_weight_lo, c, row)
            row = tl.fma(y_weight_hi * x_weight_hi, d, row)
        total += row

    pooled = (tl.sum(total, axis=1, keep_dims=True) * unit).to(out.dtype.element_ty)
    if CHANNELS_LAST:
        offset = (k.to(tl.int64) * (PH * PW) + bins) * C + channels
    else:
        offset = (k.to(tl.int64) * C + channels) * (PH * PW) + bins
    tl.store(out + offset, pooled, mask=inside)


@triton.jit(
    do_not_specialize=[
        "grad_k", "grad_c", "grad_h", "grad_w", "batch", "count", "C", "H", "W", "level", "sampling_ratio"
    ]
)  # fmt: skip
def multiscale_roi_align_backward_kernel(
    grad, grad_k, grad_c, grad_h, grad_w, rois, levels, thresholds, out, batch, count, C, H, W, level, scale,
    sampling_ratio,
    PH: tl.constexpr, PW: tl.constexpr, LEVELS: tl.constexpr, HAS_LEVELS: tl.constexpr, SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT_C: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write out [batch, C, H, W], the gradient of map `level`: the sum of Wy^T G Wx / samples over its RoIs."""
    scale = decode_float(scale, ACC)
    if CHANNELS_LAST:
        C = multiple(C, VEC)
    else:
        W = multiple(W, VEC)
    if UNIT_C:
        grad_k, grad_h, grad_w = multiple(grad_k, VEC), multiple(grad_h, VEC), multiple(grad_w, VEC)
    tiles_h, tiles_w = tl.cdiv(H, TILE_H), tl.cdiv(W, TILE_W)
    tile = tl.program_id(0)
    n = tile // (tiles_h * tiles_w)
    top = tile // tiles_w % tiles_h * TILE_H
    left = tile % tiles_w * TILE_W
    rows, cols = top + tl.arange(0, TILE_H), left + tl.arange(0, TILE_W)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        y, x, channels = rows[:, None, None], cols[None, :, None], channels[None, None, :]
        total = tl.zeros([TILE_H, TILE_W, BLOCK_C], dtype=ACC)
    else:
        y, x, channels = rows[None, :, None], cols[None, None, :], channels[:, None, None]
        total = tl.zeros([BLOCK_C, TILE_H, TILE_W], dtype=ACC)
    if UNIT_C:
        grad += channels
    else:
        grad += channels.to(tl.int64) * grad_c

    for begin in range(0, count, BLOCK_K):
        candidates = begin + tl.arange(0, BLOCK_K)
        # Past the end, the last RoI again, which `reads` excludes.
        valid = tl.minimum(candidates, count - 1)
        image, left_of, top_of, right_of, bottom_of = roi_at(rois, valid)
        given = valid
        if HAS_LEVELS:
            given = tl.load(levels + valid)
        its_level, image = locate_roi(
            image, left_of, top_of, right_of, bottom_of, given, thresholds, batch, LEVELS, HAS_LEVELS
        )
        start, extent = roi_extent(top_of, bottom_of, scale, ALIGNED)
        reads = reads_between(start, extent, top, top + TILE_H - 1)
        start, extent = roi_extent(left_of, right_of, scale, ALIGNED)
        reads = reads & reads_between(start, extent, left, left + TILE_W - 1)
        reads = reads & (candidates < count) & (its_level == level) & (image == n)
        k = begin - 1
        for _ in range(tl.sum(reads.to(tl.int32))):
            k = tl.min(tl.where(reads & (candidates > k), candidates, count))
            _, x1, y1, x2, y2 = roi_at(rois, k)
            row_start, row_bin, row_samples = make_roi_axis(y1, y2, scale, sampling_ratio, PH, SAMPLES, ALIGNED, ACC)
            col_start, col_bin, col_samples = make_roi_axis(x1, x2, scale, sampling_ratio, PW, SAMPLES, ALIGNED, ACC)
            unit = inverse_count(row_samples, col_samples, ACC)
            row_first, row_last = bins_near_pixel(row_start, row_bin, y, PH, ACC)
            col_first, col_last = bins_near_pixel(col_start, col_bin, x, PW, ACC)
            pooled = grad + k.to(tl.int64) * grad_k
            for i in range(tl.max(row_last - row_first)):
                ph = row_first + i
                row_weight = bin_weight(row_start, row_bin, row_samples, H, ph, y, PH, SAMPLES, ACC) * unit
                row_weight = tl.where(ph < row_last, row_weight, 0.0)
                row = pooled + ph.to(tl.int64) * grad_h
                for j in range(tl.max(col_last - col_first)):
                    pw = col_first + j
                    weight = bin_weight(col_start, col_bin, col_samples, W, pw, x, PW, SAMPLES, ACC)
                    weight = row_weight * tl.where(pw < col_last, weight, 0.0)
                    mask = (weight != 0) & (channels < C)
                    value = tl.load(row + pw.to(tl.int64) * grad_w, mask=mask, other=0.0).to(ACC)
                    total = tl.fma(weight, value, total)

    if CHANNELS_LAST:
        offset = ((n.to(tl.int64) * H + y) * W + x) * C + channels
    else:
        offset = ((n.to(tl.int64) * C + channels) * H + y) * W + x
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=(y < H) & (x < W) & (channels < C))


def _unit_channels(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.stride(1) == 1 for tensor in tensors)


def _vector_width(tensors: Sequence[Tensor]) -> int:
    """Return the largest power of two, at most 16, that divides the channels of `tensors` and all other strides."""
    return math.gcd(16, tensors[0].size(1), *(t.stride(d) for t in tensors for d in (0, 2, 3) if t.size(d) > 1))


def multiscale_roi_align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    first = features[0]
    batch, channels = first.shape[:2]
    count, bins = rois.size(0), pooled_height * pooled_width
    out = empty_pooled(features, rois, levels, pooled_height, pooled_width)
    if out.numel() == 0:
        return out
    channels_last = is_channels_last(first)
    unit_c = _unit_channels(features)
    elements = BLOCK_BYTES // (first.element_size() if channels_last else max(first.element_size(), 4))
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), elements // 4)
        block_bins = min(triton.next_power_of_2(bins), elements // block_c)
    else:
        block_bins = min(triton.next_power_of_2(bins), BLOCK_BINS)
        block_c = min(triton.next_power_of_2(channels), elements // block_bins)
    constants = constants_of(first, (pooled_height, pooled_width), levels, len(features), sampling_ratio, aligned)
    known_samples = constants["SAMPLES"] or BLOCK_SAMPLES
    with torch.cuda.device_of(first):
        multiscale_roi_align_kernel[count * triton.cdiv(bins, block_bins), triton.cdiv(channels, block_c)](
            *map_arguments(features, scales, thresholds), rois, rois if levels is None else levels, out,
            batch, count, channels, sampling_ratio,
            CHANNELS_LAST=channels_last, UNIT_C=unit_c, VEC=_vector_width(features) if unit_c else 1,
            BLOCK_BINS=block_bins, BLOCK_C=block_c, BLOCK_S=min(triton.next_power_of_2(known_samples), BLOCK_SAMPLES),
            num_warps=NUM_WARPS, **constants,
        )  # fmt: skip
    return out


def multiscale_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    batch: int,
    sizes: list[int],
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    count, channels, pooled_height, pooled_width = grad.shape
    constants = constants_of(grad, (pooled_height, pooled_width), levels, len(scales), sampling_ratio, aligned)
    unit_c = channels_last and _unit_channels([grad])
    elements = BLOCK_GRAD_BYTES // (grad.element_size() if channels_last else max(grad.element_size(), 4))
    tile_h, tile_w = TILE_SIZE, TILE_SIZE if channels_last else 2 * TILE_SIZE
    block_c = min(triton.next_power_of_2(channels), max(elements // (tile_h * tile_w), 1))
    outs = empty_grads(grad, batch, sizes, scales, thresholds, sampling_ratio, aligned, channels_last)
    for level, out in enumerate(outs):
        if out.numel() == 0:
            continue
        height, width = out.shape[2:]
        tiles = batch * triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
        if not channels_last:
            vec = math.gcd(16, width)
        else:
            vec = _vector_width([grad]) if unit_c else math.gcd(16, channels)
        with torch.cuda.device_of(out):
            multiscale_roi_align_backward_kernel[tiles, triton.cdiv(channels, block_c)](
                grad, *grad.stride(), rois, rois if levels is None else levels, tuple(thresholds), out,
                batch, count, channels, height, width, level, encode_float(scales[level], grad.dtype),
                sampling_ratio, CHANNELS_LAST=channels_last, UNIT_C=unit_c, VEC=vec,
                TILE_H=tile_h, TILE_W=tile_w, BLOCK_C=block_c, BLOCK_K=BLOCK_ROIS,
                num_warps=NUM_WARPS_BACKWARD, **constants,
            )  # fmt: skip
    return outs


register("multiscale_roi_align", multiscale_roi_align)
register("multiscale_roi_align_backward", multiscale_roi_align_backward)
