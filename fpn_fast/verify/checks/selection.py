# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression and anchor matching, on scenes without ties, full of ties, and with NaN and infinities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.ops.nms import CONVENTIONS
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.draw import INF, NAN, Draw, padded
from fpn_fast.verify.trial import Trial, decision

_BAD = (NAN, INF, -INF, 1e30)


def whole_boxes(draw: Draw, count: int, side: int = 8) -> Tensor:
    """[count, 4] float64 boxes with small integer corners, so that overlaps often equal each other and thresholds."""
    corners = draw.integers(0, side, count, 2, 2).sort(1).values
    return corners.flatten(1).double()


def spoil(draw: Draw, values: Tensor, share: float = 0.05) -> Tensor:
    """`values` with a share of them NaN, infinite or huge."""
    bad = torch.tensor(_BAD, dtype=values.dtype)[draw.integers(0, len(_BAD) - 1, *values.shape)]
    return torch.where(draw.uniform(*values.shape) < share, bad, values)


@register("segmented_nms", keys=("batch", "boxes"))
def segmented_nms(draw: Draw) -> Trial:
    flavour = draw.flavour("apart", "whole", "bad numbers", "apart", "many", "whole", "empty")
    batch = draw.size("batch", lambda: draw.integer(1, 3))
    room = draw.size("boxes", lambda: {"many": 1200, "empty": 0}.get(flavour, draw.integer(1, 150)))
    boxes, scores = _scored_boxes(draw, batch, room, flavour)
    groups = None
    if draw.chance(0.7):
        numbers = torch.tensor([-(2**62), -1, 0, 7, 2**62] if draw.chance(0.2) else range(draw.integer(1, 20)))
        groups = numbers[draw.integers(0, len(numbers) - 1, batch, room)].to(draw.device)
    counts = draw.integers(-1, room + 1, batch).to(draw.device) if draw.chance(0.5) else None
    convention = draw.choice(CONVENTIONS)
    threshold = draw.choice((-0.5, 0.0, 0.25, 0.5, 0.5, 0.7, 1.0))
    limit = draw.integer(0, room + 2)
    return decision(
        f"{batch} x {room} boxes, {flavour}, groups {groups is not None}, over {threshold}, {convention}",
        lambda: ops.segmented_nms(boxes, scores, groups, counts, threshold, limit, convention=convention),
        lambda: reference.segmented_nms(
            boxes.cpu().to(draw.wide), scores.cpu().to(draw.wide), None if groups is None else groups.cpu(),
            None if counts is None else counts.cpu(), threshold, limit, convention,
        ),
    )  # fmt: skip


def _scored_boxes(draw: Draw, batch: int, room: int, flavour: str) -> tuple[Tensor, Tensor]:
    """[batch, room, 4] and [batch, room] on the device."""
    if flavour == "whole":
        boxes = whole_boxes(draw, batch * room)
        scores = draw.integers(-1, 3, batch * room).double()
    else:
        boxes = boxes_in(draw, batch * room, 200, 300) if room < 1000 else draw.uniform(batch * room, 4) * 300
        boxes[:, 2:] = torch.maximum(boxes[:, :2], boxes[:, 2:])
        scores = draw.normal(batch * room)
    if flavour == "bad numbers":
        boxes, scores = spoil(draw, boxes, 0.03), spoil(draw, scores, 0.1)
    return draw.place(boxes.view(batch, room, 4)), draw.place(scores.view(batch, room))


@register("nms", ops=("segmented_nms",), keys=("boxes",))
@register("batched_nms", ops=("segmented_nms",), keys=("boxes",), grouped=True)
def nms(draw: Draw, grouped: bool = False) -> Trial:
    flavour = draw.flavour("apart", "whole", "bad numbers", "empty", "apart")
    room = 0 if flavour == "empty" else draw.size("boxes", lambda: draw.integer(1, 200))
    boxes, scores = (each[0] for each in _scored_boxes(draw, 1, room, flavour))
    groups = draw.integers(0, draw.integer(0, 9), room).to(draw.device) if grouped else None
    threshold = draw.choice((0.0, 0.3, 0.5, 0.7, 1.0))

    scene = (boxes, scores) if groups is None else (boxes, scores, groups)
    suppress: Any = ops.nms if groups is None else ops.batched_nms

    def plain() -> list[Tensor]:
        numbers = (boxes.cpu().to(draw.wide), scores.cpu().to(draw.wide))
        return [padded(reference.nms(*numbers, None if groups is None else groups.cpu(), threshold), room)]

    text = f"{room} boxes, {flavour}, over {threshold}"
    return decision(text, lambda: [padded(suppress(*scene, threshold), room)], plain)


@register("match_anchors", keys=("batch", "ground_truths", "anchors"))
def match_anchors(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "whole", "bad numbers", "grid", "any", "empty", "whole", "grid")
    batch = draw.size("batch", lambda: draw.integer(1, 3))
    g = draw.size("ground_truths", lambda: 0 if flavour == "empty" else draw.integer(1, 12))
    m = draw.size("anchors", lambda: draw.integer(0, 3) if flavour == "empty" else draw.integer(1, 700))
    low = draw.choice((0.2, 0.25, 0.3, 0.5))
    rule = (max(low, draw.choice((0.5, 0.5, 0.7))), low, draw.chance(0.6))
    whole = flavour == "whole"
    gts = (whole_boxes(draw, batch * g) if whole else boxes_in(draw, batch * g, 100, 168)).view(batch, g, 4)
    shape = (batch, m, 4) if draw.chance(0.3) else (m, 4)
    count = shape[0] * m if len(shape) == 3 else m
    anchors = (whole_boxes(draw, count) if whole else boxes_in(draw, count, 100, 168)).view(shape)
    if flavour == "bad numbers":
        gts, anchors = spoil(draw, gts), spoil(draw, anchors, 0.02)
    gts, stored = draw.place(gts), draw.place(anchors)
    described: Tensor | ops.AnchorGrid = stored
    if flavour == "grid":
        described = _grid(draw)
        stored = described.boxes(draw.wide, draw.device)
    gt_counts = (draw.integers(0, g, batch) if draw.chance(0.5) else torch.full((batch,), g)).to(draw.device)
    anchor_counts = draw.integers(0, stored.size(-2), batch).to(draw.device) if draw.chance(0.3) else None
    return decision(
        f"{batch} x {g} ground truths, {stored.size(-2)} anchors, {flavour}, high, low and low-quality {rule}",
        lambda: ops.match_anchors(
            gts, gt_counts, described, high_threshold=rule[0], low_threshold=rule[1],
            allow_low_quality_matches=rule[2], anchor_counts=anchor_counts,
        ),
        lambda: reference.match_anchors(
            gts.cpu().to(draw.wide), gt_counts.cpu(), stored.cpu().to(draw.wide),
            None if anchor_counts is None else anchor_counts.cpu(), *rule,
        ),
    )  # fmt: skip


def _grid(draw: Draw) -> ops.AnchorGrid:
    sizes = [(draw.integer(1, 13), draw.integer(1, 21)) for _ in range(draw.integer(1, 4))]
    cells = [
        [tuple(c * s for c in corners) for corners in ((-1, -1, 1, 1), (-1.5, -0.5, 1.5, 0.5))[: draw.integer(1, 2)]]
        for s in (draw.random.uniform(4, 40) for _ in sizes)
    ]
    strides = [(draw.integer(4, 32), draw.integer(4, 32)) for _ in sizes]
    return ops.AnchorGrid(cells, sizes, strides, draw.choice((0.0, 0.5)))
