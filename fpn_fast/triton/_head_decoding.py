# SPDX-License-Identifier: Apache-2.0
"""The highest logits of a head's maps, ranked by Triton and torch.topk, and their boxes, decoded from the maps.

An index counts in the order (y, x, channel), a channel in the order (anchor, class). torch.topk takes any of equal
values. For float32 it therefore gets distinct integers: the high word holds the logit's bits, mapped to the order of
floats, and the low word decreases with the index. float64 leaves no room for an index and is sorted stably.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.triton._anchors import (
    anchor_at,
    box_at,
    clip,
    decode,
    decode_distances,
    is_finite,
    is_large_enough,
    logistic,
)
from fpn_fast.triton._arguments import decode_float, decode_int, encode_float, encode_int
from fpn_fast.triton._roi_align import EXACT

# Per thread of 4 warps: 4 ranks, 1 box.
BLOCK_RANKS = 512
BLOCK_BOXES = 128
NUM_WARPS = 4

# Lower than the rank of any finite value.
LOWEST_RANK = tl.constexpr(-(2**63 - 1))


@triton.jit
def value_at(map, strides, image, channel, y, x, mask, ACC: tl.constexpr):
    """Load elements of a map of any strides in type ACC."""
    offset = image * decode_int(strides[0]).to(tl.int64) + channel * decode_int(strides[1]).to(tl.int64)
    offset += y * decode_int(strides[2]).to(tl.int64) + x * decode_int(strides[3]).to(tl.int64)
    return tl.load(map + offset, mask=mask, other=0.0).to(ACC)


@triton.jit
def square_root(x, ACC: tl.constexpr):
    if ACC == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def number_at(maps, strides, shape, image, index, mask, CENTERED: tl.constexpr, ACC: tl.constexpr):
    """Return (value, finite) of pairs of an anchor and a class. The value is the logit, CENTERED the score."""
    channels, classes, width = decode_int(shape[0]), decode_int(shape[1]), decode_int(shape[2])
    channel, place = index % channels, index // channels
    y, x = place // width, place % width
    number = value_at(maps[0], strides[0], image, channel, y, x, mask, ACC)
    finite = number - number == 0
    if CENTERED:
        center = value_at(maps[1], strides[1], image, channel // classes, y, x, mask, ACC)
        finite = finite & (center - center == 0)
        number = square_root(logistic(number, ACC) * logistic(center, ACC), ACC)
    return number, finite


@triton.jit(do_not_specialize=["count", "blocks"])
def rank_kernel(
    maps, strides, shape, ranks, count, blocks, CENTERED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Write ranks [N, count]. In float32 they are distinct: higher for a higher value, or an equal one of lower index.
    A value that is not finite has the lowest rank."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = index < count
    number, finite = number_at(maps, strides, shape, image, index, exists, CENTERED, ACC)
    if ACC == tl.float64:
        rank = tl.where(finite, number, -float("inf"))
    else:
        # 0 and -0 are equal but have different bits.
        bits = tl.where(number == 0, 0.0, number).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        rank = tl.where(finite, (ordered.to(tl.int64) << 32) - index, LOWEST_RANK)
    tl.store(ranks + image * count + index, rank, mask=exists)


@triton.jit(do_not_specialize=["count", "room", "blocks"])
def decode_head_kernel(
    maps, strides, shape, indices, image_sizes, cells, coding, score_thresh, min_size, boxes, scores, labels,
    count, room, blocks,
    CENTERED: tl.constexpr, PROPOSALS: tl.constexpr, LOGITS_OUT: tl.constexpr, STRICT_SIZE: tl.constexpr,
    DISTANCES: tl.constexpr, SYMMETRIC: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write boxes [N, room, 4], scores and labels [N, room] of the pairs at indices [N, count]; an invalid pair gets
    the score minus infinity. A score must be above the threshold. PROPOSALS have no labels, and their scores may equal
    it."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    index = tl.load(indices + image * count + row, mask=exists, other=0).to(tl.int32)
    number, valid = number_at(maps, strides, shape, image, index, exists, CENTERED, ACC)
    score = number
    if not CENTERED:
        score = logistic(number, ACC)
    threshold = decode_float(score_thresh, ACC)
    if PROPOSALS:
        valid = valid & (score >= threshold)
        if LOGITS_OUT:
            score = number
    else:
        valid = valid & (score > threshold)

    channels, classes, width = decode_int(shape[0]), decode_int(shape[1]), decode_int(shape[2])
    place, label = index // channels, index % channels % classes
    anchor = index % channels // classes
    y, x = place // width, place % width
    d0 = value_at(maps[2], strides[2], image, 4 * anchor, y, x, exists, ACC)
    d1 = value_at(maps[2], strides[2], image, 4 * anchor + 1, y, x, exists, ACC)
    d2 = value_at(maps[2], strides[2], image, 4 * anchor + 2, y, x, exists, ACC)
    d3 = value_at(maps[2], strides[2], image, 4 * anchor + 3, y, x, exists, ACC)
    valid = valid & is_finite(d0, d1, d2, d3)
    x1, y1, x2, y2 = anchor_at(
        anchor, cells, y, x, decode_int(shape[3]), decode_int(shape[4]), decode_float(coding[14], ACC), ACC
    )
    if DISTANCES:
        x1, y1, x2, y2 = decode_distances(x1, y1, x2, y2, d0, d1, d2, d3)
    else:
        x1, y1, x2, y2 = decode(x1, y1, x2, y2, d0, d1, d2, d3, coding, SYMMETRIC, MEAN, ACC)
    valid = valid & is_finite(x1, y1, x2, y2)
    height, width_of_image = tl.load(image_sizes + 2 * image), tl.load(image_sizes + 2 * image + 1)
    x1, y1, x2, y2 = clip(x1, y1, x2, y2, height, width_of_image)
    valid = valid & is_large_enough(x1, y1, x2, y2, decode_float(min_size, ACC), STRICT_SIZE)
    store_boxes(boxes, scores, image * room + row, x1, y1, x2, y2, score, valid, exists)
    if not PROPOSALS:
        tl.store(labels + image * room + row, label.to(tl.int64), mask=exists)


@triton.jit
def store_boxes(boxes, scores, row, x1, y1, x2, y2, score, valid, mask):
    tl.store(scores + row, tl.where(valid, score, -float("inf")), mask=mask)
    tl.store(boxes + row * 4, x1, mask=mask)
    tl.store(boxes + row * 4 + 1, y1, mask=mask)
    tl.store(boxes + row * 4 + 2, x2, mask=mask)
    tl.store(boxes + row * 4 + 3, y2, mask=mask)


@triton.jit(do_not_specialize=["count", "classes", "blocks"])
def decode_boxes_kernel(
    sources, deltas, given, image_sizes, coding, min_size, boxes, scores, count, classes, blocks,
    SHARED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write boxes [N, count, 4] and scores [N, count] of the pairs of a box, sources [N, R, 4], and one of `classes`,
    without background. Pairs with the score minus infinity, in given [N, count] and in scores, are invalid. SHARED:
    deltas are [N, R, 4]."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(given + image * count + index, mask=index < count, other=-float("inf"))
    valid = score > -float("inf")
    source = image * (count // classes) + index // classes
    x1, y1, x2, y2 = box_at(sources, source, valid)
    valid = valid & is_finite(x1, y1, x2, y2)
    codes = source
    if not SHARED:
        codes = source * (classes + 1) + 1 + index % classes
    d0, d1, d2, d3 = box_at(deltas, codes, valid)
    valid = valid & is_finite(d0, d1, d2, d3)
    x1, y1, x2, y2 = decode(x1, y1, x2, y2, d0, d1, d2, d3, coding, False, False, ACC)
    valid = valid & is_finite(x1, y1, x2, y2)
    height, width = tl.load(image_sizes + 2 * image), tl.load(image_sizes + 2 * image + 1)
    x1, y1, x2, y2 = clip(x1, y1, x2, y2, height, width)
    valid = valid & is_large_enough(x1, y1, x2, y2, decode_float(min_size, ACC), False)
    store_boxes(boxes, scores, image * count + index, x1, y1, x2, y2, score, valid, index < count)


def coding_of(
    weights: Sequence[float],
    means: Sequence[float],
    stds: Sequence[float],
    scale_clamp: float,
    center_clamp: float,
    center_offset: float,
    dtype: torch.dtype,
) -> tuple[float | int, ...]:
    """Encode the kernels' argument `coding`."""
    numbers = (*weights, *means, *stds, scale_clamp, center_clamp, center_offset)
    return tuple(encode_float(number, dtype) for number in numbers)


