# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: In the order of csrc/common/boxes.h: NmsConvention.
CONVENTIONS = ("torchvision", "mmcv", "torchvision_offset")
#: Boxes whose overlaps with all later ones are held in memory at a time.
_BLOCK = 1024


def _threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `iou_threshold`: a quotient exceeds both or neither."""
    rounded = torch.tensor(iou_threshold, dtype=dtype)
    if rounded.item() > iou_threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded.item()


def overlaps(a: Tensor, b: Tensor, iou_threshold: float, convention: str = "torchvision") -> Tensor:
    """[A, 4] and [B, 4] (x1, y1, x2, y2) -> [A, B] bool: which pairs overlap by more than the threshold.

    ``intersection / union > iou_threshold``, or for "mmcv" ``intersection > iou_threshold * union``, every step rounded
    to the boxes' type.

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
    """[B, 4], best first -> [B] bool: a box is kept unless a kept one before it, of its group, overlaps it.

    Of a block of boxes, those are kept that no kept one of the block overlaps: a fixed point, reached from "all are
    kept" in at most as many rounds as the longest chain of overlaps, and the only one, because each box depends on
    earlier ones.
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
    """[B, 4], [B] and [B] -> the indices of the kept boxes, by score, descending, and by index where scores are equal.

    A box or score that is not finite is not there. "torchvision_offset" moves each group by its number times the
    largest coordinate plus one, and then knows no groups.

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
    """:func:`nms` of each image: [N, B, 4], [N, B], [N, B] and [N] -> the first `max_output` indices and their number.

    Only the first ``counts[n]`` boxes of image n are there. Indices [N, max_output] int64, -1 after the last; numbers
    [N] int64.
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
