# SPDX-License-Identifier: Apache-2.0
"""Greedy non-maximum suppression in Triton, between two sorts by PyTorch.

Boxes come in lists (an image, or a level of it). A list consists of segments (the boxes of one group), each sorted best
first. One program decides a region of a segment, REGION boxes, chunk by chunk: it removes the boxes that kept boxes of
earlier chunks overlap, and then iterates to the fixed point that fpn_fast/reference/nms.py describes. Then many
programs test all later boxes of the segment against the region's kept boxes. The number of launches, two per region,
depends on the number of boxes and not on their values, so nothing synchronises. No matrix of pairs is in memory, and
the result does not depend on the order of programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.reference.nms import _threshold
from fpn_fast.triton._anchors import box_at
from fpn_fast.triton._arguments import decode_float, encode_float
from fpn_fast.triton._resample import divide
from fpn_fast.triton._roi_align import EXACT

# 64 x 64 pairs at a time: 16 per thread.
CHUNK = 64
NUM_WARPS = 8
# 16 chunks, which one program tests in 120 pairs: by estimate as long as a few launches.
REGION = 1024


@triton.jit
def overlaps(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold, PRODUCT: tl.constexpr, ACC: tl.constexpr):
    """Test intersection / union > threshold; with PRODUCT, intersection > threshold * union."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    shared = width * height
    united = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared
    if PRODUCT:
        return shared > threshold * united
    else:
        return divide(shared, united, ACC) > threshold


@triton.jit
def pairs_overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold, PRODUCT: tl.constexpr, ACC: tl.constexpr):
    """Test all pairs of boxes a and b: [a, b]."""
    return overlaps(
        ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None], bx1[None], by1[None], bx2[None], by2[None], threshold,
        PRODUCT, ACC,
    )  # fmt: skip


