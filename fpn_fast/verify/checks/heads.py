# SPDX-License-Identifier: Apache-2.0
"""Pasted masks, keypoints of heatmaps, and the focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.draw import NAN, Draw
from fpn_fast.verify.trial import Rule, Trial, decided, linear, not_worse

#: Roundings in one term of the loss: exp and log take a series of 8 terms each, 17 in float64.
_ROUNDINGS = 30


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
        # Few distinct values, so that most occur more than once.
        maps = maps.round()
    if flavour == "no numbers":
        maps[:, 0, height // 2, width // 2] = NAN
    heatmaps = draw.place(maps)
    boxes = boxes_in(draw, count, largest, largest, odd=flavour == "odd boxes")
    boxes = boxes.to(draw.choice((torch.float32, torch.float64))).to(draw.device)

    return Trial(
        f"{count} boxes of {keypoints} heatmaps {height}x{width}, {flavour}",
        [heatmaps],
        lambda inputs: ops.heatmaps_to_keypoints(inputs[0], boxes),
        lambda inputs: reference.heatmaps_to_keypoints(inputs[0], boxes.to(inputs[0].device)),
        lambda i: decided(),
        decisions=True,
    )


@register("sigmoid_focal_loss", keys=("anchors", "classes"))
def sigmoid_focal_loss(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "large logits", "some do not count", "none", "one class")
    count = 0 if flavour == "none" else int(draw.size("anchors", lambda: draw.integer(1, 40 if draw.small else 400)))
    classes = 1 if flavour == "one class" else int(draw.size("classes", lambda: draw.choice((2, 3, 10, 91))))
    logits = draw.place(draw.normal(count, classes) * (60 if flavour == "large logits" else 3) - 2)
    labels = torch.tensor([draw.integer(-1, classes - 1) for _ in range(count)], dtype=torch.int64)
    weights = torch.tensor([draw.choice((0.0, 1.0)) for _ in range(count)]) if flavour == "some do not count" else None
    here = labels.to(draw.device), None if weights is None else weights.to(draw.device)
    alpha = draw.choice((0.25, 0.5))

    def plainly(x: Tensor) -> tuple[Tensor, Tensor]:
        ones = x.new_ones(count, dtype=torch.float64) if weights is None else weights.to(x.device)
        return reference.sigmoid_focal_loss(x, labels.to(x.device), ones, alpha)

    losses, slopes = plainly(logits.detach().cpu().double())

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        # The gradient, its scale and their product are each rounded.
        return [linear(slopes.abs() * seeds[0].double().abs().cpu(), terms=_ROUNDINGS, roundings=3)]

    return Trial(
        f"{count} anchors of {classes} classes, {flavour}, alpha {alpha}",
        [logits],
        lambda inputs: [ops.sigmoid_focal_loss(inputs[0], *here, alpha=alpha)],
        lambda inputs: [plainly(inputs[0])[0].sum()],
        lambda i: linear(losses.sum(), terms=_ROUNDINGS + losses.numel(), roundings=1),
        gradient_rules,
        # Autograd would compute 1 - sigmoid, which loses all digits for large logits.
        lambda inputs, seeds: [(plainly(inputs[0])[1] * seeds[0]).to(inputs[0].dtype)],
        output_seeds=draw.seeds,
    )
