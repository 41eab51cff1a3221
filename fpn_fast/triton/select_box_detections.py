# SPDX-License-Identifier: Apache-2.0
"""Detections of scored boxes: Triton decodes and suppresses; PyTorch computes the softmax and sorts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpn_fast.triton import register
from fpn_fast.triton._greedy_nms import nms, rows_of
from fpn_fast.triton._head_decoding import coding_of, decode_boxes


def select_box_detections(
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
    weights: list[float],
    scale_clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, room, classes), dtype, device = logits.shape, boxes.dtype, boxes.device
    classes -= 1
    scores = torch.softmax(logits.double(), -1).to(dtype)[..., 1:]
    chosen = scores > score_thresh
    if counts is not None:
        chosen &= (torch.arange(room, device=device) < counts[:, None])[..., None]
    if class_top_n is not None:
        ranked = scores.where(chosen, -1).sort(dim=1, descending=True, stable=True).indices[:, class_top_n:]
        chosen.scatter_(1, ranked, False)
    pairs = room * classes
    given = scores.where(chosen, -math.inf).reshape(batch, pairs)
    coding = coding_of(weights, [0.0] * 4, [1.0] * 4, scale_clamp, math.inf, 0.0, dtype)
    found, found_scores = decode_boxes(boxes, deltas, given, image_sizes, coding, min_size)
    labels = torch.arange(1, classes + 1, device=device).repeat(batch, room)
    longest = room if class_top_n is None else min(room, class_top_n)
    keep, kept = nms(
        found, found_scores, labels, nms_thresh, max_detections, "torchvision", segments=classes, longest=longest
    )
    return *(rows_of(table, keep) for table in (found, found_scores, labels)), kept


register("select_box_detections", select_box_detections, by_torch="softmax and sorting")
