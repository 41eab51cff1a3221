# SPDX-License-Identifier: Apache-2.0
"""Detections of a head that scores given boxes: the second stage's proposals, or SSD's default boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops import _differentiable
from fpn_fast.ops._checks import check_device, check_integers, check_sizes, check_tensor
from fpn_fast.ops._heads import check_fours, check_image_sizes, check_numbers
from fpn_fast.ops._outputs import empty_detections
from fpn_fast.ops._registration import records_gradient, register_op


def select_box_detections(
    logits: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    counts: Tensor | None,
    image_sizes: Tensor,
    *,
    score_thresh: float,
    nms_thresh: float,
    max_detections: int,
    min_size: float = 0.0,
    class_top_n: int | None = None,
    weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    scale_clamp: float = math.log(1000 / 16),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the detections of a head that scores given boxes, for a batch of images.

    Of all pairs of a box and a class, without class 0 (background): keep those with a softmax probability above the
    threshold, at most `class_top_n` per class; decode their boxes, clip them to the image and filter them by size;
    suppress overlapping boxes of the same class; keep the `max_detections` highest. Only pairs above the threshold are
    decoded.

    Args:
        logits: [N, R, classes], float64, float32, float16 or bfloat16.
        deltas: [N, R, 4], (dx, dy, dw, dh) per box, or [N, R, 4 * classes], per box and class.
        boxes: [N, R, 4], (x1, y1, x2, y2) in image pixels.
        counts: [N] integers: the boxes of image n are its first counts[n]. None: all R.
        image_sizes: [N, 2] (height, width) in pixels, of any real dtype, on the boxes' device.
        score_thresh: a probability must be above it.
        nms_thresh: intersection over union above which a box removes a lower-scored one of its class.
        max_detections: detections kept per image; 0 or more.
        min_size: the shortest side of a clipped box, in pixels; 0 by default.
        class_top_n: pairs kept per class and image before suppression; 0 or more. None (default): all.
        weights, scale_clamp: a delta is divided by its weight, (10, 10, 5, 5) by default; dw and dh are at most
            scale_clamp, log(1000 / 16) by default.

    Returns:
        (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]) with D = max_detections: float32 (float64 if logits,
        deltas or boxes are float64) and int64. Boxes are in image pixels, scores descend, labels are class indices from
        1, entries after an image's last detection are zero. Boxes and scores are differentiable.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes, devices or values do not fit; the message names the rule and the value received.
        BackendUnavailableError: the requested backend cannot serve the boxes' device.

    Note:
        The call does not synchronise with the host. Equal probabilities rank in the order (box, class). A box is never
        selected if one of its logits is NaN or plus infinity, or a corner or delta is not finite.

    Source: Girshick, Fast R-CNN, 2015; Liu et al., SSD, 2016; torchvision/models/detection/roi_heads.py and ssd.py
    postprocess_detections.
    """
    given = logits, deltas, boxes
    logits, deltas, boxes = _check_tables(logits, deltas, boxes)
    if counts is not None:
        counts = check_integers(counts, "counts", "[N]", (boxes.size(0),), boxes, "boxes")
    sizes = check_image_sizes(image_sizes, boxes)
    (max_detections,) = check_sizes(max_detections=max_detections)
    if class_top_n is not None:
        (class_top_n,) = check_sizes(class_top_n=class_top_n)
    (weights,) = check_fours(weights=weights)
    (scale_clamp,) = check_numbers(scale_clamp=scale_clamp)
    score_thresh, min_size, nms_thresh = check_numbers(
        score_thresh=score_thresh, min_size=min_size, nms_thresh=nms_thresh
    )
    op: Callable[..., Any] = _FORWARD[backends.choose_for(boxes, "select_box_detections")]
    if records_gradient(given):
        op, (logits, deltas, boxes) = _differentiable.select_box_detections, given
    return op(
        logits, deltas, boxes, counts, sizes, score_thresh, min_size, class_top_n, nms_thresh, max_detections,
        weights, scale_clamp,
    )  # fmt: skip


def _check_tables(logits: Tensor, deltas: Tensor, boxes: Tensor) -> list[Tensor]:
    """Return the three tensors, contiguous, in the dtype of the result."""
    tables = {"logits": logits, "deltas": deltas, "boxes": boxes}
    for name, each in tables.items():
        check_tensor(each, name)
        if each.dim() != 3 or each.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"{name} must be [N, R, ...], as logits {tuple(logits.shape)} are, got {tuple(each.shape)}"
            )
        check_device(each, name, logits, "logits")
    classes = logits.size(2)
    if classes < 1:
        raise ValueError("logits must be [N, R, classes] with at least the background, got none")
    if deltas.size(2) not in (4, 4 * classes):
        raise ValueError(f"deltas must be [N, R, 4] or [N, R, {4 * classes}], got {tuple(deltas.shape)}")
    if boxes.size(2) != 4:
        raise ValueError(f"boxes must be [N, R, 4], (x1, y1, x2, y2), got {tuple(boxes.shape)}")
    wide = any(each.dtype == torch.float64 for each in tables.values())
    dtype = torch.float64 if wide else torch.float32
    return [each.detach().to(dtype).contiguous() for each in tables.values()]


def _fake(
    logits: Tensor, deltas: Tensor, boxes: Tensor, counts: Tensor | None, image_sizes: Tensor, *rule: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, max_detections, _, _ = rule
    return empty_detections(image_sizes, max_detections)


def _reference(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Autocast would round the products of the specification.
    with torch.autocast(logits.device.type, enabled=False):
        return reference.select_box_detections(logits, *arguments)


_FORWARD = register_op("select_box_detections", fake=_fake, reference=_reference)
