# SPDX-License-Identifier: Apache-2.0
"""Mask pasting."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.draw import Draw
from fpn_fast.verify.trial import Trial, decided, not_worse


@register("paste_masks", keys=("masks", "mask_size", "image"))
def paste_masks(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "above a threshold", "odd boxes", "any", "none", "one pixel")
    count = 0 if flavour == "none" else draw.size("masks", lambda: draw.integer(1, 9))
    drawn = (1, 1) if flavour == "one pixel" else (draw.integer(1, 60), draw.integer(1, 60))
    height, width = (int(side) for side in draw.size("image", lambda: drawn))
    size = draw.size("mask_size", lambda: draw.choice((1, 2, 7, 14, 28)))
    # Probabilities of a trained head: most of them near 0 or 1.
    masks = draw.place((draw.normal(count, 1, size, size) * 4).sigmoid())
    boxes = boxes_in(draw, count, height, width, odd=flavour == "odd boxes")
    boxes = boxes.to(draw.choice((torch.float32, torch.float64))).to(draw.device)
    padding, threshold = draw.choice((0, 1, 1, 3)), draw.choice((0.0, 0.5)) if flavour == "above a threshold" else None
    sides = (boxes[:, 2:] - boxes[:, :2]).abs().nan_to_num(0, 0, 0)
    extent = int(sides[sides < 1e6].max()) + 2 if (sides < 1e6).any() else 2

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        return [reference.paste_masks(inputs[0], boxes.to(inputs[0].device), height, width, padding, threshold)]

    return Trial(
        f"{count} masks {size}x{size} into {height}x{width}, {flavour}, padding {padding}, threshold {threshold}",
        [masks],
        lambda inputs: [ops.paste_masks(inputs[0], boxes, (height, width), padding=padding, threshold=threshold)],
        plain,
        lambda i: not_worse(max(height, width, extent)) if threshold is None else decided(),
        decisions=threshold is not None,
    )
