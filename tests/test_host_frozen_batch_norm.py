# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the frozen batch norm, run on the CPU and compared with plain PyTorch."""

import struct
from dataclasses import dataclass, replace

import torch
from helpers.frozen_norms import EPS, vectors_of
from helpers.layouts import place, poisoned
from host_kernels import run
from host_kernels.battery import TYPES, Call, HostBattery, runs

from fpn_fast import reference
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops._schemas import NORM_PART, NORM_RULES
from fpn_fast.testing import tolerances


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
LAYOUTS = ("channels_first", "channels_last")


def wide_of(dtype, on):
    return torch.promote_types(dtype, torch.float32) if on else dtype


class TestFrozenBatchNorm(HostBattery):
    program, cases = "frozen_batch_norm_main", CASES
    right = (
        *runs(list(CASES)[:6], LAYOUTS, TYPES),
        *runs(["wide_residual", "wide_output", "wide", "half_vectors"], LAYOUTS, ["float16", "bfloat16"]),
        *runs(["parts"], LAYOUTS),
        *runs(["tiles_and_a_rest"], [f"{layout}-misaligned" for layout in LAYOUTS], TYPES),
    )
    # A thread of the host for each of the kernel's: small cases.
    addresses = (*runs(["small", "small_uneven", "norm_alone"], LAYOUTS), "small/channels_last-misaligned")
    races, alone = tuple(runs(["small"], LAYOUTS)), tuple(runs(["tiles_and_a_rest"], LAYOUTS))

    def calls(self, case, dtype, layouts):
        (layout,) = layouts
        if dtype == torch.float64 and case.vectors == torch.float16:
            case = replace(case, vectors=None)
        shape = (case.batch, case.channels, *case.size)
        generator = torch.Generator().manual_seed(case.channels)

        def drawn(kind):
            return place(torch.randn(shape, generator=generator, dtype=torch.float64).to(kind), layout)

        residual_type, output_type = (wide_of(dtype, on) for on in case.wide)
        x, residual, grad = drawn(dtype), drawn(residual_type), drawn(output_type)
        norm, other = vectors_of(x, case.vectors), vectors_of(x, case.vectors, 0.5)
        none = torch.empty(0)
        (bits,) = struct.unpack("q", struct.pack("d", EPS))
        code = DTYPES.index(norm[0].dtype)

        def numbers(first, second):
            flags = (case.normed, code, case.relu, NORM_RULES.index(case.rule), layout.offset == 0)
            return [run.DTYPES[dtype], int(layout.channels_last), int(first), int(second), *map(int, flags), bits]

        others = other if case.normed else []
        y = reference.frozen_batch_norm(
            x, norm, EPS, residual if case.residual else None, others, case.relu, case.rule, output_type
        )

        def check_forward(found):
            tolerances.assert_equal(found[0], y)

        vectors = [*norm, *other]
        yield Call(
            "forward", numbers(*case.wide), [*vectors, x, residual if case.residual else none],
            [poisoned(shape, layout, output_type)], check_forward,
        )  # fmt: skip

        saved = place(y, layout)
        behind, grad_x, grad_residual = reference.frozen_batch_norm_backward(
            grad, y if case.relu else None, norm, EPS, others, case.rule, dtype
        )

        def check_backward(found):
            tolerances.assert_equal(found[0], grad_x.to(dtype))
            if case.residual:
                tolerances.assert_equal(found[1], grad_residual.to(residual_type))

        outputs = [poisoned(shape, layout, dtype)]
        if case.residual:
            outputs.append(poisoned(shape, layout, residual_type))
        unwanted = [] if case.residual else [none]
        yield Call(
            "backward", numbers(*case.wide), [*vectors, grad, saved], [*outputs, *unwanted],
            lambda found: check_backward(found[:2]),
        )  # fmt: skip

        # Of x, or of a wide residual beside a narrow output.
        source = residual if case.wide == (True, False) else x
        wide = (output_type != dtype, source.dtype != dtype)
        if wide == (True, True):
            return
        mean = norm[2].to(torch.promote_types(dtype, torch.float32))
        parts = torch.full((-(-x[:, 0].numel() // NORM_PART), 2, case.channels), float("nan"), dtype=mean.dtype)
        exact = reference.frozen_batch_norm_sums(behind.double(), source, mean)
        sizes = reference.frozen_batch_norm_sums(behind.double().abs(), source.double().abs(), -mean.abs())

        def check_sums(found):
            for sums, truth, size in zip(found[0].double().sum(0), exact, sizes, strict=True):
                tolerances.assert_linear(sums.to(mean.dtype), truth, size, terms=x[:, 0].numel() + 2, roundings=1)

        yield Call("sums", numbers(*wide), [mean, *[none] * 7, grad, saved, source], [parts], check_sums)
