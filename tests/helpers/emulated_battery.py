# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels of every op are checked for, by executing their machine code. Tests subclass `EmulatedBattery`.

A run is written "NAME", "NAME/LAYOUT" or "NAME/LAYOUT/TYPE": a case, the memory of its maps, and a type; by default
channels_first and float32. The layout "mixed" takes turns at all of them, and "mixed3" begins with the fourth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers import emulated_gpu
from helpers.devices import DTYPES as TYPES
from helpers.layouts import LAYOUTS, Layout


@dataclass
class Call:
    """One call of an op. check: what its results, as a flat list, must be."""

    op: str
    arguments: list[Any]
    check: Callable[[list[torch.Tensor]], None]


def runs(names: Iterable[str], layouts: Iterable[str] = ("channels_first",), types: Iterable[str] = ("float32",)):
    """Every case in every layout and type."""
    return ["/".join(each) for each in itertools.product(names, layouts, types)]


def check_selected(expected: Sequence[torch.Tensor], dtype: torch.dtype) -> Callable[[list[torch.Tensor]], None]:
    """The comparison with what an op selects from a detector's heads."""
    # float64 has no exponential of more digits to round: see test_generate_proposals.py.
    unit = 2**-51 if dtype == torch.float64 else 0

    def check(found: list[torch.Tensor]) -> None:
        for actual, right in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=unit, atol=2**11 * unit)

    return check


def layouts_of(name: str) -> list[Layout]:
    if not name.startswith("mixed"):
        return [LAYOUTS[name]]
    first, all_of_them = int(name.removeprefix("mixed") or 0), list(LAYOUTS.values())
    return all_of_them[first:] + all_of_them[:first]


class EmulatedBattery:
    """Subclasses give cases, the runs on the compiled library and on Triton's kernels, and `calls` of a run.

    far: runs on maps whose last element is 2^31 elements from the first, along each axis in turn.
    every_kernel: runs that execute each instance of the library's kernels whose names begin with one of `kernels`.
    """

    cases: dict[str, Any]
    cpp: Sequence[str] = ()
    triton: Sequence[str] = ()
    far: Sequence[str] = ()
    kernels: tuple[str, ...] = ()
    every_kernel: Sequence[str] = ()

    def __init_subclass__(cls) -> None:
        for part in ("cpp", "triton", "far"):
            if not getattr(cls, part):
                setattr(cls, f"test_{part}_equals_the_reference", None)

    def calls(self, case: Any, dtype: torch.dtype, layouts: list[Layout]) -> Iterator[Call]:
        raise NotImplementedError

    def calls_of(self, text: str) -> Iterator[Call]:
        name, *others = text.split("/")
        layout, dtype = (*others, *("channels_first", "float32")[len(others) :])
        return self.calls(self.cases[name], TYPES[dtype], layouts_of(layout))

    def check(self, text: str, backend: str, **options: Any) -> list[str]:
        """The kernels that the run launched."""
        kernels = []
        for call in self.calls_of(text):
            found, launches = emulated_gpu.call(call.op, call.arguments, backend, **options)
            call.check(tree_leaves(found))
            kernels += [kernel for kernel, _ in launches]
        return kernels

    def pytest_generate_tests(self, metafunc):
        if "text" in metafunc.fixturenames:
            part = metafunc.function.__name__.removeprefix("test_").partition("_")[0]
            metafunc.parametrize("text", getattr(self, part))

    def test_cpp_equals_the_reference(self, text):
        self.check(text, "cpp")

    def test_triton_equals_the_reference(self, text):
        self.check(text, "triton")

    @pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
    def test_far_equals_the_reference(self, text, axis):
        self.check(text, "cpp", orders=("in_order",), far=axis)

    def test_every_instance_of_the_librarys_kernels(self):
        """Each runs, in the fewest cases, and is right."""
        executed = {kernel for text in self.every_kernel for kernel in self.check(text, "cpp", orders=("in_order",))}
        assert {kernel for kernel in emulated_gpu.kernels() if self.has(kernel)} == {k for k in executed if self.has(k)}

    @classmethod
    def has(cls, kernel: str) -> bool:
        """Whether the mangled name is of one of its templates."""
        return any(f"{len(name)}{name}I" in kernel for name in cls.kernels)
