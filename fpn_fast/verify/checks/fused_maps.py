# SPDX-License-Identifier: Apache-2.0
"""The fusion of maps of several sizes, and maps resized and concatenated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.verify.checks import register
from fpn_fast.verify.draw import INF, NAN, Draw, form_of, text_of
from fpn_fast.verify.trial import Rule, Trial, exactly, not_worse

_KEYS = ("batch", "channels", "sizes")
_POOLED = ("max_pool", "max_pool_same", "max_pool_same_zero")


def _form(draw: Draw, of: tuple[int, int], size: tuple[int, int], bilinear: bool) -> str:
    """A form that makes `size` of a map of size `of`."""
    if of == size:
        return "identity"
    forms = ["nearest", "nearest", "adaptive_max"]
    if bilinear:
        forms += ["bilinear", "bilinear_align_corners"]
    if ((of[0] + 1) // 2, (of[1] + 1) // 2) == size:
        forms += [*_POOLED, *_POOLED]
    if (of[0] // 2, of[1] // 2) == size:
        forms += ["max_pool_2x2"] * 2
    return draw.choice(forms)


@register("fuse_maps", ops=("fuse_maps", "resample_sums"), keys=_KEYS)
def fuse_maps(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "weights", "fast", "softmax", "gate", "no images", "any", "bad numbers")
    sizes = draw.pyramid(draw.integer(1, 5))
    size = draw.choice(sizes)
    bilinear = flavour != "bad numbers" and draw.chance(0.3)
    forms = [_form(draw, each, size, bilinear) for each in sizes]
    is_smooth = any("bilinear" in form for form in forms)
    options: dict[str, Any] = {
        "rounding": draw.choice(("once", "sequential")),
        "divide": draw.choice((1, 1, 2, 3)),
        # Behind a ReLU the gradient depends on how a bilinear sum is rounded.
        "activation": draw.choice((None, "silu") if is_smooth else (None, "relu", "relu6", "silu")),
    }
    if flavour == "bad numbers" and options["activation"] == "silu":
        options["activation"] = None
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    channels, layout = draw.channels(), draw.layout()
    numbers = [draw.normal(batch, channels, *each) for each in sizes]
    if flavour == "bad numbers":
        for each in numbers:
            for value in (NAN, INF, -INF):
                each.view(-1)[draw.integer(0, each.numel() - 1)] = value
    maps = [draw.place(each, layout) for each in numbers]
    rule = flavour if flavour in ("fast", "softmax") else None
    factors = [draw.place(draw.normal(len(maps)))] if flavour in ("weights", "fast", "softmax") else []
    if flavour == "gate":
        factors = [draw.place(draw.uniform(batch, channels, 1, 1))]
    # The weights of the rules are constants here: their gradients are differences of sums.
    differentiated = factors if rule is None else []

    def given(inputs: list[Tensor]) -> dict[str, Any]:
        own = [each.to(inputs[0]) for each in (inputs[len(maps) :] if differentiated else factors)]
        return {"gate" if flavour == "gate" else "weights": each for each in own}

    def call(inputs: list[Tensor]) -> list[Tensor]:
        fused = ops.fuse_maps(inputs[: len(maps)], size, resample=forms, weight_rule=rule, **given(inputs), **options)
        return [fused]

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        rest: dict[str, Any] = {"divide": options["divide"], "activation": options["activation"]}
        sequential = options["rounding"] == "sequential"
        fused = reference.fuse_maps(
            inputs[: len(maps)], size, forms, rule=rule, sequential=sequential, **given(inputs), **rest
        )
        return [fused]

    largest = max(max(each) for each in sizes)
    is_exact = not is_smooth and options["activation"] != "silu"

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        leaves = [each.cpu().double().requires_grad_() for each in maps]
        leaves += [each.cpu().double().abs().requires_grad_() for each in differentiated]
        absolute = [seeds[0].cpu().double().abs()]
        magnitudes = list(torch.autograd.grad(plain(leaves), leaves[: len(maps)], absolute))
        if differentiated:
            # A factor's gradient is the sum of products with the resampled maps.
            wide = [each.abs() for each in leaves[: len(maps)]]
            joined = plain([*wide, leaves[-1]])
            magnitudes += torch.autograd.grad(joined, leaves[-1:], absolute)
        return [not_worse(largest, magnitude) for magnitude in magnitudes]

    text = ", ".join(f"{name}={value}" for name, value in options.items())
    return Trial(
        f"{text_of(maps)}, {layout}, {size} by {', '.join(forms)}, {flavour}, {text}",
        [*maps, *differentiated],
        call,
        plain,
        lambda _: exactly if is_exact else not_worse(largest),
        None if flavour == "bad numbers" else gradient_rules,
        form=form_of(maps, layout) if size != (1, 1) else None,
        output_seeds=draw.seeds,
    )


@register("resize_cat", keys=_KEYS)
def resize_cat(draw: Draw) -> Trial:
    flavour = draw.flavour("any", "any", "one pixel", "any", "no images")
    mode = draw.choice(("nearest", "bilinear", "bilinear_align_corners"))
    sizes = draw.pyramid(draw.integer(1, 4))
    if flavour == "one pixel":
        sizes = [*sizes[:-1], (1, 1)]
    size = draw.choice(sizes)
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    channels, layout = draw.channels(), draw.layout()
    widths = [max(channels - draw.integer(0, 3), 1) for _ in sizes]
    maps = [draw.place(draw.normal(batch, width, *each), layout) for width, each in zip(widths, sizes, strict=True)]
    largest = max(max(each) for each in sizes)

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        return [reference.resize_cat(inputs, size, mode)]

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        leaves = [each.cpu().double().requires_grad_() for each in maps]
        magnitudes = torch.autograd.grad(plain(leaves), leaves, [seeds[0].cpu().double().abs()])
        return [not_worse(largest, magnitude) for magnitude in magnitudes]

    return Trial(
        f"{text_of(maps)}, {layout}, {size} by {mode}",
        maps,
        lambda inputs: [ops.resize_cat(inputs, size, mode=mode)],
        plain,
        lambda _: exactly if mode == "nearest" else not_worse(largest),
        gradient_rules,
        form=form_of(maps, layout) if size != (1, 1) and widths[0] > 1 else None,
        output_seeds=draw.seeds,
    )
