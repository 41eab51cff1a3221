# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of the frozen batch norm, executed by the emulator and compared with plain PyTorch.

A GPU's rsqrt is an approximation. In the emulator's exact mode the root in float32 is the true one, rounded once, where
a CPU rounds a square root and a quotient. With that root the reference equals the kernels bit for bit.

With vectors in float64, whose root takes a few steps, and in the adversarial mode a bound is derived. CUDA documents an
error of at most 2 ulp for rsqrtf and 1 for rsqrt; an ulp is at most two units u, the relative error of one rounding. So
the root of variance + eps errs by 4 u, and by 1 u more because eps and that sum are rounded. Scale takes one rounding
more, shift two on the way of the mean, and then x * scale + shift is rounded once and the addition of the residual
once: at most 5 + 1 + 2 + 1 + 1 = 10 u of each term, of which `tolerances.linear` adds up the magnitudes. A gradient
takes fewer.
"""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from helpers import emulated_gpu
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, layouts_of, runs
from helpers.frozen_norms import EPS, vectors_of
from helpers.layouts import place
from torch.utils._pytree import tree_leaves

from fpn_fast import reference
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops._schemas import NORM_RULES
from fpn_fast.testing import tolerances
from tools import gpu_emulator

ROUNDINGS = 10
FORMATS = ("channels_first", "channels_last")


@dataclass(frozen=True)
class Case:
    """wide: which of residual and output are wide beside half maps; vectors: their dtype, that of x by default."""

    batch: int
    channels: int
    size: tuple[int, int]
    wide: tuple[bool, bool] = (False, False)
    vectors: torch.dtype | None = None
    residual: bool = True
    normed: bool = True
    relu: bool = True
    rule: str = "torchvision"


CASES = {
    "tiles_and_a_rest": Case(2, 24, (17, 23)),
    "many_channels": Case(1, 2064, (3, 2)),
    "uneven_planes": Case(3, 5, (13, 21)),
    "small_planes": Case(2, 3, (1, 3)),
    "norm_alone": Case(2, 16, (4, 6), residual=False, normed=False, relu=False),
    "detectron2": Case(2, 16, (4, 6), rule="detectron2", vectors=torch.float32),
    "wide_residual": Case(2, 16, (9, 8), (True, False), torch.float32),
    "wide_output": Case(2, 16, (9, 8), (False, True), torch.float32, normed=False),
    "wide": Case(2, 16, (9, 8), (True, True), torch.float32),
    "half_vectors": Case(1, 16, (5, 8), vectors=torch.float16),
    "parts": Case(3, 2, (41, 53)),
    "small": Case(1, 8, (2, 4)),
    "small_uneven": Case(1, 3, (3, 3)),
}


def wide_of(dtype, on):
    return torch.promote_types(dtype, torch.float32) if on else dtype


def doubles(*tensors):
    return [None if each is None else each.double() for each in tensors]


def absolutes(*tensors, signs=(1, 1, -1, 1)):
    """With the signs of a norm's vectors, so that all terms of its result are positive."""
    return [None if each is None else each.abs() * sign for each, sign in zip(doubles(*tensors), signs, strict=False)]


def rounded_root(values):
    return (1 / values.double().sqrt()).to(values.dtype)


