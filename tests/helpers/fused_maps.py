# SPDX-License-Identifier: Apache-2.0
"""Cases of fuse_maps and resize_cat, which the battery and the emulator run."""

import torch
from torch import Tensor

from fpn_fast import ops, reference
from fpn_fast.testing import tolerances
from helpers.battery import Case

FAST = {"weight_rule": "fast"}
BIFPN = {"resample": ["identity", "nearest", "max_pool_same"], "weights": [0.3, 1.2, 0.7], **FAST}
# Options with the exceptions of `arguments`.
CASES = [
    Case("doubling", ((8, 12), (4, 6)), {"resample": ["identity", "nearest"]}),
    Case("bifpn", ((8, 12), (4, 6), (16, 24)), BIFPN, channels=8),
    Case("bifpn_plain_padding", ((13, 21), (7, 11), (25, 42)), {
        "resample": ["identity", "nearest", "max_pool"], "weights": [0.3, -0.2, 0.7], "weight_rule": "softmax"}),
    Case("swish", ((6, 10), (3, 5), (12, 20)), {**BIFPN, "activation": "silu"}, channels=11),
    Case("weight_of_nothing", ((4, 4), (2, 2)), {"resample": ["identity", "nearest"], "weights": [-1.0, 0.5], **FAST}),
    Case("zero_padding", ((7, 5), (14, 9)), {
        "resample": ["identity", "max_pool_same_zero"], "weights": [0.5, 0.25], "rounding": "sequential"}),
    Case("halves", ((6, 5), (13, 10)), {"resample": ["identity", "max_pool_2x2"], "activation": "relu"}, channels=3),
    Case("balanced", ((7, 11), (25, 42), (13, 21), (4, 6), (2, 3)), {
        "resample": ["identity", "adaptive_max", "adaptive_max", "nearest", "nearest"], "divide": 5,
        "rounding": "sequential"}, batch=1, channels=5),
    Case("gated", ((8, 6), (4, 3)), {"resample": ["identity", "nearest"], "gated": True, "activation": "relu"}),
    Case("gated_bilinear", ((5, 6), (9, 11)), {
        "resample": ["bilinear_align_corners", "identity"], "gated": True, "like": 1}),
    Case("four_branches", ((9, 7), (5, 4), (3, 2), (1, 1)), {
        "resample": ["identity", "bilinear", "bilinear", "bilinear"], "rounding": "sequential"}, channels=1),
    Case("panoptic", ((8, 16), (8, 16), (8, 16), (8, 16)), {"resample": "identity", "activation": "relu6"}),
    Case("one_map", ((5, 8),), {"resample": "identity", "weights": [0.7], **FAST}),
    Case("pooled_alone", ((9, 16),), {"resample": "max_pool", "like": None}),
    Case("from_and_to_one_pixel", ((3, 2), (1, 1), (1, 1)), {
        "resample": ["nearest", "identity", "max_pool_same"], "like": 1}, channels=3),
    Case("downsampling", ((3, 5), (7, 9), (5, 5)), {"resample": ["identity", "nearest", "bilinear"]}),
    Case("batch_of_0", ((8, 6), (4, 3)), BIFPN | {"resample": ["identity", "nearest"], "weights": [1, 1]}, batch=0),
    Case("odd", ((7, 9), (4, 5), (14, 17)), {**BIFPN, "activation": "relu"}, batch=1, channels=8),
]  # fmt: skip


def arguments(maps: list[Tensor], like: int | None = 0, weights=None, gated: bool = False, **options) -> dict:
    """Of ops.fuse_maps, without maps.

    like: the map whose size the result has; None: half of the first's; weights: as numbers; gated: with a gate.
    """
    height, width = maps[like or 0].shape[2:]
    size = ((height + 1) // 2, (width + 1) // 2) if like is None else (height, width)
    first = maps[0]
    if weights is not None:
        options["weights"] = torch.tensor(weights, dtype=first.dtype, device=first.device)
    if gated:
        numbers = torch.arange(first.size(0) * first.size(1), device=first.device, dtype=first.dtype)
        options["gate"] = torch.sin(numbers).view(first.size(0), -1, 1, 1)
    return {"size": size, **options}


def fused(maps: list[Tensor], **options) -> list[Tensor]:
    return [ops.fuse_maps(maps, **arguments(maps, **options))]


def plain(maps: list[Tensor], **options) -> list[Tensor]:
    given = arguments(maps, **options)
    resample, rounding = given.pop("resample"), given.pop("rounding", "once")
    forms = [resample] * len(maps) if isinstance(resample, str) else resample
    rule = given.pop("weight_rule", None)
    return [reference.fuse_maps(maps, forms=forms, rule=rule, sequential=rounding == "sequential", **given)]


def is_exact(options: dict) -> bool:
    """Whether the result equals plain PyTorch's bit for bit."""
    return options.get("activation") != "silu" and not any("bilinear" in form for form in options["resample"])


def check_forward(outputs, maps, case, strides=True):
    (output,), (same,) = outputs, plain(maps, **case.options)
    if is_exact(case.options):
        # One pixel has the strides of both formats.
        strides &= max(output.shape[2:]) > 1
        (tolerances.assert_exact if strides else tolerances.assert_equal)(output, same)
        return
    (truth,) = plain([m.double() for m in maps], **case.options)
    assert output.dtype == same.dtype
    tolerances.assert_not_worse(output, same, truth, size=max(map(max, case.sizes)))


def gradients(maps, seeds, options):
    leaves = [m.detach().requires_grad_() for m in maps]
    return torch.autograd.grad(plain(leaves, **options), leaves, seeds)


def check_backward(grads, maps, seeds, case):
    expected = gradients(maps, seeds, case.options)
    doubles = [m.double() for m in maps]
    truths = gradients(doubles, [s.double() for s in seeds], case.options)
    magnitudes = gradients(doubles, [s.double().abs() for s in seeds], case.options)
    for grad, same, truth, magnitude in zip(grads, expected, truths, magnitudes, strict=True):
        tolerances.assert_not_worse(grad, same, truth, size=max(map(max, case.sizes)), magnitude=magnitude)
