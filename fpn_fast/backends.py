# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call, and why.

- ``cpp``: the compiled library: C++ for CPU tensors, CUDA for CUDA tensors.
- ``triton``: Triton kernels, for a GPU without a compiler. On CPU tensors they need ``TRITON_INTERPRET=1``, for tests.
- ``reference``: plain PyTorch on any device.

``auto`` takes the first of these that has a kernel of the op. With a backend asked for by name, an op without a kernel
there runs by the reference. :func:`explain` says which backend serves an op and why, and so does the logger
``fpn_fast``. Choose with :func:`use`, or with ``FPN_FAST_BACKEND`` in the environment at import. The choice holds for
the whole process, not for one thread.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fpn_fast import _library, _log, _torch_private

BACKENDS = ("cpp", "triton", "reference")

# Looked up at import: the first call may be under torch.compile, and torch 2.11's does not trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call. The message says why and what would help."""


def _cpp_problem(device_type: str) -> str | None:
    if device_type not in _library.problems:
        return f"the compiled library has kernels for cpu and cuda tensors, not for {device_type}"
    return _library.problems[device_type]


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem(device_type: str) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed; `pip install triton`"
    if device_type == "cpu" and not triton_interprets():
        return "triton serves cpu tensors only in its interpreter; set TRITON_INTERPRET=1 before importing fpn_fast"
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels are for cuda tensors, not for {device_type}"
    return None


_PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "cpp": _cpp_problem,
    "triton": _triton_problem,
    "reference": lambda device_type: None,
}


