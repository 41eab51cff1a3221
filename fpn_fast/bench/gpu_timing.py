# SPDX-License-Identifier: Apache-2.0
"""How a call is timed on a GPU. There are three metrics:

- gpu_cold: the GPU's time for calls that take turns over sets of inputs (and outputs, which live for one turn) of more
  than three times the L2 together, so that every call reads from memory. The calls are captured in a CUDA graph whose
  replay is timed by events, which excludes the cost of launches. Where a provider cannot be captured the method is
  ``events``, which includes it.
- gpu_warm: the same over one set, which may stay in the L2.
- wall: the host's time per call of calls issued back to back, launches included.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.providers import Provider, bind, running
from fpn_fast.bench.timing import Measurement, Sampler

Step = Callable[[], Any]

#: All sets together take this many times the L2, so a line is evicted before its set's turn comes again.
L2_TIMES = 3
#: Two sets could leave lines of the first in the L2; more than 16 of tiny maps change nothing.
MIN_SETS, MAX_SETS = 3, 16
#: Seconds per replay: events, with a grain of half a microsecond, then err by less than a thousandth.
REPLAY_SECONDS = 0.001
#: Nodes in a graph; more take time to capture and change nothing.
MAX_CALLS = 240


class GpuClock:
    """The stream on which everything is captured and timed. Tests put another in its place."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def on_stream(self) -> Any:
        return torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, run: Step) -> float:
        """The GPU's seconds for what `run` launches."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Step) -> Step:
        """`run` as the replay of a CUDA graph; raises RuntimeError where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return graph.replay


_clocks: list[GpuClock] = []


def clock() -> GpuClock:
    if not _clocks:
        _clocks.append(GpuClock())
    return _clocks[0]


def input_sets(case: Case) -> int:
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return min(MAX_SETS, max(MIN_SETS, math.ceil(L2_TIMES * l2_bytes / bytes_moved(case)) + 1))


def in_turn(steps: Sequence[Step], calls: int) -> Step:
    """`calls` calls that take turns over `steps`; a step's result lives until its next turn."""
    kept: list[Any] = [None] * len(steps)

    def run() -> None:
        for i in range(calls):
            kept[i % len(steps)] = steps[i % len(steps)]()

    return run


def gpu_measurement(steps: Sequence[Step], state: Callable[[], Any]) -> Measurement:
    """GPU time of calls that take turns over `steps`; `state` gives the context they run in."""
    gpu = clock()

    def inside(function: Sampler) -> Sampler:
        def run() -> float:
            with gpu.on_stream(), state():
                return function()

        return run

    gpu.synchronize()
    once = in_turn(steps, len(steps))
    seconds = [inside(lambda: gpu.elapsed(once))() for _ in range(2)][-1] / len(steps)
    wanted = min(MAX_CALLS, REPLAY_SECONDS / max(seconds, 1e-9))
    calls = len(steps) * max(1, math.ceil(wanted / len(steps)))
    run, method = in_turn(steps, calls), "events"
    gpu.synchronize()
    try:
        with state():
            run, method = gpu.capture(run), "graph"
    except RuntimeError:
        gpu.synchronize()
    sample = inside(lambda: gpu.elapsed(run) / calls)
    sample()
    return Measurement(method, calls, sample)


def wall_measurement(steps: Sequence[Step], state: Callable[[], Any]) -> Measurement:
    """Wall time of calls issued back to back, with one synchronisation at the end."""
    gpu = clock()

    def seconds(calls: int) -> float:
        turns = list(itertools.islice(itertools.cycle(steps), calls))
        with gpu.on_stream(), state():
            gpu.synchronize()
            start = time.perf_counter()
            for step in turns:
                step()
            gpu.synchronize()
            return (time.perf_counter() - start) / calls

    calls = len(steps)
    for _ in range(2):
        calls = len(steps) * max(1, math.ceil(REPLAY_SECONDS / max(seconds(calls), 1e-9) / len(steps)))
    return Measurement("clock", calls, lambda: seconds(calls))


def measurements(
    case: Case, provider: Provider, inputs: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]
) -> dict[str, Measurement]:
    """The metrics of `provider`, warm."""

    def state() -> Any:
        return running(case, provider)

    gpu = clock()
    gpu.synchronize()
    # Autograd runs a backward on its forward's stream, which must be the one that is captured.
    with gpu.on_stream(), state():
        steps = [bind(case, provider.function, *each) for each in zip(inputs, grads, strict=True)]
    return {
        "gpu_cold": gpu_measurement(steps, state),
        "gpu_warm": gpu_measurement(steps[:1], state),
        "wall": wall_measurement(steps, state),
    }


def copy_measurement(case: Case) -> dict[str, Measurement]:
    """A copy that reads and writes as many bytes as `case` must, over as many sets of buffers."""

    def step() -> Step:
        source = torch.randn(bytes_moved(case) // 8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return {"gpu_cold": gpu_measurement([step() for _ in range(input_sets(case))], torch.no_grad)}


def peak_bytes(step: Step) -> int:
    """The peak memory of one call, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before
