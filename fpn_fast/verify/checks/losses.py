# SPDX-License-Identifier: Apache-2.0
"""Losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.draw import Draw
from fpn_fast.verify.trial import Rule, Trial, linear

#: Of one term: a series of 8, or of 17 of float64, in each of exp and log, and what joins them.
_ROUNDINGS = 30


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
        # Rounded as it is made, as its scale is, and their product.
        return [linear(slopes.abs() * seeds[0].double().abs().cpu(), terms=_ROUNDINGS, roundings=3)]

    return Trial(
        f"{count} anchors of {classes} classes, {flavour}, alpha {alpha}",
        [logits],
        lambda inputs: [ops.sigmoid_focal_loss(inputs[0], *here, alpha=alpha)],
        lambda inputs: [plainly(inputs[0])[0].sum()],
        lambda i: linear(losses.sum(), terms=_ROUNDINGS + losses.numel(), roundings=1),
        gradient_rules,
        # Autograd would take one minus a sigmoid, of which rounding leaves little for large logits.
        lambda inputs, seeds: [(plainly(inputs[0])[1] * seeds[0]).to(inputs[0].dtype)],
        output_seeds=draw.seeds,
    )