@triton.jit
def left_by(
    boxes, kept, begin, end, x1, y1, x2, y2, alive, threshold, PRODUCT: tl.constexpr, ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Return which boxes no kept box from `begin` to `end`, whole chunks, removes."""
    for first in range(begin, end, CHUNK):
        place = first + tl.arange(0, CHUNK)
        ax1, ay1, ax2, ay2 = box_at(boxes, place, place < end)
        removes = tl.load(kept + place) > 0
        met = pairs_overlap(ax1, ay1, ax2, ay2, x1, y1, x2, y2, threshold, PRODUCT, ACC) & removes[:, None]
        alive = alive & (tl.max(met.to(tl.int32), axis=0) == 0)
    return alive


@triton.jit(do_not_specialize=["region", "room", "segments"])
def greedy_nms_kernel(
    boxes, offsets, kept, threshold, region, room, segments,
    PRODUCT: tl.constexpr, ACC: tl.constexpr, REGION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Suppress within region `region` of every segment, in kept [lists, room]. A program owns one segment of a list,
    which begins at its entry of offsets [lists, segments + 1] and ends at the next entry."""
    own = (tl.program_id(0) // segments).to(tl.int64)
    bounds = offsets + own * (segments + 1) + tl.program_id(0) % segments
    begin = (tl.load(bounds) + region * REGION).to(tl.int32)
    end = tl.minimum(begin + REGION, tl.load(bounds + 1).to(tl.int32))
    boxes, kept, threshold = boxes + own * room * 4, kept + own * room, decode_float(threshold, ACC)
    within = tl.arange(0, CHUNK)
    for first in range(begin, end, CHUNK):
        place = first + within
        alive = tl.load(kept + place, mask=place < end, other=0) > 0
        if tl.max(alive.to(tl.int32), axis=0) > 0:
            # A candidate that is missing has no box.
            x1, y1, x2, y2 = box_at(boxes, place, alive)
            alive = left_by(boxes, kept, begin, first, x1, y1, x2, y2, alive, threshold, PRODUCT, ACC, CHUNK)
            removes = pairs_overlap(x1, y1, x2, y2, x1, y1, x2, y2, threshold, PRODUCT, ACC)
            removes = removes & (within[:, None] < within[None])
            stays, changed = alive, tl.full((), 1, tl.int32)
            while changed > 0:
                met = removes & stays[:, None]
                left = alive & (tl.max(met.to(tl.int32), axis=0) == 0)
                changed = tl.max((left != stays).to(tl.int32), axis=0)
                stays = left
            tl.store(kept + place, stays.to(tl.int8), mask=place < end)
            # Other threads of the program read these stores in the next chunk.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["region", "room", "segments", "blocks"])
def nms_removal_kernel(
    boxes, numbers, offsets, kept, threshold, region, room, segments, blocks,
    GROUPED: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr, REGION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Remove the later boxes of every segment that kept boxes of its region `region` overlap. A program owns CHUNK
    boxes of a list. Only the segment of its first box, see numbers [lists, room], can begin a region before it."""
    own = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * CHUNK + tl.arange(0, CHUNK)
    bounds = offsets + own * (segments + 1)
    if GROUPED:
        bounds += tl.load(numbers + own * room + (tl.program_id(0) % blocks) * CHUNK)
    begin = (tl.load(bounds) + region * REGION).to(tl.int32)
    boxes, kept, threshold = boxes + own * room * 4, kept + own * room, decode_float(threshold, ACC)
    later = (place >= begin + REGION) & (place < tl.load(bounds + 1))
    alive = tl.load(kept + place, mask=later, other=0) > 0
    if tl.max(alive.to(tl.int32), axis=0) > 0:
        x1, y1, x2, y2 = box_at(boxes, place, alive)
        alive = left_by(boxes, kept, begin, begin + REGION, x1, y1, x2, y2, alive, threshold, PRODUCT, ACC, CHUNK)
        tl.store(kept + place, alive.to(tl.int8), mask=later)


def suppress(
    boxes: Tensor, kept: Tensor, offsets: Tensor, numbers: Tensor | None, longest: int, iou_threshold: float, mmcv: bool
) -> None:
    """Clear the entries of `kept`, [lists, room] of 0 and 1, whose boxes a better box of their segment removes.

    boxes: [lists, room, 4]; offsets: [lists, segments + 1] int64, where each segment begins and the last one ends;
    numbers: [lists, room] int64, the segment of each box, None for one segment per list; longest: an upper bound of the
    boxes of a segment.
    """
    (lists, room), segments, dtype = kept.shape, offsets.size(1) - 1, boxes.dtype
    threshold = encode_float(iou_threshold if mmcv else _threshold(iou_threshold, dtype), dtype)
    constants = {
        "PRODUCT": mmcv,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "REGION": REGION,
        "CHUNK": CHUNK,
        "num_warps": NUM_WARPS,
        **EXACT,
    }
    regions, blocks = triton.cdiv(longest, REGION), triton.cdiv(room, CHUNK)
    with torch.cuda.device_of(boxes):
        for region in range(regions):
            greedy_nms_kernel[lists * segments,](
                boxes, offsets, kept, threshold, region, room, segments, **constants
            )  # fmt: skip
            if region + 1 < regions:
                nms_removal_kernel[lists * blocks,](
                    boxes, offsets if numbers is None else numbers, offsets, kept, threshold, region, room, segments,
                    blocks, GROUPED=numbers is not None, **constants,
                )  # fmt: skip


def nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    max_output: int,
    convention: str,
    segments: int | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fpn_fast.reference.segmented_nms` without counts.

    boxes: [N, B, 4]; scores: [N, B]; groups: [N, B] or None; segments, longest: upper bounds of the groups of an image
    and of the boxes of a group, B by default.
    """
    (batch, room), device = scores.shape, boxes.device
    if batch == 0 or room == 0:
        return first_of(
            torch.zeros_like(scores, dtype=torch.int64), scores.new_zeros(batch, dtype=torch.int64), max_output
        )
    valid = boxes.isfinite().all(-1) & scores.isfinite()
    by_score = scores.where(valid, -math.inf).sort(dim=1, descending=True, stable=True).indices
    if convention == "torchvision_offset" and groups is not None:
        largest = boxes.where(valid[..., None], -math.inf).amax((1, 2))
        boxes, groups = boxes + (groups.to(boxes.dtype) * (largest + 1)[:, None])[..., None], None
    if groups is None:
        order, numbers = by_score, None
        offsets = torch.stack([torch.zeros_like(valid[:, 0], dtype=torch.int64), valid.sum(1)], 1)
    else:
        # Invalid boxes form a last group, after the valid ones, in which nothing is kept.
        groups = groups.where(valid, torch.iinfo(torch.int64).max).gather(1, by_score)
        groups, by_group = groups.sort(dim=1, stable=True)
        order = by_score.gather(1, by_group)
        numbers = torch.zeros_like(groups)
        numbers[:, 1:] = (groups[:, 1:] != groups[:, :-1]).cumsum(1)
        segments = room if segments is None else min(room, segments + 1)
        every = torch.arange(segments + 1, device=device).repeat(batch, 1)
        offsets = torch.searchsorted(numbers, every)
    kept = valid.gather(1, order).to(torch.int8)
    sources = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    suppress(sources, kept, offsets, numbers, room if longest is None else longest, iou_threshold, convention == "mmcv")
    if groups is not None:
        kept = torch.empty_like(kept).scatter_(1, by_group, kept)
    best = kept.sort(dim=1, descending=True, stable=True).indices
    return first_of(by_score.gather(1, best), kept.sum(1), max_output)


def first_of(order: Tensor, counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the first counts[n] entries of each row of order [N, B], at most `size`, as [N, size] padded with -1; and
    their number."""
    counts, taken = counts.clamp(max=size), order[:, :size]
    keep = torch.full((len(order), size), -1, dtype=torch.int64, device=order.device)
    there = torch.arange(taken.size(1), device=order.device) < counts[:, None]
    keep[:, : taken.size(1)] = taken.where(there, -1)
    return keep, counts


def rows_of(table: Tensor, keep: Tensor) -> Tensor:
    """Gather rows [N, K, ...] of table [N, B, ...] at indices keep [N, K]; zeros for index -1."""
    if table.size(1) == 0:
        return table.new_zeros(*keep.shape, *table.shape[2:])
    more = (1,) * (table.dim() - 2)
    index = keep.clamp(min=0).view(*keep.shape, *more).expand(*keep.shape, *table.shape[2:])
    return table.gather(1, index).where((keep >= 0).view(*keep.shape, *more), 0)
