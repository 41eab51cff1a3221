# SPDX-License-Identifier: Apache-2.0
"""From a case to its rows. The protocol, the same for every op and device:

1. Inputs are random, from a fixed seed. Every provider computes the case from the same ones, runs until it has compiled
   and allocated what it needs, and is compared with the reference in float64. While it is compared, the operators that
   the dispatcher hands to a backend are recorded. A provider that differs, does not run, or whose backend did not
   compute the result is refused: its row says why and has no figures, and no ratio includes it.
2. Rounds: in each, every provider is sampled once, in an order that changes between rounds, so that other work on the
   machine hits all alike. A sample is one call, or as many as the clock's grain requires.
3. A copy takes part in the rounds as one more provider. It reads and writes as many bytes as the case must;
   `copy_share` is the share of its bandwidth.
4. Reported are the median, p20 and p80 over the rounds. A ratio of two providers is the median of the ratios within
   each round, not the ratio of the medians: a slow second of the machine slows both sides of its round and cancels.

Metrics are defined in timing.py (CPU) and gpu_timing.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fpn_fast.bench import gpu_timing, timing
from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.counting import Count, Dispatched, count
from fpn_fast.bench.op import Expectation
from fpn_fast.bench.providers import (
    Provider,
    backend_problem,
    backend_seen,
    bind,
    expectation,
    op_of,
    output_grads,
    providers,
    running,
)
from fpn_fast.bench.rows import Row
from fpn_fast.bench.timing import MAX_ROUNDS, Measurement, interleave, quantile, ratio

#: The name under which the copy is reported.
COPY = "copy"
#: By (provider, metric): seconds per call, one value a round.
Samples = dict[tuple[str, str], list[float]]


class Refused(Exception):
    """A provider's result, or the backend that computed it, is not what its row would say."""


@dataclass
class Ready:
    """A provider that has passed its checks: how to sample it, and the other fields of its rows."""

    measurements: dict[str, Measurement]
    facts: dict[str, Any]


def prepare(attempt: Callable[[], Ready]) -> Ready | str:
    """What `attempt` returns, or why its provider is refused."""
    try:
        return attempt()
    except Refused as refused:
        return str(refused)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"does not run: {type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _checked(
    case: Case, provider: Provider, device_timing: Any, inputs: list[Any], grads: list[Any], expected: Expectation
) -> Ready:
    facts: dict[str, Any] = {}
    with running(case, provider):
        step = bind(case, provider.function, inputs[0], grads[0])
        step()
        # torch.compile does not compile under a dispatch mode, and its kernels do not go through the dispatcher.
        seen, is_compiled = Count(), provider.name == "compile"
        with nullcontext() if is_compiled else Dispatched(seen):
            result = step()
        if problem := expected.problem(result):
            raise Refused(problem)
        if not is_compiled:
            if problem := backend_problem(case, provider, seen.operators):
                raise Refused(problem)
            facts["backend"] = backend_seen(seen.operators)
            counted = count(step)
            facts |= {"operations": counted.operations, "syncs": counted.syncs.total()}
        if not case.overhead:
            facts["peak_bytes"] = device_timing.peak_bytes(step)
    return Ready(device_timing.measurements(case, provider, inputs, grads), facts)


def measure(
    case: Case,
    device_type: str,
    seconds: float,
    candidates: Sequence[Provider] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[list[Row], Samples]:
    """Measures `case` for some `seconds` after warming up.

    Args:
        candidates: the providers; by default all that this machine has.

    Returns:
        The rows, refused ones among them, and the samples.
    """
    device_timing: Any = gpu_timing if device_type == "cuda" else timing
    # Shapes of the case before would make torch.compile generalise, and a cache full of graphs give up.
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = [op_of(case).inputs(torch.device(device_type)) for _ in range(device_timing.input_sets(case))]
    grads = [output_grads(case, each) for each in inputs]
    expected = expectation(case, inputs[0], grads[0])
    found: dict[str, Ready | str] = {}
    for provider in providers(case, device_type) if candidates is None else candidates:
        attempt = functools.partial(_checked, case, provider, device_timing, inputs, grads, expected)
        found[provider.name] = prepare(attempt)
    if not case.overhead and any(isinstance(each, Ready) for each in found.values()):
        found[COPY] = Ready(device_timing.copy_measurement(case), {})
    return sampled(case, found, seconds, max_rounds, bytes_moved(case))


def sampled(
    case: Any, found: dict[str, Ready | str], seconds: float, max_rounds: int, least_bytes: int | None = None
) -> tuple[list[Row], Samples]:
    """The rows of a case, and the samples that they were made of. `found`: by provider, ready or why it is refused."""
    refusals = {name: why for name, why in found.items() if isinstance(why, str)}
    rows = [Row(case, name, "none", "none", least_bytes, refused=why) for name, why in refusals.items()]
    ready = {name: each for name, each in found.items() if isinstance(each, Ready)}
    measurements = {(name, metric): m for name, each in ready.items() for metric, m in each.measurements.items()}
    if not measurements:
        return rows, {}
    samples = interleave({key: measurement.sample for key, measurement in measurements.items()}, seconds, max_rounds)
    for (name, metric), measurement in measurements.items():
        own = samples[name, metric]
        row = Row(case, name, metric, measurement.method, least_bytes, **ready[name].facts)
        row.rounds, row.calls = len(own), measurement.calls
        row.p50, row.p20, row.p80 = (quantile(own, share) * 1e6 for share in (0.5, 0.2, 0.8))
        if least_bytes is not None and (COPY, metric) in samples:
            row.copy_gb_per_s = least_bytes / quantile(samples[COPY, metric], 0.5) / 1e9
            row.copy_share = ratio(samples[COPY, metric], own)
        if name != COPY:
            others = {n: times for (n, of), times in samples.items() if of == metric and n not in (name, COPY)}
            row.speedup = {other: ratio(times, own) for other, times in others.items()}
        rows.append(row)
    return rows, samples


def refused(rows: Sequence[Row]) -> list[str]:
    """One line for each row that was refused."""
    return [f"{row.case} {row.provider}: {row.refused}" for row in rows if row.refused is not None]
