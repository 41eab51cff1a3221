# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of anchor matching, run on the CPU and compared with plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.anchor_matching import CASES, Case
from host_kernels import run

PROGRAM = "match_anchors_main"


def numbers_of(case: Case, dtype: torch.dtype) -> list[int]:
    stored = isinstance(case.anchors, torch.Tensor)
    differ = stored and case.anchors.dim() == 3
    numbers = [run.DTYPES[dtype], case.low_quality, differ, stored, case.anchor_counts is not None]
    if not stored:
        _, cells, sizes, strides, _ = case.anchors._numbers()
        for i, count in enumerate(cells):
            numbers += [count, *sizes[2 * i : 2 * i + 2], *strides[2 * i : 2 * i + 2]]
    return [int(number) for number in numbers]


def outputs_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Zeros for the highest IoUs, and poison: no code is 99."""
    shape = case.expected(dtype)[0].shape
    return [
        case.gts.new_zeros(case.gts.shape[:2], dtype=dtype),
        torch.full(shape, 99),
        torch.full(shape, math.nan, dtype=dtype),
    ]


def check(case: Case, dtype: torch.dtype, **options) -> None:
    inputs = case.tensors(dtype)
    results = run.run(PROGRAM, "match", numbers_of(case, dtype), [*inputs, *outputs_of(case, dtype)], **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    matches, ious = case.expected(dtype)
    assert torch.equal(results[-2], matches)
    assert torch.equal(results[-1], ious)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("name", ["grid", "of_each_image", "odd"])
def test_no_stray_access_and_no_undefined_arithmetic(name):
    check(CASES[name], torch.float32, flavour="address")


@pytest.mark.parametrize("name", ["only_the_last_is_a_box", "more_than_a_block_without_low_quality"])
def test_no_data_race(name):
    check(CASES[name], torch.float32, flavour="thread")


def test_blocks_are_independent():
    """Without low-quality matches; those wait for the highest IoUs over all blocks."""
    case = CASES["grid_without_low_quality"]
    matches, ious = case.expected(torch.float32)
    tensors = [*case.tensors(torch.float32), *outputs_of(case, torch.float32)]
    written = torch.zeros(matches.shape, dtype=torch.int)
    for alone in run.block_by_block(PROGRAM, "match", numbers_of(case, torch.float32), tensors):
        here = alone[-2] != 99
        assert torch.equal(here, ~alone[-1].isnan())
        assert torch.equal(alone[-2][here], matches[here])
        assert torch.equal(alone[-1][here], ious[here])
        written += here
    assert (written == 1).all()
