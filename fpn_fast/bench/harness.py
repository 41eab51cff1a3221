# SPDX-License-Identifier: Apache-2.0
"""From a case to its rows. The protocol, the same for every op, detector and device:

1. Inputs are random, from a fixed seed. Every provider computes the case from the same ones, runs until it has compiled
   and allocated what it needs, and is compared with the reference in float64. Then the operators that the dispatcher
   hands to a backend are recorded. A provider that differs, does not run, or whose backend did not compute the result
   is refused: its row says why and has no figures, and no ratio includes it.
2. Rounds: in each, every provider is sampled once, in an order that changes between rounds, so that other work on the
   machine hits all alike. A sample is one call, or as many as the clock's grain requires.
3. A copy takes part in the rounds as one more provider. It reads and writes as many bytes as the case must;
   `copy_share` is the share of its bandwidth.
4. Reported are the median, p20 and p80 over the rounds. A ratio of two providers is the median of the ratios within
   each round, not the ratio of the medians: a slow second of the machine slows both sides of its round and cancels.

Metrics are defined in timing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.counting import count
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
from fpn_fast.bench.timing import MAX_ROUNDS, Measurement, State, Step, Timer, interleave, quantile, ratio, timer

#: The name under which the copy is reported.
COPY = "copy"
#: A provider that has passed its checks: how to sample it by each metric, and the other fields of its rows.
Ready = tuple[dict[str, Measurement], dict[str, Any]]


def prepare(
    bind: Callable[[], list[Step]],
    problem: Callable[[Any], str | None],
    backend_problem: Callable[[set[str]], str | None],
    clock: Timer,
    *,
    state: State = nullcontext,
    seen: bool = True,
    memory: bool = True,
    metrics: Callable[[list[Step], State], dict[str, Measurement]] | None = None,
) -> Ready | str:
    """Checks and warms a provider; returns why it is refused, if it is.

    bind: gives the calls to time, one for each set of inputs; they run inside `state`.
    problem, backend_problem: what is wrong with a call's result, and with the operators that the dispatcher saw.
    seen: whether the dispatcher sees what runs. It does not see what torch.compile made, nor a CUDA graph.
    memory: whether the peak memory of a call says something. metrics: all of `clock` by default.
    """
    facts: dict[str, Any] = {}
    try:
        # Autograd runs a backward on its forward's stream, which must be the one that is captured.
        with clock.on_stream(), state():
            steps = bind()
            if wrong := problem(steps[0]()):
                return wrong
            if seen:
                counted = count(steps[0])
                if wrong := backend_problem(set(counted.operators)):
                    return wrong
                facts = {"backend": backend_seen(counted.operators), "operations": counted.operations}
                facts["syncs"] = counted.syncs.total()
            if memory:
                facts["peak_bytes"] = clock.peak_bytes(steps[0])
            clock.synchronize()
        if metrics is not None:
            return metrics(steps, state), facts
        # A capture that a synchronisation ends leaves PyTorch's generator refusing random numbers.
        return clock.measurements(steps, state, captures=not facts.get("syncs")), facts
    except Exception as error:
        return does_not_run(error)


def does_not_run(error: Exception) -> str:
    """Why a provider, or a case, is refused."""
    lines = str(error).strip().splitlines()
    return f"does not run: {type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def drawn(case: Case, device_type: str, clock: Timer) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The sets of inputs and of gradients of outputs that calls of `case` take turns over."""
    torch.manual_seed(0)
    inputs = [op_of(case).inputs(torch.device(device_type)) for _ in range(clock.sets(bytes_moved(case)))]
    return [(each, output_grads(case, each)) for each in inputs]


def measure(
    case: Case,
    device_type: str,
    seconds: float,
    candidates: Sequence[Provider] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> list[Row]:
    """The rows of `case`, refused ones among them, measured for some `seconds` after warming up.

    candidates: the providers; by default all that this machine has.
    """
    clock, least_bytes = timer(device_type), bytes_moved(case)
    # Shapes of the case before would make torch.compile generalise, and a cache full of graphs give up.
    torch.compiler.reset()
    sets = drawn(case, device_type, clock)
    problem = expectation(case, *sets[0])
    clock.synchronize()

    def ready(provider: Provider) -> Ready | str:
        return prepare(
            lambda: [bind(case, provider.function, *each) for each in sets],
            problem,
            lambda operators: backend_problem(case, provider, operators),
            clock,
            state=lambda: running(case, provider),
            seen=provider.name != "compile",
            memory=not case.overhead,
        )

    chosen = providers(case, device_type) if candidates is None else candidates
    found = {provider.name: ready(provider) for provider in chosen}
    if not case.overhead and not all(isinstance(each, str) for each in found.values()):
        found[COPY] = _copy(device_type, least_bytes, clock)
    return sampled(case, found, seconds, max_rounds, least_bytes)


def _copy(device_type: str, least_bytes: int, clock: Timer) -> Ready | str:
    """A copy into existing buffers, by the metric of bandwidth."""

    def step() -> Step:
        source = torch.randn(least_bytes // 8, device=device_type)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    def metric(steps: list[Step], state: State) -> dict[str, Measurement]:
        return dict([next(iter(clock.measurements(steps, state).items()))])

    steps, right = range(clock.sets(least_bytes)), lambda _: None
    return prepare(
        lambda: [step() for _ in steps], right, right, clock, state=torch.no_grad, seen=False, memory=False,
        metrics=metric,
    )  # fmt: skip


def sampled(
    case: Any, found: dict[str, Ready | str], seconds: float, max_rounds: int, least_bytes: int | None = None
) -> list[Row]:
    """The rows of a case. found: by provider, ready or why it is refused."""
    rows = [Row(case, name, "none", "none", least_bytes, refused=w) for name, w in found.items() if isinstance(w, str)]
    ready = {name: each for name, each in found.items() if not isinstance(each, str)}
    measurements = {(name, metric): each for name, (own, _) in ready.items() for metric, each in own.items()}
    if not measurements:
        return rows
    samples = interleave({key: measurement.sample for key, measurement in measurements.items()}, seconds, max_rounds)
    for (name, metric), measurement in measurements.items():
        own = samples[name, metric]
        row = Row(case, name, metric, measurement.method, least_bytes, **ready[name][1])
        row.rounds, row.calls = len(own), measurement.calls
        row.p50, row.p20, row.p80 = (quantile(own, share) * 1e6 for share in (0.5, 0.2, 0.8))
        if least_bytes is not None and (COPY, metric) in samples:
            row.copy_gb_per_s = least_bytes / quantile(samples[COPY, metric], 0.5) / 1e9
            row.copy_share = ratio(samples[COPY, metric], own)
        if name != COPY:
            others = {n: times for (n, of), times in samples.items() if of == metric and n not in (name, COPY)}
            row.speedup = {other: ratio(times, own) for other, times in others.items()}
        rows.append(row)
    return rows
