# SPDX-License-Identifier: Apache-2.0
"""Rounds, medians, and how a call is timed.

The metrics:

- wall: the host's time per call of calls issued back to back, until a caller has the result. Each call allocates its
  outputs and drops them, as a caller's would. What that costs on a CPU depends on the allocator; see
  :func:`fpn_fast.bench.machine.keep_freed_memory`.
- gpu_cold: the GPU's time for calls that take turns over sets of inputs (and outputs, which live for one turn) of more
  than three times the L2 together, so that every call reads from memory. The calls are captured in a CUDA graph whose
  replay is timed by events, which excludes the cost of launches. Where a provider cannot be captured the method is
  ``events``, which includes it.
- gpu_warm: the same over one set, which may stay in the L2.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

#: Fewer rounds give no quantiles; the longest case has no time for more.
MIN_ROUNDS, MAX_ROUNDS = 7, 200
#: Seconds per sample: a clock, or events, with a grain of a microsecond then err by less than a thousandth.
SAMPLE_SECONDS = 0.003
#: Input sets on a GPU take this many times the L2, so a line is evicted before its set's turn comes again. Two sets
#: could leave lines of the first in the L2; more than 16 of tiny maps change nothing.
L2_TIMES, MIN_SETS, MAX_SETS = 3, 3, 16
#: Nodes in a graph; more take time to capture and change nothing.
MAX_NODES = 240

Key = TypeVar("Key", bound=Hashable)
Step = Callable[[], Any]
#: Makes the context that steps run in.
State = Callable[[], Any]


@dataclass
class Measurement:
    """How one metric of one provider is sampled (seconds per call): by what method, and over how many calls."""

    method: str
    calls: int
    sample: Callable[[], float]


def interleave(
    samplers: Mapping[Key, Callable[[], float]], seconds: float, max_rounds: int = MAX_ROUNDS
) -> dict[Key, list[float]]:
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


def in_turn(steps: Sequence[Step], calls: int) -> Step:
    """`calls` calls that take turns over `steps`; a step's result lives until its next turn."""
    kept: list[Any] = [None] * len(steps)

    def run() -> None:
        for i in range(calls):
            kept[i % len(steps)] = steps[i % len(steps)]()

    return run


def _calls(steps: Sequence[Step], seconds: float) -> int:
    """Calls of `seconds` each that fill a sample, as many of every step."""
    return len(steps) * max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9) / len(steps)))


class Timer:
    """Times calls on a CPU."""

    def sets(self, least_bytes: int) -> int:
        """Sets of inputs. One: the other providers run between two calls, and large maps do not fit a cache."""
        return 1

    def on_stream(self) -> Any:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def seconds(self, steps: Sequence[Step], calls: int, state: State) -> float:
        """Wall seconds per call of `calls` calls that take turns over `steps`."""
        turns = list(itertools.islice(itertools.cycle(steps), calls))
        with self.on_stream(), state():
            self.synchronize()
            start = time.perf_counter()
            for step in turns:
                step()
            self.synchronize()
            return (time.perf_counter() - start) / calls

    def elapsed(self, run: Step) -> float:
        """The device's seconds for what `run` launches."""
        return self.seconds([run], 1, nullcontext)

    def wall(self, steps: Sequence[Step], state: State) -> dict[str, Measurement]:
        calls = len(steps)
        # Twice: the first call after a pause is slow, and says little about the following ones where maps are tiny.
        for _ in range(2):
            took = self.seconds(steps, calls, state)
            calls = _calls(steps, took)
            if took > SAMPLE_SECONDS:
                break
        return {"wall": Measurement("clock", calls, lambda: self.seconds(steps, calls, state))}

    def measurements(self, steps: Sequence[Step], state: State, captures: bool = True) -> dict[str, Measurement]:
        """All metrics of this device; the first is the one of bandwidth."""
        return self.wall(steps, state)

    def peak_bytes(self, step: Step) -> int | None:
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


class GpuTimer(Timer):
    """Captures and times everything on one stream of a GPU."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def sets(self, least_bytes: int) -> int:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        return min(MAX_SETS, max(MIN_SETS, math.ceil(L2_TIMES * l2_bytes / least_bytes) + 1))

    def on_stream(self) -> Any:
        return torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, run: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self.on_stream():
            start.record()
            run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Step) -> Step:
        """`run` as the replay of a CUDA graph; raises RuntimeError where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except RuntimeError:
            # The default generator would refuse random numbers for good: its state is still that of a capture.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator("cuda"))
            raise
        return graph.replay

    def gpu(self, steps: Sequence[Step], state: State, captures: bool) -> Measurement:
        def seconds(run: Step, calls: int) -> float:
            with state():
                return self.elapsed(run) / calls

        self.synchronize()
        once = in_turn(steps, len(steps))
        taken = [seconds(once, len(steps)) for _ in range(2)][-1]
        calls = min(_calls(steps, taken), MAX_NODES // len(steps) * len(steps))
        run, method = in_turn(steps, calls), "events"
        self.synchronize()
        if captures:
            try:
                with state():
                    run, method = self.capture(run), "graph"
            except RuntimeError:
                self.synchronize()
        seconds(run, calls)
        return Measurement(method, calls, lambda: seconds(run, calls))

    def measurements(self, steps: Sequence[Step], state: State, captures: bool = True) -> dict[str, Measurement]:
        metrics = {"gpu_cold": self.gpu(steps, state, captures), "gpu_warm": self.gpu(steps[:1], state, captures)}
        return metrics | self.wall(steps, state)

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before


@functools.cache
def timer(device_type: str) -> Timer:
    """The timer of a device type; there is one stream for everything on a GPU."""
    return GpuTimer() if device_type == "cuda" else Timer()
