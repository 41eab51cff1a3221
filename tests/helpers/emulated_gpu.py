# SPDX-License-Identifier: Apache-2.0
"""Ops on the emulated GPU, for tensors of the CPU: the machine code that ships, of the compiled library or of Triton.

A process of its own, one for each worker of pytest, runs them: tools/gpu_emulator/host/worker.py.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from fpn_fast import _library
from helpers import cuda_toolkit
from tools.gpu_emulator.host import code, worker

NAMESPACES = {"cpp": "fpn_fast", "triton": "fpn_fast_triton"}
#: Each launch runs in both, with equal results.
ORDERS = ("in_order", "shuffled")


class Fault(Exception):
    """A kernel did what it may not, or its op raised: the worker's text."""


def need(backend: str) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA, which the compiled CUDA library needs")
    if not _library.path("_C_cuda").exists():
        pytest.skip("there is no compiled CUDA library whose machine code could run")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cuda_toolkit.cuobjdump()


class _Worker:
    def __init__(self) -> None:
        ours, theirs = os.pipe(), os.pipe()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"LD_PRELOAD": str(code.runtime()), "PYTHONPATH": str(code.ROOT)}
        command = [sys.executable, "-m", "tools.gpu_emulator.host.worker", str(ours[0]), str(theirs[1])]
        self.process = subprocess.Popen(
            command, env=environment, cwd=code.ROOT, pass_fds=(ours[0], theirs[1]), stderr=subprocess.PIPE, text=True
        )
        os.close(ours[0]), os.close(theirs[1])
        self.requests, self.answers = Connection(ours[1], readable=False), Connection(theirs[0], writable=False)
        atexit.register(self.process.kill)

    def ask(self, request: Any) -> Any:
        try:
            self.requests.send_bytes(worker.packed(request))
            return worker.unpacked(self.answers.recv_bytes())
        except (EOFError, BrokenPipeError):
            _worker.cache_clear()
            _, text = self.process.communicate()
            raise Fault(f"the emulator's process ended with {self.process.returncode}:\n{text}") from None


_worker = functools.cache(_Worker)


def call(
    op: str, arguments: Sequence[Any], backend: str = "cpp", orders: Sequence[str] = ORDERS,
    far: int | None = None, **options: Any,
) -> tuple[Any, list[tuple[str, dict[str, Any]]]]:  # fmt: skip
    """What `op` of `backend` returns, and its launches: kernel and counters.

    far: the axis along which the elements of maps lie so far apart that offsets need more than 31 bits.

    Raises:
        Fault: also where a result is not written whole, or differs between `orders` of the blocks.
    """
    need(backend)
    found, launches = _worker().ask((NAMESPACES[backend], op, list(arguments), tuple(orders), far, options))
    if isinstance(found, Exception):
        raise Fault(str(found)) from None
    return found, launches


def kernels() -> set[str]:
    """The mangled names of all kernels of the compiled library."""
    need("cpp")
    return set(code.texts(code.LIBRARY))
