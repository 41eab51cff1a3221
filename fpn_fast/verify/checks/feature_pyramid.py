# SPDX-License-Identifier: Apache-2.0
"""The top-down merge and the pyramid over it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_fast import nn, ops, reference
from fpn_fast.testing import tolerances
from fpn_fast.verify.checks import register
from fpn_fast.verify.draw import INF, NAN, Draw, form_of, text_of
from fpn_fast.verify.trial import Rule, Trial, exactly, linear, not_worse, share_not_worse

_KEYS = ("batch", "channels", "sizes")


def _plain(maps: Sequence[Tensor], mode: str, align_corners: bool, fuse: str) -> list[Tensor]:
    return reference.top_down(maps, mode, align_corners=align_corners, average=fuse == "avg")


def _gradient_rules(maps: list[Tensor], seeds: list[Tensor], options: dict[str, Any], largest: int) -> list[Rule]:
    """largest: the longest side of `maps`. Nearest sums gradients with weights of 1 or powers of 1/2."""
    leaves = [m.detach().double().requires_grad_() for m in maps]
    magnitudes = torch.autograd.grad(_plain(leaves, **options), leaves, [s.double().abs() for s in seeds])
    if options["mode"] == "bilinear":
        return [not_worse(largest, magnitude) for magnitude in magnitudes]
    rules = []
    for level, magnitude in enumerate(magnitudes):
        # Every finer pixel may reach this one. Each finer level rounds once; averaging and autograd's sum round again.
        terms = sum(s.shape[2] * s.shape[3] for s in seeds[: level + 1])
        rules.append(linear(magnitude, terms=terms, roundings=2 * level + 2))
    return rules


@register("top_down", keys=_KEYS)
@register("upsample_add", ops=("top_down",), keys=_KEYS, pair=True)
def top_down(draw: Draw, pair: bool = False) -> Trial:
    flavour = draw.flavour("any", "any", "one pixel", "any", "any", "no images", "any", "bad numbers")
    mode = "nearest" if flavour == "bad numbers" else draw.choice(("nearest", "bilinear"))
    options: dict[str, Any] = {
        "mode": mode,
        "align_corners": mode == "bilinear" and draw.chance(0.5),
        "fuse": draw.choice(("sum", "sum", "avg")),
    }
    sizes = draw.pyramid(2 if pair else draw.integer(1, 5))[: 2 if pair else None]
    if flavour == "one pixel":
        sizes = [(1, 1)] * len(sizes)
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    channels, layout = draw.channels(), draw.layout()
    numbers = [draw.normal(batch, channels, *size) for size in sizes]
    if flavour == "bad numbers":
        for each in numbers:
            for value in (NAN, INF, -INF):
                each.view(-1)[draw.integer(0, each.numel() - 1)] = value
    maps = [draw.place(each, layout) for each in numbers]
    on_cpu = [m.cpu() for m in maps]
    largest = max(max(size) for size in sizes)
    magnitudes = _plain([m.double().abs() for m in on_cpu], **options)

    def call(inputs: list[Tensor]) -> list[Tensor]:
        return [ops.upsample_add(inputs[0], inputs[1], **options)] if pair else ops.top_down(inputs, **options)

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        seeds = [s.cpu() for s in seeds]
        return _gradient_rules(on_cpu, [*seeds, torch.zeros_like(on_cpu[1])] if pair else seeds, options, largest)

    return Trial(
        f"{text_of(maps)}, {layout}, {', '.join(f'{k}={v}' for k, v in options.items())}",
        maps,
        call,
        lambda inputs: _plain(inputs, **options)[: 1 if pair else None],
        lambda i: exactly if mode == "nearest" else not_worse(largest, magnitudes[i]),
        None if flavour == "bad numbers" else gradient_rules,
        form=form_of(maps, layout),
        output_seeds=draw.seeds,
    )


def _convolved(weights: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], stride, padding=weight.shape[2] // 2)


def _pyramid(weights: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    merged = reference.top_down([_convolved(weights, f"inner_blocks.{i}.0", x) for i, x in enumerate(maps)])
    return [_convolved(weights, f"layer_blocks.{i}.0", x) for i, x in enumerate(merged)]


def _panet(weights: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    """The author's lists of laterals and outputs start at the coarsest level."""
    coarsest = len(maps) - 1
    names = [f"topdown_lateral_modules.{coarsest - 1 - i}.conv_lateral" for i in range(coarsest)] + ["conv_top"]
    merged = reference.top_down([_convolved(weights, name, x) for name, x in zip(names, maps, strict=True)])
    levels = [_convolved(weights, f"posthoc_modules.{coarsest - i}", x) for i, x in enumerate(merged)]
    outs = levels[:1]
    for i, level in enumerate(levels[1:]):
        below = _convolved(weights, f"panet_buttomup_conv1_modules.{i}", outs[-1], stride=2)
        outs.append(_convolved(weights, f"panet_buttomup_conv2_modules.{i}", level + below))
    return outs


