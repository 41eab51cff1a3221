# SPDX-License-Identifier: Apache-2.0
"""Anchor matching in Triton: Note [Matching without the matrix] in csrc/common/matching.h.

A program owns a block of anchors, computed or loaded, and loops over the ground truths. It skips those that overlap
none of its anchors. The highest IoU of a ground truth is an atomic maximum of integers, which does not depend on the
order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.triton import register
from fpn_fast.triton._anchors import anchor_at, box_at, is_finite
from fpn_fast.triton._arguments import decode_float, decode_int, encode_float, encode_int
from fpn_fast.triton._resample import divide
from fpn_fast.triton._roi_align import EXACT

# One warp, so that a maximum over the block stays within the warp; 4 anchors per thread.
BLOCK = 128
NUM_WARPS = 1

BELOW_LOW_THRESHOLD = tl.constexpr(-1)
BETWEEN_THRESHOLDS = tl.constexpr(-2)


@triton.jit
def made_anchor(index, levels, cells, offset, ACC: tl.constexpr):
    """Compute anchors (x1, y1, x2, y2) from `levels`, tuples (first, first_cell, cells, width, stride_y, stride_x), and
    `cells`, tuples (x1, y1, x2, y2)."""
    rest, first_cell, count = index, tl.zeros_like(index), tl.zeros_like(index) + 1
    width, stride_y, stride_x = count, count, count
    for i in tl.static_range(len(levels)):
        # An empty level begins where the next one does, which overwrites it.
        here = index >= decode_int(levels[i][0])
        rest = tl.where(here, index - decode_int(levels[i][0]), rest)
        first_cell = tl.where(here, decode_int(levels[i][1]), first_cell)
        count = tl.where(here, decode_int(levels[i][2]), count)
        width = tl.where(here, decode_int(levels[i][3]), width)
        stride_y = tl.where(here, decode_int(levels[i][4]), stride_y)
        stride_x = tl.where(here, decode_int(levels[i][5]), stride_x)
    cell, place = first_cell + rest % count, rest // count
    return anchor_at(cell, cells, place // width, place % width, stride_y, stride_x, offset, ACC)


@triton.jit
def anchors_of(
    anchors, image_stride, anchor_counts, levels, cells, offset, image, index, M,
    STORED: tl.constexpr, COUNTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return (x1, y1, x2, y2, exists). Missing anchors are inverted and infinite: they overlap nothing and do not
    enlarge the block's bounding box."""
    exists = index < M
    if COUNTED:
        exists = exists & (index < tl.load(anchor_counts + image))
    if STORED:
        x1, y1, x2, y2 = box_at(anchors, image * image_stride + index, exists)
    else:
        x1, y1, x2, y2 = made_anchor(tl.where(exists, index, 0), levels, cells, decode_float(offset, ACC), ACC)
    exists = exists & is_finite(x1, y1, x2, y2)
    infinity = float("inf")
    x1, y1 = tl.where(exists, x1, infinity), tl.where(exists, y1, infinity)
    x2, y2 = tl.where(exists, x2, -infinity), tl.where(exists, y2, -infinity)
    return x1, y1, x2, y2, exists


