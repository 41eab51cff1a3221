# SPDX-License-Identifier: Apache-2.0
"""Runs CUDA kernels on the CPU: tensors to a program and back, whole storages with them. See case_file.h."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from . import build

# As case_file.h numbers them.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# A deadlock shows as a timeout. The longest case takes seconds under a sanitizer.
TIMEOUT_S = 240

ENVIRONMENT = {
    # Whether a program frees its memory is not the question, and the leak check needs ptrace.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66",
}


class Fault(Exception):
    """A kernel did what it may not; the text is the sanitizer's report or the harness's own."""


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """All of the storage behind `tensor`, what lies outside the view included."""
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<q{len(values)}q", len(values), *values)


def _encode(numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> bytes:
    parts = [_numbers(numbers), struct.pack("<q", len(tensors))]
    for tensor in tensors:
        data = storage_bytes(tensor)
        parts += [struct.pack("<q", tensor.storage_offset()), _numbers(tensor.size()), _numbers(tensor.stride())]
        parts += [struct.pack("<qq", tensor.itemsize, len(data)), data]
    return b"".join(parts)


def _decode(data: bytes, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    results, position = [], 0
    for tensor in tensors:
        end = position + tensor.untyped_storage().nbytes()
        storage = torch.frombuffer(bytearray(data[position:end]), dtype=tensor.dtype) if end > position else tensor
        results.append(torch.as_strided(storage, tensor.size(), tensor.stride(), tensor.storage_offset()))
        position = end
    assert position == len(data), "the program wrote another number of bytes than it was given"
    return results


@functools.cache
def _launcher(binary: Path) -> tuple[str, ...]:
    """What to put before a program's name: ThreadSanitizer cannot start under some kernels' address randomisation."""
    probe = subprocess.run([binary], capture_output=True, text=True, timeout=TIMEOUT_S)
    if "unexpected memory mapping" not in probe.stderr:
        return ()
    if shutil.which("setarch") is None:
        pytest.skip("ThreadSanitizer needs setarch -R on this machine, which has no setarch")
    return ("setarch", "-R")


def run(
    program: str,
    kernel: str,
    numbers: Sequence[int],
    tensors: Sequence[torch.Tensor],
    *,
    flavour: str = "plain",
    only_block: int | None = None,
    spread: int | None = None,
) -> list[torch.Tensor]:
    """The tensors as `kernel` leaves them, each with a storage of its own; those given stay as they are.

    spread: the axis of every map along which its elements lie so far apart that offsets need more than 31 bits.
    """
    binary = build.program(program, flavour)
    environment = os.environ | ENVIRONMENT
    if only_block is not None:
        environment["HOST_CUDA_ONLY_BLOCK"] = str(only_block)
    if spread is not None:
        environment["HOST_CUDA_SPREAD"] = str(spread)
    with tempfile.NamedTemporaryFile(suffix=".case") as case:
        case.write(_encode(numbers, tensors))
        case.flush()
        command = [*_launcher(binary), str(binary), kernel, case.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
        if done.returncode != 0:
            raise Fault(f"{kernel} ({flavour}) ended with {done.returncode}:\n{done.stderr}")
        return _decode(Path(case.name).read_bytes(), tensors)


def only_the_map_was_written(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the storages differ nowhere but inside the map."""
    inside = torch.zeros(before.untyped_storage().nbytes() // before.itemsize, dtype=torch.bool)
    inside.as_strided(before.size(), before.stride(), before.storage_offset()).fill_(True)
    if not len(inside):
        return True
    old, new = (
        torch.frombuffer(bytearray(storage_bytes(tensor)), dtype=torch.uint8).view(-1, tensor.itemsize)
        for tensor in (before, after)
    )
    return torch.equal(old[~inside], new[~inside])


def outputs_of(
    program: str,
    kernel: str,
    numbers: Sequence[int],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    **options,
) -> list[torch.Tensor]:
    """The outputs as `kernel` leaves them. It must have kept the inputs, and all around the outputs, as they were."""
    results = run(program, kernel, numbers, [*inputs, *outputs], **options)
    for before, after in zip(inputs, results, strict=False):
        assert storage_bytes(before) == storage_bytes(after), "an input was written"
    for before, after in zip(outputs, results[len(inputs) :], strict=True):
        assert only_the_map_was_written(before, after), "something beside an output was written"
    return results[len(inputs) :]


def check_each_block_alone(
    program: str, kernel: str, numbers: Sequence[int], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    """Each element of the outputs, which hold what no kernel writes, is written by one block, as it is in company."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        return tensor.contiguous().view(integer)

    together = outputs_of(program, kernel, numbers, inputs, outputs)
    writers = [torch.zeros(each.shape, dtype=torch.int) for each in outputs]
    for alone in block_by_block(program, kernel, numbers, [*inputs, *outputs]):
        for before, one, right, count in zip(outputs, alone[len(inputs) :], together, writers, strict=True):
            written = bits(one) != bits(before)
            assert torch.equal(bits(one)[written], bits(right)[written])
            count += written
    assert all((count == 1).all() for count in writers)


def block_by_block(program: str, kernel: str, numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> Iterator:
    """The tensors as each block of `kernel`, run alone on those given, leaves them."""
    for block in itertools.count():
        try:
            yield run(program, kernel, numbers, tensors, only_block=block)
        except Fault as fault:
            if "no such block" not in str(fault):
                raise
            return
