# SPDX-License-Identifier: Apache-2.0
"""Segmented NMS: PyTorch sorts, Triton suppresses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpn_fast.reference.nms import CONVENTIONS
from fpn_fast.triton import register
from fpn_fast.triton._greedy_nms import nms


def segmented_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    max_output: int,
    convention: int,
) -> tuple[Tensor, Tensor]:
    if counts is not None:
        scores = scores.where(torch.arange(scores.size(1), device=scores.device) < counts[:, None], -math.inf)
    return nms(boxes, scores, groups, iou_threshold, max_output, CONVENTIONS[convention])


register("segmented_nms", segmented_nms, by_torch="sorting")
