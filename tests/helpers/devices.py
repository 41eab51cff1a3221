# SPDX-License-Identifier: Apache-2.0
"""The public ops on another device than the tensors of a test, so that one test serves every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fpn_fast import backends, ops

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in
          (torch.float64, torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip
CPU_AND_GPU = ["cpp", "reference", *(pytest.param(f"cuda-{name}", marks=pytest.mark.gpu) for name in ("cpp", "triton"))]
# A call takes Triton's interpreter some tenths of a second, and as many seconds where there are thousands of boxes.
not_interpreted = pytest.mark.parametrize("every_backend", CPU_AND_GPU, indirect=True)


def moved(tensor: Tensor, device: str) -> Tensor:
    """The same view of the same storage, with what lies between its elements, on `device`."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class OpsOn:
    """`fpn_fast.ops` for tensors of the CPU, which runs on `device` and brings results back."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            arguments, options = tree_map_only(Tensor, lambda t: moved(t, self.device), (arguments, options))
            return tree_map_only(Tensor, lambda t: t.cpu(), function(*arguments, **options))

        return call


def on_triton(op: str, *arguments: Any, **options: Any) -> Any:
    """What `op` gives on Triton: on a GPU, or on the CPU where Triton's interpreter runs; as tensors of the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with backends.use("triton"):
        assert backends.choose(device, op) == "triton"
        return getattr(OpsOn(device), op)(*arguments, **options)


def without_synchronising(call: Callable[..., Any], runs: int = 1) -> list[Any]:
    """What `call()` gives on a GPU in each run but a first one; an error where it synchronises with the host."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return [call() for _ in range(runs)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_on_a_gpu(name: str, call: Callable[..., Any], *tensors: Any) -> None:
    """`call(*tensors)` on the CPU, and twice by backend `name` on a GPU: bit for bit, and without synchronising."""
    expected = call(*tensors)
    here = tree_map_only(Tensor, lambda t: t.cuda(), tensors)
    with backends.use(name):
        for found in without_synchronising(lambda: call(*here), 2):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
