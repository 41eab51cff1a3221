# SPDX-License-Identifier: Apache-2.0
"""The losses of torchvision's one-stage detectors in fixed shapes. Needs torchvision.

torchvision looks up the foreground of each image, and so reads its length from the device. Here losses are computed for
all anchors and masked. No shape depends on a value: a step synchronises with nothing, compiles as one graph, and can be
captured in a CUDA graph. Masked entries read harmless numbers, because a gradient of 0 times a NaN would be a NaN.

Boxes and losses are float32 (float64 for float64 heads), also under autocast, where torchvision rounds anchors and
decoded boxes to the head's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher

from fpn_fast import ops
from fpn_fast.nn._matching import matches_by_op
from fpn_fast.nn.dense_detectors import check_labels
from fpn_fast.nn.static_sampling import encoded
from fpn_fast.nn.static_targets import StaticTargets

__all__ = ["fcos_losses", "retinanet_losses", "ssd_losses"]

#: Losses of boxes that torchvision's RetinaNet may have, of those whose gradient needs no decoded box.
_BOX_LOSSES = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def retinanet_losses(
    head_outputs: Mapping[str, Tensor], anchors: Tensor, targets: StaticTargets, model: Any
) -> dict[str, Tensor]:
    """The losses of a RetinaNet: torchvision's up to rounding.

    Args:
        head_outputs: "cls_logits" [N, M, classes] and "bbox_regression" [N, M, 4].
        anchors: [M, 4], in pixels of the canvas.
        targets: of N images, in pixels of the canvas.
        model: a RetinaNet, whose matcher and box coder are used.

    Returns:
        "classification" and "bbox_regression", scalars.

    Raises:
        ValueError: the model's box loss is neither l1, torchvision's default, nor smooth_l1.
        RuntimeError: a label is no class; on a GPU an assertion of the device.
    """
    head = model.head.regression_head
    if head._loss_type not in _BOX_LOSSES:
        raise ValueError(f"a RetinaNet's box loss must be {' or '.join(_BOX_LOSSES)}, got {head._loss_type}")
    matcher, logits = model.proposal_matcher, head_outputs["cls_logits"]
    check_labels(targets.labels, logits.shape[-1])
    matches = matches_by_op(matcher, targets.boxes, targets.counts, anchors)
    foreground, codes = matches >= 0, _wide(head_outputs["bbox_regression"])
    # Of each image the mean over its foreground, and the mean of the images.
    share = (foreground.sum(1, keepdim=True).clamp(min=1) * len(matches)).to(codes.dtype).reciprocal()
    weights = torch.where(matches == Matcher.BETWEEN_THRESHOLDS, 0, share)
    labels = _own(targets.labels, matches).where(foreground, -1)
    found, goals = _codes(head.box_coder, codes, anchors, targets, matches)
    box_losses = _BOX_LOSSES[head._loss_type](found, goals, reduction="none")
    return {
        "classification": ops.sigmoid_focal_loss(logits.flatten(0, 1), labels.flatten(), weights.flatten()),
        "bbox_regression": (box_losses.sum((1, 2)) * share[:, 0]).sum(),
    }


def fcos_losses(
    head_outputs: Mapping[str, Tensor],
    anchors: Tensor,
    targets: StaticTargets,
    model: Any,
    anchors_per_level: Sequence[int],
) -> dict[str, Tensor]:
    """The losses of an FCOS: torchvision's up to rounding. See :func:`retinanet_losses`.

    Args:
        head_outputs: "cls_logits" [N, M, classes], "bbox_regression" [N, M, 4] and "bbox_ctrness" [N, M, 1].
        anchors_per_level: finest first; their sum is M.

    Returns:
        "classification", "bbox_regression" and "bbox_ctrness", scalars.
    """
    logits = head_outputs["cls_logits"]
    check_labels(targets.labels, logits.shape[-1])
    matches = _fcos_matches(anchors, anchors_per_level, targets, model.center_sampling_radius)
    foreground = matches >= 0
    count = foreground.sum().clamp(min=1)
    labels = _own(targets.labels, matches).where(foreground, -1)
    # As pairs of corners, (x1, y1) and (x2, y2).
    (start, end), matched = _corners(anchors), foreground[..., None]
    own = _corners(_own(targets.boxes, matches).where(matched, anchors))
    centers = (start + end) / 2
    left, right = _corners(_wide(head_outputs["bbox_regression"]))
    if model.head.box_coder.normalize_by_size:
        left, right = (each * (end - start) for each in (left, right))
    found = (centers - left).where(matched, start), (centers + right).where(matched, end)
    before, after = centers - own[0], own[1] - centers
    # The foreground is inside its box, and an anchor's centre is inside the anchor.
    centerness = (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).sqrt()
    heights = _wide(head_outputs["bbox_ctrness"])[..., 0].where(foreground, 0)
    losses = {
        "bbox_regression": _giou_losses(found, own),
        "bbox_ctrness": F.binary_cross_entropy_with_logits(heights, centerness.to(heights.dtype), reduction="none"),
    }
    return {
        "classification": ops.sigmoid_focal_loss(logits.flatten(0, 1), labels.flatten()) / count,
        **{name: each.where(foreground, 0).sum() / count for name, each in losses.items()},
    }


def ssd_losses(
    head_outputs: Mapping[str, Tensor], anchors: Tensor, targets: StaticTargets, model: Any
) -> dict[str, Tensor]:
    """The losses of an SSD: torchvision's up to rounding. See :func:`retinanet_losses`.

    Args:
        anchors: [M, 4], the default boxes, in pixels of the canvas.

    Returns:
        "bbox_regression" and "classification", scalars. Labels count from 1. Among negatives of equal loss the first
        anchors are taken.
    """
    matches = _ssd_matches(anchors, targets, model.proposal_matcher)
    foreground, codes = matches >= 0, _wide(head_outputs["bbox_regression"])
    count = foreground.sum().clamp(min=1)
    found, goals = _codes(model.box_coder, codes, anchors, targets, matches)
    labels = _own(targets.labels, matches).where(foreground, 0)
    logits = _wide(head_outputs["cls_logits"])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    positive = labels > 0
    wanted = model.neg_to_pos_ratio * positive.sum(1, keepdim=True)
    hardest = losses.detach().masked_fill(positive, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    # Where an image has too few negatives, positives count twice, as in torchvision.
    mined = hardest.argsort(1) < wanted
    return {
        "bbox_regression": F.smooth_l1_loss(found, goals, reduction="sum") / count,
        "classification": (losses.where(positive, 0).sum() + losses.where(mined, 0).sum()) / count,
    }


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _own(table: Tensor, matches: Tensor) -> Tensor:
    """table [N, G, ...] of ground truths -> [N, M, ...], the row of each anchor's match, any row where it has none."""
    image = torch.arange(len(table), device=table.device)[:, None]
    return table[image, matches.clamp(min=0)]


