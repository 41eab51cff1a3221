# SPDX-License-Identifier: Apache-2.0
"""How an op is called, by whom, and what its result is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 if the tensor is empty."""
    return torch.linalg.vector_norm(tensor, ord=torch.inf).item() if tensor.numel() else 0.0


class OnDevice:
    """Tensors made on the CPU and copied to each device once: a CUDA graph cannot hold the copy."""

    def __init__(self, value: Any) -> None:
        self.there: dict[torch.device, Any] = {torch.device("cpu"): value}

    def __call__(self, device: torch.device) -> Any:
        if device not in self.there:
            value = self.there[torch.device("cpu")]
            self.there[device] = tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, value)
        return self.there[device]


@dataclass(frozen=True)
class Expectation:
    """The right results of a case in float64, their dtypes, and the largest error allowed in each."""

    results: list[Tensor]
    bounds: list[float]
    dtypes: list[torch.dtype]
    tensors_of: Callable[[Any], list[Tensor]] = listed

    def problem(self, actual: Any) -> str | None:
        """What is wrong with a provider's result; None where it is right."""
        actual = self.tensors_of(actual)
        if len(actual) != len(self.results):
            return f"{len(actual)} results where the reference has {len(self.results)}"
        expected = zip(actual, self.results, self.bounds, self.dtypes, strict=True)
        for i, (result, exact, bound, dtype) in enumerate(expected):
            if result.shape != exact.shape or result.dtype != dtype:
                return f"result {i} is {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(exact.shape)}"
            error = largest(result.detach().double() - exact)
            # Written so that a NaN is an error.
            if not error <= bound:
                return f"result {i} differs from the reference by {error:.3g}, more than {bound:.3g}"
        return None


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
