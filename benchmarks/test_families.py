# SPDX-License-Identifier: Apache-2.0
"""Every family's cases, for pytest-benchmark; ``--family NAME`` for one. See harness.py for the protocol."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, METRIC
from fpn_fast.bench.rows import as_dict


@pytest.mark.benchmark(timer=CLOCK)
def test_family(family, case, provider, measured, machine, benchmark):
    rows, samples = measured(family, case)
    refused = rows.get((provider, "none"))
    if refused is not None:
        pytest.fail(f"refused: {refused.refused}", pytrace=False)
    key = provider, METRIC[machine["device_type"]]
    benchmark.group = str(case)
    benchmark.extra_info.update(as_dict(rows[key]), machine=machine)
    CLOCK.load(samples[key])
    benchmark.pedantic(lambda: None, rounds=len(samples[key]))
