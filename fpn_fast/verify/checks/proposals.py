# SPDX-License-Identifier: Apache-2.0
"""Region proposals: the decisions on the maps of a head, and the kept boxes, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, ops
from fpn_fast.ops.generate_proposals import DETECTRON2, MMDET, TORCHVISION
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.selection import spoil
from fpn_fast.verify.draw import Draw, text_of
from fpn_fast.verify.trial import Rule, Trial, decided

_KEYS = ("batch", "anchors", "sizes")


def boxes_rule(dtype: torch.dtype) -> Rule:
    """Equal, but in float64 within a unit: nothing wider rounds its exponential. Corners are at most 2,048 pixels."""
    unit = 2.0**-51 if dtype == torch.float64 else 0.0
    return decided(rtol=unit, atol=2**11 * unit)


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


@register("generate_proposals", keys=_KEYS)
def generate_proposals(draw: Draw) -> Trial:
    flavour = draw.flavour("apart", "ties", "bad numbers", "apart", "thresholds", "apart", "no images", "ties")
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
        # The probability of a logit of 0, and a side of a box that is an anchor.
        corner = cells[0][0]
        options.update(score_thresh=0.5, min_size=corner[2] - corner[0], strict_size=draw.chance(0.3))
    elif draw.chance(0.5):
        options.update(
            score_thresh=draw.random.uniform(0, 0.6), weights=(2.0, 2.0, 4.0, 4.0), stds=(0.5, 0.5, 2.0, 2.0)
        )

    def call(_: list[Tensor]) -> Any:
        return ops.generate_proposals(logits, deltas, cells, strides, image, **options)

    def plain(_: list[Tensor]) -> Any:
        with backends.use("reference"):
            on_cpu = [m.cpu() for m in logits], [m.cpu() for m in deltas]
            return ops.generate_proposals(*on_cpu, cells, strides, image.cpu(), **options)

    return Trial(
        f"{text_of(logits)}, {flavour}, {options['pre_nms_top_n']} to {options['post_nms_top_n']}",
        [],
        call,
        plain,
        lambda i: boxes_rule(draw.dtype),
        decisions=True,
    )
