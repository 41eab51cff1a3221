# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the focal loss, run on the CPU and compared with float64."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers.focal_losses import ALPHA, CASES, DTYPES, Case, accumulated, check
from host_kernels import run

from fpn_fast.ops._schemas import FOCAL_TILE

PROGRAM = "sigmoid_focal_loss_main"
# A thread of the host for each of the kernel's: the smaller cases, and one of two tiles.
SMALL = ("one_tile", "two_classes", "odd", "large_logits")


def numbers_of(dtype: torch.dtype, aligned: bool = True) -> list[int]:
    (bits,) = struct.unpack("q", struct.pack("d", ALPHA))
    return [run.DTYPES[dtype], bits, int(aligned)]


def tensors_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs, and outputs that are no number."""
    logits, labels, weights = case.inputs(dtype)
    tiles = -(-logits.numel() // FOCAL_TILE)
    nowhere = torch.full((tiles,), float("nan"), dtype=accumulated(dtype))
    return [logits, labels, weights, nowhere, torch.full_like(logits, float("nan"))]


def check_case(case: Case, dtype: torch.dtype, *, aligned: bool = True, **options) -> None:
    tensors = tensors_of(case, dtype)
    numbers = numbers_of(dtype, aligned)
    results = run.run(PROGRAM, "gradient", numbers, tensors, **options)
    for before, after in zip(tensors[:3], results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    check(results[3], results[4], tensors[:3])
    sums = run.run(PROGRAM, "sums", numbers, tensors, **options)
    assert torch.equal(sums[3], results[3])
    assert sums[4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_is_the_float64_truth(name, dtype):
    check_case(CASES[name], dtype)


def test_element_by_element():
    check_case(CASES["tiles_and_a_rest"], torch.float32, aligned=False)


@pytest.mark.parametrize("name", SMALL)
def test_no_stray_access_and_no_undefined_arithmetic(name):
    check_case(CASES[name], torch.float32, flavour="address")


def test_no_data_race():
    check_case(CASES["one_tile"], torch.float32, flavour="thread")


def test_blocks_are_independent():
    """Each number is written by one block."""
    tensors = tensors_of(CASES["tiles_and_a_rest"], torch.float32)
    whole = run.run(PROGRAM, "gradient", numbers_of(torch.float32), tensors)
    written = torch.zeros(tensors[4].shape, dtype=torch.int)
    for alone in run.block_by_block(PROGRAM, "gradient", numbers_of(torch.float32), tensors):
        here = ~alone[4].isnan()
        assert torch.equal(alone[4][here], whole[4][here])
        assert int((~alone[3].isnan()).sum()) == 1
        written += here
    assert (written == 1).all()
