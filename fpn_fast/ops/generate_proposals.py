# SPDX-License-Identifier: Apache-2.0
"""Region proposals straight from the maps of an RPN's head: selection, decoding and suppression in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
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
from fpn_fast.ops._registration import register_op
from fpn_fast.ops.nms import CONVENTIONS


@dataclass(frozen=True)
class ProposalRule:
    """How a library selects proposals: keywords of :func:`generate_proposals` and, as defaults, torchvision's.

    >>> sorted(name for name, value in vars(DETECTRON2).items() if value != getattr(TORCHVISION, name))
    ['min_size', 'scores', 'strict_size']
    """

    score_thresh: float = 0.0
    min_size: float = 1e-3
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    scale_clamp: float = math.log(1000 / 16)
    clamp: str = "max"
    center: str = "corner"
    center_clamp: float = math.inf
    center_offset: float = 0.0
    strict_size: bool = False
    scores: str = "probability"
    convention: str = "torchvision"


#: Pass one with ``**vars(DETECTRON2)``. Cell anchors and strides follow the library's own rounding and order.
TORCHVISION = ProposalRule()
DETECTRON2 = ProposalRule(min_size=0.0, strict_size=True, scores="logit")
MMDET = ProposalRule(min_size=0.0, strict_size=True, clamp="symmetric", center="mean", convention="mmcv")


def generate_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Sequence[Sequence[float]] | Tensor],
    strides: Sequence[tuple[int, int]],
    image_sizes: Tensor,
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float = TORCHVISION.score_thresh,
    min_size: float = TORCHVISION.min_size,
    weights: Sequence[float] = TORCHVISION.weights,
    means: Sequence[float] = TORCHVISION.means,
    stds: Sequence[float] = TORCHVISION.stds,
    scale_clamp: float = TORCHVISION.scale_clamp,
    clamp: str = TORCHVISION.clamp,
    center: str = TORCHVISION.center,
    center_clamp: float = TORCHVISION.center_clamp,
    center_offset: float = TORCHVISION.center_offset,
    strict_size: bool = TORCHVISION.strict_size,
    scores: str = TORCHVISION.scores,
    convention: str = TORCHVISION.convention,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select an RPN's proposals for a batch of images, straight from the maps of its head.

    Per image and level: take the `pre_nms_top_n` highest logits, decode their boxes, clip them to the image, filter
    them by size and score, and suppress overlapping ones. Per image: keep the `post_nms_top_n` highest scores of all
    levels. Anchors are computed inside the kernel and never stored.

    Args:
        objectness: 1 to 8 maps of logits [N, A, H_l, W_l], of one dtype (float64, float32, float16 or bfloat16) and
            device, with any strides. Under autocast they and the deltas are promoted to the widest dtype among them.
        deltas: as many maps [N, 4A, H_l, W_l], (dx, dy, dw, dh) per anchor.
        cell_anchors: per level A anchors (x1, y1, x2, y2) about the origin, as floats or as a tensor [A, 4]. Reading a
            tensor on a GPU synchronises with the host.
        strides: per level (stride_y, stride_x), integers: pixels between neighbouring anchors.
        image_sizes: [N, 2] (height, width) in pixels, of any real dtype, on the maps' device.
        pre_nms_top_n: boxes kept per level and image before suppression; 0 or more.
        post_nms_top_n: boxes kept per image after suppression; 0 or more.
        nms_thresh: intersection over union above which a box removes a lower-scored one of its level.
        score_thresh: the lowest probability of a proposal; 0 by default.
        min_size: the shortest side of a clipped box, in pixels; 0.001 by default. With `strict_size` a side must be
            longer.
        weights, means, stds: a delta is divided by its weight, multiplied by its std, and its mean is added.
        scale_clamp, clamp: dw and dh are at most scale_clamp, log(1000 / 16) by default; with clamp="symmetric"
            (mmdetection) also at least -scale_clamp, with "max" (default) unbounded below.
        center: how an anchor's centre is computed: "corner" (default) ``x1 + width / 2``, or "mean" ``(x1 + x2) / 2``
            (mmdetection). They round differently.
        center_clamp: the farthest, in pixels, that a centre moves along either axis (mmdetection's ctr_clamp, which
            goes with clamp="max"); infinite by default.
        center_offset: offset of the first anchor from the image's corner, in strides (detectron2's offset); 0 by
            default.
        strict_size: see min_size; False by default.
        scores: "probability" (default), or "logit" (detectron2): what ranks the levels' boxes and is returned.
        convention: "torchvision" (default) or "mmcv": the overlap rule, see :func:`segmented_nms`.

    Defaults are torchvision's. ``**vars(DETECTRON2)`` and ``**vars(MMDET)`` of this module give the other libraries'.

    Returns:
        (boxes [N, P, 4], scores [N, P], counts [N]) with P = post_nms_top_n: float32 (float64 for float64 maps) and
        int64. Boxes are in image pixels, scores descend, entries after an image's last proposal are zero. There is no
        gradient.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or dtypes differ.
        ValueError: shapes, devices or values do not fit; the message names the rule and the value received.
        BackendUnavailableError: the requested backend cannot serve the maps' device.

    Note:
        The call does not synchronise with the host. Equal logits rank in the order (y, x, anchor), equal scores in that
        of levels. A logit that is not finite takes no place among the highest. An anchor with a delta or a corner that
        is not finite is never proposed. Each level is suppressed by itself; torchvision shifts the boxes of up to 1,000
        candidates apart instead, which costs some bits of their coordinates.

    Source: Ren et al., Faster R-CNN, 2015; torchvision/models/detection/rpn.py filter_proposals.
    """
    objectness, deltas = check_head(objectness=objectness, deltas=deltas)
    anchors = objectness[0].size(1)
    check_channels("deltas", "[N, 4A, H, W]", deltas, 4 * anchors, objectness)
    check_choice("clamp", clamp, ("max", "symmetric"))
    check_choice("center", center, ("corner", "mean"))
    check_choice("scores", scores, ("probability", "logit"))
    check_choice("convention", convention, CONVENTIONS[:2])
    pre_nms_top_n, post_nms_top_n = check_sizes(pre_nms_top_n=pre_nms_top_n, post_nms_top_n=post_nms_top_n)
    coding = check_fours(weights=weights, means=means, stds=stds)
    if not center_clamp >= 0:
        raise ValueError(f"center_clamp must be 0 or more pixels, got {center_clamp}")
    flat_strides = check_strides(strides, len(objectness))
    sizes = check_image_sizes(image_sizes, objectness[0])
    cells = flatten_cells(cell_anchors, len(objectness), anchors)
    thresholds = check_numbers(nms_thresh=nms_thresh, score_thresh=score_thresh, min_size=min_size)
    scale_clamp, center_offset, center_clamp = check_numbers(
        scale_clamp=scale_clamp, center_offset=center_offset, center_clamp=center_clamp
    )
    # The largest float32 clamps nothing either, and AOTInductor's runtime cannot read infinity from a package.
    center_clamp = min(center_clamp, torch.finfo(torch.float32).max)
    backend = backends.choose_for(objectness[0], "generate_proposals")
    return _FORWARD[backend](
        objectness, deltas, cells, flat_strides, sizes, pre_nms_top_n, post_nms_top_n, *thresholds,
        *coding, scale_clamp, clamp == "symmetric", center == "mean", center_offset,
        center_clamp, bool(strict_size), scores == "logit", CONVENTIONS.index(convention),
    )  # fmt: skip


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    image_sizes, post_nms_top_n = arguments[4], arguments[6]
    boxes, scores, _, counts = empty_detections(image_sizes, post_nms_top_n)
    return boxes, scores, counts


def _reference(objectness: list[Tensor], deltas: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, convention = arguments
    return run_reference(reference.generate_proposals, [objectness, deltas], *others, CONVENTIONS[convention])


_FORWARD = register_op("generate_proposals", fake=_fake, reference=_reference)