def _parse(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, got {name!r}")
    return name


_requested = _parse(os.environ.get("FPN_FAST_BACKEND", "auto"), "FPN_FAST_BACKEND")
# Choices by (requested, device type, op) that were made and logged: they cannot change while the process lives.
_chosen: dict[tuple[str, str, str | None], str] = {}
# (backend, device type) -> the ops that have no kernel there.
_missing: dict[tuple[str, str], set[str]] = {}
# (op, backend) -> the part of the op that torch's own operators compute there.
_torch_parts: dict[tuple[str, str], str] = {}


def requested() -> str:
    """The backend asked for: ``auto``, ``cpp``, ``triton`` or ``reference``."""
    return _requested


def problem(backend: str, device_type: str, op: str | None = None) -> str | None:
    """Why `backend` cannot serve tensors of `device_type`, or `op` on them, and what would help. None where it can."""
    found = _PROBLEMS[_parse(backend, "backend")](device_type)
    if found is None and op in _missing.get((backend, device_type), ()):
        found = f"it has no kernel of {op} for {device_type} tensors"
    return found


def available(device_type: str, op: str | None = None) -> list[str]:
    """The backends that can serve tensors of `device_type`, or `op` on them, best first."""
    return [name for name in BACKENDS if problem(name, device_type, op) is None]


def declare_missing(op: str, backend: str, device_type: str) -> None:
    """Records, at registration, that `backend` has no kernel of `op` for tensors of `device_type`."""
    _missing.setdefault((backend, device_type), set()).add(op)


def declare_torch_part(op: str, backend: str, part: str) -> None:
    """Records, at registration, which part of `op` torch's own operators compute on `backend`, such as "sorting"."""
    _torch_parts[op, backend] = part


def notes(backend: str, device_type: str, op: str | None = None) -> list[str]:
    """The parts of `op`, or of all ops, that `backend` leaves to others for tensors of `device_type`."""
    if op is not None:
        return [f"{_torch_parts[op, backend]} by torch's own operators"] if (op, backend) in _torch_parts else []
    missing = sorted(_missing.get((backend, device_type), ()))
    found = [f"without kernels of {', '.join(missing)}"] if missing else []
    parts: dict[str, list[str]] = {}
    for (name, where), part in sorted(_torch_parts.items()):
        if where == backend:
            parts.setdefault(part, []).append(name)
    return found + [f"{part} of {', '.join(names)} by torch's own operators" for part, names in parts.items()]


def choose(device_type: str, op: str | None = None) -> str:
    """The backend that serves a call on `device_type`, which is the reference for an op without a kernel.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot serve this device.
    """
    key = (_requested, device_type, op)
    if torch.compiler.is_compiling():
        return _choose(*key)
    return _chosen.get(key) or _choose(*key)


def choose_for(tensor: Tensor, op: str) -> str:
    """:func:`choose` for the device of `tensor`. The first call writes a line to the log."""
    device_type = _device_type(tensor)
    if torch.compiler.is_compiling():
        return _choose(_requested, device_type, op)
    return _chosen.get((_requested, device_type, op)) or _serve(tensor, device_type, op)


def _device_type(tensor: Tensor) -> str:
    # Reading a device's type costs more than the choice.
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def _serve(tensor: Tensor, device_type: str, op: str) -> str:
    """The first call of :func:`choose_for`, and every call while DEBUG lines are written."""
    found = choose(device_type, op)
    if found == "reference" != _requested and device_type in ("cpu", "cuda"):
        text = "%s runs by the reference on %s tensors, in plain PyTorch: %s"
        _log.once(logging.WARNING, (op, device_type), text, op, device_type, _reasons(device_type, op, found))
    if _log.debugs():
        kind = (device_type, str(tensor.dtype).removeprefix("torch."), _memory_format(tensor))
        reasons = _reasons(device_type, op, found)
        _log.once(logging.DEBUG, (op, *kind, found), "%s on %s: %s (%s)", op, " ".join(kind), found, reasons)
    else:
        _chosen[_requested, device_type, op] = found
    return found


def _reasons(device_type: str, op: str, found: str) -> str:
    """Why `found` was chosen and none before it."""
    if _requested == found:
        return "asked for by name"
    before = BACKENDS[: BACKENDS.index(found)] if _requested == "auto" else (_requested,)
    reasons = [f"not {name}: {problem(name, device_type, op) or 'its interpreter is for tests'}" for name in before]
    return "; ".join(reasons) or "the first that has a kernel"


def _memory_format(tensor: Tensor) -> str:
    if tensor.is_contiguous():
        return "contiguous"
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if is_last else "strided"


# A compiler knows all that is active while it traces, and compiles anew where that changes.
@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is active."""
    return _torch_private.function_transforms_active() or _torch_private.forward_mode_active()


@torch.compiler.assume_constant_result
def jit_traced() -> bool:
    """Whether torch.jit.trace, or what is built on it, records the calls of this thread."""
    return _torch_private.jit_trace_active()


@torch.compiler.assume_constant_result
def plain_only() -> bool:
    """Whether a call has to be made of torch's own operators: :func:`transformed` or :func:`jit_traced`."""
    return (
        _torch_private.function_transforms_active()
        or _torch_private.forward_mode_active()
        or _torch_private.jit_trace_active()
    )


def has_kernel(tensor: Tensor, op: str) -> bool:
    """Whether a backend has a kernel of `op` for the device of `tensor`, or was asked for by name."""
    return _requested != "auto" or choose(_device_type(tensor), op) != "reference"


def falls_back(module: object, tensor: Tensor, op: str, *, known: bool = True) -> bool:
    """Whether `module` has to run its original library's code instead of `op`. Warns in the log the first time.

    It has to where the op has no kernel, because that code is faster than the reference, and where the op does not
    know the settings of the module or the dtypes of its inputs: ``known=False``. Where :func:`plain_only` it has to
    too, without a warning.
    """
    if plain_only():
        return True
    if known and has_kernel(tensor, op):
        return False
    kind, device_type = type(module), tensor.device.type
    if device_type == "meta":
        # Nothing is computed, only shapes.
        return True
    reason = f"no backend here has a kernel of {op}" if known else f"{op} does not know its settings or dtypes"
    text = "%s runs its original library's code on %s tensors: %s"
    _log.once(logging.WARNING, (kind, op, device_type, known), text, kind.__name__, device_type, reason)
    return True


# A compiler calls it without reading _chosen: its guard on that would compile anew after the next eager call.
@torch.compiler.assume_constant_result
def _choose(name: str, device_type: str, op: str | None) -> str:
    if name == "auto":
        # The interpreter is for testing kernels, never the faster choice.
        return next(b for b in available(device_type, op) if b != "triton" or device_type == "cuda")
    if (reason := problem(name, device_type)) is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot serve {device_type} tensors: {reason}")
    return name if problem(name, device_type, op) is None else "reference"


def explain(device_type: str = "cpu", op: str | None = None) -> str:
    """One line per backend: which one serves tensors of `device_type`, which others could, and why the rest cannot.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        op: the name of an op, such as ``"segmented_nms"``. Without it, each line names the ops that the backend has no
            kernel of. Each line also says which parts of an op torch's own operators compute.

    >>> print(explain("cpu", "nms").splitlines()[0])
    nms of cpu tensors, backend asked for: auto
    """
    try:
        taken: str | None = choose(device_type, op)
    except BackendUnavailableError:
        taken = None
    of = "" if op is None else f"{op} of "
    lines = [f"{of}{device_type} tensors, backend asked for: {_requested}"]
    for name in BACKENDS:
        reason = problem(name, device_type, op)
        states = ["taken" if name == taken else "available", *notes(name, device_type, op)]
        lines.append(f"  {name:<9} {'; '.join(states) if reason is None else f'not available: {reason}'}")
    return "\n".join(lines)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Uses one backend inside a ``with`` block: ``auto``, ``cpp``, ``triton`` or ``reference``.

    Raises:
        ValueError: `name` is none of these.
        BackendUnavailableError: the backend serves no device on this machine.

    >>> with use("reference"):
    ...     choose("cpu")
    'reference'
    """
    global _requested
    _parse(name, "backend")
    if name != "auto" and all(problem(name, device_type) is not None for device_type in ("cpu", "cuda")):
        raise BackendUnavailableError(f"backend {name!r} cannot serve cpu tensors: {problem(name, 'cpu')}")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before
