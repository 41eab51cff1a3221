# SPDX-License-Identifier: Apache-2.0
"""Targets of anchors and proposals by :func:`ops.match_anchors`, equal to those of torchvision's RPN and RoI heads."""

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
    """gt_boxes [G, 4] and boxes [M, 4] -> [M] int64: ``matcher(similarity(gt_boxes, boxes))``, all -1 for G = 0."""
    if gt_boxes.numel() == 0:
        return torch.full(boxes.shape[:1], Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=boxes.device)
    if not _is_served(matcher, similarity, gt_boxes, boxes):
        return matcher(similarity(gt_boxes, boxes))
    return _matches(matcher, gt_boxes[None], None, boxes)[0]


def match_images(
    matcher: Matcher, similarity: Similarity, gt_boxes: Sequence[Tensor], boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`match_boxes` for all images in one call: ground truths [G_n, 4] per image, the same boxes [M, 4] for all.

    Returns:
        Matches [N, M] int64, all -1 in an image without ground truths; and the padded ground truths [N, G, 4], in the
        dtype of torchvision's targets.
    """
    # torchvision's targets of an image without ground truths are float32.
    types = [torch.float32 if each.numel() == 0 else each.dtype for each in gt_boxes]
    target_type = functools.reduce(torch.promote_types, types, types[0])
    padded, counts = ops.pad_boxes([each.to(target_type) for each in gt_boxes])
    if all(each == target_type for each in types) and _is_served(matcher, similarity, padded, boxes):
        return _matches(matcher, padded, counts, boxes), padded
    return torch.stack([match_boxes(matcher, similarity, each, boxes) for each in gt_boxes]), padded


def _is_served(matcher: Matcher, similarity: Similarity, gt_boxes: Tensor, boxes: Tensor) -> bool:
    known = type(matcher) is Matcher and similarity is box_iou and _same_arithmetic(gt_boxes, boxes)
    return not backends.falls_back(matcher, boxes, "match_anchors", known=known)


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
    """Whether torchvision computes the IoU in one dtype, which the op does too. Without boxes torchvision raises."""
    types = {gt_boxes.dtype, boxes.dtype}
    one = types in ({torch.float32}, {torch.float64}, {torch.float32, torch.float16}, {torch.float32, torch.bfloat16})
    return one and len(boxes) > 0


def labels_of(matches: Tensor) -> Tensor:
    """A matcher's indices -> float32 labels: 1 for a match, 0 for background, -1 for an ignored anchor."""
    return (matches + 1).clamp(max=1).to(torch.float32)


def assign_targets_to_anchors(
    matcher: Matcher, similarity: Similarity, anchors: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The labels and boxes of torchvision's RegionProposalNetwork.assign_targets_to_anchors.

    Args:
        anchors: per image [M, 4].
        targets: per image a dict with "boxes" [G, 4].

    Returns:
        Per image the labels [M] float32: 1 for a match, 0 for background, -1 for an ignored anchor. And per image the
        matched boxes [M, 4]: the first ground truth for an anchor without a match, zeros in an image without ground
        truths.
    """
    labels, matched = [], []
    for boxes, target in zip(anchors, targets, strict=False):
        gt_boxes = target["boxes"]
        matches = match_boxes(matcher, similarity, gt_boxes, boxes)
        labels.append(labels_of(matches))
        none = torch.zeros_like(boxes, dtype=torch.float32)
        matched.append(gt_boxes[matches.clamp(min=0)] if gt_boxes.numel() else none)
    return labels, matched


def assign_targets_to_proposals(
    matcher: Matcher, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The indices and labels of torchvision's RoIHeads.assign_targets_to_proposals.

    Args:
        proposals: per image [M, 4].
        gt_boxes, gt_labels: per image [G, 4] and [G].

    Returns:
        Per image the index [M] int64 of each proposal's ground truth, 0 for none. And per image the labels [M] int64: 0
        for background, -1 for proposals that the sampler ignores.
    """
    indices, labels = [], []
    for boxes, gts, of_gts in zip(proposals, gt_boxes, gt_labels, strict=False):
        matches = match_boxes(matcher, box_iou, gts, boxes)
        indices.append(matches.clamp(min=0))
        # Without ground truths there is no label to look up.
        own = of_gts[indices[-1]].to(torch.int64) if gts.numel() else indices[-1]
        labels.append(torch.where(matches >= 0, own, matches + 1))
    return indices, labels
