# SPDX-License-Identifier: Apache-2.0
"""Targets of anchors and proposals, as torchvision's RPN and RoI heads assign them, by :func:`ops.match_anchors`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from fpn_fast import backends, ops

Similarity = Callable[[Tensor, Tensor], Tensor]


def match_boxes(matcher: Matcher, similarity: Similarity, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """gt_boxes [G, 4], boxes [M, 4] -> [M] int64, what ``matcher(similarity(gt_boxes, boxes))`` gives; G above 0."""
    if not _is_served(matcher, similarity, gt_boxes, boxes):
        return matcher(similarity(gt_boxes, boxes))
    return _matches(matcher, gt_boxes[None], None, boxes)[0]


def match_images(
    matcher: Matcher, similarity: Similarity, gt_boxes: Sequence[Tensor], boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`match_boxes` of each image's ground truths [G_n, 4] and the same boxes [M, 4] for all, in one call.

    Returns: [N, M] int64, -1 throughout an image without ground truths; and the ground truths [N, G, 4], padded, of the
        type that torchvision's targets have.
    """
    # torchvision's targets of an image without ground truths are float32.
    types = [torch.float32 if each.numel() == 0 else each.dtype for each in gt_boxes]
    target_type = functools.reduce(torch.promote_types, types, types[0])
    padded, counts = ops.pad_boxes([each.to(target_type) for each in gt_boxes])
    if all(each == target_type for each in types) and _is_served(matcher, similarity, padded, boxes):
        return _matches(matcher, padded, counts, boxes), padded
    none = torch.full(boxes.shape[:1], Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=boxes.device)
    rows = [match_boxes(matcher, similarity, each, boxes) if each.numel() else none for each in gt_boxes]
    return torch.stack(rows), padded


def _is_served(matcher: Matcher, similarity: Similarity, gt_boxes: Tensor, boxes: Tensor) -> bool:
    usual = type(matcher) is Matcher and similarity is box_iou and _same_arithmetic(gt_boxes, boxes)
    return usual and backends.beats_torchvision(boxes, "match_anchors")


def _matches(matcher: Matcher, gt_boxes: Tensor, counts: Tensor | None, boxes: Tensor) -> Tensor:
    matches, _ = ops.match_anchors(
        gt_boxes,
        counts,
        boxes,
        high_threshold=matcher.high_threshold,
        low_threshold=matcher.low_threshold,
        allow_low_quality_matches=matcher.allow_low_quality_matches,
    )
    return matches


def _same_arithmetic(gt_boxes: Tensor, boxes: Tensor) -> bool:
    """Whether torchvision computes the IoU in one type, as the op does; without boxes it raises."""
    types = {gt_boxes.dtype, boxes.dtype}
    one = types in ({torch.float32}, {torch.float64}, {torch.float32, torch.float16}, {torch.float32, torch.bfloat16})
    return one and len(boxes) > 0


def labels_of(matches: Tensor) -> Tensor:
    """Codes of a matcher -> float32: 1 for a match, 0 for background, -1 for what counts as neither."""
    # -2, -1 and matches to -1, 0 and 1.
    return (matches + 1).clamp(max=1).to(torch.float32)


def assign_targets_to_anchors(
    matcher: Matcher, similarity: Similarity, anchors: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """torchvision's RegionProposalNetwork.assign_targets_to_anchors: the same labels and boxes.

    anchors: [M, 4] of each image; targets: of each image, with "boxes" [G, 4].

    Returns: of each image, labels [M] float32: 1 for a match, 0 for background, -1 for what counts as neither; and its
    ground truth [M, 4], the first where it has none, zeros where the image has none.
    """
    labels, matched = [], []
    for boxes, target in zip(anchors, targets, strict=False):
        gt_boxes = target["boxes"]
        if gt_boxes.numel() == 0:
            labels.append(torch.zeros(boxes.shape[:1], dtype=torch.float32, device=boxes.device))
            matched.append(torch.zeros(boxes.shape, dtype=torch.float32, device=boxes.device))
            continue
        matches = match_boxes(matcher, similarity, gt_boxes, boxes)
        labels.append(labels_of(matches))
        matched.append(gt_boxes[matches.clamp(min=0)])
    return labels, matched


def assign_targets_to_proposals(
    matcher: Matcher, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """torchvision's RoIHeads.assign_targets_to_proposals: the same indices and labels.

    proposals: [M, 4] of each image; gt_boxes, gt_labels: [G, 4] and [G] of each.

    Returns: of each image [M] int64, the ground truth's index, 0 where there is none; and [M] int64, its label, 0 for
    background and -1 for what the sampler ignores.
    """
    indices, labels = [], []
    for boxes, gts, of_gts in zip(proposals, gt_boxes, gt_labels, strict=False):
        if gts.numel() == 0:
            indices.append(torch.zeros(boxes.shape[:1], dtype=torch.int64, device=boxes.device))
            labels.append(torch.zeros_like(indices[-1]))
            continue
        matches = match_boxes(matcher, box_iou, gts, boxes)
        indices.append(matches.clamp(min=0))
        labels.append(torch.where(matches >= 0, of_gts[indices[-1]].to(torch.int64), matches + 1))
    return indices, labels
