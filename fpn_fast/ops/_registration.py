# SPDX-License-Identifier: Apache-2.0
"""Registers an op's rules for tracers and autograd in every namespace that has the op.

The dispatcher has one CUDA slot per op. So the compiled ops live in ``fpn_fast::`` and the Triton ops in
``fpn_fast_triton::``. A reference that a tracer cannot follow is an op in ``fpn_fast_reference::``. Schemas are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fpn_fast import _library, _torch_private, backends
from fpn_fast.ops._schemas import SCHEMAS

#: Backend -> namespace of its ops.
NAMESPACES = {"cpp": "fpn_fast", "triton": "fpn_fast_triton", "reference": "fpn_fast_reference"}
_reference_library = torch.library.Library("fpn_fast_reference", "DEF")

#: Device types of the compiled library -> dispatch keys of their kernels.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _is_defined(backend: str, qualified: str) -> bool:
    if backend == "cpp" and _library.problems["cpu"] is not None:
        return False
    if backend == "triton":
        if backends.problem("triton", "cuda") is not None:
            return False
        import fpn_fast.triton  # noqa: F401  defines fpn_fast_triton::

    # A library that was built before the op was written does not have it.
    namespace, _, name = qualified.partition("::")
    return hasattr(getattr(torch.ops, namespace), name)


def _declare_missing(name: str, defined: set[str]) -> None:
    """Tell `backends` where op `name` has no kernel although the backend serves the device."""
    for device_type, key in _DISPATCH_KEYS.items():
        compiled = f"{NAMESPACES['cpp']}::{name}"
        has_kernel = "cpp" in defined and _torch_private.has_kernel(compiled, key)
        if _library.problems[device_type] is None and not has_kernel:
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
    """Register the rules of op `name` in every namespace that has it.

    Args:
        fake: returns outputs of the right shapes for a tracer.
        setup_context, backward: the autograd rule, None for an op without gradient. `backward` takes a backend, so that
            the backend of the forward pass computes the gradient too.
        reference: the op in plain PyTorch if its control flow depends on values, so that a tracer cannot follow it. An
            op without a kernel on some backend needs one, because `backends.choose` falls back to it.

    Returns:
        Backend -> op, for the backends that have it.
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
        op = getattr(getattr(torch.ops, namespace), name).default
        _torch_private.take_any_strides(op)
        torch.library.register_vmap(qualified, functools.partial(call_each_sample, op))
        if backward is not None:
            torch.library.register_autograd(qualified, backward(backend), setup_context=setup_context)
        found[backend] = op
    _declare_missing(name, set(found))
    return found


def call_each_sample(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """The batching rule of every op for torch.vmap: one call per sample, and the outputs stacked.

    info, in_dims: see :func:`torch.library.register_vmap`. The result is (outputs, their batch dimensions).
    """
    if info.batch_size == 0:
        raise ValueError("torch.vmap must map over at least one sample, got none")
    calls = [function(*_sample(arguments, in_dims, i)) for i in range(info.batch_size)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    stacked = [torch.stack(outputs) for outputs in zip(*calls, strict=True)]
    return type(calls[0])(stacked), type(calls[0])([0] * len(stacked))


def _sample(argument: Any, dim: Any, i: int) -> Any:
    """Sample `i` of an argument, or of a list of them; `dim` is its batch dimension, None for what has none."""
    if isinstance(argument, (list, tuple)):
        return [_sample(each, of_each, i) for each, of_each in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def traced() -> bool:
    """Return whether a compiler, a tracer or a function transform is active. All support registered ops only."""
    return (
        torch.compiler.is_compiling()
        or _torch_private.function_transforms_active()
        or _torch_private.jit_trace_active()
    )


def records_gradient(tensors: Iterable[Tensor]) -> bool:
    """Return whether autograd, or a transform that may differentiate, follows what is made of `tensors`."""
    # A generator in any() would take 0.4 us more.
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    # Forward mode, and vmap within grad, do not show in requires_grad.
    return backends.transformed()


def call_kernel(op: Callable[..., Any], *arguments: Any) -> Any:
    """Run `op` without recording a gradient. A tracer sees the op with its autograd rule; eager mode skips the rule."""
    if traced():
        return op(*arguments)
    with _torch_private.below_autograd():
        return op(*arguments)


def constant(value: float) -> float:
    """Return a float that stays constant in a traced graph: tracers turn plain floats into inputs, but not text."""
    return float.fromhex(float(value).hex()) if traced() else float(value)
