# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that the package uses, with a public fallback for a torch without it.

No other file of the package reads one. A fallback gives the same results and costs more time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad


def _kernel_by_lookup(op: str, dispatch_key: str) -> bool:
    try:
        torch.library.get_kernel(op, dispatch_key)
    except RuntimeError:
        return False
    return True


def _assert_now(condition: torch.Tensor, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


#: Raises RuntimeError(message) unless a tensor of one element is true; on a GPU when its stream gets there, without
#: synchronising with the host.
assert_async: Callable[[torch.Tensor, str], None] = getattr(torch, "_assert_async", _assert_now)

#: A context in which an op runs its kernel and records no gradient. Under no_grad the registered autograd rule runs
#: first, in Python.
below_autograd: Callable[[], AbstractContextManager[None]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", torch.no_grad
)

#: Whether a function transform of torch.func is active. The fallback says yes, so that every call goes through
#: torch's operators or an op with a rule for transforms.
function_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

#: Whether torch.jit.trace, or what is built on it, records the calls of this thread.
jit_trace_active: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)


def forward_mode_active() -> bool:
    """Whether a level of forward-mode differentiation is entered. Without torch's number of the level: yes."""
    return getattr(forward_ad, "_current_level", 0) >= 0


#: Whether an op such as "fpn_fast::top_down" has a kernel for a dispatch key such as "CUDA".
has_kernel: Callable[[str, str], bool] = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", _kernel_by_lookup)

#: torch.use_deterministic_algorithms, without the import of the compiler that takes seconds.
set_deterministic_algorithms: Callable[..., None] = getattr(
    torch._C, "_set_deterministic_algorithms", torch.use_deterministic_algorithms
)


def take_any_strides(op: Any) -> None:
    """Let Inductor pass maps to `op` as they lie. Otherwise it copies them to the strides that they had in eager mode.

    A library for torch 2.11 cannot give the tag with the schema. Without the tag, results are the same.
    """
    if isinstance(tags := op.tags, list):
        tags.append(torch.Tag.flexible_layout)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs hooks that calling its steps would not run. The fallback says yes."""
    return bool(getattr(module, "_forward_hooks", True) or getattr(module, "_forward_pre_hooks", True))


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs hooks, forward or backward. The fallback says yes."""
    backward = getattr(module, "_backward_hooks", True) or getattr(module, "_backward_pre_hooks", True)
    return bool(backward) or has_forward_hooks(module)


#: Whether hooks are registered for every module, such as torch.nn.modules.module.register_module_forward_hook does.
has_global_hooks: Callable[[], bool] = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)


def compiled_package(program: torch.export.ExportedProgram, path: str, options: dict[str, Any]) -> Any:
    """Writes a package of AOTInductor to `path` and loads it. Documented functions of a private module."""
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    return torch._inductor.aoti_load_package(path)


def register_pytree(kind: type, flatten: Callable[[Any], Any], unflatten: Callable[..., Any]) -> None:
    """Lets torch take instances of a class apart into tensors: (tensors, context), and the reverse.

    Without it nothing happens: torch.export.register_dataclass would import the compiler, and torch.compile needs none.
    """
    if (pytree := getattr(torch.utils, "_pytree", None)) is not None:
        pytree.register_pytree_node(kind, flatten, unflatten)