@dataclass(frozen=True)
class Candidates:
    """Candidates per image and level, best first: boxes [N, L, K, 4], scores [N, L, K] and labels [N, L, K], which are
    empty for proposals. The score of a missing candidate is minus infinity."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def best_of_levels(
    logits: Sequence[Tensor],
    centerness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[float],
    strides: Sequence[int],
    image_sizes: Tensor,
    top_n: int,
    coding: tuple[float | int, ...],
    score_thresh: float,
    min_size: float,
    *,
    proposals: bool = False,
    logits_out: bool = False,
    strict_size: bool = False,
    distances: bool = False,
    symmetric_clamp: bool = False,
    mean_center: bool = False,
) -> Candidates:
    """Select, decode, clip and filter the `top_n` highest pairs of an anchor and a class per level.

    The arguments are those of the ops in fpn_fast/ops/select_detections.py and generate_proposals.py.
    """
    batch, levels, dtype, device = len(image_sizes), len(logits), image_sizes.dtype, image_sizes.device
    counts = [each[0].numel() if batch else 0 for each in logits]
    if max(counts) >= 2**31:
        raise ValueError(f"maps must have less than 2^31 pairs of an anchor and a class per level, got {max(counts)}")
    room = max(min(top_n, count) for count in counts)
    found = Candidates(
        torch.empty(batch, levels, room, 4, dtype=dtype, device=device),
        torch.full((batch, levels, room), -math.inf, dtype=dtype, device=device),
        torch.empty(batch, levels, 0 if proposals else room, dtype=torch.int64, device=device),
    )
    constants = {
        "CENTERED": len(centerness) > 0,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
        **EXACT,
    }
    thresholds = encode_float(score_thresh, dtype), encode_float(min_size, dtype)
    corners = [encode_float(number, dtype) for number in cell_anchors]
    anchors = len(corners) // 4 // levels
    for i, count in enumerate(counts):
        maps = (logits[i], centerness[i] if centerness else logits[i], deltas[i])
        layout = tuple(tuple(map(encode_int, each.stride())) for each in maps)
        channels, _, width = logits[i].shape[1:]
        shape = tuple(map(encode_int, (channels, channels // anchors, width, *strides[2 * i : 2 * i + 2])))
        cells = tuple(tuple(corners[j : j + 4]) for j in range(4 * anchors * i, 4 * anchors * (i + 1), 4))
        with torch.cuda.device_of(image_sizes):
            ranks = torch.empty(
                batch, count, dtype=torch.float64 if dtype == torch.float64 else torch.int64, device=device
            )
            blocks = triton.cdiv(count, BLOCK_RANKS)
            rank_kernel[batch * blocks,](
                maps, layout, shape, ranks, count, blocks, BLOCK=BLOCK_RANKS, **constants
            )  # fmt: skip
            taken = min(top_n, count)
            if dtype == torch.float64:
                indices = ranks.sort(dim=1, descending=True, stable=True).indices[:, :taken].contiguous()
            else:
                indices = ranks.topk(taken, dim=1).indices
            blocks = triton.cdiv(taken, BLOCK_BOXES)
            decode_head_kernel[batch * blocks,](
                maps, layout, shape, indices, image_sizes, cells, coding, *thresholds,
                found.boxes[:, i], found.scores[:, i], found.labels[:, i], taken, levels * room, blocks,
                PROPOSALS=proposals, LOGITS_OUT=logits_out, STRICT_SIZE=strict_size, DISTANCES=distances,
                SYMMETRIC=symmetric_clamp, MEAN=mean_center, BLOCK=BLOCK_BOXES, **constants,
            )  # fmt: skip
    return found


def decode_boxes(
    boxes: Tensor,
    deltas: Tensor,
    given: Tensor,
    image_sizes: Tensor,
    coding: tuple[float | int, ...],
    min_size: float,
) -> tuple[Tensor, Tensor]:
    """Return boxes [N, R * classes, 4] and scores of all pairs of a box, [N, R, 4], and a class. Pairs with the score
    minus infinity, in given [N, R * classes] and in the result, are invalid."""
    (batch, pairs), dtype = given.shape, given.dtype
    found, scores = given.new_empty(batch, pairs, 4), torch.empty_like(given)
    classes, blocks = pairs // max(boxes.size(1), 1), triton.cdiv(pairs, BLOCK_BOXES)
    with torch.cuda.device_of(boxes):
        decode_boxes_kernel[batch * blocks,](
            boxes, deltas, given, image_sizes, coding, encode_float(min_size, dtype), found, scores, pairs, classes,
            blocks,
            SHARED=deltas.size(2) == 4, ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK_BOXES,
            num_warps=NUM_WARPS, **EXACT,
        )  # fmt: skip
    return found, scores
