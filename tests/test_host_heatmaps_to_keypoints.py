# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of heatmaps_to_keypoints, run on the CPU and compared with plain PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers.keypoint_heatmaps import CASES, DTYPES, Case, same
from host_kernels import run

PROGRAM = "heatmaps_to_keypoints_main"


def numbers_of(case: Case, dtype: torch.dtype) -> list[int]:
    return [run.DTYPES[dtype], int(case.box_type == torch.float64)]


def unwritten(case: Case) -> list[torch.Tensor]:
    """Full of a number that no case gives; a NaN may be a score."""
    return [torch.full((len(case.boxes), case.keypoints, *size), -7.0) for size in ((3,), ())]


def check(case: Case, dtype: torch.dtype, **options) -> None:
    inputs = case.inputs(dtype)
    results = run.run(PROGRAM, "search", numbers_of(case, dtype), [*inputs, *unwritten(case)], **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    assert same(results[2:], case.expected(dtype))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_reference(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_the_reference_in_every_type(dtype):
    check(CASES["no_numbers"], dtype)


@pytest.mark.parametrize("name", ["any", "no_box", "large_maps", "wide", "tall"])
def test_no_stray_access_and_no_undefined_arithmetic(name):
    check(CASES[name], torch.float32, flavour="address")


def test_no_data_race():
    check(CASES["tall"], torch.float32, flavour="thread")


@pytest.mark.parametrize("name", ["any", "no_box"])
def test_blocks_are_independent(name):
    """Each keypoint is found by one block."""
    case = CASES[name]
    inputs, outputs = case.inputs(torch.float32), unwritten(case)
    expected = case.expected(torch.float32)
    written = [torch.zeros(each.shape, dtype=torch.int) for each in outputs]
    for alone in run.block_by_block(PROGRAM, "search", numbers_of(case, torch.float32), [*inputs, *outputs]):
        for found, right, count in zip(alone[2:], expected, written, strict=True):
            here = found != -7
            assert torch.equal(found[here], right[here])
            count += here
    assert all((count == 1).all() for count in written)
