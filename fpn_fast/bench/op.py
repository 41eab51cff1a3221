# SPDX-License-Identifier: Apache-2.0
"""How an op is called, and by whom."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fpn_fast import backends

Function = Callable[[Sequence[Tensor]], Any]


def listed(result: Any) -> list[Tensor]:
    """A tensor or a sequence of them, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def unpadded(result: Any) -> list[Tensor]:
    """(boxes [N, P, 4], ..., counts [N]) -> the boxes of each image, then the rest of each; a list stays as it is."""
    if isinstance(result, list | Tensor):
        return listed(result)
    *padded, counts = result
    lengths = counts.tolist()
    return [image[:length] for tensor in padded for image, length in zip(tensor, lengths, strict=True)]


def lists_on_cpu(padded: tuple[Tensor, ...]) -> Any:
    """Padded results as a caller on a CPU wants them; on a GPU they stay, without host synchronisation."""
    return unpadded(padded) if padded[0].device.type == "cpu" else padded


def on_device(value: Any) -> Callable[[torch.device], Any]:
    """Tensors made on the CPU, copied to each device once: a CUDA graph cannot hold the copy."""
    return functools.cache(lambda device: tree_map_only(Tensor, lambda each: each.to(device), value))


@dataclass(frozen=True)
class Op:
    """How one op is called; each function takes the case's inputs and returns a tensor or a list of them.

    eager: the sequence that the op replaces; fused: the op; compiled: what torch.compile is given, as one graph where
        fullgraph; None where it cannot compile what the op replaces.
    kernel: the registered op that has to run where a backend of ours is timed.
    alongside: torch operators that may run with that kernel, such as a neck's convolutions.
    tensors_of: the tensors of a result that are compared. decides: they are decisions, about which float64 says
        nothing: the same elements in the same order as the reference in the same dtype, floats to rounding.
    """

    inputs: Callable[[torch.device], list[Tensor]]
    eager: Function
    fused: Function
    compiled: Function | None
    kernel: str
    fullgraph: bool = False
    alongside: frozenset[str] = frozenset()
    decides: bool = False
    tensors_of: Callable[[Any], list[Tensor]] = listed

    def reference(self, inputs: Sequence[Tensor]) -> Any:
        """`fused` by the reference in plain PyTorch."""
        with backends.use("reference"):
            return self.fused(inputs)
