# SPDX-License-Identifier: Apache-2.0
"""The last step of a detector in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.reference.generate_proposals import anchors_at, clip, decode, logistic
from fpn_fast.reference.nms import nms

Detections = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_distances(anchors: Tensor, distances: Tensor) -> Tensor:
    """[K, 4] anchors and (left, top, right, bottom), in sides of the anchor from its centre -> [K, 4] boxes.

    Source: torchvision/models/detection/_utils.py BoxLinearCoder.
    """
    centers = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    reach = distances * (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    return torch.cat([centers - reach[:, :2], centers + reach[:, 2:]], 1)


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
    """Writes what is left of image n's candidates when each removes those of its class that it overlaps."""
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
    """Of each level the best `pre_nms_top_n` pairs of an anchor and a class that score more than `score_thresh`,
    decoded and clipped; of all levels, what class-aware suppression leaves, best first.

    logits, deltas, centerness: L maps [N, A * classes, H, W], [N, 4A, H, W] and, or none, [N, A, H, W]; cell_anchors: L
    tables [A, 4]; strides: L pairs (y, x); image_sizes: [N, 2] (height, width) in the type of the result. Returns
    boxes [N, D, 4], scores [N, D], labels [N, D] and counts [N], zero after the last.

    A score is the logit's sigmoid; with centerness, the root of its product with the centerness' sigmoid. The best are
    by logit, with centerness by score; of equal ones the first in the order of (y, x, anchor, class). Scores that are
    equal count in the order of levels.

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
                # PyTorch's float32 root is not rounded correctly on every machine.
                scores = ranks = torch.sqrt((scores * logistic(centers)).double()).to(dtype)
            index = (valid & (scores > torch.tensor(score_thresh, dtype=dtype))).nonzero().flatten()
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
    """Of all pairs of a box and a class but the first, which is background, those whose probability is more than
    `score_thresh`, of each class the best `class_top_n`; decoded, clipped and filtered by size; what class-aware
    suppression leaves of them, best first.

    logits: [N, R, classes]; deltas: [N, R, 4] or one for each class, [N, R, 4 * classes]; boxes: [N, R, 4]; the boxes
    of image n are its first counts[n], or all; image_sizes: [N, 2] (height, width). All in the type of the result,
    which is as :func:`select_detections` gives it.

    Probabilities are made in float64 and rounded. Of equal ones the first in the order of (box, class) counts more.

    Source: torchvision/models/detection/roi_heads.py and ssd.py, postprocess_detections.
    """
    found, dtype = _empty(image_sizes, max_detections), image_sizes.dtype
    room = logits.size(1)
    for n, count in enumerate([room] * len(logits) if counts is None else counts.clamp(0, room).tolist()):
        scores = torch.softmax(logits[n, :count].double(), -1).to(dtype)
        chosen = scores > torch.tensor(score_thresh, dtype=dtype)
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
