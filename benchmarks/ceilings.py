# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at best: ``python -m benchmarks.ceilings`` prints it as JSON. Without one it says so.

- copy: a gigabyte from one buffer to another, counting reads and writes.
- l2_read: 24 MB read over and over past the first cache; they fit in the L2 of every data-centre GPU since 2020.
- graph: GPU time and wall time of the replay of a CUDA graph of one tiny kernel, and what each further node adds.
- launch: wall time of launching a tiny kernel through PyTorch.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from fpn_fast.bench.timing import GpuTimer, Step, Timer, timer

COPY_BYTES = 10**9
L2_READ_BYTES = 24 << 20
#: Enough for a launch of a millisecond at 6 TB/s.
L2_READ_TURNS = 256
GRAPH_NODES, LAUNCHES, SAMPLES = 101, 1000, 21


def _median(sample: Callable[[], float]) -> float:
    sample()
    return statistics.median(sample() for _ in range(SAMPLES))


def copy(clock: Timer, device_type: str = "cuda", bytes_copied: int = COPY_BYTES) -> dict[str, Any]:
    """Copy bandwidth in GB/s, reads and writes together."""
    source = torch.randn(bytes_copied // 4, device=device_type)
    target = torch.zeros_like(source)
    clock.synchronize()
    seconds = _median(lambda: clock.elapsed(lambda: target.copy_(source)))
    return {"device_type": device_type, "bytes": bytes_copied, "gb_per_s": 2 * bytes_copied / seconds / 1e9}


def l2_read(clock: GpuTimer) -> dict[str, Any]:
    """L2 read rate in GB/s."""
    from benchmarks.l2_read import BLOCK, WARPS, l2_read_kernel

    blocks = L2_READ_BYTES // 4 // BLOCK
    source = torch.randn(blocks * BLOCK, device="cuda")
    # Eight programs of eight warps fill a multiprocessor.
    programs = 8 * torch.cuda.get_device_properties().multi_processor_count
    sums = torch.empty(programs, device="cuda")
    clock.synchronize()

    def read() -> None:
        l2_read_kernel[(programs,)](source, sums, blocks, L2_READ_TURNS, BLOCK=BLOCK, num_warps=WARPS)

    seconds = _median(lambda: clock.elapsed(read))
    error = abs(sums.double().sum() / L2_READ_TURNS - source.double().sum()).item() / source.double().abs().sum().item()
    if not error < 1e-4:
        raise ValueError(f"the kernel's sum is wrong by {error:.3g} of the sum of magnitudes")
    return {"bytes": L2_READ_BYTES, "turns": L2_READ_TURNS, "gb_per_s": L2_READ_BYTES * L2_READ_TURNS / seconds / 1e9}


def graph(clock: GpuTimer) -> dict[str, Any]:
    """Replay latency and cost per node, microseconds."""
    value = torch.zeros(1, device="cuda").add_(1)
    clock.synchronize()

    def replay_of(nodes: int) -> Step:
        return clock.capture(lambda: [value.add_(1) for _ in range(nodes)])

    one, many = replay_of(1), replay_of(GRAPH_NODES)
    first, last = (_median(lambda r=replay: clock.elapsed(r)) for replay in (one, many))
    return {
        "one_node_gpu_us": first * 1e6,
        "one_node_wall_us": _median(lambda: clock.seconds([one], 1, nullcontext)) * 1e6,
        "further_node_gpu_us": (last - first) / (GRAPH_NODES - 1) * 1e6,
    }


def launch(clock: GpuTimer) -> dict[str, Any]:
    """Wall time per launch, microseconds, of launches issued back to back."""
    value = torch.zeros(1, device="cuda")
    return {"wall_us": _median(lambda: clock.seconds([lambda: value.add_(1)], LAUNCHES, nullcontext)) * 1e6}


def ceilings() -> dict[str, Any]:
    """Each part's result; one that fails says so, and the others still run."""
    found: dict[str, Any] = {}
    if not torch.cuda.is_available():
        # A small copy on the CPU tries the code; device_type says so.
        found["copy"] = copy(timer("cpu"), "cpu", 1 << 20)
        return found | dict.fromkeys(("l2_read", "graph", "launch"), "skipped: no GPU")
    parts: tuple[Callable[[Any], dict[str, Any]], ...] = (copy, l2_read, graph, launch)
    for part in parts:
        try:
            found[part.__name__] = part(timer("cuda"))
        except Exception as error:
            found[part.__name__] = {"problem": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    result = ceilings()
    print(json.dumps(result, indent=1))
    sys.exit(any("problem" in part for part in result.values()))
