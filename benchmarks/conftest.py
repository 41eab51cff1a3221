# SPDX-License-Identifier: Apache-2.0
"""Measures each case once, all providers in the same rounds, and hands every test its provider's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fpn_fast.bench.cases import FAMILIES, Case
from fpn_fast.bench.harness import Samples, measure
from fpn_fast.bench.machine import facts
from fpn_fast.bench.providers import providers
from fpn_fast.bench.rows import Results, Row

#: The metric that a test hands to pytest-benchmark.
METRIC = {"cpu": "wall", "cuda": "gpu_cold"}


class RecordedClock:
    """A timer for pytest-benchmark that reads out samples taken already.

    pytest-benchmark times one function after the other; here the providers of a case are sampled in turn, on a GPU by
    events, so its rounds are read from the samples: one from each pair of its readings of the clock.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())
        self.started = False

    def load(self, samples: list[float]) -> None:
        """Makes `samples` the next rounds."""
        self.samples, self.started = iter(samples), False

    def __call__(self) -> float:
        if self.started:
            self.now += next(self.samples)
        self.started = not self.started
        return self.now


CLOCK = RecordedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fpn_fast benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--case-seconds", type=float, default=4.0, help="time for each case, beyond warming up")
    group.addoption("--family", help=f"comma-separated, of {', '.join(FAMILIES)}; all by default")
    group.addoption("--results", type=Path, help="folder for <machine>/<family>.json; without it no rows are kept")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family`, `case` and `provider` gets all of them."""
    if {"family", "case", "provider"} <= set(metafunc.fixturenames):
        device_type, chosen = (metafunc.config.getoption(name) for name in ("--device", "--family"))
        families = chosen.split(",") if chosen else list(FAMILIES)
        if unknown := set(families) - set(FAMILIES):
            raise pytest.UsageError(f"--family takes {', '.join(FAMILIES)}, not {', '.join(sorted(unknown))}")
        found = [(f, c, p.name) for f in families for c in FAMILIES[f](device_type) for p in providers(c, device_type)]
        ids = [f"{case}-{name}" for _, case, name in found]
        metafunc.parametrize(("family", "case", "provider"), found, ids=ids)


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> dict[str, Any]:
    return facts(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest, machine: dict[str, Any]
) -> Callable[[str, Case], tuple[dict[tuple[str, str], Row], Samples]]:
    """A case's rows and samples by (provider, metric). It is measured when it is first asked for."""
    options = request.config.option
    results: dict[str, Results] = {}
    latest: dict[Case, tuple[dict[tuple[str, str], Row], Samples]] = {}

    def of(family: str, case: Case) -> tuple[dict[tuple[str, str], Row], Samples]:
        if case not in latest:
            rows, samples = measure(case, options.device, options.case_seconds)
            if options.results is not None:
                if family not in results:
                    results[family] = Results(options.results, family, machine)
                results[family].add(rows)
            latest.clear()
            latest[case] = {(row.provider, row.metric): row for row in rows}, samples
        return latest[case]

    return of
