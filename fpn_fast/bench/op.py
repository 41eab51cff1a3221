# SPDX-License-Identifier: Apache-2.0
"""How an op is called, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fpn_fast.bench.cases import Case

Function = Callable[[Sequence[Tensor]], Any]


def listed(result: Any) -> list[Tensor]:
    """A tensor or a sequence of them, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 of nothing."""
    return torch.linalg.vector_norm(tensor, ord=torch.inf).item() if tensor.numel() else 0.0


@dataclass(frozen=True)
class Expectation:
    """The right results of a case in float64, their dtypes, and how far from them each may be."""

    results: list[Tensor]
    bounds: list[float]
    dtypes: list[torch.dtype]
    #: Of what a provider gives, the tensors that are compared.
    tensors_of: Callable[[Any], list[Tensor]] = listed

    def problem(self, actual: Any) -> str | None:
        """What is wrong with the result of a step; None where it is right."""
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
    """How one op is called: each function takes the case's inputs and gives a tensor or a list of them."""

    inputs: Callable[[Case, torch.device], list[Tensor]]
    reference: Function
    eager: Function
    fused: Function
    #: What torch.compile is given, and whether as one graph; None where it cannot compile what the op replaces.
    compiled: Function | None
    fullgraph: bool = True
    #: What else is known to do the same on a GPU, by the provider's name.
    on_gpu: Mapping[str, Function] = field(default_factory=dict)
    #: The op whose kernels `fused` runs, where that is not the case's.
    kernel: str | None = None
    #: The check of an op that decides, given its inputs; None: as far from float64 as the reference in the same dtype.
    expected: Callable[[Sequence[Tensor]], Expectation] | None = None