@register("nn.FeaturePyramidNetwork", ops=("top_down",), keys=_KEYS, dtypes=(torch.float32, torch.bfloat16))
@register("nn.PANet", ops=("top_down",), keys=_KEYS, dtypes=(torch.float32, torch.bfloat16), panet=True)
def pyramid_network(draw: Draw, panet: bool = False) -> Trial:
    sizes = draw.pyramid(draw.integer(1, 4))
    if panet:
        # Its convolutions of stride 2 give these.
        sizes = [tuple(-(-side // 2**level) for side in sizes[0]) for level in range(len(sizes))]
    batch = draw.size("batch", lambda: draw.integer(1, 2))
    channels, layout = draw.size("channels", lambda: draw.choice((1, 4, 8))), draw.layout("contiguous", "channels_last")
    widths = [draw.integer(1, 9) for _ in sizes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.random.getrandbits(60))
        extra = draw.chance(0.5)
        pyramid: torch.nn.Module = (
            nn.PANet(widths, channels, extra_level=extra)
            if panet
            else nn.FeaturePyramidNetwork(widths, channels, nn.LastLevelMaxPool() if extra else None)
        )
    pyramid = pyramid.to(draw.device, draw.dtype)
    maps = [draw.place(draw.normal(batch, width, *size), layout) for width, size in zip(widths, sizes, strict=True)]
    names = [str(i) for i in range(len(maps))]
    parameters = dict(pyramid.named_parameters())

    def call(inputs: list[Tensor]) -> list[Tensor]:
        features = inputs[: len(maps)] if panet else OrderedDict(zip(names, inputs, strict=False))
        weights = dict(zip(parameters, inputs[len(maps) :], strict=True))
        found = torch.func.functional_call(pyramid, weights, (features,))
        return found if panet else list(found.values())

    def plain(inputs: list[Tensor]) -> list[Tensor]:
        weights = dict(zip(parameters, inputs[len(maps) :], strict=True))
        results = (_panet if panet else _pyramid)(weights, inputs[: len(maps)])
        return [*results, results[-1][:, :, ::2, ::2]] if extra else results

    rule = not_worse(max(max(size) for size in sizes))
    inputs = [*maps, *(p.detach() for p in parameters.values())]

    def gradient_rules(seeds: list[Tensor], found: list[Tensor], exact: list[Tensor]) -> list[Rule]:
        # The module is linear, so the gradient for absolute values is the sum of its terms' magnitudes.
        leaves = [i.cpu().double().abs().requires_grad_() for i in inputs]
        magnitudes = torch.autograd.grad(plain(leaves), leaves, [s.cpu().double().abs() for s in seeds])
        share = tolerances.largest_share(found, exact, magnitudes)
        return [share_not_worse(m, share) for m in magnitudes]

    return Trial(
        f"{', '.join(f'{tuple(m.shape)}' for m in maps)} to {channels} channels, {layout}",
        inputs,
        call,
        plain,
        lambda i: rule,
        gradient_rules,
        output_seeds=draw.seeds,
    )
