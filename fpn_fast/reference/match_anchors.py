# SPDX-License-Identifier: Apache-2.0
"""Anchor matching in plain PyTorch: torchvision's box_iou and Matcher for blocks of ground truths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: torchvision's codes of anchors without a match.
BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS = -1, -2
# Ground truths compared at once: the temporary memory is this many rows of M values.
_BLOCK = 8


def grid_anchors(
    cells: Tensor, grids: Sequence[tuple[int, int, int]], strides: Sequence[tuple[float, float]], offset: float
) -> Tensor:
    """Return the anchors of a pyramid, [M, 4], in the order (level, row, column, cell anchor).

    cells: [sum of A_l, 4], the anchors of all levels around a cell's origin; grids: (A_l, H_l, W_l) per level; strides:
    (vertical, horizontal) pixels between cells, per level; offset: of a cell's origin, in strides.
    """
    levels, first = [], 0
    for (count, height, width), (down, right) in zip(grids, strides, strict=True):
        axes = [
            (torch.arange(size, dtype=cells.dtype, device=cells.device) + offset) * stride
            for size, stride in ((height, down), (width, right))
        ]
        y, x = torch.meshgrid(*axes, indexing="ij")
        origins = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        levels.append((origins + cells[first : first + count]).reshape(-1, 4))
        first += count
    return torch.cat(levels) if levels else cells[:0]


def match_anchors(
    gt_boxes: Tensor,
    gt_counts: Tensor,
    anchors: Tensor,
    anchor_counts: Tensor | None,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    """Return matches [N, M] int64 and IoUs [N, M] of gt_boxes [N, G, 4] and anchors [M, 4] or [N, M, 4].

    gt_counts: [N]; anchor_counts: [N] or None; boxes have one floating-point dtype. An IoU is
    inter / ((area of the ground truth + area of the anchor) - inter) with every operation rounded; NaN becomes 0.
    Each anchor matches the first of the ground truths of highest IoU. With low-quality matches, an anchor also keeps
    its match, whatever the thresholds are, if no anchor has a higher IoU with some ground truth. If a ground truth is
    not finite, all finite anchors match the first such, with an IoU of NaN.
    """
    n, g = gt_boxes.shape[:2]
    anchors = anchors.expand(n, -1, -1)
    m = anchors.size(1)
    positions = torch.arange(m, device=anchors.device)
    anchor_is_valid = anchors.isfinite().all(2)
    if anchor_counts is not None:
        anchor_is_valid &= positions < anchor_counts[:, None]
    gt_exists = torch.arange(g, device=gt_boxes.device) < gt_counts[:, None]
    gt_is_valid = gt_exists & gt_boxes.isfinite().all(2)
    not_finite = gt_exists & ~gt_is_valid

    best = gt_boxes.new_zeros((n, m))
    # An IoU of 0 does not replace the first ground truth.
    matches = torch.zeros_like(best, dtype=torch.int64)
    highest = []
    for first in range(0, g, _BLOCK):
        iou = _iou(gt_boxes, gt_is_valid, anchors, anchor_is_valid, first)
        block_best, block_match = iou.max(1)
        better = block_best > best
        best = torch.where(better, block_best, best)
        matches = torch.where(better, block_match + first, matches)
        highest.append(iou.amax(2) if m else iou.new_zeros(iou.shape[:2]))

    low = torch.full((), low_threshold, dtype=best.dtype, device=best.device)
    high = torch.full((), high_threshold, dtype=best.dtype, device=best.device)
    # torchvision compares with the thresholds in the IoU's type.
    codes = matches.masked_fill(best < high, BETWEEN_THRESHOLDS).masked_fill(best < low, BELOW_LOW_THRESHOLD)
    if allow_low_quality_matches:
        for block, first in enumerate(range(0, g, _BLOCK)):
            iou = _iou(gt_boxes, gt_is_valid, anchors, anchor_is_valid, first)
            restored = (iou == highest[block][:, :, None]) & gt_is_valid[:, first : first + _BLOCK, None]
            codes = torch.where(restored.any(1), matches, codes)
    # torchvision's maximum counts the NaN, which is the IoU with a NaN, as the highest.
    spoilt = not_finite.any(1, keepdim=True)
    codes = torch.where(spoilt, (not_finite.cumsum(1) == 0).sum(1, keepdim=True), codes)
    matchable = anchor_is_valid & gt_exists.any(1, keepdim=True)
    return codes.masked_fill(~matchable, BELOW_LOW_THRESHOLD), best.masked_fill(spoilt & matchable, torch.nan)


def _iou(gt_boxes: Tensor, gt_is_valid: Tensor, anchors: Tensor, anchor_is_valid: Tensor, first: int) -> Tensor:
    """Return the IoUs [N, up to _BLOCK, M] of the ground truths from `first` on; 0 where a box is not valid."""
    gts = gt_boxes[:, first : first + _BLOCK, None]
    anchors = anchors[:, None]
    extent = (torch.minimum(gts[..., 2:], anchors[..., 2:]) - torch.maximum(gts[..., :2], anchors[..., :2])).clamp(0)
    inter = extent[..., 0] * extent[..., 1]
    areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (gts, anchors)]
    iou = inter / (areas[0] + areas[1] - inter)
    valid = gt_is_valid[:, first : first + _BLOCK, None] & anchor_is_valid[:, None]
    return torch.where(valid & (iou > 0), iou, 0)
