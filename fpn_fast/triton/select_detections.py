# SPDX-License-Identifier: Apache-2.0
"""Detections of a dense head: Triton ranks, decodes and suppresses; PyTorch takes the top k and sorts."""

from __future__ import annotations

import math

from torch import Tensor

from fpn_fast.triton import register
from fpn_fast.triton._greedy_nms import nms, rows_of
from fpn_fast.triton._head_decoding import best_of_levels, coding_of


def select_detections(
    logits: list[Tensor],
    deltas: list[Tensor],
    centerness: list[Tensor] | None,
    cell_anchors: list[float],
    strides: list[int],
    image_sizes: Tensor,
    score_thresh: float,
    pre_nms_top_n: int,
    nms_thresh: float,
    max_detections: int,
    weights: list[float],
    scale_clamp: float,
    distances: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coding = coding_of(weights, [0.0] * 4, [1.0] * 4, scale_clamp, math.inf, 0.0, image_sizes.dtype)
    found = best_of_levels(
        logits, centerness or [], deltas, cell_anchors, strides, image_sizes, pre_nms_top_n, coding, score_thresh,
        -math.inf, distances=distances,
    )  # fmt: skip
    boxes, scores, labels = found.boxes.flatten(1, 2), found.scores.flatten(1), found.labels.flatten(1)
    classes = logits[0].size(1) * 4 // deltas[0].size(1)
    keep, counts = nms(boxes, scores, labels, nms_thresh, max_detections, "torchvision", segments=classes)
    return *(rows_of(table, keep) for table in (boxes, scores, labels)), counts


register("select_detections", select_detections, by_torch="top-k and sorting")
