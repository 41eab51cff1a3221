# SPDX-License-Identifier: Apache-2.0
"""Whether the steps that a fused path leaves out are still its library's own, which is torchvision in most cases.

People try a loss or a suppression by replacing a step: on a module (``model.rpn.compute_loss = mine``), on
torchvision's class, in a subclass, or a function in a module of torchvision (``retinanet.sigmoid_focal_loss = mine``).
torchvision calls all of these, and a fused path would not. Its module therefore asks :class:`Steps` at every call, and
runs torchvision's code where something is not torchvision's own.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from fpn_fast import _torch_private

#: Where the methods of torchvision and the functions that they call come from.
_KNOWN_PACKAGES = ("torchvision", "torch", "fpn_fast", "builtins", "collections", "typing")
#: Recorded for what was replaced before fpn_fast was imported: nothing equals it.
_REPLACED = object()
_ALL_STEPS: list[Steps] = []


class Steps:
    """Steps of a class of torchvision that a fused path leaves out, and the functions that they call.

    All are recorded when a module of fpn_fast is imported. :meth:`are_own` costs a few microseconds.

    Args:
        base: the class of torchvision.
        methods: the names of its methods that are left out. With "forward", its forward hooks are too.
        replaced: the name of its method that the fused path itself stands for. A subclass may override that one.
        fused: the class of fpn_fast that replaces `base`, or several, if they override some of `methods`.
        calls: more functions that are left out.
    """

    def __init__(
        self,
        base: type,
        *methods: str,
        replaced: str | None = None,
        fused: type | tuple[type, ...] | None = None,
        calls: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        self.base = base
        functions = vars(base)
        kinds = fused if isinstance(fused, tuple) else (fused or base,)
        # Other versions of torchvision, or its stand-ins, may lack a method.
        self._methods = {
            name: (functions[name], *(vars(kind).get(name, functions[name]) for kind in kinds))
            for name in methods
            if name in functions
        }
        self._has_hooks = "forward" in methods
        recorded: dict[tuple[Any, str], Any] = {}
        for name in (*methods, *([replaced] if replaced else [])):
            if hasattr(base, name):
                _record(base, name, recorded)
        for function in calls:
            _record_calls(function, recorded)
        self._recorded = [(owner, name, value) for (owner, name), value in recorded.items()]
        _ALL_STEPS.append(self)

    def are_own(self, module: object) -> bool:
        """Whether all of them are torchvision's own in `module`, an instance of the class or of a subclass."""
        return not self.changed(module)

    def changed(self, module: object) -> list[str]:
        """The names of those that are not torchvision's own in `module`."""
        shadows, kind = vars(module), type(module)
        found = [
            name
            for owner, name, value in self._recorded
            # No assignment here, which torch.compile does not trace.
            if getattr(owner, name, None) is not value and not _stands_for(getattr(owner, name, None), value)
        ]
        for name, own in self._methods.items():
            method = getattr(kind, name, own[0])
            if name in shadows or all(method is not each for each in own):
                found.append(name)
        if self._has_hooks and isinstance(module, nn.Module) and _torch_private.has_forward_hooks(module):
            found.append("forward hooks")
        return found


class Part(Steps):
    """A part of a detector that a fused path leaves out as a whole: of no subclass, and without forward hooks."""

    def __init__(self, base: type, *, fused: type | None = None, calls: tuple[Callable[..., Any], ...] = ()) -> None:
        names = [name for name, value in vars(base).items() if isinstance(value, FunctionType)]
        super().__init__(
            base, *(n for n in names if n == "__call__" or not n.startswith("__")), fused=fused, calls=calls
        )
        self._kinds = (base, fused)

    def changed(self, module: object) -> list[str]:
        kind = type(module)
        return super().changed(module) if kind in self._kinds else [f"class {kind.__name__}"]


def changed_steps(module: nn.Module, apart: set[type]) -> Iterator[str]:
    """The dotted names of what is not torchvision's own in `module` and its parts, without modules of `apart`."""
    for path, owner in module.named_modules():
        if owner is not module and type(owner) in apart:
            continue
        parts = {name: part for name, part in vars(owner).items() if not isinstance(part, nn.Module)}
        for name, part in ({"": owner} | parts).items():
            for steps in _ALL_STEPS:
                # torchvision's own subclasses, such as SSDMatcher, are for what is not fused.
                subclass = type(part) is not steps.base and _package(type(part)) == "torchvision"
                if isinstance(part, steps.base) and not subclass:
                    yield from (".".join(filter(None, (path, name, each))) for each in steps.changed(part))


def _record(owner: Any, name: str, recorded: dict[tuple[Any, str], Any]) -> None:
    """Records the function or class that `owner`, a module or a class, has as `name`, and what it calls."""
    if (owner, name) not in recorded:
        # A base class may define it.
        value = inspect.getattr_static(owner, name)
        # Of other libraries the stand-ins in our tests have methods from elsewhere.
        known = _package(value) in _KNOWN_PACKAGES or (isinstance(owner, type) and _package(owner) != "torchvision")
        recorded[owner, name] = value if known else _REPLACED
        _record_calls(value, recorded)


def _record_calls(function: Any, recorded: dict[tuple[Any, str], Any]) -> None:
    """Records what `function`, if it is one of torchvision, looks up by name in modules of torchvision when it runs."""
    function = inspect.unwrap(function)  # of torch.jit's decorators
    if not isinstance(function, FunctionType) or _package(function) != "torchvision":
        return
    module, names = sys.modules[function.__globals__["__name__"]], set(_names(function.__code__))
    for name in names & vars(module).keys():
        value = vars(module)[name]
        if not isinstance(value, ModuleType):
            owners = {module: {name}}
        elif value.__name__.partition(".")[0] == "torchvision":
            owners = {value: names & vars(value).keys()}
        else:
            continue
        for owner, called in owners.items():
            for each in called:
                if callable(vars(owner)[each]):
                    _record(owner, each, recorded)


def _stands_for(value: Any, recorded: Any) -> bool:
    """Whether `value` does what was recorded, while fpn_fast.bench counts or torch.fx traces."""
    module = _module_of(value)
    return module == "fpn_fast.bench.counting" or (module.startswith("torch.fx.") and inspect.unwrap(value) is recorded)


def _names(code: CodeType) -> Iterator[str]:
    """The global and attribute names in `code`, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _package(value: Any) -> str:
    return _module_of(value).partition(".")[0]


def _module_of(value: Any) -> str:
    """The module that defines `value`. functools.wraps copies a function's name and module, and not its globals."""
    if isinstance(value, FunctionType):
        name = value.__globals__.get("__name__", "")
    elif isinstance(value, functools.partial):
        name = ""
    else:
        name = value.__module__ if isinstance(value, type) else type(value).__module__
    return str(name)
