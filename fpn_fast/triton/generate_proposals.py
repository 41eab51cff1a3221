# SPDX-License-Identifier: Apache-2.0
"""Region proposals: Triton ranks, decodes and suppresses; PyTorch takes the top k and sorts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpn_fast.reference.nms import CONVENTIONS
from fpn_fast.triton import register
from fpn_fast.triton._greedy_nms import first_of, rows_of, suppress
from fpn_fast.triton._head_decoding import best_of_levels, coding_of


def generate_proposals(
    objectness: list[Tensor],
    deltas: list[Tensor],
    cell_anchors: list[float],
    strides: list[int],
    image_sizes: Tensor,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float,
    min_size: float,
    weights: list[float],
    means: list[float],
    stds: list[float],
    scale_clamp: float,
    symmetric_clamp: bool,
    mean_center: bool,
    center_offset: float,
    center_clamp: float,
    strict_size: bool,
    logits_out: bool,
    convention: int,
) -> tuple[Tensor, Tensor, Tensor]:
    coding = coding_of(weights, means, stds, scale_clamp, center_clamp, center_offset, image_sizes.dtype)
    found = best_of_levels(
        objectness, [], deltas, cell_anchors, strides, image_sizes, pre_nms_top_n, coding, score_thresh, min_size,
        proposals=True, logits_out=logits_out, strict_size=strict_size, symmetric_clamp=symmetric_clamp,
        mean_center=mean_center,
    )  # fmt: skip
    room = found.scores.size(2)
    kept = found.scores.isfinite().to(torch.int8)
    # Each level is a list with one segment.
    offsets = (torch.arange(2, device=kept.device) * room).repeat(kept.size(0) * kept.size(1), 1)
    mmcv = CONVENTIONS[convention] == "mmcv"
    suppress(found.boxes.flatten(0, 1), kept.flatten(0, 1), offsets, None, room, nms_thresh, mmcv)
    scores = found.scores.where(kept > 0, -math.inf).flatten(1)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    keep, counts = first_of(order, kept.sum((1, 2)), post_nms_top_n)
    return rows_of(found.boxes.flatten(1, 2), keep), rows_of(scores, keep), counts


register("generate_proposals", generate_proposals, by_torch="top-k and sorting")
