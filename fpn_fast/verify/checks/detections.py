# SPDX-License-Identifier: Apache-2.0
"""The last step of a detector: decisions on the maps of a dense head and on scored boxes."""

from __future__ import annotations

from typing import Any

import torch

from fpn_fast import backends, ops
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.proposals import boxes_rule, cell_anchors, head_maps
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.checks.selection import spoil
from fpn_fast.verify.draw import Draw, text_of
from fpn_fast.verify.trial import Trial

_FLAVOURS = ("apart", "ties", "bad numbers", "apart", "thresholds", "apart", "no images", "ties")


@register("select_detections", keys=("batch", "anchors", "classes", "sizes"))
def select_detections(draw: Draw) -> Trial:
    flavour = draw.flavour(*_FLAVOURS)
    sizes = draw.pyramid(draw.integer(1, 3))
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 2))
    anchors, classes = (
        draw.size("anchors", lambda: draw.integer(1, 2)),
        draw.size("classes", lambda: draw.integer(1, 4)),
    )
    deltas = head_maps(draw, batch, anchors, sizes, flavour)[1]
    logits = head_maps(draw, batch, anchors * classes, sizes, flavour)[0]
    # FCOS codes boxes as distances, which are not negative, and has a centerness.
    centered = draw.chance(0.4)
    centerness = head_maps(draw, batch, anchors, sizes, flavour)[0] if centered else []
    if centered:
        deltas = [m.abs() for m in deltas]
    cells = cell_anchors(draw, len(sizes), anchors)
    strides = [(draw.integer(2, 6) << i, draw.integer(2, 6) << i) for i in range(len(sizes))]
    image = torch.stack([draw.integers(30, 120, batch), draw.integers(30, 120, batch)], 1).to(draw.device)
    options: dict[str, Any] = {
        # The probability of a logit of 0.
        "score_thresh": 0.5 if flavour == "thresholds" else draw.choice((0.05, 0.3)),
        "pre_nms_top_n": draw.choice((draw.integer(0, 20), draw.integer(1, 400))),
        "nms_thresh": draw.choice((-0.5, 0.3, 0.5, 1.0)),
        "max_detections": draw.integer(0, 60),
        "coder": "distances" if centered else "deltas",
        "weights": draw.choice(((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 4.0, 4.0))),
    }

    def run(device: str) -> Any:
        lists = [[m.to(device) for m in maps] for maps in (logits, deltas, centerness)]
        return ops.select_detections(
            lists[0], lists[1], cells, strides, image.to(device), centerness=lists[2], **options
        )  # fmt: skip

    # Where there is nothing to move, `to` gives the maps themselves, with the strides that they were drawn with.
    return _trial(draw, f"{text_of(logits)}, {flavour}, {options['coder']}, {options['pre_nms_top_n']}", run)


@register("select_box_detections", keys=("batch", "boxes", "classes"))
def select_box_detections(draw: Draw) -> Trial:
    flavour = draw.flavour(*_FLAVOURS)
    if draw.dtype == torch.float64 and flavour in ("ties", "thresholds"):
        # Probabilities that should be equal differ by a unit, for there is nothing wider to round them from.
        flavour = "apart"
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    room = draw.size("boxes", lambda: draw.integer(0, 120))
    classes = draw.size("classes", lambda: draw.integer(1, 6))
    codes = 4 if draw.chance(0.3) else 4 * classes
    logits, deltas = draw.normal(batch, room, classes) * 2, draw.normal(batch, room, codes)
    boxes = boxes_in(draw, batch * room, 90, 160).view(batch, room, 4)
    least = draw.choice((0.0, 0.01, 2.0))
    if flavour in ("ties", "thresholds"):
        logits = logits.round()
    if flavour == "thresholds":
        # Sides of whole numbers that stay what they are.
        boxes, deltas, least = boxes.round(), torch.zeros_like(deltas), 8.0
    elif flavour == "bad numbers":
        logits, deltas, boxes = spoil(draw, logits, 0.02), spoil(draw, deltas, 0.01), spoil(draw, boxes, 0.01)
    placed = [draw.place(each) for each in (logits, deltas, boxes)]
    counts = draw.integers(0, room + 1, batch) if draw.chance(0.5) else None
    image = torch.tensor([[90, 160]]).expand(batch, 2)
    options: dict[str, Any] = {
        "score_thresh": 0.25 if flavour == "thresholds" else draw.choice((0.0, 0.05, 0.2)),
        "nms_thresh": draw.choice((-0.5, 0.3, 0.5, 1.0)),
        "max_detections": draw.integer(0, 60),
        "min_size": least,
        "class_top_n": draw.choice((None, None, draw.integer(0, 30))),
    }

    def run(device: str) -> Any:
        scored, moved, sources = (each.to(device) for each in placed)
        return ops.select_box_detections(
            scored, moved, sources, None if counts is None else counts.to(device), image.to(device), **options
        )  # fmt: skip

    return _trial(draw, f"{batch} x {room} boxes of {classes} classes, {flavour}", run)


def _trial(draw: Draw, text: str, run: Any) -> Trial:
    def plain(_: Any) -> Any:
        with backends.use("reference"):
            return run("cpu")

    return Trial(text, [], lambda _: run(draw.device), plain, lambda i: boxes_rule(draw.dtype), decisions=True)
