# SPDX-License-Identifier: Apache-2.0
"""Who computes a case, and the checks that they compute the right thing by the backend that their row names.

- eager: the sequence of PyTorch calls that the op replaces, as torchvision or another library writes it.
- compile: ``torch.compile`` of the op's reference, as one graph for the case's shapes; of the library's own code where
  the reference is a loop over boxes, which nobody would compile.
- cpp, triton: the op by that backend, asked for by name, where it has kernels for it (triton on a GPU only).
- Others that a checkout puts in RIVALS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends
from fpn_fast.bench import libraries, torchvision_ops
from fpn_fast.bench.cases import Case
from fpn_fast.bench.op import Function, Op, listed
from fpn_fast.ops._registration import NAMESPACES
from fpn_fast.ops._schemas import SCHEMAS
from fpn_fast.testing import tolerances

#: A decoded box is about eight roundings of coordinates up to this many pixels.
DECODE_ROUNDINGS, DECODE_RANGE = 8, 4096
#: Roundings of a score, relative to 1.
SCORE_ROUNDINGS = 4
OPS: dict[str, Callable[[Case], Op]] = {**torchvision_ops.OPS, **libraries.OPS}
#: By op: further providers of a case on a GPU, by name.
RIVALS: dict[str, Callable[[Case], dict[str, Function]]] = {}
#: torch operators that may run with any kernel of ours: they fill, copy and convert tensors.
_NO_ARITHMETIC = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "_to_copy", "cat", "clone", "constant_pad_nd", "copy_", "fill_", "full",
                 "lift_fresh", "ones", "zero_", "zeros")
}  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """A way to compute a case; `backend` is the one of ours that it asks for, None for others' code."""

    name: str
    function: Function
    backend: str | None = None


def op_of(case: Case) -> Op:
    return OPS[case.op](case)


def providers(
    case: Case, device_type: str, names: Sequence[str] | None = None, *, compiler: str = "inductor"
) -> list[Provider]:
    """The providers that can serve `case` on this machine, eager first; only `names` where given.

    compiler: torch.compile's backend.
    """
    op = op_of(case)
    found = [Provider("eager", op.eager)]
    # Compiling every case of a series takes minutes and says no more than the case that it starts from.
    if op.compiled is not None and not case.axis:
        # With static shapes, code whose lengths depend on the data would be compiled anew for each length.
        dynamic = False if op.fullgraph else None
        function = torch.compile(op.compiled, fullgraph=op.fullgraph, dynamic=dynamic, backend=compiler)
        found.append(Provider("compile", function))
    if device_type == "cuda" and case.op in RIVALS:
        found += [Provider(name, function) for name, function in RIVALS[case.op](case).items()]
    for backend in ("cpp", "triton"):
        # On a CPU Triton kernels run in an interpreter, which is for tests.
        has_kernel = backends.problem(backend, device_type, op.kernel) is None
        if has_kernel and (backend != "triton" or device_type == "cuda"):
            found.append(Provider(backend, op.fused, backend))
    return [provider for provider in found if names is None or provider.name in names]


@contextmanager
def running(case: Case, provider: Provider) -> Iterator[None]:
    """The state in which a step of `provider` runs: its backend, and gradients only where the case has them."""
    backend = nullcontext() if provider.backend is None else backends.use(provider.backend)
    with backend, torch.set_grad_enabled(case.direction != "forward"):
        yield


def output_grads(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for each output, in the output's memory format; none where the case needs none."""
    if "backward" not in case.direction:
        return []
    with torch.no_grad():
        return [torch.randn_like(output) for output in listed(op_of(case).reference(inputs))]


def bind(
    case: Case, function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[[], Tensor | Sequence[Tensor]]:
    """`case`'s direction as a call without arguments, to be run inside :func:`running`."""
    if case.direction == "forward":
        return lambda: function(inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if case.direction == "forward_grad":
        return lambda: function(leaves)
    if case.direction == "forward_backward":
        return lambda: torch.autograd.grad(listed(function(leaves)), leaves, grads)
    outputs = listed(function(leaves))
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def expectation(case: Case, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[Any], str | None]:
    """A check of a result, by the rules of ``verify``: what is wrong with it; None where it is right.

    Decisions must be those of the reference; other values no worse than the reference in the same dtype.
    """
    op, size = op_of(case), max(map(max, case.levels))
    with torch.set_grad_enabled(case.direction != "forward"):
        plain = op.tensors_of(bind(case, op.reference, inputs, grads)())
        wide = [each.double() for each in inputs], [each.double() for each in grads]
        truth = plain if op.decides else listed(bind(case, op.reference, *wide)())

    def rule(actual: Tensor, own: Tensor, exact: Tensor) -> tolerances.Error:
        if op.decides:
            units = DECODE_ROUNDINGS * DECODE_RANGE if own.dim() == 2 else SCORE_ROUNDINGS
            return tolerances.close(actual, own, 0, units * torch.finfo(inputs[0].dtype).eps)
        return tolerances.not_worse(actual, own, exact, size=size)

    def problem(result: Any) -> str | None:
        found = [each.detach() for each in op.tensors_of(result)]
        if len(found) != len(plain):
            return f"{len(found)} results where the reference has {len(plain)}"
        for i, (actual, own, exact) in enumerate(zip(found, plain, truth, strict=True)):
            error = tolerances.alike(actual, own)
            if error.within:
                error = rule(actual, own.detach(), exact.detach())
            if not error.within:
                return f"result {i} {error.text}"
        return None

    return problem


def backend_seen(operators: Iterable[str]) -> str:
    """The backends whose operators are among `operators`, joined by "+"; ``torch`` where there is none of ours."""
    spaces = {name.partition("::")[0] for name in operators}
    return "+".join(backend for backend, space in NAMESPACES.items() if space in spaces) or "torch"


def backend_problem(case: Case, provider: Provider, operators: Iterable[str]) -> str | None:
    """Why `operators`, seen by the dispatcher in a step, are not those of the backend that `provider` names.

    The op's kernels must be among them, and no operator of torch that computes, except those named in Op.alongside.
    """
    operators, seen = set(operators), backend_seen(operators)
    wanted = provider.backend or "torch"
    if seen != wanted:
        return f"{wanted} was to compute this, and {seen} did"
    if provider.backend is None:
        return None
    op, space = op_of(case), NAMESPACES[provider.backend]
    kernels = {op.kernel} if case.direction != "backward" else set()
    if "backward" in case.direction and f"{op.kernel}_backward" in SCHEMAS:
        kernels.add(f"{op.kernel}_backward")
    if missing := {f"{space}::{kernel}" for kernel in kernels} - operators:
        return f"{', '.join(sorted(missing))} did not run"
    others = {name for name in operators - op.alongside - _NO_ARITHMETIC if not name.startswith(f"{space}::")}
    return f"torch's operators computed a part: {', '.join(sorted(others))}" if others else None
