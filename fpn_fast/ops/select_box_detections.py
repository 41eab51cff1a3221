# SPDX-License-Identifier: Apache-2.0
"""Detections of a head that scores given boxes: the second stage's proposals, or SSD's default boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import DTYPES, check_sizes
from fpn_fast.ops._heads import check_fours, check_image_sizes, check_numbers
from fpn_fast.ops._registration import register_op
from fpn_fast.ops.nms import check_integers
from fpn_fast.ops.select_detections import empty_detections


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
    """The detections of a batch of images, from the logits and deltas of their boxes.

    Of all pairs of a box and a class but the first, which is background: those whose probability, by softmax, is above
    the threshold, of each class at most the `class_top_n` highest; their boxes, decoded, clipped to the image and
    filtered by size; what is left when each one removes lower ones of its class that it overlaps; and of that the
    `max_detections` highest. Only pairs above the threshold are decoded.

    Args:
        logits: [N, R, classes], of float64, float32, float16 or bfloat16.
        deltas: [N, R, 4], (dx, dy, dw, dh) of each box, or [N, R, 4 * classes], of each box and class.
        boxes: [N, R, 4], (x1, y1, x2, y2) in image pixels.
        counts: [N] of an integer type: the boxes of image n are its first counts[n]. None: all R.
        image_sizes: [N, 2] (height, width) in pixels, of any real type, on the boxes' device.
        score_thresh: a probability has to be above it.
        nms_thresh: intersection over union above which a box removes a lower one of its class.
        max_detections: of each image; 0 or more.
        min_size: the shortest side, in pixels, of a clipped box.
        class_top_n: of each class and image; 0 or more. None: all.
        weights, scale_clamp: a delta is divided by its weight; dw and dh are at most scale_clamp.

    Everything is computed in float32, in float64 if logits, deltas or boxes are of that.

    Returns:
        (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]), D = max_detections: float32 (float64) and int64.
        Boxes are in image pixels, scores descending, labels the classes from 1; zero after the last.

        Equal probabilities count in the order of (box, class). A box with a logit that is a NaN or plus infinity, or
        with a corner or a delta that is not finite, is never selected. Nothing here waits for a GPU.

    Raises:
        TypeError: something is not a tensor, or not of a type above.
        ValueError: shapes, devices or numbers do not fit; the message says which rule was broken, and by what.
        BackendUnavailableError: the backend asked for cannot serve the boxes' device.

    No gradient, as in every detector.

    Source: Girshick, Fast R-CNN, 2015; Liu et al., SSD, 2016; torchvision/models/detection/roi_heads.py and ssd.py
    postprocess_detections.
    """
    logits, deltas, boxes = _check_tables(logits, deltas, boxes)
    counts = check_integers(counts, "counts", boxes, (boxes.size(0),))
    sizes = check_image_sizes(image_sizes, boxes)
    check_sizes(max_detections=max_detections, class_top_n=0 if class_top_n is None else class_top_n)
    (weights,) = check_fours(weights=weights)
    (scale_clamp,) = check_numbers(scale_clamp=scale_clamp)
    score_thresh, min_size, nms_thresh = check_numbers(
        score_thresh=score_thresh, min_size=min_size, nms_thresh=nms_thresh
    )
    backend = backends.choose_for(boxes, "select_box_detections")
    return _FORWARD[backend](
        logits, deltas, boxes, counts, sizes, score_thresh, min_size, class_top_n, nms_thresh, max_detections,
        weights, scale_clamp,
    )  # fmt: skip


def _check_tables(logits: Tensor, deltas: Tensor, boxes: Tensor) -> list[Tensor]:
    """The three in the type in which they are computed, contiguous."""
    tables = {"logits": logits, "deltas": deltas, "boxes": boxes}
    for name, each in tables.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(each).__name__}")
        if each.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {each.dtype}")
        if each.dim() != 3 or each.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"{name} must be [N, R, ...], as logits {tuple(logits.shape)} are, got {tuple(each.shape)}"
            )
        if each.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {each.device}")
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
    logits: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    counts: Tensor | None,
    image_sizes: Tensor,
    score_thresh: float,
    min_size: float,
    class_top_n: int | None,
    nms_thresh: float,
    max_detections: int,
    *coding: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_detections(image_sizes, max_detections)


def _reference(
    logits: Tensor, deltas: Tensor, boxes: Tensor, counts: Tensor | None, image_sizes: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(boxes.device.type, enabled=False):
        return reference.select_box_detections(logits, deltas, boxes, counts, image_sizes, *numbers)


_FORWARD = register_op("select_box_detections", fake=_fake, reference=_reference)
