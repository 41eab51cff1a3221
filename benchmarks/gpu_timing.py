# SPDX-License-Identifier: Apache-2.0
"""How a case is measured on a GPU. The rounds are those of harness.py; each provider has three metrics:

- gpu_cold: time on the GPU alone, of calls that take turns over sets of inputs (and of outputs, which are kept for one
  turn) of more than three times the L2 together, so that every call reads from memory. The calls are captured in a CUDA
  graph and the replay is timed by events, which leaves the launches' cost out; where a provider cannot be captured
  (method `events`) it is in.
- gpu_warm: the same over one set, which may stay in the L2.
- wall: what a caller who issues such calls back to back waits for each, launches included, by the host's clock.

Clocks are read before and after, never set.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import Case, bytes_moved
from benchmarks.harness import Measurement
from benchmarks.providers import Provider, bind, running

#: Sets take this many times the L2 together; a line is then gone before its set's turn comes again.
L2_TIMES = 3
#: Bounds for sets: two would let half an L2 of lines survive, and more than 16 tiny ones change nothing.
MIN_SETS, MAX_SETS = 3, 16
#: A replay this long is read to a per mille by events, which count in half microseconds.
REPLAY_SECONDS = 0.001
#: Nodes in a graph: more cost capture time and change nothing.
MAX_CALLS = 240

Step = Callable[[], Any]


def input_sets(case: Case) -> int:
    """Sets of inputs for `case`."""
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return min(MAX_SETS, max(MIN_SETS, math.ceil(L2_TIMES * l2_bytes / bytes_moved(case)) + 1))


def on_stream(function: Callable[[], float]) -> float:
    """Runs `function` on the stream that everything here is captured and timed on."""
    with torch.cuda.stream(_stream()):
        return function()


_streams: list[torch.cuda.Stream] = []


def _stream() -> torch.cuda.Stream:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def elapsed(function: Step) -> float:
    """Seconds on the GPU from before to after what `function` launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def calls_in_turn(steps: Sequence[Step], calls: int) -> Step:
    """`calls` calls that take turns over `steps`; each step's result is kept until its next turn, as its set is."""
    kept: list[Any] = [None] * len(steps)

    def run() -> None:
        for i in range(calls):
            kept[i % len(steps)] = steps[i % len(steps)]()

    return run


def capture(run: Step) -> Step:
    """`run` as the replay of a CUDA graph; raises RuntimeError where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        run()
    return graph.replay


def gpu_measurement(steps: Sequence[Step], state: Callable[[], Any]) -> Measurement:
    """GPU time of calls that take turns over `steps`; `state` gives the context they run in."""

    def warm_up() -> float:
        with state():
            calls_in_turn(steps, len(steps))()
            return elapsed(calls_in_turn(steps, len(steps))) / len(steps)

    wanted = min(MAX_CALLS, REPLAY_SECONDS / max(on_stream(warm_up), 1e-9))
    calls = len(steps) * max(1, math.ceil(wanted / len(steps)))
    run = calls_in_turn(steps, calls)
    try:
        with state():
            replay, method = capture(run), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        replay, method = run, "events"

    def sample() -> float:
        with state():
            return elapsed(replay) / calls

    on_stream(sample)
    return Measurement(method, calls, lambda: on_stream(sample))


def wall_measurement(steps: Sequence[Step], state: Callable[[], Any]) -> Measurement:
    """Wall time per call of calls issued back to back and waited for together."""

    def seconds(calls: int) -> float:
        torch.cuda.synchronize()
        with state():
            turns = list(itertools.islice(itertools.cycle(steps), calls))
            start = time.perf_counter()
            for step in turns:
                step()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / calls

    first = on_stream(lambda: seconds(len(steps)))
    calls = len(steps) * max(1, math.ceil(REPLAY_SECONDS / max(first, 1e-9) / len(steps)))
    return Measurement("clock", calls, lambda: on_stream(lambda: seconds(calls)))


def gpu_measurements(
    case: Case, provider: Provider, inputs: Sequence[Sequence[torch.Tensor]], grads: Sequence[Sequence[torch.Tensor]]
) -> dict[str, Measurement]:
    """All metrics of `provider`; every step is bound on the stream that it will be captured on."""

    def state() -> Any:
        return running(case, provider)

    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()), state():
        steps = [bind(case, provider.function, *each) for each in zip(inputs, grads, strict=True)]
    return {
        "gpu_cold": gpu_measurement(steps, state),
        "gpu_warm": gpu_measurement(steps[:1], state),
        "wall": wall_measurement(steps, state),
    }


def copy_measurement(case: Case) -> Measurement:
    """GPU time of a copy that reads and writes as many bytes as `case` must, over as many sets."""
    from benchmarks.harness import copy_step

    steps = [copy_step(case, torch.device("cuda")) for _ in range(input_sets(case))]
    return gpu_measurement(steps, torch.no_grad)
