# SPDX-License-Identifier: Apache-2.0
"""How a case is measured. The protocol, the same for every op:

1. Inputs are random, from a fixed seed. Every provider computes the case from the same ones, is run until it has
   compiled and allocated what it will, and is compared with the float64 reference. One that differs, or does not run,
   is refused: its row says why and holds no figures.
2. Rounds: in each, every provider is sampled once, in an order that rotates and reverses between rounds, so that what
   else the machine does hits all alike. A sample is as many calls as fill SAMPLE_SECONDS, at least one.
3. A copy into a buffer that is there already takes part in the rounds as one more provider, reading and writing as many
   bytes as the case must. Its bandwidth is the one that `copy_share` is a share of.
4. Reported are the median, p20 and p80 over the rounds. A ratio of two providers is the median of the ratios within
   each round, not the ratio of the medians: a slow second of the machine slows both sides of one ratio and cancels.

On a CPU there is one metric, `wall`. Each call allocates its outputs and drops them, as a caller's would: a large one
comes from the system afresh, and is paged in as it is written, by every provider alike. That is what users see, so it
is reported as it is; `machine.ALLOCATOR_VARIABLES` change it, and results under such a setting go to a folder of their
own. Call overhead is measured on tiny maps, where nothing else takes time. On a GPU see gpu_timing.py.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, bytes_moved
from benchmarks.providers import OPS, Provider, bind, output_grads, parity_problem, providers, running
from benchmarks.rows import Row

#: A sample this long is read to a few per mille by a clock of a microsecond.
SAMPLE_SECONDS = 0.003
MIN_ROUNDS, MAX_ROUNDS = 7, 200
#: The name under which the copy is reported.
COPY = "copy"

#: Seconds per call, of one sample.
Sampler = Callable[[], float]


@dataclass
class Measurement:
    """How one metric of one provider is sampled."""

    method: str
    calls: int
    sample: Sampler


def interleave(samplers: dict[Any, Sampler], seconds: float, max_rounds: int = MAX_ROUNDS) -> dict[Any, list[float]]:
    """Samples all of `samplers` round by round until `seconds` have passed; see the protocol above."""
    keys = list(samplers)
    samples: dict[Any, list[float]] = {key: [] for key in keys}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(max_rounds):
            if turn >= min(MIN_ROUNDS, max_rounds) and time.perf_counter() - start > seconds:
                break
            first = turn % len(keys)
            order = keys[first:] + keys[:first]
            for key in reversed(order) if (turn // len(keys)) % 2 else order:
                samples[key].append(samplers[key]())
    finally:
        gc.enable()
    return samples


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of `samples` are not above, interpolated between the two nearest."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def clock_measurement(step: Callable[[], Any], case: Case, provider: Provider) -> Measurement:
    """Wall time on a CPU."""

    def seconds(calls: int) -> float:
        with running(case, provider):
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls

    calls = max(1, round(SAMPLE_SECONDS / max(seconds(1), 1e-9)))
    if calls > 1:
        # The first call after a pause is slow; on a tiny case it says little of the ones that follow.
        calls = max(1, round(SAMPLE_SECONDS / seconds(calls)))
    return Measurement("clock", calls, lambda: seconds(calls))


def copy_step(case: Case, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes as many bytes as `case` must."""
    source = torch.randn(bytes_moved(case) // 8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one call takes at its peak; None where the system does not say (it does on Linux)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024

    try:
        # Sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (OSError, ValueError, IndexError):
        return None


def prepare(
    case: Case, provider: Provider, inputs: list[torch.Tensor], grads: list[torch.Tensor]
) -> tuple[Callable[[], Any] | None, str | None]:
    """A warm step of `provider`, or why it is refused."""
    try:
        with running(case, provider):
            step = bind(case, provider.function, inputs, grads)
            step()
            problem = parity_problem(case, step, inputs, grads)
    except Exception as error:
        return None, f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    return (step, None) if problem is None else (None, problem)


def measure(
    case: Case,
    device_type: str,
    seconds: float,
    candidates: Sequence[Provider] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[list[Row], dict[tuple[str, str], list[float]]]:
    """Measures `case` for some `seconds` beyond warming up.

    candidates: the providers, eager among them; by default all that this machine has.

    Returns: the rows, refused ones among them, and the samples in seconds by (provider, metric).
    """
    device = torch.device(device_type)
    # Shapes that torch.compile has seen before would make it generalise.
    torch._dynamo.reset()
    torch.manual_seed(0)
    if device_type == "cuda":
        from benchmarks.gpu_timing import gpu_measurements, input_sets
    else:
        input_sets = lambda case: 1  # noqa: E731
    inputs = [OPS[case.op].inputs(case, device) for _ in range(input_sets(case))]
    grads = [output_grads(case, each) for each in inputs]

    rows: list[Row] = []
    measurements: dict[tuple[str, str], Measurement] = {}
    peaks: dict[str, int | None] = {}
    for provider in providers(case, device_type) if candidates is None else candidates:
        step, problem = prepare(case, provider, inputs[0], grads[0])
        if step is None:
            rows.append(Row(case, provider.name, "wall", "none", bytes_moved(case), refused=problem))
            continue
        if not case.overhead:
            with running(case, provider):
                peaks[provider.name] = peak_bytes(step, device)
        if device_type == "cuda":
            found = gpu_measurements(case, provider, inputs, grads)
        else:
            found = {"wall": clock_measurement(step, case, provider)}
        measurements |= {(provider.name, metric): measurement for metric, measurement in found.items()}
    if not case.overhead:
        copy = Provider(COPY, OPS[case.op].reference)
        if device_type == "cuda":
            from benchmarks.gpu_timing import copy_measurement

            measurements[COPY, "gpu_cold"] = copy_measurement(case)
        else:
            measurements[COPY, "wall"] = clock_measurement(copy_step(case, device), case, copy)

    samples = interleave({key: each.sample for key, each in measurements.items()}, seconds, max_rounds)
    for (name, metric), measurement in measurements.items():
        row = _row(case, name, metric, measurement, samples)
        row.peak_bytes = peaks.get(name)
        rows.append(row)
    return rows, samples


def _row(
    case: Case, name: str, metric: str, measurement: Measurement, samples: dict[tuple[str, str], list[float]]
) -> Row:
    own = samples[name, metric]
    row = Row(case, name, metric, measurement.method, bytes_moved(case), rounds=len(own), calls=measurement.calls)
    row.p50, row.p20, row.p80 = (quantile(own, share) * 1e6 for share in (0.5, 0.2, 0.8))
    if (COPY, metric) in samples:
        copies = samples[COPY, metric]
        row.copy_gb_per_s = row.bytes / quantile(copies, 0.5) / 1e9
        row.copy_share = ratio(copies, own)
    if name != COPY:
        others = {other: times for (other, of), times in samples.items() if of == metric and other not in (name, COPY)}
        row.speedup = {other: ratio(times, own) for other, times in others.items()}
    return row
