# SPDX-License-Identifier: Apache-2.0
"""How a case is measured. The protocol, the same for every op and device:

1. Inputs are random, from a fixed seed. Every provider computes the case from the same ones, is run until it has
   compiled and allocated what it will, and is compared with the float64 reference. One that differs, or does not run,
   is refused: its row says why and holds no figures, and it is part of no ratio.
2. Rounds: in each, every provider is sampled once, in an order that changes between rounds, so that whatever else the
   machine does hits all alike. A sample is one call, or as many as it takes to be longer than its clock's grain.
3. A copy takes part in the rounds as one more provider. It reads and writes as many bytes as the case must, and its
   bandwidth is the one that `copy_share` is a share of.
4. Reported are the median, p20 and p80 over the rounds. A ratio of two providers is the median of the ratios within
   each round, not the ratio of the medians: a slow second of the machine slows both sides of its round and cancels.

What a metric means is said in cpu_timing.py and gpu_timing.py. Call overhead is measured on tiny maps, where nothing
else takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast.bench import cpu_timing, gpu_timing
from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.counting import Count, count
from fpn_fast.bench.op import Expectation
from fpn_fast.bench.providers import Provider, bind, expectation, op_of, output_grads, providers, running
from fpn_fast.bench.rows import Row
from fpn_fast.bench.sampling import MAX_ROUNDS, Measurement, interleave, quantile, ratio

#: The name under which the copy is reported.
COPY = "copy"
#: By (provider, metric): seconds per call, one value a round.
Samples = dict[tuple[str, str], list[float]]


@dataclass
class Ready:
    """A provider that computes the case rightly, and how to sample it."""

    measurements: dict[str, Measurement]
    peak_bytes: int | None = None
    counted: Count | None = None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"does not run: {type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def prepare(
    case: Case,
    provider: Provider,
    timing: Any,
    inputs: list[list[Tensor]],
    grads: list[list[Tensor]],
    expected: Expectation,
) -> Ready | str:
    """`provider` warm and checked, or why it is refused."""
    try:
        with running(case, provider):
            step = bind(case, provider.function, inputs[0], grads[0])
            step()
            problem = expected.problem(step())
            if problem is not None:
                return problem
            peak = None if case.overhead else timing.peak_bytes(step)
            # What torch.compile has made of a function no longer goes through the dispatcher.
            counted = None if provider.name == "compile" else count(step)
        return Ready(timing.measurements(case, provider, inputs, grads), peak, counted)
    except Exception as error:
        return _reason(error)


def measure(
    case: Case,
    device_type: str,
    seconds: float,
    candidates: Sequence[Provider] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[list[Row], Samples]:
    """Measures `case` for some `seconds` after warming up.

    candidates: the providers; by default all that this machine has.

    Returns: the rows, refused ones among them, and the samples.
    """
    timing: Any = gpu_timing if device_type == "cuda" else cpu_timing
    device = torch.device(device_type)
    # Shapes of the case before would make torch.compile generalise, and a cache full of graphs give up.
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = [op_of(case).inputs(case, device) for _ in range(timing.input_sets(case))]
    grads = [output_grads(case, each) for each in inputs]

    expected = expectation(case, inputs[0], grads[0])
    rows: list[Row] = []
    ready: dict[str, Ready] = {}
    for provider in providers(case, device_type) if candidates is None else candidates:
        found = prepare(case, provider, timing, inputs, grads, expected)
        if isinstance(found, Ready):
            ready[provider.name] = found
        else:
            rows.append(Row(case, provider.name, "none", "none", bytes_moved(case), refused=found))
    if not ready:
        return rows, {}
    del expected
    if not case.overhead:
        ready[COPY] = Ready(timing.copy_measurement(case))

    measurements = {(name, metric): m for name, each in ready.items() for metric, m in each.measurements.items()}
    samples = interleave({key: measurement.sample for key, measurement in measurements.items()}, seconds, max_rounds)
    rows += [_row(case, name, metric, m, ready[name], samples) for (name, metric), m in measurements.items()]
    return rows, samples


def _row(case: Case, name: str, metric: str, measurement: Measurement, ready: Ready, samples: Samples) -> Row:
    own = samples[name, metric]
    row = Row(case, name, metric, measurement.method, bytes_moved(case), rounds=len(own), calls=measurement.calls)
    row.p50, row.p20, row.p80 = (quantile(own, share) * 1e6 for share in (0.5, 0.2, 0.8))
    row.peak_bytes = ready.peak_bytes
    if ready.counted is not None:
        row.operations, row.waits = ready.counted.operations, ready.counted.waits.total()
    if (COPY, metric) in samples:
        copies = samples[COPY, metric]
        row.copy_gb_per_s = row.bytes / quantile(copies, 0.5) / 1e9
        row.copy_share = ratio(copies, own)
    if name != COPY:
        others = {other: times for (other, of), times in samples.items() if of == metric and other not in (name, COPY)}
        row.speedup = {other: ratio(times, own) for other, times in others.items()}
    return row


def refused(rows: Sequence[Row]) -> list[str]:
    """One line for each row that was refused."""
    return [f"{row.case} {row.provider}: {row.refused}" for row in rows if row.refused is not None]