class TestFrozenBatchNorm(EmulatedBattery):
    cases = CASES
    cpp = (
        *runs(list(CASES)[:6], FORMATS, TYPES),
        *runs(["wide_residual", "wide_output", "wide", "half_vectors"], FORMATS, ["float16", "bfloat16"]),
        *runs(["parts", "small", "small_uneven"], FORMATS),
        *runs(["tiles_and_a_rest"], [f"{layout}-misaligned" for layout in FORMATS], TYPES),
    )
    triton = (
        *runs(["tiles_and_a_rest", "small_planes", "detectron2"], FORMATS, ["bfloat16"]),
        *runs(["uneven_planes"], FORMATS),
        *runs(["norm_alone"], FORMATS, ["float64"]),
        *runs(["wide", "half_vectors"], ["channels_last"], ["bfloat16"]),
    )
    kernels = tuple(f"frozen_batch_norm{part}_kernel" for part in ("", "_backward", "_sums"))
    every_kernel = (
        *runs(["norm_alone"], FORMATS, TYPES),
        *runs(["wide_residual", "wide_output", "wide"], FORMATS, ["float16", "bfloat16"]),
    )

    @mock.patch.object(torch.Tensor, "rsqrt", rounded_root)
    def calls(self, case, dtype, layouts, exact=True):
        (layout,) = layouts
        if dtype == torch.float64 and case.vectors == torch.float16:
            case = replace(case, vectors=None)
        double = torch.float64
        shape = (case.batch, case.channels, *case.size)
        generator = torch.Generator().manual_seed(case.channels)

        def drawn(kind):
            return place(torch.randn(shape, generator=generator, dtype=double).to(kind), layout)

        residual_type, output_type = (wide_of(dtype, on) for on in case.wide)
        x, residual, grad = drawn(dtype), drawn(residual_type), drawn(output_type)
        norm, other = vectors_of(x, case.vectors), vectors_of(x, case.vectors, 0.5) if case.normed else []
        source = residual if case.wide == (True, False) else x
        residual = residual if case.residual else None
        exact = exact and norm[0].dtype != double
        rule = NORM_RULES.index(case.rule)

        def check(actual, plain, truth, magnitude):
            if exact:
                return tolerances.assert_equal(actual, plain.to(actual.dtype))
            # detectron2's scale and shift are rounded to the maps' type too.
            roundings = (actual.element_size() == 2) + (case.rule == "detectron2")
            tolerances.assert_linear(actual, truth, magnitude, terms=ROUNDINGS, roundings=roundings)

        def forward(x, residual, norm, other, relu, rule, kind):
            return reference.frozen_batch_norm(x, norm, EPS, residual, other, relu, rule, kind)

        y = forward(x, residual, norm, other, case.relu, case.rule, output_type)
        maps, plain = (x, residual), "torchvision"
        truth = forward(*doubles(*maps), doubles(*norm), doubles(*other), case.relu, plain, double)
        most = forward(*absolutes(*maps), absolutes(*norm), absolutes(*other), False, plain, double)
        arguments = [x, norm, EPS, residual, other, case.relu, rule, output_type != dtype]
        found = [Call("frozen_batch_norm", arguments, lambda out: check(out[0], y, truth, most))]

        saved = place(y, layout) if case.relu else None
        behind, *grads = reference.frozen_batch_norm_backward(grad, saved, norm, EPS, other, case.rule, dtype)
        _, *truths = reference.frozen_batch_norm_backward(
            *doubles(grad, saved), doubles(*norm), EPS, doubles(*other), plain, double
        )

        def check_backward(out):
            for i in range(1 + case.residual):
                check(out[i], grads[i], truths[i], truths[i].abs())

        codes = DTYPES.index(dtype), DTYPES.index(residual_type) if case.residual else -1
        arguments = [grad, saved, norm, EPS, other, rule, *codes]
        found.append(Call("frozen_batch_norm_backward", arguments, check_backward))

        # Of x, or of a wide residual beside a narrow output.
        if (output_type != dtype, source.dtype != dtype) == (True, True):
            return found
        mean = norm[2].to(torch.promote_types(dtype, torch.float32))
        exactly = reference.frozen_batch_norm_sums(behind.double(), source, mean)
        sizes = reference.frozen_batch_norm_sums(behind.double().abs(), source.double().abs(), -mean.abs())

        def check_sums(out):
            for sums, right, size in zip(out[0].double().sum(0), exactly, sizes, strict=True):
                tolerances.assert_linear(sums.to(mean.dtype), right, size, terms=x[:, 0].numel() + 2, roundings=1)

        return [*found, Call("frozen_batch_norm_sums", [grad, saved, source, mean], check_sums)]

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [*((name, dtype) for name in ("uneven_planes", "norm_alone") for dtype in TYPES), ("detectron2", "bfloat16")],
    )
    def test_the_worst_roots_keep_the_bound(self, name, dtype):
        for call in self.calls(CASES[name], TYPES[dtype], layouts_of("channels_last"), exact=False):
            # Another seed moves them otherwise.
            found, _ = emulated_gpu.call(call.op, call.arguments, orders=("in_order",), mufu="adversarial")
            call.check(tree_leaves(found))

    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_memory_bounds_both_directions(self, dtype, layout):
        """Maps are read and written once; by the cycle model an H200 issues instructions faster than it moves bytes."""
        h200 = {each.name: each.value for each in gpu_emulator.model_constants()}
        case = Case(1, 256, (96, 84), vectors=torch.float32, rule="detectron2")
        for call, vectors in zip(self.calls(case, TYPES[dtype], layouts_of(layout)), (8, 4), strict=False):
            found, ((_, counters),) = emulated_gpu.call(call.op, call.arguments, orders=("in_order",))
            maps = [each for each in tree_leaves(call.arguments) if isinstance(each, torch.Tensor) and each.dim() == 4]
            written = sum(each.nbytes for each in tree_leaves(found))
            assert counters["distinct_read_bytes"] == sum(each.nbytes for each in maps) + vectors * 4 * case.channels
            assert counters["distinct_written_bytes"] == written
            issue = counters["warp_instructions"] / (h200["sms"] * h200["schedulers"])
            dram = (counters["distinct_read_bytes"] + counters["distinct_written_bytes"]) / h200["dram_bytes_per_cycle"]
            assert issue < dram
