# SPDX-License-Identifier: Apache-2.0
"""Matches of anchors and proposals by :func:`ops.match_anchors`, equal to those of torchvision's Matcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from fpn_fast import backends, ops
from fpn_fast.nn._own import Part

Similarity = Callable[[Tensor, Tensor], Tensor]

MATCHER = Part(Matcher, calls=(box_iou,))


def check_targets(targets: Sequence[dict[str, Tensor]], images: int, *names: str) -> None:
    """Raises ValueError unless there are as many targets as images, each with as many rows of its tables `names` as of
    its boxes."""
    if len(targets) != images:
        raise ValueError(f"targets must be one for each of the {images} images, got {len(targets)}")
    for i, target in enumerate(targets):
        # In an image without boxes nothing is looked up.
        boxes = len(target["boxes"]) if target["boxes"].numel() else 0
        for name in names if boxes else ():
            if len(target[name]) != boxes:
                raise ValueError(
                    f"targets must have as many {name} as boxes, got {len(target[name])} and {boxes} for image {i}"
                )


def match_boxes(matcher: Matcher, similarity: Similarity, gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """gt_boxes [G, 4] and boxes [M, 4] -> [M] int64: ``matcher(similarity(gt_boxes, boxes))``, all -1 for G = 0."""
    if gt_boxes.numel() == 0:
        return torch.full(boxes.shape[:1], Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=boxes.device)
    if not _is_served(matcher, similarity, gt_boxes, boxes):
        return matcher(similarity(gt_boxes, boxes))
    return matches_by_op(matcher, gt_boxes[None], None, boxes)[0]


def match_images(
    matcher: Matcher, similarity: Similarity, gt_boxes: Sequence[Tensor], boxes: Tensor | ops.AnchorGrid
) -> tuple[Tensor, Tensor]:
    """:func:`match_boxes` for all images in one call: ground truths [G_n, 4] per image, the same boxes [M, 4] for all,
    or a rule for them in the dtype of the ground truths.

    Returns:
        Matches [N, M] int64, all -1 in an image without ground truths; and the padded ground truths [N, G, 4], in the
        dtype of torchvision's targets.
    """
    # torchvision's targets of an image without ground truths are float32.
    types = [torch.float32 if each.numel() == 0 else each.dtype for each in gt_boxes]
    target_type = functools.reduce(torch.promote_types, types, types[0])
    padded, counts = ops.pad_boxes([each.to(target_type) for each in gt_boxes])
    like = padded.flatten(0, 1) if isinstance(boxes, ops.AnchorGrid) else boxes
    if all(each == target_type for each in types) and _is_served(matcher, similarity, padded, like):
        return matches_by_op(matcher, padded, counts, boxes), padded
    if isinstance(boxes, ops.AnchorGrid):
        boxes = boxes.boxes(padded.dtype, padded.device)
    return torch.stack([match_boxes(matcher, similarity, each, boxes) for each in gt_boxes]), padded


def _is_served(matcher: Matcher, similarity: Similarity, gt_boxes: Tensor, boxes: Tensor) -> bool:
    known = MATCHER.are_own(matcher) and similarity is box_iou and _same_arithmetic(gt_boxes, boxes)
    return not backends.falls_back(matcher, boxes, "match_anchors", known=known)


def matches_by_op(matcher: Matcher, gt_boxes: Tensor, counts: Tensor | None, boxes: Tensor | ops.AnchorGrid) -> Tensor:
    """What `matcher` finds for padded ground truths [N, G, 4]: [N, M], see :func:`ops.match_anchors`."""
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
