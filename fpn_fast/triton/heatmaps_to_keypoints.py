# SPDX-License-Identifier: Apache-2.0
"""Keypoints of heatmaps in Triton: the counterpart of csrc/common/heatmaps_to_keypoints.h. One program owns a heatmap.
It moves down a block of columns of the box and keeps the four resized rows that the current pixels read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.triton import register
from fpn_fast.triton._resample import divide
from fpn_fast.triton._roi_align import EXACT

# Columns of a block: two per thread of 4 warps.
BLOCK = 256
NUM_WARPS = 4

INF = tl.constexpr(float("inf"))
LONGEST_SIDE = tl.constexpr(8192)
NO_POSITION = tl.constexpr(2**31 - 1)


@triton.jit
def box_side(lo, hi, BOX: tl.constexpr):
    """Return (pixels, step): the pixels that cover a side and their size; no pixels for an invalid or too long side."""
    extent = hi - lo
    length = tl.where(extent > 1, extent, 1.0).to(BOX)
    # A comparison with NaN is false.
    found = (tl.abs(lo) < INF) & (tl.abs(hi) < INF) & (length <= LONGEST_SIDE)
    pixels = tl.where(found, length, 0.0).to(tl.int32)
    pixels += tl.where(found & (pixels.to(BOX) < length), 1, 0)
    return pixels, divide(length, tl.maximum(pixels, 1), BOX)


@triton.jit
def cubic_near(x):
    return (1.25 * x - 2.25) * x * x + 1


@triton.jit
def cubic_far(x):
    return ((-0.75 * x + 3.75) * x - 6) * x + 3


@triton.jit
def cubic_taps(pixel, scale, size, ACC: tl.constexpr):
    """Return the first of four taps, and their weights."""
    source = scale * (pixel.to(ACC) + 0.5) - 0.5
    # Not tl.floor, which flushes a subnormal number to 0.
    whole = source.to(tl.int32).to(ACC)
    second = tl.minimum(whole - (whole > source).to(ACC), (size - 1).to(ACC))
    t = tl.minimum(source - second, 1.0)
    rest = 1 - t
    return second.to(tl.int32) - 1, cubic_far(t + 1), cubic_near(t), cubic_near(rest), cubic_far(rest + 1)


@triton.jit
def clamp_tap(tap, size):
    return tl.minimum(tl.maximum(tap, 0), size - 1)


@triton.jit
def read_row(heatmap, row, first, wa, wb, wc, wd, width, ACC: tl.constexpr):
    """Return a row of the heatmap, resized to the box's columns."""
    start = heatmap + row * width
    a = tl.load(start + clamp_tap(first, width)).to(ACC)
    b = tl.load(start + clamp_tap(first + 1, width)).to(ACC)
    c = tl.load(start + clamp_tap(first + 2, width)).to(ACC)
    d = tl.load(start + clamp_tap(first + 3, width)).to(ACC)
    return wa * a + wb * b + wc * c + wd * d


@triton.jit
def is_higher(value, position, best, at):
    """Compare values and positions: NaN is the highest value, and of equal values the first position wins."""
    nan, best_nan = value != value, best != best
    higher = (value > best) | ((value == best) & (position < at))
    return tl.where(nan | best_nan, nan & ((best_nan == 0) | (position < at)), higher)


@triton.jit(do_not_specialize=["keypoints", "height", "width"])
def heatmaps_to_keypoints_kernel(
    heatmaps, boxes, points, scores, keypoints, height, width,
    BOX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write points [R, K, 3] and scores [R, K] of heatmaps [R, K, height, width] and boxes [R, 4]."""
    index = tl.program_id(0).to(tl.int64)
    corners = boxes + index // keypoints * 4
    left, top = tl.load(corners), tl.load(corners + 1)
    columns, step_x = box_side(left, tl.load(corners + 2), BOX)
    rows, step_y = box_side(top, tl.load(corners + 3), BOX)
    columns = tl.where(rows > 0, columns, 0)
    scale_x, scale_y = divide(width, tl.maximum(columns, 1), ACC), divide(height, tl.maximum(rows, 1), ACC)
    heatmap = heatmaps + index * height * width
    best, at = tl.full([BLOCK], -INF, ACC), tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, columns, BLOCK):
        x = begin + tl.arange(0, BLOCK)
        across, wa, wb, wc, wd = cubic_taps(tl.minimum(x, columns - 1), scale_x, width, ACC)
        # Taps above the map read its first row. Three names of one value would keep it:
        # for Triton a name is constant in a loop if what it is given there is what it had before.
        d = read_row(heatmap, 0, across, wa, wb, wc, wd, width, ACC)
        b, c = d * 1.0, d * 1.0
        y = tl.minimum(columns, 0)
        down, va, vb, vc, vd = cubic_taps(y, scale_y, height, ACC)
        for first in range(-2, height - 1):
            a, b, c = b, c, d
            d = read_row(heatmap, clamp_tap(first + 3, height), across, wa, wb, wc, wd, width, ACC)
            while (y < rows) & (down == first):
                value = va * a + vb * b + vc * c + vd * d
                position = y * columns + x
                taken = (x < columns) & is_higher(value, position, best, at)
                best, at = tl.where(taken, value, best), tl.where(taken, position, at)
                y += 1
                down, va, vb, vc, vd = cubic_taps(y, scale_y, height, ACC)
    nan = best != best
    any_nan = tl.max(nan.to(tl.int32), 0) > 0
    highest = tl.max(tl.where(nan, -INF, best), 0)
    position = tl.min(tl.where(tl.where(any_nan, nan, best == highest), at, NO_POSITION), 0)
    found = columns > 0
    columns = tl.maximum(columns, 1)
    x = ((position % columns).to(BOX) + 0.5) * step_x + left
    y = ((position // columns).to(BOX) + 0.5) * step_y + top
    tl.store(points + index * 3, tl.where(found, x, 0.0).to(tl.float32))
    tl.store(points + index * 3 + 1, tl.where(found, y, 0.0).to(tl.float32))
    tl.store(points + index * 3 + 2, tl.where(found, 1.0, 0.0))
    score = tl.where(any_nan, float("nan"), highest)
    tl.store(scores + index, tl.where(found, score, 0.0).to(tl.float32))


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    count, keypoints, height, width = heatmaps.shape
    points = heatmaps.new_empty((count, keypoints, 3), dtype=torch.float32)
    scores = heatmaps.new_empty((count, keypoints), dtype=torch.float32)
    if scores.numel() == 0:
        return points, scores
    with torch.cuda.device_of(heatmaps):
        heatmaps_to_keypoints_kernel[count * keypoints,](
            heatmaps, boxes, points, scores, keypoints, height, width,
            BOX=tl.float64 if boxes.dtype == torch.float64 else tl.float32,
            ACC=tl.float64 if heatmaps.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT,
        )  # fmt: skip
    return points, scores


register("heatmaps_to_keypoints", heatmaps_to_keypoints)
