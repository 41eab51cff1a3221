# SPDX-License-Identifier: Apache-2.0
"""Gives an op of every namespace its fake and autograd rules in one call.

The dispatcher has one CUDA slot for each op, so the compiled ops live in ``fpn_fast::``, the Triton ones in
``fpn_fast_triton::``, and where plain PyTorch cannot be traced the reference in ``fpn_fast_reference::``, with equal
schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fpn_fast import _library, backends
from fpn_fast.ops._schemas import SCHEMAS

#: Backend -> namespace, of the backends that are torch ops.
NAMESPACES = {"cpp": "fpn_fast", "triton": "fpn_fast_triton", "reference": "fpn_fast_reference"}
_reference_library = torch.library.Library("fpn_fast_reference", "DEF")


def _has_ops(backend: str) -> bool:
    if backend == "cpp":
        return _library.problems["cpu"] is None
    return backends.problem("triton", "cuda") is None


def register_op(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[[str], Callable[..., Any]],
    reference: Callable[..., Any] | None = None,
) -> dict[str, torch._ops.OpOverload]:
    """Registers the rules of op `name` in every namespace that has it.

    backward: given a backend's name, the op's backward, so that a gradient is computed by the backend of its forward.
    reference: the op in plain PyTorch, where that looks at numbers and so has to be an op for a tracer; None where a
        tracer can follow it.

    Returns: backend -> op.
    """
    found = {}
    for backend, namespace in NAMESPACES.items():
        if backend == "reference":
            if reference is None:
                continue
            _reference_library.define(name + SCHEMAS[name])
            _reference_library.impl(name, reference, "CompositeExplicitAutograd")
        elif not _has_ops(backend):
            continue
        if backend == "triton":
            import fpn_fast.triton  # noqa: F401  defines fpn_fast_triton::
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward(backend), setup_context=setup_context)
        found[backend] = getattr(getattr(torch.ops, namespace), name).default
    return found


def traced() -> bool:
    """Whether a compiler or a function transform watches, which understands registered ops only."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
