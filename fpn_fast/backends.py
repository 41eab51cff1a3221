# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call, and why.

- ``cpp``: the compiled library; C++ on CPU tensors, CUDA on CUDA tensors.
- ``triton``: for a GPU without a compiler; on CPU tensors only under ``TRITON_INTERPRET=1``, for testing.
- ``reference``: plain PyTorch, on any device.

``auto`` takes the first of these that can serve the call. An op that a backend has no kernel for runs by the reference
there, also where the backend was asked for by name; :func:`explain` says which ops. Choose with :func:`use`, or with
``FPN_FAST_BACKEND`` in the environment when the package is imported. The choice is one for the process, not one for
each thread.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fpn_fast import _library

BACKENDS = ("cpp", "triton", "reference")


# Looked up here, because torch.compile may be what asks first, and torch 2.11's does not follow the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why and what would help."""


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
# Choices by (requested, device type, op): the answer cannot change while the process lives.
_chosen: dict[tuple[str, str, str | None], str] = {}
# (backend, device type) -> the ops that have no kernel there.
_missing: dict[tuple[str, str], set[str]] = {}
# (op, backend) -> what of the op torch's own operators do there.
_shared: dict[tuple[str, str], str] = {}


def requested() -> str:
    """The backend asked for: ``auto``, ``cpp``, ``triton`` or ``reference``."""
    return _requested


def problem(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors of `device_type`, with what would help; None where it can."""
    return _PROBLEMS[_parse(backend, "backend")](device_type)


def available(device_type: str) -> list[str]:
    """The backends that can serve tensors of `device_type`, best first."""
    return [name for name in BACKENDS if problem(name, device_type) is None]


def declare_missing(op: str, backend: str, device_type: str) -> None:
    """Says that `op` has no kernel on `backend` for tensors of `device_type`; called where the op is registered."""
    _missing.setdefault((backend, device_type), set()).add(op)


def declare_shared(op: str, backend: str, by_torch: str) -> None:
    """Says what of `op` on `backend` torch's own operators do, such as "sorting"; called where the op is registered."""
    _shared[op, backend] = by_torch


def has_form(op: str, backend: str, device_type: str) -> bool:
    """Whether `backend` has a kernel of `op` for tensors of `device_type`, if it serves them at all."""
    return op not in _missing.get((backend, device_type), ())


def choose(device_type: str, op: str | None = None) -> str:
    """The backend that serves a call on `device_type`; for an op that it has no kernel of, the reference.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot serve this device.
    """
    key = (_requested, device_type, op)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(*key)
    return found


def choose_for(tensor: Tensor, op: str | None = None) -> str:
    """:func:`choose` for the device of `tensor`; asking a device for its type's name costs more than the choice."""
    return choose("cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type, op)


def beats_torchvision(tensor: Tensor, op: str) -> bool:
    """Whether a module should call `op` for tensors like `tensor` and not do as torchvision does.

    Not where the op has no kernel and would run by the reference, unless a backend was asked for by name.
    """
    return _requested != "auto" or choose_for(tensor, op) != "reference"


def _choose(name: str, device_type: str, op: str | None) -> str:
    if name == "auto":
        # The interpreter is for testing kernels, never the faster choice.
        usable = [b for b in available(device_type) if b != "triton" or device_type == "cuda"]
        return next(b for b in usable if op is None or has_form(op, b, device_type))
    reason = problem(name, device_type)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot serve {device_type} tensors: {reason}")
    return name if op is None or has_form(op, name, device_type) else "reference"


def remarks(backend: str, device_type: str, op: str | None = None) -> list[str]:
    """What of `op`, or of all ops, `backend` leaves to others for tensors of `device_type`."""
    if op is not None:
        return [f"{_shared[op, backend]} by torch's own operators"] if (op, backend) in _shared else []
    missing = sorted(_missing.get((backend, device_type), ()))
    found = [f"without kernels of {', '.join(missing)}"] if missing else []
    shared: dict[str, list[str]] = {}
    for (name, where), by_torch in sorted(_shared.items()):
        if where == backend:
            shared.setdefault(by_torch, []).append(name)
    return found + [f"{by_torch} of {', '.join(names)} by torch's own operators" for by_torch, names in shared.items()]


def explain(device_type: str = "cpu", op: str | None = None) -> str:
    """One line a backend: which serves tensors of `device_type` now, which could, and why the others cannot.

    op: an op's name, such as "segmented_nms", for the backends that serve this one; without it, each line names the ops
        that its backend has no kernel of and leaves to the reference. Either way a line says what of an op with a
        kernel torch's own operators do.
    """
    try:
        taken: str | None = choose(device_type, op)
    except BackendUnavailableError:
        taken = None
    of = "" if op is None else f"{op} of "
    lines = [f"{of}{device_type} tensors, backend asked for: {_requested}"]
    for name in BACKENDS:
        reason = problem(name, device_type)
        missing = sorted(_missing.get((name, device_type), ()))
        if reason is None and op in missing:
            reason = f"it has no kernel of {op} for {device_type} tensors, which runs by another backend"
        state = "taken" if name == taken else "available" if reason is None else f"not available: {reason}"
        if reason is None:
            state += "".join(f"; {remark}" for remark in remarks(name, device_type, op))
        lines.append(f"  {name:<9} {state}")
    return "\n".join(lines)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Asks for a backend inside a ``with`` block: ``auto``, ``cpp``, ``triton`` or ``reference``.

    Raises:
        ValueError: `name` is none of these.
        BackendUnavailableError: no device type on this machine can be served by it.
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
