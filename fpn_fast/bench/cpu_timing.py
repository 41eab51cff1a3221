# SPDX-License-Identifier: Apache-2.0
"""How a case is measured on a CPU, in the rounds of harness.py. There is one metric:

- wall: what a caller waits. Each call allocates its outputs through torch and drops them, as a caller's would. What a
  large fresh output costs depends on the allocator, which the variables in machine.ALLOCATOR_VARIABLES set; results
  under such a setting go to a folder of their own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.providers import Provider, bind, running
from fpn_fast.bench.sampling import Measurement

#: A sample this long is read to a per mille by a clock of a microsecond.
SAMPLE_SECONDS = 0.003


def input_sets(case: Case) -> int:
    """One: between two calls on the same maps the other providers run, and large maps do not fit a cache."""
    return 1


def _clock_measurement(step: Callable[[], Any], state: Callable[[], Any]) -> Measurement:
    def seconds(calls: int) -> float:
        with state():
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls

    calls = 1
    # Twice: the first call after a pause is slow, and of a tiny case says little of the ones that follow.
    for _ in range(2):
        calls = max(1, round(SAMPLE_SECONDS / max(seconds(calls), 1e-9)))
    return Measurement("clock", calls, lambda: seconds(calls))


def measurements(
    case: Case, provider: Provider, inputs: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]
) -> dict[str, Measurement]:
    """The metrics of `provider`, warm."""
    with running(case, provider):
        step = bind(case, provider.function, inputs[0], grads[0])
    return {"wall": _clock_measurement(step, lambda: running(case, provider))}


def copy_measurement(case: Case) -> dict[str, Measurement]:
    """A copy, into a buffer that is there already, that reads and writes as many bytes as `case` must."""
    source = torch.randn(bytes_moved(case) // 8)
    target = torch.zeros_like(source)
    return {"wall": _clock_measurement(lambda: target.copy_(source), torch.no_grad)}


def peak_bytes(step: Callable[[], Any]) -> int | None:
    """Memory that one call takes at its peak; None where the system does not say (Linux does).

    Pages count, so what is smaller than a few hundred kilobytes may read as nothing.
    """

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024

    try:
        # Memory that was freed and kept for later calls would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
        # Sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
