# SPDX-License-Identifier: Apache-2.0
"""Detections of a dense head, such as RetinaNet's or FCOS's, straight from its maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops import _differentiable
from fpn_fast.ops._checks import check_sizes
from fpn_fast.ops._heads import (
    check_channels,
    check_choice,
    check_fours,
    check_head,
    check_image_sizes,
    check_numbers,
    check_strides,
    flatten_cells,
    run_reference,
)
from fpn_fast.ops._outputs import empty_detections
from fpn_fast.ops._registration import records_gradient, register_op


def select_detections(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Sequence[Sequence[float]] | Tensor],
    strides: Sequence[tuple[int, int]],
    image_sizes: Tensor,
    *,
    score_thresh: float,
    pre_nms_top_n: int,
    nms_thresh: float,
    max_detections: int,
    centerness: Sequence[Tensor] = (),
    coder: str = "deltas",
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    scale_clamp: float = math.log(1000 / 16),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select a dense head's detections for a batch of images, straight from its maps.

    Per image and level: take the `pre_nms_top_n` highest pairs of an anchor and a class with a score above the
    threshold, decode their boxes and clip them to the image. Per image: suppress overlapping boxes of the same class
    and keep the `max_detections` highest. Anchors are computed inside the kernel and never stored.

    Args:
        logits: 1 to 8 maps [N, A * classes, H_l, W_l], the classes of an anchor adjacent, of one dtype (float64,
            float32, float16 or bfloat16) and device, with any strides: a head's output permuted to [N, H * W * A,
            classes] is a view of such a map. Under autocast all maps are promoted to the widest dtype among them.
        deltas: as many maps [N, 4A, H_l, W_l].
        cell_anchors: per level A anchors (x1, y1, x2, y2) about the origin, as floats or as a tensor [A, 4]. Reading a
            tensor on a GPU synchronises with the host.
        strides: per level (stride_y, stride_x), integers: pixels between neighbouring anchors.
        image_sizes: [N, 2] (height, width) in pixels, of any real dtype, on the maps' device.
        score_thresh: a score must be above it. A score is the logit's sigmoid; with centerness, the square root of its
            product with the sigmoid of the centerness.
        pre_nms_top_n: pairs kept per level and image before suppression; 0 or more.
        nms_thresh: intersection over union above which a box removes a lower-scored one of its class.
        max_detections: detections kept per image; 0 or more.
        centerness: none (default), or as many maps [N, A, H_l, W_l] of logits (FCOS).
        coder: how deltas are read: "deltas" (default), (dx, dy, dw, dh); or "distances", (left, top, right, bottom)
            from the anchor's centre in units of its sides (FCOS).
        weights, scale_clamp: for "deltas": each is divided by its weight; dw and dh are at most scale_clamp, log(1000 /
            16) by default.

    Returns:
        (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]) with D = max_detections: float32 (float64 for
        float64 maps) and int64. Boxes are in image pixels, scores descend, labels are class indices from 0, entries
        after an image's last detection are zero. Boxes and scores are differentiable.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or dtypes differ.
        ValueError: shapes, devices or values do not fit; the message names the rule and the value received.
        BackendUnavailableError: the requested backend cannot serve the maps' device.

    Note:
        The call does not synchronise with the host. Equal logits (scores, with centerness) rank in the order
        (y, x, anchor, class), equal scores in that of levels. A pair with a value that is not finite is never selected.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; Tian et al., FCOS, 2019;
    torchvision/models/detection/retinanet.py and fcos.py postprocess_detections.
    """
    maps = {"logits": logits, "deltas": deltas} | ({"centerness": centerness} if len(centerness) else {})
    given = [list(logits), list(deltas), list(centerness)]
    logits, deltas, *others = check_head(**maps)
    check_choice("coder", coder, ("deltas", "distances"))
    cells = flatten_cells(cell_anchors, len(logits), None)
    anchors = len(cells) // 4 // len(logits)
    if anchors == 0 or logits[0].size(1) % anchors:
        raise ValueError(f"logits must be [N, A * classes, H, W] for {anchors} anchors, got {tuple(logits[0].shape)}")
    check_channels("deltas", "[N, 4A, H, W]", deltas, 4 * anchors, logits)
    centers = others[0] if others else None
    if centers:
        check_channels("centerness", "[N, A, H, W]", centers, anchors, logits)
    pre_nms_top_n, max_detections = check_sizes(pre_nms_top_n=pre_nms_top_n, max_detections=max_detections)
    (weights,) = check_fours(weights=weights)
    (scale_clamp,) = check_numbers(scale_clamp=scale_clamp)
    flat_strides = check_strides(strides, len(logits))
    sizes = check_image_sizes(image_sizes, logits[0])
    score_thresh, nms_thresh = check_numbers(score_thresh=score_thresh, nms_thresh=nms_thresh)
    op: Callable[..., Any] = _FORWARD[backends.choose_for(logits[0], "select_detections")]
    if records_gradient(chain(*given)):
        op, (logits, deltas, centers) = _differentiable.select_detections, given
    return op(
        logits, deltas, centers, cells, flat_strides, sizes, score_thresh, pre_nms_top_n, nms_thresh, max_detections,
        weights, scale_clamp, coder == "distances",
    )  # fmt: skip


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image_sizes, max_detections = arguments[5], arguments[9]
    return empty_detections(image_sizes, max_detections)


def _reference(
    logits: list[Tensor], deltas: list[Tensor], centerness: list[Tensor] | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_reference(reference.select_detections, [logits, deltas, centerness or []], *arguments)


_FORWARD = register_op("select_detections", fake=_fake, reference=_reference)
