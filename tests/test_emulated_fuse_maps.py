# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels of fused, and of resized and concatenated, maps, executed by the emulator."""

import torch
from helpers import fused_maps
from helpers.emulated_battery import Call, EmulatedBattery, runs
from helpers.layouts import place
from test_resize_cat import CASES as JOINED
from test_resize_cat import check_backward as check_joined_gradients
from test_resize_cat import check_forward as check_joined
from test_resize_cat import narrowed

from fpn_fast.ops.fuse_maps import _CODES, ACTIVATIONS, FORMS
from fpn_fast.ops.resize_cat import _IDENTITY
from fpn_fast.reference.fuse_maps import resized
from fpn_fast.testing import tolerances

POOLED = _CODES["max_pool"]
BY_NAME = {case.name: case for case in fused_maps.CASES}
JOINED_BY_NAME = {case.name: case for case in JOINED}


def placed(maps, layouts):
    """Layouts take turns."""
    return [place(each, layouts[i % len(layouts)]) for i, each in enumerate(maps)]


def forms_of(case):
    forms = case.options["resample"]
    return [forms] * len(case.sizes) if isinstance(forms, str) else forms


def seeds_of(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(like.dtype)


class TestFuseMaps(EmulatedBattery):
    cases = BY_NAME
    # The library has no kernels of these ops for a GPU.
    test_every_instance_of_the_librarys_kernels = None
    triton = (
        *runs(["bifpn", "odd"], ["channels_last"], ["bfloat16"]),
        *runs(["swish", "zero_padding", "gated_bilinear"]),
    )

    def calls(self, case, dtype, layouts):
        maps = case.inputs(dtype, "cpu", torch.contiguous_format, grad=False)
        given, forms = fused_maps.arguments(maps, **case.options), forms_of(case)
        codes, own = [FORMS.index(form) for form in forms], placed(maps, layouts)
        fast, divide = given.get("weight_rule") == "fast", given.get("divide", 1)
        weights, gate = given.get("weights"), given.get("gate")
        if weights is not None and given.get("weight_rule") == "softmax":
            weights = weights.softmax(0)
        options = (given.get("rounding") == "sequential", divide, ACTIVATIONS.index(given.get("activation")))
        yield Call(
            "fuse_maps",
            [own, *given["size"], codes, weights, fast, gate, *options],
            lambda found: fused_maps.check_forward(found, maps, case, strides=False),
        )
        if maps[0].numel() == 0:
            return
        # A plain sum's gradients, with coefficients, and those of the coefficients.
        plain = type(case)(case.name, case.sizes, {"resample": forms, "weights": [0.5] * len(maps)}
                           | {"like": case.options.get("like", 0)}, case.batch, case.channels)  # fmt: skip
        (fused,) = fused_maps.plain(maps, **plain.options)
        seed = seeds_of(fused)
        wide = torch.promote_types(dtype, torch.float32)
        extents = [extent for each in maps for extent in each.shape[2:]]
        pooled = [each for each, code in zip(own, codes, strict=True) if code >= POOLED]
        yield Call(
            "resample_backward",
            [place(seed, layouts[0]), [0, case.channels] * len(maps), extents, codes, pooled,
             torch.full((len(maps),), 0.5, dtype=wide), None],
            lambda found: fused_maps.check_backward(found, maps, [seed], plain),
        )  # fmt: skip

        def check_sums(found):
            for k, form in enumerate(forms):
                products = seed.double() * resized(maps[k].double(), given["size"], form)
                size = resized(maps[k].double().abs(), given["size"], "identity" if "max" in form else form)
                bound = (seed.double().abs() * size).sum() if size.shape == seed.shape else products.abs().sum()
                plain_sum = (seed.to(wide) * resized(maps[k], given["size"], form).to(wide)).sum()
                tolerances.assert_not_worse(
                    found[0][:, :, k].sum(), plain_sum, products.sum(), size=max(given["size"]), magnitude=bound
                )

        yield Call("resample_sums", [place(seed, layouts[0]), own, codes], check_sums)


class TestResizeCat(EmulatedBattery):
    cases = JOINED_BY_NAME
    # The library has no kernels of these ops for a GPU.
    test_every_instance_of_the_librarys_kernels = None
    triton = (*runs(["nearest"], ["channels_last"]), *runs(["align_corners"]))

    def calls(self, case, dtype, layouts):
        maps = case.inputs(dtype, "cpu", torch.contiguous_format, grad=False)
        size, own = maps[0].shape[2:], placed(narrowed(maps), layouts)
        mode = FORMS.index(case.options.get("mode", "bilinear"))
        codes = [_IDENTITY if each.shape[2:] == size else mode for each in own]
        yield Call("resize_cat", [own, *size, codes], lambda found: check_joined(found, maps, case, strides=False))
        if maps[0].numel() == 0:
            return
        seed = seeds_of(torch.empty(case.batch, sum(each.size(1) for each in own), *size, dtype=dtype))
        channels, first = [], 0
        for each in own:
            channels += [first, each.size(1)]
            first += each.size(1)
        extents = [extent for each in own for extent in each.shape[2:]]

        def check(found):
            # The gradient of the channel that is left out is zero.
            grads = [
                torch.cat([g.new_zeros(m.size(0), m.size(1) - g.size(1), *m.shape[2:]), g], 1)
                for g, m in zip(found, maps, strict=True)
            ]
            check_joined_gradients(grads, maps, [seed], case)

        yield Call("resample_backward", [place(seed, layouts[0]), channels, extents, codes, [], None, None], check)
