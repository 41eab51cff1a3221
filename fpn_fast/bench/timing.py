# SPDX-License-Identifier: Apache-2.0
"""Rounds, medians, and how a call is timed on a CPU. There is one metric there:

- wall: the time until a caller has the result. Each call allocates its outputs and drops them, as a caller's would.
  What that costs depends on the allocator; see :func:`fpn_fast.bench.machine.keep_freed_memory`.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.providers import Provider, bind, running

#: Fewer rounds give no quantiles; the longest case has no time for more.
MIN_ROUNDS, MAX_ROUNDS = 7, 200
#: Seconds per sample: a clock with a grain of a microsecond then errs by less than a thousandth.
SAMPLE_SECONDS = 0.003

Key = TypeVar("Key", bound=Hashable)
#: Takes one sample: seconds per call.
Sampler = Callable[[], float]


@dataclass
class Measurement:
    """How one metric of one provider is sampled: by what method, and over how many calls."""

    method: str
    calls: int
    sample: Sampler


def interleave(samplers: Mapping[Key, Sampler], seconds: float, max_rounds: int = MAX_ROUNDS) -> dict[Key, list[float]]:
    """Samples each of `samplers` once a round until `seconds` have passed, in an order that changes with the round."""
    keys = list(samplers)
    samples: dict[Key, list[float]] = {key: [] for key in keys}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(max_rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % len(keys)
            order = keys[first:] + keys[:first]
            # Every other cycle backwards: else each would always follow the same one.
            for key in reversed(order) if (turn // len(keys)) % 2 else order:
                samples[key].append(samplers[key]())
    finally:
        gc.enable()
    return samples


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of `samples` lie below, interpolated between the two nearest."""
    return torch.tensor(samples, dtype=torch.float64).quantile(share).item()


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def input_sets(case: Case) -> int:
    """One: the other providers run between two calls on the same maps, and large maps do not fit a cache."""
    return 1


def wall_measurement(step: Callable[[], Any], state: Callable[[], Any]) -> Measurement:
    """Wall time of one call of `step`; `state` gives the context it runs in."""

    def seconds(calls: int) -> float:
        with state():
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls

    calls = 1
    # Twice: the first call after a pause is slow, and says little about the following ones where maps are tiny.
    for _ in range(2):
        calls = max(1, round(SAMPLE_SECONDS / max(seconds(calls), 1e-9)))
    return Measurement("clock", calls, lambda: seconds(calls))


def measurements(
    case: Case, provider: Provider, inputs: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]
) -> dict[str, Measurement]:
    """The metrics of `provider`, warm."""
    with running(case, provider):
        step = bind(case, provider.function, inputs[0], grads[0])
    return {"wall": wall_measurement(step, lambda: running(case, provider))}


def copy_measurement(case: Case) -> dict[str, Measurement]:
    """A copy into an existing buffer that reads and writes as many bytes as `case` must."""
    source = torch.randn(bytes_moved(case) // 8)
    target = torch.zeros_like(source)
    return {"wall": wall_measurement(lambda: target.copy_(source), torch.no_grad)}


def peak_bytes(step: Callable[[], Any]) -> int | None:
    """The peak memory of one call, in bytes; None where the system does not say. Linux does.

    It is counted in pages, so anything below a few hundred kilobytes may read as nothing.
    """

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024

    try:
        # Freed memory that the allocator keeps would hide what this call takes.
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
