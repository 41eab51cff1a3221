# SPDX-License-Identifier: Apache-2.0
"""The whole CPU library under the sanitizers of addresses and of undefined behaviour.

``make sanitize`` builds it and runs every op's CPU tests with it; ``make test`` runs `verify` with it, see
test_sanitized_library.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import copied_package

TESTS = (
    "frozen_batch_norm",
    "generate_proposals",
    "heatmaps_to_keypoints",
    "match_anchors",
    "multiscale_roi_align",
    "multiscale_roi_align_max",
    "nms",
    "op_contracts",
    "paste_masks",
    "select_detections",
    "sigmoid_focal_loss",
    "top_down",
)
# Of them: what runs the library on the CPU, in this process.
ONLY = "cpp and not (cuda or process)"
# With any optimisation the sanitizers' checks take the compiler six times as long.
FLAGS = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build() -> Path:
    """A folder with a package that has the sanitized library."""
    return copied_package.build("sanitized_library", copied_package.sources(), FLAGS)


def environment(folder: Path) -> dict[str, str]:
    """For a Python that imports the package in `folder`: the sanitizers' runtimes come before all else."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(each.stdout.strip() for each in found),
        # Python itself frees nothing at its end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def main() -> int:
    """Runs the tests; returns pytest's exit code."""
    folder = build()
    tests = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", *tests, "-k", ONLY, "-p", "no:cacheprovider", "-q"]
    return subprocess.run([*command, *sys.argv[1:]], cwd=copied_package.ROOT, env=environment(folder)).returncode


if __name__ == "__main__":
    sys.exit(main())
