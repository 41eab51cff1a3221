# SPDX-License-Identifier: Apache-2.0
"""Batch norm with fixed statistics, a residual and ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import nn, ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.draw import INF, NAN, Draw, form_of, text_of
from fpn_fast.verify.trial import Rule, Trial, exactly, linear

#: Roundings in scale and shift, of which a GPU's reciprocal root is off by two units, and in two sums and products.
_ROUNDINGS = 16
#: The registered ops of a call, and the sizes that a user may set.
OPS, KEYS = ("frozen_batch_norm", "frozen_batch_norm_sums"), ("batch", "channels", "size")


def _away_from_zero(x: Tensor, bounds: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor]) -> Tensor:
    """x, with other values where ReLU's decision would depend on the rounding.

    bounds: scale [C, 1, 1] and the size of the shift; rest: what is added to the product, and its size.
    """
    scale, shift_size = bounds
    for _ in range(8):
        y, size = x * scale + rest[0], x.abs() * scale.abs() + shift_size + rest[1]
        x = torch.where(y.abs() < 0.05 * size, x + 1, x)
    return x


@register("frozen_batch_norm", ops=OPS, keys=KEYS)
def frozen_batch_norm(draw: Draw, module: bool = False) -> Trial:
    """module: by nn.FrozenBatchNorm2d, which has neither residual nor ReLU."""
    flavour = draw.flavour(
        "any", "residual", "both norms", "any", "no images", "one pixel", "both norms", "bad numbers"
    )
    drawn = (1, 1) if flavour == "one pixel" else (draw.integer(1, 60), draw.integer(1, 60))
    size = tuple(int(side) for side in draw.size("size", lambda: drawn))
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    channels, layout = draw.channels(), draw.layout()
    relu, rule = draw.chance(0.7), draw.choice(("torchvision", "torchvision", "detectron2", "batch_norm"))
    if module:
        flavour, relu, rule = "any" if "norm" in flavour else flavour, False, "torchvision"
    eps = draw.choice((0.0, 1e-5, 1e-3))
    bad, count = flavour == "bad numbers", 1 + (flavour in ("residual", "both norms") and not module)
    # By detectron2's rule plain PyTorch rounds the gradients of scale and shift to the type of the map too.
    vectors = draw.dtype if rule == "detectron2" else draw.choice((draw.wide, draw.wide, draw.dtype))

    def norm() -> list[Tensor]:
        signs = draw.integers(0, 1, channels) * 2 - 1
        weight, variance = (0.5 + draw.uniform(channels)) * signs, 0.5 + draw.uniform(channels)
        return [v.to(vectors) for v in (weight, draw.normal(channels), draw.normal(channels), variance)]

    norms = [norm() for _ in range(2 if flavour == "both norms" else 1)]
    maps = [draw.normal(batch, channels, *size).to(draw.dtype) for _ in range(count)]
    if bad:
        for value in (NAN, INF, -INF):
            maps[0].view(-1)[draw.integer(0, maps[0].numel() - 1)] = value

    def terms(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, shift, and the sizes of their parts, of norm `index` in float64."""
        if index >= len(norms):
            one = torch.ones(1, 1, 1, dtype=torch.float64)
            return one, 0 * one, 0 * one, one
        weight, bias, mean, variance = (v.double().reshape(-1, 1, 1) for v in norms[index])
        root = (variance + eps).rsqrt()
        return weight * root, bias - mean * weight * root, bias.abs() + (mean * weight * root).abs(), root

    scale, shift, shift_size, _ = terms(0)
    other_scale, other_shift, other_size, _ = terms(1)
    rest, rest_size = shift, torch.zeros_like(shift)
    if count == 2:
        rest = shift + maps[1].double() * other_scale + other_shift
        rest_size = maps[1].double().abs() * other_scale.abs() + other_size
    if not bad:
        maps[0] = _away_from_zero(maps[0].double(), (scale, shift_size), (rest, rest_size)).to(draw.dtype)
    magnitude = maps[0].double().abs() * scale.abs() + shift_size + rest_size
    statistics = [[v.to(draw.device) for v in each[2:]] for each in norms]
    placed = [draw.place(each, layout) for each in maps]
    inputs = [*placed, *(v.to(draw.device) for each in norms for v in each[:2])]
    # detectron2 rounds scale and shift to the type of the map as well.
    roundings = 4 if rule == "detectron2" else 2

    def split(values: list[Tensor]) -> tuple[list[list[Tensor]], Tensor | None]:
        weights = [values[count + 2 * i : count + 2 * i + 2] for i in range(len(norms))]
        pairs = zip(weights, statistics, strict=True)
        return [[*w, *(v.to(w[0]) for v in s)] for w, s in pairs], values[1] if count == 2 else None

    def call(values: list[Tensor]) -> list[Tensor]:
        (own, *others), residual = split(values)
        activation = "relu" if relu else None
        other = others[0] if others else None
        if module:
            buffers = dict(zip(("weight", "bias", "running_mean", "running_var"), own, strict=True))
            return [torch.func.functional_call(nn.FrozenBatchNorm2d(channels, eps), buffers, (values[0],))]
        weight, bias, mean, variance = own
        options: dict[str, Any] = {"residual": residual, "residual_norm": other, "activation": activation, "rule": rule}
        return [ops.frozen_batch_norm(values[0], weight, bias, mean, variance, eps, **options)]

    def plain(values: list[Tensor]) -> list[Tensor]:
        (own, *others), residual = split(values)
        dtype = torch.promote_types(values[0].dtype, own[0].dtype) if rule == "torchvision" else values[0].dtype
        other = others[0] if others else []
        arguments = (residual, other, relu, rule, dtype)
        return [reference.frozen_batch_norm(values[0], own, eps, *arguments)]

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        g = seeds[0].cpu().double().abs()
        rules = [linear(g * scale.abs(), terms=_ROUNDINGS, roundings=roundings)]
        if count == 2:
            rules.append(linear(g * other_scale.abs(), terms=_ROUNDINGS, roundings=roundings))
        for i, each in enumerate(norms):
            sizes = g * (maps[i].double().abs() + each[2].double().abs().reshape(-1, 1, 1)) * terms(i)[3]
            for size in (sizes, g):
                added = size[:, 0].numel() + _ROUNDINGS
                rules.append(linear(size.sum((0, 2, 3)), terms=added, roundings=2))
        return rules

    # Of the backends, Triton alone does not contract as F.batch_norm does.
    exact = bad and draw.device == "cpu" and rule != "batch_norm"
    return Trial(
        f"{text_of(placed)}, {layout}, {flavour}, {rule}, relu={relu}, eps={eps}, vectors {vectors}",
        inputs,
        call,
        plain,
        lambda i: exactly if exact else linear(magnitude, terms=_ROUNDINGS, roundings=roundings),
        None if bad else gradient_rules,
        form=form_of(placed, layout),
        output_seeds=draw.seeds,
    )
