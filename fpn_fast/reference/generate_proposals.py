# SPDX-License-Identifier: Apache-2.0
"""Region proposals in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast.reference.nms import greedy


def exponential(x: Tensor) -> Tensor:
    """Compute exp in float64 and round it: the same value on every machine, unlike a float32 exp."""
    return torch.exp(x.double()).to(x.dtype)


def logistic(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)) with every step rounded, like PyTorch's sigmoid."""
    return 1 / (1 + exponential(-x))


def anchors_at(
    index: Tensor, cells: Tensor, width: int, stride: Sequence[int], center_offset: float, dtype: torch.dtype
) -> Tensor:
    """Return the anchors [..., 4] at flat indices [...] of (y, x, anchor): cell anchors moved by (x + offset) * stride.

    Source: torchvision/models/detection/anchor_utils.py; detectron2/modeling/anchor_generator.py.
    """
    cell, place = index % len(cells), index // len(cells)
    y = ((place // width).to(dtype) + center_offset) * stride[0]
    x = ((place % width).to(dtype) + center_offset) * stride[1]
    return torch.stack([x, y, x, y], -1) + cells[cell]


def decode(
    anchors: Tensor,
    deltas: Tensor,
    weights: Sequence[float],
    means: Sequence[float],
    stds: Sequence[float],
    scale_clamp: float,
    symmetric_clamp: bool,
    mean_center: bool,
    center_clamp: float = math.inf,
) -> Tensor:
    """Decode anchors [..., 4] and deltas [..., 4], (dx, dy, dw, dh), to boxes [..., 4] with every step rounded.

    Source: torchvision/models/detection/_utils.py BoxCoder; detectron2/modeling/box_regression.py; mmdetection's
    DeltaXYWHBBoxCoder.
    """
    codes = deltas / _beside(weights, deltas) * _beside(stds, deltas) + _beside(means, deltas)
    sides = anchors[..., 2:] - anchors[..., :2]
    centers = (anchors[..., :2] + anchors[..., 2:]) * 0.5 if mean_center else anchors[..., :2] + 0.5 * sides
    scales = codes[..., 2:].clamp(min=-scale_clamp if symmetric_clamp else None, max=scale_clamp)
    moved = (codes[..., :2] * sides).clamp(-center_clamp, center_clamp) + centers
    reach = 0.5 * (exponential(scales) * sides)
    return torch.cat([moved - reach, moved + reach], -1)


def _beside(values: Sequence[float], like: Tensor) -> Tensor:
    """`values` on the device of `like`. The driver stages a copy this small, so it does not synchronise."""
    return torch.tensor(values, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)


def clip(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Clip boxes [..., 4] to images of (height, width), [..., 2]."""
    limits = image_size.flip(-1)
    return boxes.clamp(min=0).clamp(max=torch.cat([limits, limits], -1))


def _propose(
    logits: Tensor,
    deltas: Tensor,
    cells: Tensor,
    stride: Sequence[int],
    image_size: Tensor,
    pre_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float,
    min_size: float,
    coding: tuple[Any, ...],
    center_offset: float,
    strict_size: bool,
    convention: str,
) -> tuple[Tensor, Tensor]:
    """Return the boxes [K, 4] and logits [K] kept of one level of one image, [A, H, W] and [4A, H, W], best first."""
    width, dtype = logits.size(2), image_size.dtype
    logits = logits.permute(1, 2, 0).flatten().to(dtype)
    deltas = deltas.view(-1, 4, *deltas.shape[1:]).permute(2, 3, 0, 1).reshape(-1, 4)
    finite = logits.isfinite().nonzero().flatten()
    index = finite[logits[finite].sort(descending=True, stable=True).indices[:pre_nms_top_n]]
    logits, deltas = logits[index], deltas[index].to(dtype)
    anchors = anchors_at(index, cells, width, stride, center_offset, dtype)
    boxes = decode(anchors, deltas, *coding)
    valid = deltas.isfinite().all(1) & boxes.isfinite().all(1) & (logistic(logits) >= score_thresh)
    boxes = clip(boxes, image_size)
    sides = boxes[:, 2:] - boxes[:, :2]
    valid &= (sides > min_size if strict_size else sides >= min_size).all(1)
    boxes, logits = boxes[valid], logits[valid]
    kept = greedy(boxes, None, nms_thresh, convention)
    return boxes[kept], logits[kept]


def generate_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cell_anchors: Sequence[Tensor],
    strides: Sequence[Sequence[int]],
    image_sizes: Tensor,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    score_thresh: float,
    min_size: float,
    weights: Sequence[float],
    means: Sequence[float],
    stds: Sequence[float],
    scale_clamp: float,
    symmetric_clamp: bool,
    mean_center: bool,
    center_offset: float,
    center_clamp: float,
    strict_size: bool,
    logits_out: bool,
    convention: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per level: decode, clip and filter the `pre_nms_top_n` highest logits, then suppress overlapping boxes. Per
    image: keep the `post_nms_top_n` highest scores of all levels.

    objectness, deltas: L maps [N, A, H, W] and [N, 4A, H, W]; cell_anchors: L tables [A, 4]; strides: L pairs (y, x);
    image_sizes: [N, 2] (height, width) in the dtype of the result. The other arguments are those of
    :func:`fpn_fast.ops.generate_proposals`, with flags for its words.

    Returns boxes [N, P, 4], scores [N, P] and counts [N]; entries after an image's last proposal are zero. Equal logits
    rank in the order (y, x, anchor), equal scores in that of levels.

    Source: torchvision/models/detection/rpn.py.
    """
    batch = len(image_sizes)
    boxes, scores = image_sizes.new_zeros(batch, post_nms_top_n, 4), image_sizes.new_zeros(batch, post_nms_top_n)
    counts = torch.zeros(batch, dtype=torch.int64, device=image_sizes.device)
    coding = (weights, means, stds, scale_clamp, symmetric_clamp, mean_center, center_clamp)
    rule = (pre_nms_top_n, nms_thresh, score_thresh, min_size, coding, center_offset, strict_size, convention)
    for n in range(batch):
        levels = [
            _propose(logits[n], codes[n], cells, stride, image_sizes[n], *rule)
            for logits, codes, cells, stride in zip(objectness, deltas, cell_anchors, strides, strict=True)
        ]
        found, found_scores = torch.cat([each[0] for each in levels]), torch.cat([each[1] for each in levels])
        if not logits_out:
            found_scores = logistic(found_scores)
        best = found_scores.sort(descending=True, stable=True).indices[:post_nms_top_n]
        boxes[n, : len(best)], scores[n, : len(best)] = found[best], found_scores[best]
        counts[n] = len(best)
    return boxes, scores, counts
