# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression: torchvision's functions, and one op for all images and groups of a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import check_device, check_integers, check_shape, check_sizes, check_tensor
from fpn_fast.ops._registration import constant, register_op
from fpn_fast.reference.nms import CONVENTIONS


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the boxes that remain after each removes the lower-scored ones it overlaps: :func:`torchvision.ops.nms`.

    Args:
        boxes: [B, 4], (x1, y1, x2, y2); compared in float32 (float64 for float64).
        scores: [B], of any floating-point dtype.
        iou_threshold: intersection over union above which a kept box removes a lower-scored one.

    Returns:
        int64 indices of the kept boxes, scores descending; of equal scores the lower index comes first.

    Raises:
        TypeError, ValueError: see :func:`segmented_nms`.

    Note:
        The length of the result is data, so the call synchronises with the host. :func:`segmented_nms` does not. A box
        or score that is not finite is never kept and removes none.

    >>> nms(torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [8, 8, 9, 9]]), torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist()
    [1, 2]

    Source: torchvision/csrc/ops/cpu/nms_kernel.cpp.
    """
    return _of_one_image(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes within groups: :func:`torchvision.ops.batched_nms`.

    Args:
        boxes, scores, iou_threshold: see :func:`nms`.
        idxs: [B] integers, bools or floats, the group of each box; any values. Equal numbers are one group.

    Returns:
        int64 indices of the kept boxes, see :func:`nms`.

    Raises:
        TypeError, ValueError: see :func:`segmented_nms`.

    Note:
        No boxes of any shape give no indices, like in torchvision.

        Groups are compared. torchvision shifts up to 1,000 boxes (25,000 on a GPU) apart instead: coordinates lose some
        bits, and boxes below zero can meet another group's. ``segmented_nms(..., convention="torchvision_offset")``
        does the same.
    """
    if isinstance(boxes, Tensor) and boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    if isinstance(idxs, Tensor) and idxs.dtype == torch.bool:
        idxs = idxs.long()
    elif isinstance(idxs, Tensor) and idxs.is_floating_point():
        # Equal numbers have equal bits: adding 0 turns -0 into 0.
        idxs = (idxs.double() + 0.0).view(torch.int64)
    return _of_one_image(boxes, scores, idxs, iou_threshold)


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    max_output: int,
    *,
    convention: str = "torchvision",
) -> tuple[Tensor, Tensor]:
    """Suppress the boxes of all images and groups in one call, with outputs of a fixed size.

    Args:
        boxes: [N, B, 4], (x1, y1, x2, y2); compared in float32 (float64 for float64).
        scores: [N, B], of any floating-point dtype.
        groups: [N, B] integers: only boxes of one group remove each other. None: all are one group.
        counts: [N] integers: the boxes of image n are its first counts[n]. None: all B.
        iou_threshold: the overlap above which a kept box removes one with a lower score, or with an equal score and a
            higher index.
        max_output: kept boxes returned per image.
        convention: the overlap rule.
            "torchvision" (default): ``intersection / union > iou_threshold``.
            "mmcv": ``intersection > iou_threshold * union``.
            "torchvision_offset": the first, on boxes moved by ``group * (largest coordinate of the image + 1)`` instead
            of groups, equal to torchvision's batched_nms for up to 1,000 boxes bit for bit.

    Returns:
        (keep, counts): int64 indices [N, max_output] of the kept boxes, scores descending, of equal scores the lower
        index first, and -1 after the last; and their number per image, [N] int64.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes, devices or values do not fit; the message names the rule and the value received.
        BackendUnavailableError: the requested backend cannot serve the boxes' device.

    Note:
        The call does not synchronise with the host. A box or score that is not finite is never kept and removes none.

    Source: torchvision/ops/boxes.py batched_nms; mmcv/ops/nms.py.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be {', '.join(CONVENTIONS[:-1])} or {CONVENTIONS[-1]}, got {convention!r}")
    (max_output,) = check_sizes(max_output=max_output)
    _check_boxes(boxes, "[N, B, 4]", 3)
    boxes, scores = _numbers(boxes, scores)
    if groups is not None:
        groups = check_integers(groups, "groups", "[N, B]", (boxes.size(0), boxes.size(1)), boxes, "boxes")
    if counts is not None:
        counts = check_integers(counts, "counts", "[N]", (boxes.size(0),), boxes, "boxes")
    return _suppress(boxes, scores, groups, counts, iou_threshold, max_output, CONVENTIONS.index(convention))


def _of_one_image(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    _check_boxes(boxes, "[B, 4]", 2)
    boxes, scores = _numbers(boxes, scores)
    if groups is not None:
        groups = check_integers(groups, "idxs", "[B]", (boxes.size(0),), boxes, "boxes").unsqueeze(0)
    keep, counts = _suppress(boxes.unsqueeze(0), scores.unsqueeze(0), groups, None, iou_threshold, boxes.size(0), 0)
    return keep[0, : int(counts)]


def _check_boxes(boxes: Tensor, shape: str, dimensions: int) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes must be a tensor, got {type(boxes).__name__}")
    if boxes.dim() != dimensions or boxes.size(-1) != 4:
        raise ValueError(f"boxes must be {shape}, got {tuple(boxes.shape)}")


def _numbers(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes [..., 4] and scores [...] in the dtype in which they are compared."""
    check_tensor(boxes, "boxes")
    check_tensor(scores, "scores")
    check_shape(scores, "scores", "one for each box", tuple(boxes.shape[:-1]))
    check_device(scores, "scores", boxes, "boxes")
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    return boxes.detach().to(dtype).contiguous(), scores.detach().to(dtype).contiguous()


def _suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, counts: Tensor | None, iou_threshold: float, *output: int
) -> tuple[Tensor, Tensor]:
    """Run the op; `output` is (max_output, index of the convention)."""
    iou_threshold = constant(iou_threshold)
    if math.isnan(iou_threshold):
        raise ValueError("iou_threshold must be a number, got nan")
    backend = backends.choose_for(boxes, "segmented_nms")
    return _FORWARD[backend](boxes, scores, groups, counts, iou_threshold, *output)


def _fake(boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, max_output = boxes.size(0), arguments[-2]
    return boxes.new_empty((batch, max_output), dtype=torch.int64), boxes.new_empty((batch,), dtype=torch.int64)


def _reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    *others, convention = arguments
    return reference.segmented_nms(*(*others, CONVENTIONS[convention]))


_FORWARD = register_op("segmented_nms", fake=_fake, reference=_reference)
