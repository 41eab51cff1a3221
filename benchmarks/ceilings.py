# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at best: ``python -m benchmarks.ceilings`` prints it as JSON. Without one it says so.

- sm_clock: of the multiprocessors, by a kernel that waits for a number of cycles.
- copy: a gigabyte from one buffer to another, counting reads and writes.
- l2_read: 24 MB read over and over past the first cache, by all multiprocessors and by one; they fit in the L2 of every
  data-centre GPU since 2020.
- latency: of a load whose address is the result of the load before, in random order over lines of memory that fit in
  the first cache, in the L2, or in neither.
- conversions: float32 to bfloat16 one by one, as results a clock and multiprocessor.
- graph: GPU time and wall time of the replay of a CUDA graph of one tiny kernel, what each further node adds, and the
  gap between two kernels.
- launch: wall time of launching a tiny kernel through PyTorch.

What a constant of the cycle model (tools/gpu_emulator/cycle_model.h) stands for is under ``model``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fpn_fast.bench.timing import GpuTimer, Step, Timer, timer

DEVICE = "cuda"
CYCLE_MODEL = Path(__file__).resolve().parents[1] / "tools" / "gpu_emulator" / "cycle_model.h"
COPY_BYTES = 10**9
L2_READ_BYTES = 24 << 20
#: Enough for a launch of a millisecond at 6 TB/s; of one multiprocessor at 0.1 TB/s.
L2_READ_TURNS, L2_READ_TURNS_OF_ONE = 256, 5
LINE_BYTES = 128
#: By memory: lines (4 KB, 8 MB, 512 MB), and how a load is cached.
CHASES = {"l1": (1 << 5, ""), "l2": (1 << 16, ".cg"), "dram": (1 << 22, ".cg")}
#: In one launch, of several loads; all launches together visit a sixth of the longest chain.
CHASE_TURNS = 2000
CONVERSION_TURNS = 1000
#: Cycles of a kernel that waits: to measure the clock, and between gaps.
CLOCK_CYCLES, WAIT_CYCLES = 10**7, 4000
GRAPH_NODES, LAUNCHES, SAMPLES = 101, 1000, 21
XU_OF_A_MULTIPROCESSOR, LANES = 4, 32


def _median(sample: Callable[[], float]) -> float:
    sample()
    return statistics.median(sample() for _ in range(SAMPLES))


def _hertz(clock: Timer) -> float:
    return CLOCK_CYCLES / _median(lambda: clock.elapsed(lambda: torch.cuda._sleep(CLOCK_CYCLES)))


def sm_clock(clock: Timer) -> dict[str, Any]:
    return {"model": {"clock_ghz": _hertz(clock) / 1e9}}


def copy(clock: Timer) -> dict[str, Any]:
    """Copy bandwidth in GB/s, reads and writes together."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.zeros_like(source)
    clock.synchronize()
    rate = 2 * source.nbytes / _median(lambda: clock.elapsed(lambda: target.copy_(source)))
    return {"gb_per_s": rate / 1e9, "model": {"dram_bytes_per_cycle": rate / _hertz(clock)}}


def l2_read(clock: GpuTimer) -> dict[str, Any]:
    """L2 read rates in GB/s."""
    from benchmarks.ceiling_kernels import READ_FLOATS, l2_read_kernel

    def rate(programs: int, warps: int, turns: int) -> float:
        block = READ_FLOATS * LANES * warps
        source = torch.randn(L2_READ_BYTES // 4 // block * block, device=DEVICE)
        sums = torch.empty(programs, device=DEVICE)
        clock.synchronize()

        def read() -> None:
            l2_read_kernel[(programs,)](source, sums, len(source) // block, turns, BLOCK=block, num_warps=warps)

        seconds = _median(lambda: clock.elapsed(read))
        error = abs(sums.double().sum() / turns - source.double().sum()).item() / source.double().abs().sum().item()
        if not error < 1e-4:
            raise ValueError(f"the kernel's sum is wrong by {error:.3g} of the sum of magnitudes")
        return source.nbytes * turns / seconds

    # Eight programs of eight warps fill a multiprocessor, and one of 32 warps half of one.
    programs = 8 * torch.cuda.get_device_properties().multi_processor_count
    all_of_them, one = rate(programs, 8, L2_READ_TURNS), rate(1, 32, L2_READ_TURNS_OF_ONE)
    per_cycle = {"l2_bytes_per_cycle": all_of_them / _hertz(clock), "port_bytes_per_cycle": one / _hertz(clock)}
    return {"gb_per_s": all_of_them / 1e9, "one_multiprocessor_gb_per_s": one / 1e9, "model": per_cycle}


def chain(lines: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory in which the first word of each line is the address of another line, and these addresses in their order,
    which is random and visits all lines before the first again."""
    words, order = LINE_BYTES // 8, torch.randperm(lines, device=DEVICE)
    table = torch.zeros(lines * words, dtype=torch.int64, device=DEVICE)
    addresses = table.data_ptr() + LINE_BYTES * order
    table[words * order] = addresses.roll(-1)
    return table, addresses


