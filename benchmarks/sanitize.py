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


#: Of both images, on every level, off the map, and without level.
ROIS = (
    (0.0, 3.3, 5.1, 30.7, 41.9),
    (1.0, 0.0, 0.0, 76.0, 52.0),
    (1.0, 60.2, 10.4, 61.3, 33.8),
    (0.0, -9.5, -8.5, 12.25, 9.75),
    (1.0, 500.0, 500.0, 600.0, 600.0),
    (0.0, float("nan"), 5.0, 30.0, 40.0),
    (7.0, 3.0, 5.0, 30.0, 40.0),
)


def multiscale_roi_align(device: torch.device) -> int:
    """Forward and backward for both memory formats and grids; returns the number of calls."""
    calls = 0
    rois = torch.tensor(ROIS * 4)
    scales = [2.0 ** -(2 + level) for level in range(len(LEVELS))]
    for dtype, memory_format, (size, ratio), channels in itertools.product(
        (torch.float32, torch.bfloat16),
        (torch.contiguous_format, torch.channels_last),
        ((7, 2), ((3, 5), 0), (14, 2)),
        CHANNELS,
    ):
        features = [
            torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format) for size in LEVELS
        ]
        results = []
        for where, backend in ((torch.device("cpu"), "reference"), (device, "cpp")):
            maps = [feature.to(where).requires_grad_() for feature in features]
            with backends.use(backend):
                pooled = ops.multiscale_roi_align(
                    maps, rois.to(where), size, scales, sampling_ratio=ratio, canonical_scale=48
                )
            results.append(_gradients([pooled], maps))
        label = f"multiscale_roi_align {size} {ratio} {dtype} {memory_format} C={channels}"
        # RoIs add up at a pixel: gradients are compared as shares of the largest.
        scaled = [[each / max(1.0, right.abs().max().item()) for each, right in zip(r, results[0], strict=True)]
                  for r in results]  # fmt: skip
        _compare(label, scaled[1], scaled[0])
        calls += 1
    return calls


CALLS: dict[str, Callable[[torch.device], int]] = {
    "top_down": top_down,
    "multiscale_roi_align": multiscale_roi_align,
}


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
