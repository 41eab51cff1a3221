# SPDX-License-Identifier: Apache-2.0
"""The harness that runs CUDA kernels on the CPU, tested on toy kernels: right results, and known faults reported."""

import re

import pytest
import torch
from host_kernels import build, run

BLOCKS, THREADS, WARP = 3, 64, 32
TOY_SOURCE = build.HERE / "toy_kernels.cuh"

flavours = pytest.mark.parametrize("flavour", build.FLAVOURS)


def poison(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN, or -1 for integers: no kernel here writes that, so what is not written shows."""
    return torch.full((*size, dtype.itemsize), 0xFF, dtype=torch.uint8).view(dtype).squeeze(-1)


def toy(kernel: str, numbers: list[int], values: torch.Tensor, out: torch.Tensor, **options) -> torch.Tensor:
    return run.run("toy_main", kernel, [BLOCKS, *numbers], [values, out], **options)[1]


def source_line(code: str) -> str:
    """`file:line` of the one line of the toy kernels with `code` in it, as a report names it."""
    lines = [i for i, line in enumerate(TOY_SOURCE.read_text().splitlines(), 1) if code in line]
    assert len(lines) == 1, f"{code!r} stands in lines {lines}"
    return f"{TOY_SOURCE.name}:{lines[0]}"


def small_integers(count: int) -> torch.Tensor:
    """Floats whose sums are exact in any order."""
    return torch.randint(-50, 50, (count,), generator=torch.Generator().manual_seed(0)).float()


@flavours
def test_block_sum(flavour):
    values = small_integers(BLOCKS * THREADS)
    sums = toy("block_sum", [], values, poison(BLOCKS), flavour=flavour)
    assert torch.equal(sums, values.view(BLOCKS, THREADS).sum(1))


@flavours
@pytest.mark.parametrize("count", [BLOCKS * THREADS, BLOCKS * THREADS - 45])
def test_warp_sum(flavour, count):
    values = small_integers(count)
    sums = toy("warp_sum", [count], values, poison(BLOCKS * THREADS // WARP), flavour=flavour)
    padded = torch.zeros(BLOCKS * THREADS).index_copy(0, torch.arange(count), values)
    assert torch.equal(sums, padded.view(-1, WARP).sum(1))


@flavours
def test_votes_and_shuffles(flavour):
    out = toy("lanes", [], poison(0), poison(BLOCKS, THREADS, 6, dtype=torch.int32), flavour=flavour)
    lane = torch.arange(THREADS) % WARP
    segment = lane // 8 * 8
    votes = sum(1 << i for i in range(0, WARP, 3))
    expected = [
        torch.full_like(lane, votes if votes < 1 << 31 else votes - (1 << 32)),
        torch.full_like(lane, 1),
        segment + (lane + 1) % 8,
        lane ^ 5,
        torch.where(lane - 3 >= segment, lane - 3, lane),
        torch.where(lane + 3 < segment + 8, lane + 3, lane),
    ]
    assert torch.equal(out, torch.stack(expected, 1).int().expand(BLOCKS, -1, -1))


@flavours
def test_atomics(flavour):
    bins, count = 7, 1000
    values = torch.rand(count, generator=torch.Generator().manual_seed(0))
    histogram = toy("histogram", [count, bins], values, torch.zeros(bins, dtype=torch.int32), flavour=flavour)
    assert torch.equal(histogram, torch.bincount((values * bins).int(), minlength=bins).int())


@flavours
def test_counts_of_bits(flavour):
    out = torch.zeros(BLOCKS, THREADS, 7, dtype=torch.int64)
    out = toy("bits", [], poison(0), out, flavour=flavour)
    values = [5 << i & (1 << 64) - 1 for i in range(THREADS)]

    def counts(value, bits):
        return [value.bit_count(), bits - value.bit_length()]

    def first_bit(value):
        return (value & -value).bit_length()

    expected = [
        [*counts(v % (1 << 32), 32), first_bit(v % (1 << 32)), *counts(v, 64), first_bit((v - 5) % (1 << 64))]
        for v in values
    ]
    assert torch.equal(out[..., :6], torch.tensor(expected).expand(BLOCKS, -1, -1))
    thirds = sum(1 << i for i in range(0, THREADS, 3))
    assert (out[:, 0, 6] == thirds - (1 << 64)).all()


@flavours
def test_threads_that_return_early_hold_nobody_up(flavour):
    out = toy("early_return", [], poison(0), poison(BLOCKS, THREADS), flavour=flavour)
    even = torch.arange(0, THREADS, 2)
    assert torch.equal(out[:, even], (THREADS - 2 - even).float().expand(BLOCKS, -1))
    assert out[:, even + 1].isnan().all()


@flavours
@pytest.mark.parametrize("kernel", ["copy", "vector_copy", "offset"])
def test_correct_kernels_are_clean(flavour, kernel):
    if kernel == "copy":
        values = small_integers(100)
        assert torch.equal(toy(kernel, [100], values, poison(100), flavour=flavour), values)
    elif kernel == "vector_copy":
        values = small_integers(4 * THREADS + 4)
        assert torch.equal(toy(kernel, [4], values, poison(4 * THREADS), flavour=flavour), values[4:])
    else:
        stride = 1 << 28
        out = toy(kernel, [stride], poison(0), poison(BLOCKS, THREADS), flavour=flavour)
        assert torch.equal(out, (torch.arange(1, THREADS + 1) * stride).float().expand(BLOCKS, -1))


def test_a_missing_barrier_is_reported():
    values = small_integers(BLOCKS * THREADS)
    with pytest.raises(run.Fault, match="data race") as fault:
        toy("block_sum_without_barriers", [], values, poison(BLOCKS), flavour="thread")
    assert source_line("partial[threadIdx.x] += partial") in str(fault.value)
    assert "::partial" in str(fault.value)


def test_blocks_that_overlap_are_reported():
    out = poison(32 * BLOCKS + 1)
    with pytest.raises(run.Fault, match="data race") as fault:
        toy("overlapping_blocks", [], poison(0), out, flavour="thread")
    assert source_line("out[32 * blockIdx.x + threadIdx.x]") in str(fault.value)


@pytest.mark.parametrize(
    ("kernel", "numbers", "report", "code"),
    [
        ("copy_out_of_bounds", [100], "heap-buffer-overflow", "out[i] = i < count"),
        ("offset_overflow", [1 << 28], "signed integer overflow", "static_cast<index_t>(threadIdx.x + 1)"),
        ("vector_copy", [1], "misaligned address", "const float4 four"),
    ],
)
def test_memory_faults_are_reported(kernel, numbers, report, code):
    values, out = small_integers(4 * THREADS + 4), poison(100 if "copy_out" in kernel else 4 * THREADS)
    with pytest.raises(run.Fault, match=report) as fault:
        toy(kernel, numbers, values, out, flavour="address")
    assert source_line(code) in str(fault.value)


def test_blocks_run_alone_show_what_they_write_and_need():
    in_company = toy("chained_blocks", [], poison(0), poison(BLOCKS))
    assert torch.equal(in_company, torch.arange(1.0, BLOCKS + 1))
    alone = [out for _, out in run.block_by_block("toy_main", "chained_blocks", [BLOCKS], [poison(0), poison(BLOCKS)])]
    assert len(alone) == BLOCKS
    assert [out.isnan().tolist() for out in alone] == [[False, True, True], [True] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("empty_grid", "at least one block"),
        ("tall_grid", "65535"),
        ("large_block", "1 to 1024 threads"),
        ("partial_mask", "name every thread of the warp"),
        ("unordered_barrier", "may not wait"),
    ],
)
def test_what_the_harness_refuses(kernel, reason):
    with pytest.raises(run.Fault, match=re.escape(reason)):
        toy(kernel, [], poison(0), poison(BLOCKS, THREADS))
