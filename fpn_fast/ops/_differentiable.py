# SPDX-License-Identifier: Apache-2.0
"""What the heads' ops return where a gradient is recorded: the kernels' values, as functions of the selected rows.

Decisions have no gradient, so they are made on detached tensors. Values are computed again, in plain PyTorch, from the
rows that were selected alone. Entries without a row read zeros, because a gradient of 0 times a NaN would be a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpn_fast.ops.nms import segmented_nms
from fpn_fast.reference.generate_proposals import anchors_at, clip, decode, logistic
from fpn_fast.reference.heatmaps_to_keypoints import LONGEST_SIDE, taps
from fpn_fast.reference.select_detections import decode_distances

Detections = tuple[Tensor, Tensor, Tensor, Tensor]
_PLAIN = [0.0] * 4, [1.0] * 4


def select_detections(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    centerness: Sequence[Tensor],
    cell_anchors: Sequence[float],
    strides: Sequence[int],
    image_sizes: Tensor,
    score_thresh: float,
    pre_nms_top_n: int,
    nms_thresh: float,
    max_detections: int,
    weights: Sequence[float],
    scale_clamp: float,
    distances: bool,
) -> Detections:
    """See :func:`fpn_fast.ops.select_detections`."""
    dtype = image_sizes.dtype
    tables = torch.tensor(cell_anchors, dtype=dtype, device="cpu").view(len(logits), -1, 4)
    levels = []
    for i, cells in enumerate(tables.to(image_sizes.device, non_blocking=True)):
        # [N, pairs in the order (y, x, anchor, class)]
        own, codes = (each.permute(0, 2, 3, 1).flatten(1) for each in (logits[i], deltas[i]))
        centers = [each.permute(0, 2, 3, 1).flatten(1) for each in centerness[i : i + 1]]
        classes = logits[i].size(1) // len(cells)
        with torch.no_grad():
            ranks = own.to(dtype)
            finite = ranks.isfinite()
            for each in centers:
                center = each.to(dtype).unsqueeze(2)
                finite = (finite.unflatten(1, (-1, classes)) & center.isfinite()).flatten(1)
                ranks = _scores(ranks.unflatten(1, (-1, classes)), center).flatten(1)
            ranks = ranks.where(finite, -torch.inf)
            index = _highest(ranks, pre_nms_top_n)
            anchors = anchors_at(index // classes, cells, logits[i].size(3), strides[2 * i : 2 * i + 2], 0.0, dtype)
        found = [_rows(own, index), *(_rows(each, index // classes) for each in centers)]
        found.append(_rows(codes.unflatten(1, (-1, 4)), index // classes))
        levels.append((*(each.to(dtype) for each in found), anchors, index % classes))
    *rows, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))

    def values(heights: list[Tensor], codes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        if distances:
            return decode_distances(anchors, codes), _scores(*heights)
        return decode(anchors, codes, weights, *_PLAIN, scale_clamp, False, False), _scores(*heights)

    with torch.no_grad():
        *heights, codes, anchors = (each.detach() for each in rows)
        boxes, scores = values(heights, codes, anchors)
        valid = (scores > score_thresh) & codes.isfinite().all(-1) & boxes.isfinite().all(-1)
        valid &= torch.stack(heights).isfinite().all(0)
        boxes = clip(boxes, image_sizes[:, None])
        keep, counts = _suppress(boxes, scores, valid, labels, nms_thresh, max_detections)
    *heights, codes, anchors, labels = (_rows(each, keep) for each in (*rows, labels))
    boxes, scores = values(heights, codes, anchors)
    return *_without_padding(keep, clip(boxes, image_sizes[:, None]), scores), labels, counts


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
    """See :func:`fpn_fast.ops.select_box_detections`."""
    dtype, (room, classes) = image_sizes.dtype, logits.shape[1:]
    foreground = max(classes - 1, 1)
    # [N, R * (1 or classes), 4]
    codes = deltas.flatten(1).unflatten(1, (-1, 4))
    per_box = deltas.size(2) // 4

    def decoded(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sources, codes and boxes of pairs [N, K]; -1 for none."""
        row = pairs // foreground
        column = row * per_box + (pairs % foreground + 1 if per_box > 1 else 0)
        own, source = _rows(codes, column.where(pairs >= 0, -1)).to(dtype), _rows(boxes, row).to(dtype)
        return source, own, decode(source, own, weights, *_PLAIN, scale_clamp, False, False)

    with torch.no_grad():
        scores = torch.softmax(logits.double(), -1)[..., 1:].to(dtype)
        if counts is not None:
            scores = scores.where((torch.arange(room, device=boxes.device) < counts[:, None])[..., None], -torch.inf)
        # A comparison with NaN is False.
        scores = scores.where(scores > score_thresh, -torch.inf)
        if class_top_n is None:
            # A box's probabilities sum to one, so fewer than 1 / score_thresh of them are above it.
            most = classes - 1
            if score_thresh * most > 1:
                most = min(most, int(1 / score_thresh) + 1)
            columns = scores.topk(most, dim=2).indices.sort(dim=2).values
            pairs = (torch.arange(room, device=boxes.device)[:, None] * foreground + columns).flatten(1)
        else:
            ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :class_top_n]
            pairs = (ranked * foreground + torch.arange(classes - 1, device=boxes.device)).flatten(1).sort(1).values
        scores = scores.flatten(1).gather(1, pairs)
        source, own, found = decoded(pairs)
        valid = torch.cat([source, own, found], -1).isfinite().all(-1)
        found = clip(found, image_sizes[:, None])
        valid &= (found[..., 2:] - found[..., :2] >= min_size).all(-1)
        keep, kept = _suppress(found, scores, valid, pairs % foreground, nms_thresh, max_detections)
        pairs = _rows(pairs, keep).where(keep >= 0, -1)
        labels = (pairs % foreground + 1).where(keep >= 0, 0)
    rows = _rows(logits, pairs // foreground).double()
    scores = torch.softmax(rows, -1).gather(-1, labels[..., None])[..., 0].to(dtype)
    found = clip(decoded(pairs)[-1], image_sizes[:, None])
    return *_without_padding(keep, found, scores), labels, kept


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The op's results from the keypoints that it found, [R, K, 3], as functions of heatmaps and boxes.

    A keypoint moves with its box. Its score is a sum of 16 pixels of the heatmap.
    """
    accumulate = torch.float64 if heatmaps.dtype == torch.float64 else torch.float32
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    usable = boxes.isfinite().all(1, keepdim=True) & (sides <= LONGEST_SIDE).all(1, keepdim=True)
    boxes, sides = boxes.where(usable, 0)[:, None], sides.where(usable, 1)[:, None]
    with torch.no_grad():
        pixels = sides.ceil()
        # Which pixel of the resized map it is. Float32 tells half pixels apart up to 2**22 pixels from the origin.
        position = (found[..., :2] - boxes[..., :2]) / (sides / pixels) - 0.5
        position = position.where(usable[:, None], 0).round().clamp(min=0).minimum(pixels - 1)
        x, y = (
            taps(position[..., i].to(accumulate), heatmaps.size(3 - i), pixels[..., i].to(accumulate)) for i in (0, 1)
        )
    points = ((position + 0.5) * (sides / pixels) + boxes[..., :2]).to(torch.float32)
    points = torch.cat([points, torch.ones_like(points[..., :1])], 2).where(usable[:, None], 0)
    image, keypoint = (torch.arange(extent, device=heatmaps.device) for extent in heatmaps.shape[:2])
    rows, columns = torch.stack(y[0], -1)[..., None], torch.stack(x[0], -1)[:, :, None]
    pixel = heatmaps[image[:, None, None, None], keypoint[:, None, None], rows, columns].to(accumulate)
    # In the order of the kernels: along x first.
    across = [_weighted(pixel[:, :, row].unbind(-1), x[1]) for row in range(4)]
    return points, _weighted(across, y[1]).to(torch.float32).where(usable, 0)


def _weighted(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total


def _scores(logits: Tensor, *centerness: Tensor) -> Tensor:
    """The sigmoid; with centerness, the square root of the product of both sigmoids."""
    scores = _sigmoid(logits)
    for each in centerness:
        scores = torch.sqrt((scores * _sigmoid(each)).double()).to(logits.dtype)
    return scores


def _sigmoid(logits: Tensor) -> Tensor:
    """The kernels' sigmoid with the gradient of torch's: that of its exponential overflows."""
    if not torch.is_grad_enabled():
        return logistic(logits)
    smooth = torch.sigmoid(logits)
    return logistic(logits).detach() + (smooth - smooth.detach())


def _highest(ranks: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest per image of [N, B], best first, of equal ones the lower first."""
    count = min(count, ranks.size(1))
    if count == 0:
        return ranks.topk(0).indices
    # Of equal values topk takes any.
    lowest = ranks.topk(count).values[:, -1:]
    above, equal = ranks > lowest, ranks == lowest
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True)))
    numbers = torch.arange(1, count + 1, dtype=torch.int32, device=ranks.device).repeat(ranks.size(0), 1)
    index = torch.searchsorted(taken.cumsum(1, dtype=torch.int32), numbers)
    order = ranks.gather(1, index).sort(dim=1, descending=True, stable=True).indices
    return index.gather(1, order)


def _suppress(
    boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, nms_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Of candidates [N, K], the indices [N, D] of those that remain, -1 for none, and their number per image."""
    return segmented_nms(boxes, scores.where(valid, -torch.inf), labels, None, nms_thresh, max_detections)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [N, D, ...] of a table [N, K, ...] at indices [N, D]; zeros at negative ones. Indexing has no atomics."""
    if table.size(1) == 0:
        table = pad(table, (0, 0) * (table.dim() - 2) + (0, 1))
    image = torch.arange(table.size(0), device=table.device)[:, None]
    there = index >= 0
    return table[image, index.clamp(min=0)].where(there.view(*there.shape, *[1] * (table.dim() - 2)), 0)


def _without_padding(keep: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return boxes.where((keep >= 0)[..., None], 0), scores.where(keep >= 0, 0)
