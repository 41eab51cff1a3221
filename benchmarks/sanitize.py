# SPDX-License-Identifier: Apache-2.0
"""Calls each compiled kernel once on small odd maps, for compute-sanitizer: ``python -m benchmarks.sanitize``.

The sanitizer slows kernels a hundredfold, so this is no test suite: results are only held against gross error, which
shows that the kernels ran.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpn_fast import backends, ops, reference

#: Ratios of two and others, a single pixel at the top, and channels that do and do not fill 16 bytes.
LEVELS = ((13, 19), (7, 9), (4, 5), (1, 1))
CHANNELS = (3, 16)


def _gradients(merged: Sequence[Tensor], laterals: Sequence[Tensor]) -> list[Tensor]:
    return [*merged, *torch.autograd.grad(list(merged), laterals, [torch.ones_like(m) for m in merged])]


def _compare(label: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, right in zip(actual, expected, strict=True):
        if not torch.allclose(result.float().cpu(), right.float(), rtol=0.05, atol=0.05):
            raise AssertionError(f"{label}: wrong result")


def top_down(device: torch.device) -> int:
    """Forward and backward for both memory formats and modes; returns the number of calls."""
    calls = 0
    for dtype, memory_format, mode, channels in itertools.product(
        (torch.float32, torch.bfloat16),
        (torch.contiguous_format, torch.channels_last),
        ("nearest", "bilinear"),
        CHANNELS,
    ):
        laterals = [
            torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format) for size in LEVELS
        ]
        here = [lateral.clone().requires_grad_() for lateral in laterals]
        there = [lateral.to(device).requires_grad_() for lateral in laterals]
        expected = _gradients(reference.top_down(here, mode), here)
        actual = _gradients(ops.top_down(there, mode), there)
        _compare(f"top_down {mode} {dtype} {memory_format} C={channels}", actual, expected)
        calls += 1
    return calls


CALLS: dict[str, Callable[[torch.device], int]] = {"top_down": top_down}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with backends.use("cpp"):
        for name, call in CALLS.items():
            print(f"{name}: {call(torch.device(options.device))} calls on {options.device}, forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())
