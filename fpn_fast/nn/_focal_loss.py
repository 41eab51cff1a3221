# SPDX-License-Identifier: Apache-2.0
"""The classification loss of RetinaNet's head: sync-free, with one temporary of the logits' size instead of twelve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from fpn_fast import ops


def classification_loss(logits: Tensor, matches: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The focal loss of all anchors, divided by each image's number of matched anchors and averaged over images.

    Args:
        logits: [N, M, classes], float32 or float64.
        matches: per image [M] int64: the index of each anchor's ground truth, -1 for background, -2 for an ignored
            anchor.
        labels: per image [G_n] int64: the class of each ground truth.

    Returns:
        A scalar. It equals torchvision's ``RetinaNetClassificationHead.compute_loss`` up to rounding. It has no second
        derivative.
    """
    matched = torch.stack(list(matches))
    positive = matched >= 0
    share = (positive.sum(1, keepdim=True).clamp(min=1) * len(matches)).to(logits.dtype).reciprocal()
    weights = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, 0, share)
    # One class more, because gather needs a row also where an image has no ground truth.
    classes = [F.pad(own, (0, 1))[match.clamp(min=0)] for own, match in zip(labels, matches, strict=True)]
    own_class = torch.where(positive, torch.stack(classes), -1)
    return ops.sigmoid_focal_loss(logits.flatten(0, 1), own_class.flatten(), weights.flatten())