def _codes(
    coder: BoxCoder, codes: Tensor, anchors: Tensor, targets: StaticTargets, matches: Tensor
) -> tuple[Tensor, Tensor]:
    """The head's codes [N, M, 4] and those of the matched boxes, both zeros for anchors without a match."""
    matched = matches >= 0
    goals = encoded(coder, _own(targets.boxes, matches), anchors, matched)
    return codes.where(matched[..., None], 0), goals.to(codes.dtype)


def _fcos_matches(anchors: Tensor, anchors_per_level: Sequence[int], targets: StaticTargets, radius: float) -> Tensor:
    """[N, M]: per anchor the smallest ground truth around its centre, of those of its level's range, -1 for none.

    torchvision's decisions, bit for bit: FCOS.compute_loss in torchvision/models/detection/fcos.py.
    """
    sides, finest, coarsest = anchors[:, 2] - anchors[:, 0], anchors_per_level[0], anchors_per_level[-1]
    # The finest level takes all that is small, the coarsest all that is large.
    lower = torch.cat([sides.new_zeros(finest), 4 * sides[finest:]])
    upper = torch.cat([8 * sides[: len(sides) - coarsest], sides.new_full((coarsest,), torch.inf)])
    # [M, 1] and [N, 1, G]
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2)[:, None].unbind(-1)
    x1, y1, x2, y2 = targets.boxes[:, None].unbind(-1)
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    nearest = torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom))
    furthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
    off = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
    matched = (off < radius * sides[:, None]) & (nearest > 0) & targets.real()[:, None]
    matched &= (furthest > lower[:, None]) & (furthest < upper[:, None])
    # The float32 difference decides, and not the area alone: of areas that round alike the first counts.
    ranks = (1e8 - (x2 - x1) * (y2 - y1)).where(matched, 0)
    best, owners = ranks.max(2)
    return owners.where(best >= 1e-5, -1)


def _ssd_matches(anchors: Tensor, targets: StaticTargets, matcher: Matcher) -> Tensor:
    """[N, M]: the ground truth of each default box, -1 for none: torchvision's SSDMatcher.

    A ground truth also gets the default box of highest IoU, whatever that is; of two that want one, the last gets it.
    """
    matches, _ = ops.match_anchors(
        targets.boxes,
        targets.counts,
        anchors,
        high_threshold=matcher.high_threshold,
        low_threshold=matcher.low_threshold,
        allow_low_quality_matches=False,
    )
    # With the roles exchanged, and every IoU a match.
    best, _ = ops.match_anchors(
        anchors.expand(len(matches), -1, -1),
        None,
        targets.boxes,
        high_threshold=0.0,
        low_threshold=0.0,
        allow_low_quality_matches=False,
        anchor_counts=targets.counts,
    )
    places, slots = (torch.arange(n, device=matches.device) for n in (matches.size(1), best.size(1)))
    taken = slots[:, None].where(best[..., None] == places, -1).amax(1)
    return taken.where(taken >= 0, matches)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] -> (x1, y1) and (x2, y2), [..., 2] each."""
    first, last = boxes.unflatten(-1, (2, 2)).unbind(-2)
    return first, last


def _area(sides: Tensor) -> Tensor:
    # The gradient of a product over a dimension would read on the host whether there are zeros.
    width, height = sides.unbind(-1)
    return width * height


def _giou_losses(boxes: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], eps: float = 1e-7) -> Tensor:
    """Of boxes as corners -> [...]: torchvision's ``generalized_box_iou_loss``, which selects those that overlap."""
    (first, last), (other_first, other_last) = boxes, others
    overlap = torch.minimum(last, other_last) - torch.maximum(first, other_first)
    common = _area(overlap).where((overlap > 0).all(-1), 0)
    union = _area(last - first) + _area(other_last - other_first) - common
    hull = _area(torch.maximum(last, other_last) - torch.minimum(first, other_first))
    return 1 - (common / (union + eps) - (hull - union) / (hull + eps))
