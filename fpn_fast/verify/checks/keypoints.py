# SPDX-License-Identifier: Apache-2.0
"""Keypoints of heatmaps."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.draw import NAN, Draw
from fpn_fast.verify.trial import Trial, decided


@register("heatmaps_to_keypoints", keys=("boxes", "keypoints", "heatmap_size"))
def heatmaps_to_keypoints(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "ties", "odd boxes", "any", "none", "no numbers")
    largest = 9 if draw.small else 90
    count = 0 if flavour == "none" else draw.size("boxes", lambda: draw.integer(1, 2 if draw.small else 7))
    keypoints = draw.size("keypoints", lambda: draw.integer(1, 2 if draw.small else 4))
    drawn = draw.choice(((56, 56), (14, 14), (7, 9), (1, 1)))
    height, width = (int(side) for side in draw.size("heatmap_size", lambda: (7, 6) if draw.small else drawn))
    maps = draw.normal(count, keypoints, height, width)
    if flavour == "ties":
        # Whole numbers, so few of them that most are there more than once.
        maps = maps.round()
    if flavour == "no numbers":
        maps[:, 0, height // 2, width // 2] = NAN
    heatmaps = draw.place(maps)
    boxes = boxes_in(draw, count, largest, largest, odd=flavour == "odd boxes")
    boxes = boxes.to(draw.choice((torch.float32, torch.float64))).to(draw.device)

    def plain(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return reference.heatmaps_to_keypoints(inputs[0], boxes.to(inputs[0].device))

    return Trial(
        f"{count} boxes of {keypoints} heatmaps {height}x{width}, {flavour}",
        [heatmaps],
        lambda inputs: ops.heatmaps_to_keypoints(inputs[0], boxes),
        plain,
        lambda i: decided(),
        decisions=True,
    )
