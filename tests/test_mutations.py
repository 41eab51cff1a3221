# SPDX-License-Identifier: Apache-2.0
"""``verify`` notices faults: in a library whose kernels have some planted, it fails with each and passes without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import planted_faults
from helpers.planted_faults import FAULTS

# Runs `verify` for each [fault's number, ops, report], two at a time, and prints the exit codes. Each is a fork of a
# process that has imported torch, which takes longer than to verify an op; the library is loaded after the fork.
DRIVER = f"""
import json, multiprocessing, os, sys
import torch, torchvision

def verify(number, ops, report):
    os.environ["{planted_faults.VARIABLE}"] = str(number)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from fpn_fast.__main__ import main
    return main(["verify", "--quick", "--backends", "cpp", "--json", report, "--ops", *ops])

with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
    print(json.dumps(pool.starmap_async(verify, json.loads(sys.argv[1]), chunksize=1).get(timeout=600)))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Fault's name -> exit code and JSON of `verify`; "" -> those without a fault."""
    library, reports = planted_faults.build(), tmp_path_factory.mktemp("reports")
    ops = list(dict.fromkeys(fault.op for fault in FAULTS))
    runs = [(0, ops, str(reports / "none.json"))]
    runs += [(i, [fault.op], str(reports / f"{fault.name}.json")) for i, fault in enumerate(FAULTS, start=1)]
    command = [sys.executable, "-c", DRIVER, json.dumps(runs)]
    environment = {**os.environ, "PYTHONPATH": str(library)}
    done = subprocess.run(command, cwd=reports, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    found = {}
    for (_, _, report), name, code in zip(runs, ["", *(fault.name for fault in FAULTS)], codes, strict=True):
        assert Path(report).exists(), done.stderr
        found[name] = code, json.loads(Path(report).read_text())
        assert found[name][1]["environment"]["library"] == str(library / "fpn_fast" / "_C.abi3.so")
    return found


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
