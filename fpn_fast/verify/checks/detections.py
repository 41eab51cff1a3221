# SPDX-License-Identifier: Apache-2.0
"""Proposals and detections: decisions on the maps of a head and on scored boxes, and the kept boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops
from fpn_fast.ops.generate_proposals import DETECTRON2, MMDET, TORCHVISION
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.checks.selection import spoil
from fpn_fast.verify.draw import Draw, text_of
from fpn_fast.verify.trial import Trial, against_reference

_FLAVOURS = ("apart", "ties", "bad numbers", "apart", "thresholds", "apart", "no images", "ties")


def head_maps(
    draw: Draw, batch: int, anchors: int, sizes: list[tuple[int, int]], flavour: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [N, A, H, W] and deltas [N, 4A, H, W] per level. With the flavour "ties", many scores are equal."""
    logits, deltas = [], []
    for size in sizes:
        score, code = draw.normal(batch, anchors, *size) * 3 - 1, draw.normal(batch, 4 * anchors, *size) * 0.3
        if flavour == "ties":
            score = score.round()
        elif flavour == "thresholds":
            score, code = score.round(), torch.zeros_like(code)
        elif flavour == "bad numbers":
            score, code = spoil(draw, score), spoil(draw, code, 0.02)
        layout = draw.layout()
        logits.append(draw.place(score, layout))
        deltas.append(draw.place(code, draw.choice((layout, draw.layout()))))
    return logits, deltas


def cell_anchors(draw: Draw, levels: int, anchors: int, *, whole: bool = False) -> list[list[tuple[float, ...]]]:
    """`anchors` boxes around the origin per level."""
    tables: list[list[tuple[float, ...]]] = []
    for level in range(levels):
        sides = [(draw.random.uniform(4, 12), draw.random.uniform(4, 12)) for _ in range(anchors)]
        if whole:
            sides = [(float(round(w)), float(round(h))) for w, h in sides]
        tables.append([(-w * 2**level, -h * 2**level, w * 2**level, h * 2**level) for w, h in sides])
    return tables


@register("generate_proposals", keys=("batch", "anchors", "sizes"))
def generate_proposals(draw: Draw) -> Trial:
    flavour = draw.flavour(*_FLAVOURS)
    sizes = draw.pyramid(draw.integer(1, 4))
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    anchors = draw.size("anchors", lambda: draw.integer(1, 3))
    logits, deltas = head_maps(draw, batch, anchors, sizes, flavour)
    cells = cell_anchors(draw, len(sizes), anchors, whole=flavour == "thresholds")
    strides = [(draw.integer(2, 6) << i, draw.integer(2, 6) << i) for i in range(len(sizes))]
    image = torch.stack([draw.integers(30, 120, batch), draw.integers(30, 120, batch)], 1).to(draw.device)
    most = sum(anchors * h * w for h, w in sizes)
    options: dict[str, Any] = {
        **vars(draw.choice((TORCHVISION, DETECTRON2, MMDET))),
        "pre_nms_top_n": draw.choice((draw.integer(0, 40), draw.integer(1, most + 5))),
        "post_nms_top_n": draw.choice((draw.integer(0, 20), draw.integer(1, most + 5))),
        "nms_thresh": draw.choice((-0.5, 0.3, 0.5, 0.7, 1.0)),
        "center_offset": draw.choice((0.0, 0.5)),
    }
    if flavour == "thresholds":
        # Exactly the probability of a logit of 0, and exactly the side of an anchor.
        corner = cells[0][0]
        options.update(score_thresh=0.5, min_size=corner[2] - corner[0], strict_size=draw.chance(0.3))
    elif draw.chance(0.5):
        options.update(
            score_thresh=draw.random.uniform(0, 0.6), weights=(2.0, 2.0, 4.0, 4.0), stds=(0.5, 0.5, 2.0, 2.0)
        )

    def run(device: str) -> Any:
        maps = [m.to(device) for m in logits], [m.to(device) for m in deltas]
        return ops.generate_proposals(*maps, cells, strides, image.to(device), **options)

    text = f"{text_of(logits)}, {flavour}, {options['pre_nms_top_n']} to {options['post_nms_top_n']}"
    return against_reference(draw, text, run)


@register("select_detections", keys=("batch", "anchors", "classes", "sizes"))
def select_detections(draw: Draw) -> Trial:
    flavour = draw.flavour(*_FLAVOURS)
    sizes = draw.pyramid(draw.integer(1, 3))
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 2))
    anchors = draw.size("anchors", lambda: draw.integer(1, 2))
    classes = draw.size("classes", lambda: draw.integer(1, 4))
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
        scored, moved, centred = ([m.to(device) for m in maps] for maps in (logits, deltas, centerness))
        return ops.select_detections(scored, moved, cells, strides, image.to(device), centerness=centred, **options)

    text = f"{text_of(logits)}, {flavour}, {options['coder']}, {options['pre_nms_top_n']}"
    return against_reference(draw, text, run)


@register("select_box_detections", keys=("batch", "boxes", "classes"))
def select_box_detections(draw: Draw) -> Trial:
    flavour = draw.flavour(*_FLAVOURS)
    if draw.dtype == torch.float64 and flavour in ("ties", "thresholds"):
        # In float64 no wider type rounds the probabilities, so equal ones may differ by a unit.
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
        # Whole sides, which decoding keeps exact.
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

    return against_reference(draw, f"{batch} x {room} boxes of {classes} classes, {flavour}", run)
