# SPDX-License-Identifier: Apache-2.0
"""`accelerate()` replaces the modules of a detector by fused ones, and `restore()` undoes it.

Both change the class of a module in place. Its parameters, buffers and hooks and all references to it stay, and
checkpoints load both ways.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fpn_fast.nn._own import changed_steps


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class, and what was done with it or why nothing was."""

    name: str
    module: str
    note: str


_LIMIT = (
    "torch.jit.script and torch.onnx.export(dynamo=True) do not take swapped modules: use them before accelerate(), "
    "or after restore()"
)


_ADVICE = (
    "its convolutions are channels_first, and the GPU's tensor cores take channels_last: "
    "model.to(memory_format=torch.channels_last) saves conversions"
)


@dataclass
class Report:
    """The modules that were swapped, those that were left unchanged, what the model can no longer do (`limits`), and
    what would make it faster (`advice`).

    ``print`` shows it as a table, with a line for all modules of a class; ``as_dict()`` gives plain data.
    """

    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[Any]]:
        """{"swapped": [{"name", "module", "note"}, ...], "left": [...], "limits": [text, ...], "advice": [...]}"""
        return {
            "swapped": [vars(entry) for entry in self.swapped],
            "left": [vars(entry) for entry in self.left],
            "limits": self.limits,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for done, entries in (("swapped", self.swapped), ("left", self.left)):
            for entry in entries:
                alike.setdefault((done, entry.module, entry.note), []).append(entry.name)
        if not alike:
            return "fpn_fast: this model has no module with a fused implementation"
        rows = []
        for (done, module, note), names in alike.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            rows.append((done, names[0] + more, module, note))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
        head = f"fpn_fast: {len(self.swapped)} swapped, {len(self.left)} left"
        return "\n".join([head, *lines, *self.limits, *self.advice])


def replacing(*kinds: type) -> dict[type, type]:
    """Class of a library -> fused class. Each of `kinds` subclasses the class of its name that it replaces."""
    return {next(base for base in kind.__mro__[1:] if base.__name__ == kind.__name__): kind for kind in kinds}


#: Each has a module in this package, which imports the library.
_LIBRARIES = ("detectron2", "mmdet", "torchvision")


def __getattr__(name: str) -> Any:
    """Imports a module of this package at its first use, such as ``fpn_fast.integrations.mmdet.register()``."""
    if name in _LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _fused(model: nn.Module) -> dict[type, type]:
    """Class -> fused class, for the libraries that `model` has classes of. No other library is imported."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    roots = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
    fused: dict[type, type] = {}
    for library in _LIBRARIES:
        if library in roots:
            fused |= __getattr__(library).FUSED
    return fused


def _qualified(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _swap(name: str, module: nn.Module, new: type) -> Entry:
    entry = Entry(name, _qualified(type(module)), f"now {_qualified(new)}")
    module.__class__ = new
    return entry


def _note_changed(report: Report, model: nn.Module, apart: set[type]) -> None:
    """Notes which steps of the swapped modules are not the library's own: its code runs there."""
    modules = dict(model.named_modules())
    for i, entry in enumerate(report.swapped):
        changed = dict.fromkeys(changed_steps(modules[entry.name], apart))
        if changed:
            note = f"{entry.note}; its library's code runs where you changed {', '.join(changed)}"
            report.swapped[i] = replace(entry, note=note)


def _wants_channels_last(model: nn.Module) -> bool:
    """Whether `model` has channels_first convolutions on a GPU with tensor cores."""
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or nn.parameter.is_lazy(module.weight):
            continue
        weight = module.weight
        # The weights of a 1x1 convolution are of both formats.
        if weight.is_cuda and not weight.is_contiguous(memory_format=torch.channels_last):
            return torch.cuda.get_device_capability(weight.device) >= (7, 0)
    return False


def accelerate(model: nn.Module) -> Report:
    """Swaps every module of `model` that has a fused implementation, in place. The model computes the same.

    Weights, hooks and references stay. A second call changes nothing, and :func:`restore` undoes it. Subclasses of the
    libraries' modules stay unchanged, because they may compute something else.

    Args:
        model: a detector of torchvision, detectron2 or mmdetection, or any module that contains their modules.

    Returns:
        What was swapped, and what was left with the reason.

    Raises:
        TypeError: `model` is not a module.

    >>> import torchvision
    >>> pyramid = torchvision.ops.FeaturePyramidNetwork([8, 8], 4)
    >>> print(accelerate(pyramid).swapped[0].note)
    now fpn_fast.FeaturePyramidNetwork
    """
    fused = _fused(model)
    report = Report()
    for name, module in model.named_modules():
        kind, note = type(module), None
        if kind in fused:
            # A fused class may refuse some settings of the class that it replaces.
            note = getattr(fused[kind], "problem", lambda _: None)(module)
            if note is None:
                report.swapped.append(_swap(name, module, fused[kind]))
        elif kind in fused.values():
            note = "fused already"
        elif base := next((base for base in kind.__mro__[1:] if base in fused), None):
            note = f"a subclass of {_qualified(base)}, which may compute something else"
        if note is not None:
            report.left.append(Entry(name, _qualified(kind), note))
    _note_changed(report, model, {*fused.values()})
    if any(type(module) in fused.values() for module in model.modules()):
        report.limits.append(_LIMIT)
        if _wants_channels_last(model):
            report.advice.append(_ADVICE)
    return report


def restore(model: nn.Module) -> Report:
    """Undoes :func:`accelerate`, in place: every fused module gets its library's class back and keeps its weights.

    Modules that were built as fused ones get their library's class too.

    Raises:
        TypeError: `model` is not a module.
    """
    originals = {new: old for old, new in _fused(model).items()}
    report = Report()
    for name, module in model.named_modules():
        if type(module) in originals:
            report.swapped.append(_swap(name, module, originals[type(module)]))
            # What values_of() keeps.
            vars(module).pop("_numbers", None)
    return report
