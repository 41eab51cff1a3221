# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign in max mode in Triton: Note [Winners] in csrc/common/roi_align_max.h.

The mode is rare, so its kernels are simple. A program owns a block of adjacent output elements: forward of one RoI,
backward of one map's gradient. Backward it loops over the RoIs in ascending order, skips those that cannot read the
block, and gathers from the bins that can. Every element is written once, so two runs are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast._memory_format import is_channels_last
from fpn_fast.ops._outputs import empty_grads, empty_pooled_and_winners
from fpn_fast.triton import register
from fpn_fast.triton._arguments import decode_float, encode_float
from fpn_fast.triton._roi_align import (
    bins_near_pixel,
    constants_of,
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

# Elements of a program: 4 per thread of 4 warps.
BLOCK = 512
NUM_WARPS = 4

WINNER_MASK = tl.constexpr((1 << 15) - 1)


@triton.jit(do_not_specialize=["batch", "C", "sampling_ratio", "blocks"])
def multiscale_roi_align_max_kernel(
    features, geometry, scales, thresholds, rois, levels, out, winners, batch, C, sampling_ratio, blocks,
    PH: tl.constexpr, PW: tl.constexpr, LEVELS: tl.constexpr, HAS_LEVELS: tl.constexpr, SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out [K, C, PH, PW], the largest sample of each bin, and winners, its position."""
    k = tl.program_id(0) // blocks
    image, x1, y1, x2, y2 = roi_at(rois, k)
    given = k
    if HAS_LEVELS:
        given = tl.load(levels + k)
    level, image = locate_roi(image, x1, y1, x2, y2, given, thresholds, batch, LEVELS, HAS_LEVELS)
    feature, scale, height, width, stride_n, stride_c, stride_h, stride_w = map_of(
        features, geometry, scales, level, LEVELS, ACC
    )
    row_start, row_bin, row_samples = make_roi_axis(y1, y2, scale, sampling_ratio, PH, SAMPLES, ALIGNED, ACC)
    col_start, col_bin, col_samples = make_roi_axis(x1, x2, scale, sampling_ratio, PW, SAMPLES, ALIGNED, ACC)

    elements = C.to(tl.int64) * (PH * PW)
    element = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    if CHANNELS_LAST:
        c, bin = element % C, (element // C).to(tl.int32)
    else:
        c, bin = element // (PH * PW), (element % (PH * PW)).to(tl.int32)
    # Past the end, the first bin again, which is not stored.
    bin = tl.where(inside, bin, 0)
    ph, pw = bin // PW, bin % PW
    plane = feature + image.to(tl.int64) * stride_n + c * stride_c

    row_first, row_last = samples_near_map(row_start, row_bin, row_samples, height, ph, ACC)
    col_first, col_last = samples_near_map(col_start, col_bin, col_samples, width, pw, ACC)
    # A RoI without a level reads no sample.
    row_most = tl.where(level >= 0, tl.max(row_last - row_first), 0)
    largest = tl.full([BLOCK], float("-inf"), dtype=ACC)
    winner = tl.full([BLOCK], -1, dtype=tl.int32)
    for i in range(row_most):
        row = row_first + i
        y_lo, y_hi, y_weight_lo, y_weight_hi, y_on_map = sample_taps(
            row_start, row_bin, row_samples, height, ph, row, SAMPLES, ACC
        )
        above, below = plane + y_lo.to(tl.int64) * stride_h, plane + y_hi.to(tl.int64) * stride_h
        for j in range(tl.max(col_last - col_first)):
            col = col_first + j
            x_lo, x_hi, x_weight_lo, x_weight_hi, x_on_map = sample_taps(
                col_start, col_bin, col_samples, width, pw, col, SAMPLES, ACC
            )
            exists = (row < row_last) & (col < col_last)
            on_map = exists & y_on_map & x_on_map
            mask = inside & on_map
            left, right = x_lo.to(tl.int64) * stride_w, x_hi.to(tl.int64) * stride_w
            a = tl.load(above + left, mask=mask, other=0.0).to(ACC)
            b = tl.load(above + right, mask=mask, other=0.0).to(ACC)
            c_ = tl.load(below + left, mask=mask, other=0.0).to(ACC)
            d = tl.load(below + right, mask=mask, other=0.0).to(ACC)
            value = y_weight_lo * (x_weight_lo * a + x_weight_hi * b)
            value += y_weight_hi * (x_weight_lo * c_ + x_weight_hi * d)
            value = tl.where(on_map, value, 0.0)
            wins = exists & (value > largest)
            number = ((row & WINNER_MASK) << 16) | (col & WINNER_MASK)
            largest = tl.where(wins, value, largest)
            winner = tl.where(wins, tl.where(on_map, number, -1), winner)

    pooled = tl.where(largest == float("-inf"), 0.0, largest).to(out.dtype.element_ty)
    offset = k.to(tl.int64) * elements + element
    tl.store(out + offset, pooled, mask=inside)
    tl.store(winners + offset, winner, mask=inside)


@triton.jit
def winner_weight(
    start, bin_size, samples, size, bin, winner, pixel, SAMPLES: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Return the weight with which the winner reads `pixel`, along one axis."""
    first, _ = samples_near_map(start, bin_size, samples, size, bin, ACC)
    sample = first + ((winner - first) & WINNER_MASK)
    lo, hi, weight_lo, weight_hi, on_map = sample_taps(start, bin_size, samples, size, bin, sample, SAMPLES, ACC)
    # Past the border both taps are the same pixel, and the second has weight zero.
    return tl.where(on_map, tl.where(lo == pixel, weight_lo, tl.where(hi == pixel, weight_hi, 0.0)), 0.0)


@triton.jit(do_not_specialize=[
    "grad_k", "grad_c", "grad_h", "grad_w", "won_k", "won_c", "won_h", "won_w", "batch", "count", "C", "H", "W",
    "level", "sampling_ratio",
])  # fmt: skip
def multiscale_roi_align_max_backward_kernel(
    grad, grad_k, grad_c, grad_h, grad_w, winners, won_k, won_c, won_h, won_w, rois, levels, thresholds, out,
    batch, count, C, H, W, level, scale, sampling_ratio,
    PH: tl.constexpr, PW: tl.constexpr, LEVELS: tl.constexpr, HAS_LEVELS: tl.constexpr, SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out [batch, C, H, W], the gradient of map `level`, gathered from the winners that read a pixel."""
    scale = decode_float(scale, ACC)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < batch.to(tl.int64) * C * H * W
    # Past the end, the first element again, which is not stored.
    rest = tl.where(inside, element, 0)
    if CHANNELS_LAST:
        c, rest = rest % C, rest // C
    x, rest = (rest % W).to(tl.int32), rest // W
    y, rest = (rest % H).to(tl.int32), rest // H
    if not CHANNELS_LAST:
        c, rest = rest % C, rest // C
    n = rest.to(tl.int32)
    top, bottom, left, right = tl.min(y), tl.max(y), tl.min(x), tl.max(x)
    grad += c * grad_c
    winners += c * won_c

    total = tl.zeros([BLOCK], dtype=ACC)
    k = tl.zeros((), dtype=tl.int32)
    for _ in range(count):
        image, x1, y1, x2, y2 = roi_at(rois, k)
        given = k
        if HAS_LEVELS:
            given = tl.load(levels + k)
        its_level, image = locate_roi(image, x1, y1, x2, y2, given, thresholds, batch, LEVELS, HAS_LEVELS)
        start, extent = roi_extent(y1, y2, scale, ALIGNED)
        reads = reads_between(start, extent, top, bottom)
        start, extent = roi_extent(x1, x2, scale, ALIGNED)
        reads = reads & reads_between(start, extent, left, right)
        if reads & (its_level == level) & (image >= tl.min(n)) & (image <= tl.max(n)):
            row_start, row_bin, row_samples = make_roi_axis(y1, y2, scale, sampling_ratio, PH, SAMPLES, ALIGNED, ACC)
            col_start, col_bin, col_samples = make_roi_axis(x1, x2, scale, sampling_ratio, PW, SAMPLES, ALIGNED, ACC)
            row_first, row_last = bins_near_pixel(row_start, row_bin, y, PH, ACC)
            col_first, col_last = bins_near_pixel(col_start, col_bin, x, PW, ACC)
            for i in range(tl.max(row_last - row_first)):
                ph = row_first + i
                for j in range(tl.max(col_last - col_first)):
                    pw = col_first + j
                    mask = (n == image) & (ph < row_last) & (pw < col_last)
                    at = k.to(tl.int64) * won_k + ph.to(tl.int64) * won_h + pw.to(tl.int64) * won_w
                    winner = tl.load(winners + at, mask=mask, other=-1)
                    weight = winner_weight(row_start, row_bin, row_samples, H, ph, winner >> 16, y, SAMPLES, ACC)
                    weight *= winner_weight(col_start, col_bin, col_samples, W, pw, winner, x, SAMPLES, ACC)
                    # A NaN must not reach pixels that the winner does not read.
                    mask = (winner >= 0) & (weight != 0)
                    at = k.to(tl.int64) * grad_k + ph.to(tl.int64) * grad_h + pw.to(tl.int64) * grad_w
                    value = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
                    total = tl.where(mask, tl.fma(weight, value, total), total)
        k += 1

    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def multiscale_roi_align_max(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    first = features[0]
    batch, channels = first.shape[:2]
    out, winners = empty_pooled_and_winners(features, rois, levels, pooled_height, pooled_width)
    if out.numel() == 0:
        return out, winners
    blocks = triton.cdiv(channels * pooled_height * pooled_width, BLOCK)
    with torch.cuda.device_of(first):
        multiscale_roi_align_max_kernel[rois.size(0) * blocks,](
            *map_arguments(features, scales, thresholds), rois, rois if levels is None else levels, out, winners,
            batch, channels, sampling_ratio, blocks,
            CHANNELS_LAST=is_channels_last(first), BLOCK=BLOCK, num_warps=NUM_WARPS,
            **constants_of(first, (pooled_height, pooled_width), levels, len(features), sampling_ratio, aligned),
        )  # fmt: skip
    return out, winners


def multiscale_roi_align_max_backward(
    grad: Tensor,
    winners: Tensor,
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
    outs = empty_grads(grad, batch, sizes, scales, thresholds, sampling_ratio, aligned, channels_last)
    for level, out in enumerate(outs):
        if out.numel() == 0:
            continue
        height, width = out.shape[2:]
        with torch.cuda.device_of(out):
            multiscale_roi_align_max_backward_kernel[triton.cdiv(out.numel(), BLOCK),](
                grad, *grad.stride(), winners, *winners.stride(), rois, rois if levels is None else levels,
                tuple(thresholds), out, batch, count, channels, height, width, level,
                encode_float(scales[level], grad.dtype), sampling_ratio,
                CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=NUM_WARPS, **constants,
            )  # fmt: skip
    return outs


register("multiscale_roi_align_max", multiscale_roi_align_max)
register("multiscale_roi_align_max_backward", multiscale_roi_align_max_backward)
