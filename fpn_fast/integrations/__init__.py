# SPDX-License-Identifier: Apache-2.0
"""`accelerate()`: swaps what a detector has that we have a fused form of.

A swap changes a module's class in place. Parameters, buffers, hooks, the module's identity and every reference to it
stay as they are, checkpoints go both ways, and undoing it is changing the class back.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class, and what was done or why it was left."""

    name: str
    module: str
    note: str


#: What a model with fused modules in it cannot do that it could before.
_LIMIT = "torch.jit.script: no longer; script the model before accelerate(), or after restore()"


@dataclass
class Report:
    """What :func:`accelerate` or :func:`restore` did, and what the model cannot do any more (`limits`).

    Printed, a table; ``as_dict()``, plain data.
    """

    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[Any]]:
        """{"swapped": [{"name", "module", "note"}, ...], "left": [...], "limits": [text, ...]}"""
        return {
            "swapped": [vars(entry) for entry in self.swapped],
            "left": [vars(entry) for entry in self.left],
            "limits": self.limits,
        }

    def __str__(self) -> str:
        rows = [("swapped", *vars(e).values()) for e in self.swapped] + [("left", *vars(e).values()) for e in self.left]
        if not rows:
            return "fpn_fast: nothing in this model has a fused form"
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
        return "\n".join([f"fpn_fast: {len(self.swapped)} swapped, {len(self.left)} left", *lines, *self.limits])


#: Each has a module here, which imports the library.
_LIBRARIES = ("detectron2", "mmdet", "torchvision")


def __getattr__(name: str) -> Any:
    """Its modules, imported when they are asked for: ``fpn_fast.integrations.mmdet.register()``."""
    if name in _LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _fused(model: nn.Module) -> dict[type, type]:
    """Class -> its fused class, of the libraries whose classes `model` is made of: no other is imported."""
    roots = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
    fused: dict[type, type] = {}
    for library in _LIBRARIES:
        if library in roots:
            fused |= __getattr__(library).FUSED
    return fused


def _problem(module: nn.Module, fused: type) -> str | None:
    """Why `module` must be left although its class has a fused one, which knows."""
    return fused.problem(module) if hasattr(fused, "problem") else None


def _qualified(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Report:
    """Swaps, in place, every module of `model` that has a fused form; the model computes the same.

    Weights, hooks and references stay; calling it again changes nothing; :func:`restore` undoes it. Subclasses of a
    known module are left, because they may compute something else.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model(model)
    fused = _fused(model)
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in fused and (reason := _problem(module, fused[kind])):
            report.left.append(Entry(name, _qualified(kind), reason))
        elif kind in fused:
            module.__class__ = fused[kind]
            report.swapped.append(Entry(name, _qualified(kind), f"now {_qualified(fused[kind])}"))
        elif kind in fused.values():
            report.left.append(Entry(name, _qualified(kind), "fused already"))
        elif base := next((base for base in kind.__mro__[1:] if base in fused), None):
            note = f"a subclass of {_qualified(base)}, which may compute something else"
            report.left.append(Entry(name, _qualified(kind), note))
    if any(type(module) in fused.values() for module in model.modules()):
        report.limits.append(_LIMIT)
    return report


def restore(model: nn.Module) -> Report:
    """Undoes :func:`accelerate`, in place: every fused module becomes what it replaced, with its weights of now.

    Modules that were built as fused ones become the library's too. Raises TypeError if `model` is not a module.
    """
    _check_model(model)
    originals = {new: old for old, new in _fused(model).items()}
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        if kind in originals:
            module.__class__ = originals[kind]
            report.swapped.append(Entry(name, _qualified(kind), f"now {_qualified(originals[kind])}"))
    return report
