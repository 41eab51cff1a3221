# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of mask pasting, run on the CPU and compared with plain PyTorch, bit for bit."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers.mask_pasting import CASES, DTYPES, Case
from host_kernels import run

PROGRAM = "paste_masks_main"


def numbers_of(case: Case, dtype: torch.dtype) -> list[int]:
    (bits,) = struct.unpack("q", struct.pack("d", case.threshold or 0.0))
    return [run.DTYPES[dtype], int(case.box_type == torch.float64), case.padding, bits]


def kernel_of(case: Case) -> str:
    return "values" if case.threshold is None else "above"


def output_of(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Every byte 0xFF."""
    expected = case.expected(dtype)
    poison = torch.full((expected.numel() * expected.itemsize,), 0xFF, dtype=torch.uint8)
    return poison.view(torch.uint8 if expected.dtype == torch.bool else dtype).view(expected.shape)


def check(case: Case, dtype: torch.dtype, **options) -> None:
    inputs = case.inputs(dtype)
    results = run.run(PROGRAM, kernel_of(case), numbers_of(case, dtype), [*inputs, output_of(case, dtype)], **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    expected = case.expected(dtype)
    if expected.dtype == torch.bool:
        expected = expected.to(torch.uint8)
    assert torch.equal(results[2], expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("name", ["inside_and_across", "bool", "empty_values", "narrow_images"])
def test_no_stray_access_and_no_undefined_arithmetic(name):
    check(CASES[name], torch.float32, flavour="address")


def test_no_data_race():
    check(CASES["bool"], torch.float32, flavour="thread")


@pytest.mark.parametrize("name", ["inside_and_across", "bool"])
def test_blocks_are_independent(name):
    """Each pixel is written by one block."""
    case = CASES[name]
    inputs, output = case.inputs(torch.float32), output_of(case, torch.float32)
    expected = case.expected(torch.float32).to(output.dtype)
    written = torch.zeros(expected.shape, dtype=torch.int)
    for alone in run.block_by_block(PROGRAM, kernel_of(case), numbers_of(case, torch.float32), [*inputs, output]):
        here = ~alone[2].isnan() if output.is_floating_point() else alone[2] != 0xFF
        assert torch.equal(alone[2][here], expected[here])
        written += here
    assert (written == 1).all()
