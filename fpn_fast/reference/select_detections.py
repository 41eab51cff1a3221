# SPDX-License-Identifier: Apache-2.0
"""Detections in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.reference.generate_proposals import anchors_at, clip, decode, logistic
from fpn_fast.reference.nms import nms

Detections = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_distances(anchors: Tensor, distances: Tensor) -> Tensor:
    """Decode anchors [..., 4] and (left, top, right, bottom) from their centres, in anchor sides, to boxes [..., 4].

    Source: torchvision/models/detection/_utils.py BoxLinearCoder.
    """
    centers = 0.5 * (anchors[..., :2] + anchors[..., 2:])
    sides = anchors[..., 2:] - anchors[..., :2]
    reach = distances * torch.cat([sides, sides], -1)
    return torch.cat([centers - reach[..., :2], centers + reach[..., 2:]], -1)


def _empty(image_sizes: Tensor, max_detections: int) -> Detections:
    batch, device = len(image_sizes), image_sizes.device
    return (
        image_sizes.new_zeros(batch, max_detections, 4),
        image_sizes.new_zeros(batch, max_detections),
        torch.zeros(batch, max_detections, dtype=torch.int64, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def _finish(
    found: Detections, n: int, boxes: Tensor, scores: Tensor, labels: Tensor, nms_thresh: float, max_detections: int
) -> None:
    """Suppress the candidates of image n per class and write those that remain to `found`."""
    kept = nms(boxes, scores, labels, nms_thresh)[:max_detections]
    for target, source in zip(found, (boxes, scores, labels), strict=False):
        target[n, : len(kept)] = source[kept]
    found[3][n] = len(kept)


def select_detections(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    centerness: Sequence[Tensor],
    cell_anchors: Sequence[Tensor],
    strides: Sequence[Sequence[int]],
    image_sizes: Tensor,
    score_thresh: float,
    pre_nms_top_n: int,
    nms_thresh: float,
    max_detections: int,
    weights: Sequence[float],
    scale_clamp: float,
    distances: bool,
) -> Detections:
    """Per level: decode and clip the `pre_nms_top_n` highest pairs of an anchor and a class with a score above
    `score_thresh`. Per image: suppress overlapping boxes of the same class and keep the `max_detections` highest.

    logits, deltas: L maps [N, A * classes, H, W] and [N, 4A, H, W]; centerness: L maps [N, A, H, W] or none;
    cell_anchors: L tables [A, 4]; strides: L pairs (y, x); image_sizes: [N, 2] (height, width) in the dtype of the
    result.

    Returns boxes [N, D, 4], scores [N, D], labels [N, D] and counts [N]; entries after an image's last detection are
    zero. A score is the logit's sigmoid; with centerness, the square root of its product with the sigmoid of the
    centerness. Pairs rank by logit, with centerness by score; equal ones in the order (y, x, anchor, class). Equal
    scores of different levels rank in the order of levels.

    Source: torchvision/models/detection/retinanet.py and fcos.py, postprocess_detections.
    """
    found, dtype = _empty(image_sizes, max_detections), image_sizes.dtype
    for n in range(len(image_sizes)):
        candidates = []
        for i, (cells, stride) in enumerate(zip(cell_anchors, strides, strict=True)):
            values = logits[i][n].permute(1, 2, 0).flatten().to(dtype)
            classes = logits[i].size(1) // len(cells)
            valid, scores, ranks = values.isfinite(), logistic(values), values
            if centerness:
                centers = centerness[i][n].permute(1, 2, 0).flatten().to(dtype).repeat_interleave(classes)
                valid &= centers.isfinite()
                # PyTorch's float32 square root is not correctly rounded on every machine.
                scores = ranks = torch.sqrt((scores * logistic(centers)).double()).to(dtype)
            index = (valid & (scores > torch.tensor(score_thresh, dtype=dtype, device="cpu"))).nonzero().flatten()
            index = index[ranks[index].sort(descending=True, stable=True).indices[:pre_nms_top_n]]
            anchors = anchors_at(index // classes, cells, logits[i].size(3), stride, 0.0, dtype)
            codes = deltas[i][n].view(-1, 4, *deltas[i].shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4).to(dtype)
            codes = codes[index // classes]
            plain = [0.0] * 4, [1.0] * 4
            boxes = (
                decode_distances(anchors, codes)
                if distances
                else decode(anchors, codes, weights, *plain, scale_clamp, False, False)
            )
            valid = codes.isfinite().all(1) & boxes.isfinite().all(1)
            boxes = clip(boxes, image_sizes[n])
            candidates.append((boxes[valid], scores[index][valid], (index % classes)[valid]))
        joined, scores, labels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        _finish(found, n, joined, scores, labels, nms_thresh, max_detections)
    return found


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
    weights: Sequence[float],
    scale_clamp: float,
) -> Detections:
    """Of all pairs of a box and a class, without class 0 (background): take those with a probability above
    `score_thresh`, at most `class_top_n` per class; decode, clip and filter them by size; suppress overlapping boxes of
    the same class and keep the `max_detections` highest.

    logits: [N, R, classes]; deltas: [N, R, 4], or [N, R, 4 * classes] per class; boxes: [N, R, 4]; counts: [N], the
    boxes of image n are its first counts[n], None for all; image_sizes: [N, 2] (height, width). All have the dtype of
    the result, see :func:`select_detections`.

    Probabilities are computed in float64 and rounded. Equal ones rank in the order (box, class).

    Source: torchvision/models/detection/roi_heads.py and ssd.py, postprocess_detections.
    """
    found, dtype = _empty(image_sizes, max_detections), image_sizes.dtype
    room = logits.size(1)
    for n, count in enumerate([room] * len(logits) if counts is None else counts.clamp(0, room).tolist()):
        scores = torch.softmax(logits[n, :count].double(), -1).to(dtype)
        chosen = scores > torch.tensor(score_thresh, dtype=dtype, device="cpu")
        chosen[:, :1] = False
        if class_top_n is not None:
            ranked = scores.where(chosen, -1).sort(dim=0, descending=True, stable=True).indices[class_top_n:]
            chosen.scatter_(0, ranked, False)
        box, label = chosen.nonzero().unbind(1)
        codes = deltas[n, :count].view(count, deltas.size(2) // 4, 4)
        codes = codes[box, label if codes.size(1) > 1 else torch.zeros_like(label)]
        sources = boxes[n, box]
        decoded = decode(sources, codes, weights, [0.0] * 4, [1.0] * 4, scale_clamp, False, False)
        valid = sources.isfinite().all(1) & codes.isfinite().all(1) & decoded.isfinite().all(1)
        decoded = clip(decoded, image_sizes[n])
        valid &= (decoded[:, 2:] - decoded[:, :2] >= min_size).all(1)
        _finish(found, n, decoded[valid], scores[box, label][valid], label[valid], nms_thresh, max_detections)
    return found