def latency(clock: GpuTimer) -> dict[str, Any]:
    """Nanoseconds, and cycles, of a load."""
    from benchmarks import ceiling_kernels

    found: dict[str, Any] = {"model": {}}
    loads = CHASE_TURNS * ceiling_kernels.LOADS
    for name, (lines, cache) in CHASES.items():
        table, addresses = chain(lines)
        place, text = addresses[:1].clone(), ceiling_kernels.chase(cache)
        # What was written last would be in the L2.
        torch.zeros(CHASES["dram"][0] * LINE_BYTES // 4, device=DEVICE)
        clock.synchronize()
        chase = lambda p=place, t=text: ceiling_kernels.chase_kernel[(1,)](p, CHASE_TURNS, CHASE=t, num_warps=1)  # noqa: E731
        seconds = _median(lambda chase=chase: clock.elapsed(chase)) / loads
        if place.item() != addresses[(SAMPLES + 1) * loads % lines].item():
            raise ValueError(f"the chain of {name} of {table.nbytes} bytes ended at another line")
        found[f"{name}_ns"] = seconds * 1e9
        found["model"][f"{name}_latency"] = seconds * _hertz(clock)
    return found


def conversions(clock: GpuTimer) -> dict[str, Any]:
    """Float32 to bfloat16, a result at a time."""
    from benchmarks.ceiling_kernels import CONVERSIONS, STEP, convert_kernel

    warps, multiprocessors = 8, torch.cuda.get_device_properties().multi_processor_count
    programs = 8 * multiprocessors
    values = torch.randn(programs * warps * LANES, device=DEVICE)
    numbers = {"BLOCK": warps * LANES, "CONVERSIONS": CONVERSIONS, "STEP": STEP, "num_warps": warps}
    clock.synchronize()
    seconds = _median(lambda: clock.elapsed(lambda: convert_kernel[(programs,)](values, CONVERSION_TURNS, **numbers)))
    results = len(values) * CONVERSION_TURNS * CONVERSIONS
    rate = results / multiprocessors / (seconds * _hertz(clock))
    return {"results_per_cycle": rate, "model": {"xu_cycles": XU_OF_A_MULTIPROCESSOR * LANES / rate}}


def graph(clock: GpuTimer) -> dict[str, Any]:
    """Replay latency, cost per node, and the gap between kernels that wait, microseconds."""
    value = torch.zeros(1, device=DEVICE).add_(1)
    clock.synchronize()

    def replays(step: Step) -> list[Step]:
        return [clock.capture(lambda n=nodes: [step() for _ in range(n)]) for nodes in (1, GRAPH_NODES)]

    def microseconds(replay: Step) -> float:
        return _median(lambda: clock.elapsed(replay)) * 1e6

    one, many = replays(lambda: value.add_(1))
    first, last, *waiting = map(microseconds, (one, many, *replays(lambda: torch.cuda._sleep(WAIT_CYCLES))))
    return {
        "one_node_gpu_us": first,
        "one_node_wall_us": _median(lambda: clock.seconds([one], 1, nullcontext)) * 1e6,
        "further_node_gpu_us": (last - first) / (GRAPH_NODES - 1),
        "gap_us": (waiting[1] - waiting[0]) / (GRAPH_NODES - 1) - WAIT_CYCLES / _hertz(clock) * 1e6,
    }


def launch(clock: GpuTimer) -> dict[str, Any]:
    """Wall time per launch, microseconds, of launches issued back to back."""
    value = torch.zeros(1, device=DEVICE)
    return {"wall_us": _median(lambda: clock.seconds([lambda: value.add_(1)], LAUNCHES, nullcontext)) * 1e6}


PARTS: tuple[Callable[[Any], dict[str, Any]], ...] = (sm_clock, copy, l2_read, latency, conversions, graph, launch)


def ceilings() -> dict[str, Any]:
    """Each part's result; one that fails says so, and the others still run."""
    if not torch.cuda.is_available():
        return {part.__name__: "skipped: no GPU" for part in PARTS}
    found: dict[str, Any] = {}
    for part in PARTS:
        try:
            found[part.__name__] = part(timer(DEVICE))
        except Exception as error:
            found[part.__name__] = {"problem": f"{type(error).__name__}: {error}"}
    return found


def constants(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By name, those of the cycle model that were measured: what the model assumes, and what was found."""
    assumed = dict(re.findall(r"(\w+)(?: = |, )([\d.]+)[;,]", CYCLE_MODEL.read_text()))
    measured = [part.get("model", {}) for part in found.values() if isinstance(part, dict)]
    return {
        name: {"assumed": float(assumed[name]), "measured": value} for each in measured for name, value in each.items()
    }


if __name__ == "__main__":
    result = ceilings()
    print(json.dumps(result | {"constants": constants(result)}, indent=1))
    sys.exit(any("problem" in part for part in result.values()))
