# SPDX-License-Identifier: Apache-2.0
"""The machine that figures belong to, and its allocator."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fpn_fast import __version__

#: The checkout, where this is one.
ROOT = Path(__file__).resolve().parents[2]
_CPU_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
#: Settings of the memory allocator, on which the cost of a fresh output depends on a CPU.
ALLOCATOR_VARIABLES = (*_CPU_VARIABLES, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE")
#: With these, glibc keeps freed memory. By default it returns large blocks to the system, which hands out zeroed pages
#: anew for every output: most of the time of a merge, whoever computes it.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,pstate,driver_version"


def allocator() -> dict[str, str]:
    return {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}


def keep_freed_memory() -> None:
    """Starts this process again with KEEP_FREED_MEMORY in its environment, which glibc reads when a process starts.

    Does nothing without glibc, and where the environment already has settings of an allocator: they win.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and not set(_CPU_VARIABLES) & set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_FREED_MEMORY})


def output(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The checkout's commit, with "+changes" where the library's sources differ from it; None outside a checkout.

    FPN_FAST_COMMIT in the environment names it for a copy without history.
    """
    if stated := os.environ.get("FPN_FAST_COMMIT"):
        return stated
    if not (ROOT / "csrc" / "ops.cpp").exists():
        # An installation: a repository around it is another project's.
        return None
    git = "git", "-C", str(ROOT)
    head = output(*git, "rev-parse", "--short=12", "HEAD")
    changes = output(*git, "status", "--porcelain", "--", "fpn_fast", "csrc", "setup.py")
    return None if head is None else head + ("+changes" if changes else "")


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def clocks() -> dict[str, str] | None:
    """The GPU's clocks, power limit, temperature and driver as nvidia-smi reads them; None without it."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    device = torch.cuda.current_device() if uuid is None else f"GPU-{uuid}"
    answer = output("nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", f"--id={device}")
    return None if answer is None else dict(zip(_CLOCKS.split(","), answer.split(", "), strict=False))


def facts(device_type: str) -> dict[str, Any]:
    """The machine's part of a results file."""
    found: dict[str, Any] = {
        "device_type": device_type,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision") if importlib.util.find_spec("torchvision") else None,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "fpn_fast": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "allocator": allocator(),
    }
    if device_type == "cpu":
        load = [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None
        return found | {"capability": torch.backends.cpu.get_cpu_capability(), "load_before": load}
    properties = torch.cuda.get_device_properties()
    return found | {
        "host": found["device"],
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "torch_cuda": torch.version.cuda,
        "clocks_before": clocks(),
    }


def slug(machine: dict[str, Any]) -> str:
    """The folder of a machine's results, by device, threads, and allocator where it is not KEEP_FREED_MEMORY."""
    words = [machine["device"]]
    if machine["device_type"] == "cpu":
        words += [str(machine["threads"]), "threads"]
    if machine["allocator"] != KEEP_FREED_MEMORY:
        words += [f"{name} {value}" for name, value in machine["allocator"].items()]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
