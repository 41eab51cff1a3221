# SPDX-License-Identifier: Apache-2.0
"""Gives an op of every namespace its fake and autograd rules in one call.

The dispatcher has one CUDA slot for each op, so the compiled ops live in ``fpn_fast::``, the Triton ones in
``fpn_fast_triton::``, and where plain PyTorch cannot be traced the reference in ``fpn_fast_reference::``, with equal
schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fpn_fast import _library, _torch_private, backends
from fpn_fast.ops._schemas import SCHEMAS

#: Backend -> namespace, of the backends that are torch ops.
NAMESPACES = {"cpp": "fpn_fast", "triton": "fpn_fast_triton", "reference": "fpn_fast_reference"}
_reference_library = torch.library.Library("fpn_fast_reference", "DEF")


#: Device type -> the dispatcher's name for its kernels, of those that the compiled library knows.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _is_defined(backend: str, qualified: str) -> bool:
    if backend == "cpp":
        return _library.problems["cpu"] is None
    if backends.problem("triton", "cuda") is not None:
        return False
    import fpn_fast.triton  # noqa: F401  defines fpn_fast_triton::

    namespace, _, name = qualified.partition("::")
    return hasattr(getattr(torch.ops, namespace), name)


def _declare_missing(name: str, defined: set[str]) -> None:
    """Tells `backends` where this op has no kernel although the backend could serve the device."""
    for device_type, key in _DISPATCH_KEYS.items():
        if _library.problems[device_type] is None:
            has_kernel = _torch_private.has_kernel(f"{NAMESPACES['cpp']}::{name}", key)
            if not has_kernel:
                backends.declare_missing(name, "cpp", device_type)
        if "triton" not in defined:
            backends.declare_missing(name, "triton", device_type)


def register_op(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[[str], Callable[..., Any]] | None = None,
    reference: Callable[..., Any] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Registers the rules of op `name` in every namespace that has it.

    backward: given a backend's name, the op's backward, so that a gradient is computed by the backend of its forward;
        None for an op without gradient. setup_context goes with it.
    reference: the op in plain PyTorch, where that looks at numbers and so has to be an op for a tracer; None where a
        tracer can follow it. An op that some backend has no kernel for needs one: `backends.choose` sends it there.

    Returns: backend -> op, of the backends that have it.
    """
    found = {}
    for backend, namespace in NAMESPACES.items():
        qualified = f"{namespace}::{name}"
        if backend == "reference":
            if reference is None:
                continue
            _reference_library.define(name + SCHEMAS[name])
            _reference_library.impl(name, reference, "CompositeExplicitAutograd")
        elif not _is_defined(backend, qualified):
            continue
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward(backend), setup_context=setup_context)
        found[backend] = getattr(getattr(torch.ops, namespace), name).default
    _declare_missing(name, set(found))
    return found


def traced() -> bool:
    """Whether a compiler or a function transform is active; both understand registered ops only."""
    return torch.compiler.is_compiling() or _torch_private.function_transforms_active()


def records_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd has to record an op on `tensors`."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def call_kernel(op: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `op` without recording a gradient, past its registered autograd rule unless a tracer needs to see it."""
    if traced():
        return op(*arguments)
    with _torch_private.below_autograd():
        return op(*arguments)


def constant(value: float) -> float:
    """A float: a tracer of dynamic shapes makes variables of numbers; their text makes constants of them again."""
    return float.fromhex(float(value).hex()) if traced() else float(value)
