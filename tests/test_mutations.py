# SPDX-License-Identifier: Apache-2.0
"""``verify`` notices faults: in a library whose kernels have some planted, it fails with each and passes without."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import planted_faults
import pytest
from planted_faults import FAULTS


def verify(folder: Path, report: Path, ops: list[str], fault: int = 0) -> tuple[int, dict]:
    """Exit code and JSON of ``verify --quick`` with the library in `folder`; fault: the one that is on, from 1."""
    command = [sys.executable, "-m", "fpn_fast", "verify", "--quick", "--backends", "cpp", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(folder), planted_faults.VARIABLE: str(fault)}
    done = subprocess.run([*command, "--ops", *ops], cwd=report.parent, capture_output=True, text=True, env=environment)
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    assert found["environment"]["library"] == str(folder / "fpn_fast" / "_C.abi3.so")
    return done.returncode, found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Fault's name -> exit code and JSON; "" -> those without a fault."""
    library, reports = planted_faults.build(), tmp_path_factory.mktemp("reports")
    ops = list(dict.fromkeys(fault.op for fault in FAULTS))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = {"": pool.submit(verify, library, reports / "none.json", ops)}
        for number, fault in enumerate(FAULTS, start=1):
            runs[fault.name] = pool.submit(verify, library, reports / f"{fault.name}.json", [fault.op], number)
        return {name: run.result() for name, run in runs.items()}


def test_passes_without_a_fault(outcomes):
    code, found = outcomes[""]
    assert code == 0
    assert all(row["passed"] and row["cases"] > 0 for row in found["rows"])
    assert {row["op"] for row in found["rows"]} == {fault.op for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_notices(outcomes, fault):
    code, found = outcomes[fault.name]
    assert code == 1
    failures = [failure for row in found["rows"] for failure in row["failures"]]
    assert failures
    # By what it computed, not because it could not.
    assert not any(failure["message"].startswith("raised") for failure in failures)
