# SPDX-License-Identifier: Apache-2.0
"""``verify`` of the whole CPU library under the sanitizers of addresses and of undefined behaviour."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import sanitized_library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose sanitizers these are")


def test_verify(tmp_path):
    folder, report = sanitized_library.build(), tmp_path / "report.json"
    command = [sys.executable, "-m", "fpn_fast", "verify", "--cases", "3", "--backends", "cpp", "--json", str(report)]
    environment = sanitized_library.environment(folder)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["environment"]["library"] == str(folder / "fpn_fast" / "_C.abi3.so")
    assert all(row["cases"] > 0 for row in found["rows"])


def test_is_sanitized(tmp_path):
    """A read past the end of a map ends the process."""
    folder = sanitized_library.build()
    script = (
        "import torch, fpn_fast; "
        "maps = [torch.ones(1, 64, 8, 8), torch.ones(1, 64, 4, 4)]; "
        "maps[0].untyped_storage().resize_(64); fpn_fast.ops.top_down(maps)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env=sanitized_library.environment(folder), timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