@triton.jit
def box_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, ACC: tl.constexpr):
    """Return inter / ((area of a + area of b) - inter); 0 for NaN, as between boxes without area."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    area_a, area_b = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
    iou = divide(inter, (area_a + area_b) - inter, ACC)
    return tl.where(iou > 0, iou, 0.0)


@triton.jit
def code_of(best, match, high, low):
    return tl.where(best < low, BELOW_LOW_THRESHOLD, tl.where(best < high, BETWEEN_THRESHOLDS, match))


@triton.jit(do_not_specialize=["image_stride", "M", "G", "blocks"])
def match_anchors_kernel(
    gt_boxes, gt_counts, anchors, image_stride, anchor_counts, levels, cells, offset, high, low, highest, matches, ious,
    M, G, blocks,
    STORED: tl.constexpr, COUNTED: tl.constexpr, LOW_QUALITY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write matches [N, M], with low-quality matches the best ground truth instead of the code; ious [N, M]; and
    highest [N, G], the bits of each ground truth's highest IoU."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x1, y1, x2, y2, exists = anchors_of(
        anchors, image_stride, anchor_counts, levels, cells, offset, image, index, M, STORED, COUNTED, ACC
    )
    left, right, top, bottom = tl.min(x1), tl.max(x2), tl.min(y1), tl.max(y2)
    best = tl.zeros([BLOCK], dtype=ACC)
    # Only an IoU above 0 replaces the first.
    match = tl.zeros([BLOCK], dtype=tl.int32)
    not_finite = tl.full((), -1, dtype=tl.int32)
    count = tl.minimum(tl.load(gt_counts + image), G).to(tl.int32)
    for g in range(count):
        gx1, gy1, gx2, gy2 = box_at(gt_boxes, image * G + g, True)
        finite = is_finite(gx1, gy1, gx2, gy2)
        not_finite = tl.where(finite | (not_finite >= 0), not_finite, g)
        if finite & (gx1 < right) & (left < gx2) & (gy1 < bottom) & (top < gy2):
            iou = box_iou(gx1, gy1, gx2, gy2, x1, y1, x2, y2, ACC)
            # Strictly greater: the first of equal IoUs stays.
            match = tl.where(iou > best, g, match)
            best = tl.maximum(best, iou)
            if LOW_QUALITY:
                highest_here = tl.max(iou)
                # IoUs are not negative, so their bits have their order.
                bits = highest_here.to(highest.dtype.element_ty, bitcast=True)
                tl.atomic_max(highest + image * G + g, bits, mask=highest_here > 0, sem="relaxed")
    # Note [Ground truths that are not finite] in csrc/common/matching.h. Either kernel's code for a NaN is the match.
    match = tl.where(not_finite >= 0, not_finite, match)
    best = tl.where(exists & (not_finite >= 0), float("nan"), best)
    if not LOW_QUALITY:
        match = code_of(best, match, decode_float(high, ACC), decode_float(low, ACC))
    match = tl.where(exists & (count > 0), match, BELOW_LOW_THRESHOLD)
    tl.store(matches + image * M + index, match.to(tl.int64), mask=index < M)
    tl.store(ious + image * M + index, best, mask=index < M)


@triton.jit(do_not_specialize=["image_stride", "M", "G", "blocks"])
def match_anchors_low_quality_kernel(
    gt_boxes, gt_counts, anchors, image_stride, anchor_counts, levels, cells, offset, high, low, highest, matches, ious,
    M, G, blocks,
    STORED: tl.constexpr, COUNTED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn matches [N, M] into codes, except where an anchor has the highest IoU of a ground truth."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    match = tl.load(matches + image * M + index, mask=index < M, other=-1)
    best = tl.load(ious + image * M + index, mask=index < M, other=0.0)
    # No IoU of the block exceeds its highest best IoU.
    bound = tl.max(tl.where(match >= 0, best, -1.0))
    x1, y1, x2, y2, _ = anchors_of(
        anchors, image_stride, anchor_counts, levels, cells, offset, image, index, M, STORED, COUNTED, ACC
    )
    restored = tl.zeros([BLOCK], dtype=tl.int1)
    for g in range(tl.minimum(tl.load(gt_counts + image), G).to(tl.int32)):
        gx1, gy1, gx2, gy2 = box_at(gt_boxes, image * G + g, True)
        wanted = tl.load(highest + image * G + g).to(ACC, bitcast=True)
        # A ground truth without overlap has a highest IoU of 0, which every anchor equals.
        if is_finite(gx1, gy1, gx2, gy2) & (wanted <= bound):
            restored = restored | (box_iou(gx1, gy1, gx2, gy2, x1, y1, x2, y2, ACC) == wanted)
    code = code_of(best, match, decode_float(high, ACC), decode_float(low, ACC))
    tl.store(matches + image * M + index, code, mask=(match >= 0) & ~restored)


def match_anchors(
    gt_boxes: Tensor,
    gt_counts: Tensor,
    anchors: Tensor | None,
    anchor_counts: Tensor | None,
    cell_anchors: list[float],
    cells: list[int],
    sizes: list[int],
    strides: list[int],
    offset: float,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    (n, g), dtype = gt_boxes.shape[:2], gt_boxes.dtype
    levels, count, first_cell = [], 0, 0
    for i, each in enumerate(cells):
        height, width = sizes[2 * i : 2 * i + 2]
        levels.append(tuple(map(encode_int, (count, first_cell, each, width, *strides[2 * i : 2 * i + 2]))))
        count, first_cell = count + each * height * width, first_cell + each
    if anchors is not None:
        count = anchors.size(-2)
    matches, ious = gt_boxes.new_empty((n, count), dtype=torch.int64), gt_boxes.new_empty((n, count))
    if matches.numel() == 0:
        return matches, ious
    highest = gt_boxes.new_zeros((n, g), dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    corners = tuple(encode_float(number, dtype) for number in cell_anchors)
    differ = anchors is not None and anchors.dim() == 3
    blocks = triton.cdiv(count, BLOCK)
    arguments = (
        gt_boxes, gt_counts, gt_boxes if anchors is None else anchors, count if differ else 0,
        gt_counts if anchor_counts is None else anchor_counts, tuple(levels),
        tuple(corners[i : i + 4] for i in range(0, len(corners), 4)),
        *(encode_float(number, dtype) for number in (offset, high_threshold, low_threshold)),
        highest, matches, ious, count, g, blocks,
    )  # fmt: skip
    constants = {
        "STORED": anchors is not None,
        "COUNTED": anchor_counts is not None,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
        **EXACT,
    }
    low_quality = allow_low_quality_matches and g > 0
    with torch.cuda.device_of(gt_boxes):
        match_anchors_kernel[n * blocks,](*arguments, LOW_QUALITY=low_quality, **constants)
        if low_quality:
            match_anchors_low_quality_kernel[n * blocks,](*arguments, **constants)
    return matches, ious


register("match_anchors", match_anchors)
