# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at best: ``python -m benchmarks.ceilings`` prints it as JSON. Without one it says so.

- copy: a gigabyte from one buffer to another, counting reads and writes.
- l2_read: 24 MB read over and over past the first cache; they fit in the L2 of every data-centre GPU since 2020.
- graph: GPU time and wall time of the replay of a CUDA graph of one tiny kernel, and what each further node adds.
- launch: wall time of launching a tiny kernel through PyTorch.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fpn_fast.bench.gpu_timing import clock
from fpn_fast.bench.machine import as_json

NO_GPU = "skipped: no GPU"
COPY_BYTES = 10**9
L2_READ_BYTES = 24 << 20
#: Enough for a launch of a millisecond at 6 TB/s.
L2_READ_TURNS = 256
GRAPH_NODES = 101


def _median(sample: Callable[[], float]) -> float:
    sample()
    return statistics.median(sample() for _ in range(21))


def _wall(run: Callable[[], Any]) -> float:
    """Median wall seconds of `run`, synchronised before and after where there is a GPU."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def sample() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return _median(sample)


def _gpu(run: Callable[[], Any]) -> float:
    """Median GPU seconds of `run`."""

    def sample() -> float:
        with clock().on_stream():
            return clock().elapsed(run)

    clock().synchronize()
    return _median(sample)


def copy(device_type: str, bytes_copied: int) -> dict[str, Any]:
    """Copy bandwidth in GB/s, reads and writes together."""
    source = torch.randn(bytes_copied // 4, device=device_type)
    target = torch.zeros_like(source)
    seconds = (_gpu if device_type == "cuda" else _wall)(lambda: target.copy_(source))
    return {"device_type": device_type, "bytes": bytes_copied, "gb_per_s": 2 * bytes_copied / seconds / 1e9}


def l2_read() -> dict[str, Any]:
    """L2 read rate in GB/s."""
    if importlib.util.find_spec("triton") is None:
        return {"gb_per_s": None, "problem": "triton is not installed"}
    from benchmarks.l2_read import BLOCK, WARPS, l2_read_kernel

    blocks = L2_READ_BYTES // 4 // BLOCK
    source = torch.randn(blocks * BLOCK, device="cuda")
    # Eight programs of eight warps fill a multiprocessor.
    programs = 8 * torch.cuda.get_device_properties().multi_processor_count
    sums = torch.empty(programs, device="cuda")
    launch = l2_read_kernel[(programs,)]
    seconds = _gpu(lambda: launch(source, sums, blocks, L2_READ_TURNS, BLOCK=BLOCK, num_warps=WARPS))
    error = abs(sums.double().sum() / L2_READ_TURNS - source.double().sum()).item() / source.double().abs().sum().item()
    if not error < 1e-4:
        return {"gb_per_s": None, "problem": f"the kernel's sum is wrong by {error:.3g} of the sum of magnitudes"}
    return {"bytes": L2_READ_BYTES, "turns": L2_READ_TURNS, "gb_per_s": L2_READ_BYTES * L2_READ_TURNS / seconds / 1e9}


def graph() -> dict[str, Any]:
    """Replay latency and cost per node, microseconds."""
    value = torch.zeros(1, device="cuda")
    value.add_(1)
    clock().synchronize()

    def replay_of(nodes: int) -> Callable[[], Any]:
        return clock().capture(lambda: [value.add_(1) for _ in range(nodes)])

    one, many = replay_of(1), replay_of(GRAPH_NODES)
    first, last = _gpu(one), _gpu(many)
    return {
        "one_node_gpu_us": first * 1e6,
        "one_node_wall_us": _wall(one) * 1e6,
        "further_node_gpu_us": (last - first) / (GRAPH_NODES - 1) * 1e6,
    }


def launch() -> dict[str, Any]:
    """Wall time per launch, microseconds, of launches issued back to back."""
    value = torch.zeros(1, device="cuda")
    return {"wall_us": _wall(lambda: [value.add_(1) for _ in range(1000)]) * 1e3}


def attempt(part: Callable[[], dict[str, Any]]) -> Any:
    """`part`'s result; a part that fails says so, and the others still run."""
    if not torch.cuda.is_available():
        return NO_GPU
    try:
        return part()
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def ceilings() -> dict[str, Any]:
    return {
        # Without a GPU a small copy on the CPU tries the code; device_type says so.
        "copy": attempt(lambda: copy("cuda", COPY_BYTES)) if torch.cuda.is_available() else copy("cpu", 1 << 20),
        "l2_read": attempt(l2_read),
        "graph": attempt(graph),
        "launch": attempt(launch),
    }


if __name__ == "__main__":
    sys.exit(any("problem" in part for part in as_json(__doc__, ceilings).values()))
