# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: In the order of csrc/common/boxes.h: NmsConvention.
CONVENTIONS = ("torchvision", "mmcv", "torchvision_offset")
#: Boxes whose overlaps with all later boxes are in memory at once.
_BLOCK = 1024


def _threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """Return the largest value of `dtype` up to `iou_threshold`: a quotient in `dtype` exceeds both or neither."""
    rounded = torch.tensor(iou_threshold, dtype=dtype, device="cpu")
    if rounded.item() > iou_threshold:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return rounded.item()


def overlaps(a: Tensor, b: Tensor, iou_threshold: float, convention: str = "torchvision") -> Tensor:
    """Return which pairs of boxes [A, 4] and [B, 4] overlap by more than the threshold: [A, B] bool.

    The rule is ``intersection / union > iou_threshold``, for "mmcv" ``intersection > iou_threshold * union``, with
    every step rounded to the boxes' dtype.

    Source: torchvision/csrc/ops/cpu/nms_kernel.cpp; mmcv/ops/csrc/common/cuda/nms_cuda_kernel.cuh.
    """
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    sides = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - corner).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    if convention == "mmcv":
        return shared > torch.tensor(iou_threshold, dtype=a.dtype, device=a.device) * union
    return shared / union > _threshold(iou_threshold, a.dtype)


def greedy(boxes: Tensor, groups: Tensor | None, iou_threshold: float, convention: str = "torchvision") -> Tensor:
    """Return which boxes [B, 4], best first, are kept, [B] bool: those that no kept box before them overlaps.

    groups: [B]; only boxes of one group remove each other.

    Within a block, the kept boxes are a fixed point of that rule. Each box depends on earlier boxes only, so the fixed
    point is unique, and the iteration from "all are kept" ends after at most the longest chain of overlaps.
    """
    kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for first in range(0, len(boxes), _BLOCK):
        block = slice(first, first + _BLOCK)
        overlap = overlaps(boxes[block], boxes[first:], iou_threshold, convention)
        if groups is not None:
            overlap &= groups[block, None] == groups[None, first:]
        within = overlap[:, : len(overlap)].triu(1)
        allowed, last = kept[block].clone(), None
        while last is None or not torch.equal(allowed, last):
            last, allowed = allowed, kept[block] & ~(within & allowed[:, None]).any(0)
        kept[block] = allowed
        kept[first + _BLOCK :] &= ~(overlap[:, len(overlap) :] & allowed[:, None]).any(0)
    return kept


def nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, convention: str = "torchvision"
) -> Tensor:
    """Return the indices of the kept boxes, scores descending; of equal scores the lower index comes first.

    boxes: [B, 4]; scores: [B]; groups: [B] or None. A box or score that is not finite is ignored. "torchvision_offset"
    moves each group by its index times (the largest coordinate + 1) and then ignores the groups.

    Source: torchvision/ops/boxes.py batched_nms.
    """
    valid = (boxes.isfinite().all(1) & scores.isfinite()).nonzero().flatten()
    order = valid[scores[valid].sort(descending=True, stable=True).indices]
    if len(order) == 0:
        return order
    boxes, groups = boxes[order], None if groups is None else groups[order]
    if convention == "torchvision_offset" and groups is not None:
        boxes, groups = boxes + (groups.to(boxes.dtype) * (boxes.max() + 1))[:, None], None
    return order[greedy(boxes, groups, iou_threshold, convention)]


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    max_output: int,
    convention: str = "torchvision",
) -> tuple[Tensor, Tensor]:
    """Apply :func:`nms` per image; return indices [N, max_output], -1 after the last, and their counts [N], int64.

    boxes: [N, B, 4]; scores: [N, B]; groups: [N, B] or None; counts: [N], the boxes of image n are its first counts[n].
    """
    batch, room = scores.shape
    keep = torch.full((batch, max_output), -1, dtype=torch.int64, device=boxes.device)
    kept = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for n, count in enumerate([room] * batch if counts is None else counts.clamp(0, room).tolist()):
        own = None if groups is None else groups[n, :count]
        found = nms(boxes[n, :count], scores[n, :count], own, iou_threshold, convention)[:max_output]
        keep[n, : len(found)] = found
        kept[n] = len(found)
    return keep, kept
