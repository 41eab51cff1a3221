# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign. See harness.py for the protocol, cases.py for what is measured."""

from __future__ import annotations

import pytest

from benchmarks.conftest import CLOCK, METRIC
from benchmarks.rows import as_dict


@pytest.mark.benchmark(timer=CLOCK)
def test_multiscale_roi_align(case, provider, measured, machine, benchmark):
    rows, samples = measured(case)
    refused = rows.get((provider, "none"))
    if refused is not None:
        pytest.fail(f"refused: {refused.refused}", pytrace=False)
    key = provider, METRIC[machine["device_type"]]
    benchmark.group = str(case)
    benchmark.extra_info.update(as_dict(rows[key]), machine=machine)
    CLOCK.load(samples[key])
    benchmark.pedantic(lambda: None, rounds=len(samples[key]))
