# SPDX-License-Identifier: Apache-2.0
"""The tests that every op's CUDA kernels pass on the CPU. An op's test file subclasses `HostBattery`.

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
from helpers.devices import DTYPES as TYPES
from helpers.layouts import LAYOUTS, Layout

from . import run


@dataclass
class Call:
    """One run of a program. check: what the outputs must be."""

    kernel: str
    numbers: list[int]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    check: Callable[[list[torch.Tensor]], None]


def runs(names: Iterable[str], layouts: Iterable[str] = ("channels_first",), types: Iterable[str] = ("float32",)):
    """Every case in every layout and type."""
    return ["/".join(each) for each in itertools.product(names, layouts, types)]


def selected(expected: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.Tensor], Callable]:
    """Unwritten outputs for what an op selects from a detector's heads, and their comparison with `expected`."""
    # float64 has no exponential of more digits to round: see test_generate_proposals.py.
    unit = 2**-51 if dtype == torch.float64 else 0

    def check(found: list[torch.Tensor]) -> None:
        for actual, right in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=unit, atol=2**11 * unit)

    return [torch.full_like(each, -7) for each in expected], check


def layouts_of(name: str) -> list[Layout]:
    if not name.startswith("mixed"):
        return [LAYOUTS[name]]
    first, all_of_them = int(name.removeprefix("mixed") or 0), list(LAYOUTS.values())
    return all_of_them[first:] + all_of_them[:first]


RUNS = {
    "test_equals_the_reference": "right",
    "test_no_stray_access_and_no_undefined_arithmetic": "addresses",
    "test_no_data_race": "races",
    "test_blocks_are_independent": "alone",
    "test_offsets_of_more_than_31_bits": "far",
}


class HostBattery:
    """Subclasses give the program, its cases, and which runs each test makes; `calls` says what a run is.

    right: compared with the reference. addresses, races: under the sanitizers. alone: one block after the other.
    far: of maps whose last element is 2^31 elements from the first, along each axis in turn.
    """

    program: str
    cases: dict[str, Any]
    right: tuple[str, ...] | list[str]
    addresses: tuple[str, ...]
    races: tuple[str, ...]
    alone: tuple[str, ...] = ()
    far: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        for test, field in RUNS.items():
            if not getattr(cls, field):
                setattr(cls, test, None)

    def calls(self, case: Any, dtype: torch.dtype, layouts: list[Layout]) -> Iterator[Call]:
        raise NotImplementedError

    def calls_of(self, text: str) -> Iterator[Call]:
        name, *others = text.split("/")
        layout, dtype = (*others, *("channels_first", "float32")[len(others) :])
        return self.calls(self.cases[name], TYPES[dtype], layouts_of(layout))

    def outputs(self, call: Call, **options) -> list[torch.Tensor]:
        return run.outputs_of(self.program, call.kernel, call.numbers, call.inputs, call.outputs, **options)

    def check(self, text: str, **options) -> None:
        for call in self.calls_of(text):
            call.check(self.outputs(call, **options))

    def pytest_generate_tests(self, metafunc):
        if "text" in metafunc.fixturenames:
            metafunc.parametrize("text", getattr(self, RUNS[metafunc.function.__name__]))

    def test_equals_the_reference(self, text):
        self.check(text)

    def test_no_stray_access_and_no_undefined_arithmetic(self, text):
        self.check(text, flavour="address")

    def test_no_data_race(self, text):
        self.check(text, flavour="thread")

    @pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
    def test_offsets_of_more_than_31_bits(self, text, axis):
        self.check(text, spread=axis)

    def test_blocks_are_independent(self, text):
        """Each element is written by one block, and needs nothing that another block writes."""
        for call in self.calls_of(text):
            run.check_each_block_alone(self.program, call.kernel, call.numbers, call.inputs, call.outputs)
