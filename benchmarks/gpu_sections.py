# SPDX-License-Identifier: Apache-2.0
"""What each section of gpu_run.py does. A section gives its results, and what went wrong if something did."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpn_fast.bench import report

if TYPE_CHECKING:
    from benchmarks.gpu_run import Run

NO_GPU = "skipped: no GPU"
ROOT = Path(__file__).resolve().parents[1]
LIBRARY_FILES = ("_C.abi3.so", "_C_cuda.abi3.so")
SANITIZER_TOOLS = ("memcheck", "racecheck")
#: What a sanitizer tool exits with when it found something.
SANITIZER_ERROR = 9

#: What a dry run walks of the benchmarks: some of each family.
DRY_CASES = (
    "resnet50_fpn_800x1344-n1-float32-channels_last",
    "ratio_2_spread-n1-bfloat16-channels_last",
    "top_1000_800x1344-n1-float32-channels_last",
    "91_classes_800x1344-n1",
    "1000_boxes_5_groups",
    "20_gts",
    "100_masks",
    "20_people",
    "gts_20-",
    "_proposals-faster_rcnn_r50_800x1344-n1-float32-channels_last",
)

#: One test's line of `pytest -v`, without or with xdist.
_VERDICT = re.compile(r"^(?:\S+::.* |\[gw\d+\].*?)(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)

Outcome = tuple[dict[str, Any], str | None]


def _ending(code: int | None) -> str:
    return "stopped at its time limit" if code is None else f"exit code {code}"


def _json_of(run: Run, module: str) -> tuple[dict[str, Any], int | None]:
    """What `module` writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        code, _ = run.module(module, "--json", str(path))
        return json.loads(path.read_text()) if path.exists() else {}, code


def environment(run: Run) -> Outcome:
    """Device, clocks, versions and kernels."""
    results, code = _json_of(run, "fpn_fast.bench.machine")
    return results, None if code == 0 else _ending(code)


def library(run: Run) -> Outcome:
    """Builds the compiled library in the checkout, or brings it there from the folder that holds it."""
    if run.options.dry_run:
        return {"library": "skipped: dry run"}, None
    if run.options.library == "build":
        code, _ = run.command([sys.executable, "setup.py", "build_ext", "--inplace"])
        return {"library": "built"}, None if code == 0 else f"build: {_ending(code)}"
    source = Path(run.options.library).resolve()
    found = [name for name in LIBRARY_FILES if (source / name).exists()]
    for name in found:
        if source != ROOT / "fpn_fast":
            shutil.copy2(source / name, ROOT / "fpn_fast" / name)
    missing = [name for name in LIBRARY_FILES if name not in found]
    return {"library": str(source), "files": found}, f"{source} lacks {', '.join(missing)}" if missing else None


def ceilings(run: Run) -> Outcome:
    """Copy, L2, graph and launch."""
    results, code = _json_of(run, "benchmarks.ceilings")
    return results, None if code == 0 else _ending(code)


def tests(run: Run) -> Outcome:
    """The tests marked gpu; where time runs out, those that had ended."""
    arguments = ["tests", "-m", "gpu", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if run.has_gpu and importlib.util.find_spec("xdist"):
        # Most of a test's time is Triton's compiler, on the CPU; and a crash of the device ends one worker only.
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    code, output = run.module("pytest", *arguments)
    words = _VERDICT.findall(output)
    results: dict[str, Any] = {word.lower(): words.count(word) for word in sorted(set(words))}
    results["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if not run.has_gpu:
        results["gpu"] = NO_GPU
    # 5: none of the tests is marked gpu.
    return results, None if code in (0, 5) else _ending(code)


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or in a CUDA toolkit."""
    if found := shutil.which("compute-sanitizer"):
        return found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (path := Path(home) / "bin" / "compute-sanitizer").exists():
            return str(path)
    return None


def sanitizer(run: Run) -> Outcome:
    """Each tool over one call of each kernel."""
    program = [sys.executable, "-m", "benchmarks.sanitize"]
    if not run.has_gpu:
        code, _ = run.command(program)
        return {"calls": _ending(code), **dict.fromkeys(SANITIZER_TOOLS, NO_GPU)}, None if code == 0 else "calls failed"
    tool = find_sanitizer()
    if tool is None:
        return dict.fromkeys(SANITIZER_TOOLS, "skipped: no compute-sanitizer"), None
    results, problems = {}, []
    for i, name in enumerate(SANITIZER_TOOLS):
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERROR), *program]
        # Without the caching allocator every tensor is an allocation of its own, whose ends memcheck knows.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, output = run.command(command, variables, share=1 / (len(SANITIZER_TOOLS) - i))
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
        results[name] = "; ".join([*summary, _ending(code)])
        if code != 0:
            problems.append(f"{name}: {results[name]}")
    return results, "; ".join(problems) or None


def benchmarks(run: Run) -> Outcome:
    """Every case, into <machine>/<family>.json."""
    arguments = ["--output", str(run.output), "--seconds", "0.1" if run.options.dry_run else "2"]
    if run.options.dry_run:
        arguments += ["--tiny", "--only", ",".join(DRY_CASES)]
    # A case that has begun needs time to end, most of it for torch.compile.
    limit = max(5.0, run.section_left() - 30)
    before = {path: path.stat().st_mtime_ns for path in run.output.glob("*/*.json")}
    code, _ = run.module("fpn_fast", "bench", *arguments, "--limit", f"{limit:.0f}")
    files = [path for path in sorted(run.output.glob("*/*.json")) if before.get(path) != path.stat().st_mtime_ns]
    results: dict[str, Any] = {"files": [str(path.relative_to(run.output)) for path in files]}
    for path in files:
        found = report.load(path)
        refused = [row for row in found["rows"] if "refused" in row]
        results[path.stem] = {
            "cases": len(report.by_case(found)),
            "not_reached": found["machine"].get("not_reached", []),
            "refused": [f"{report.case_of(row)} {row['provider']}: {row['refused']}" for row in refused],
        }
    if not run.has_gpu:
        results["gpu"] = NO_GPU
    return results, None if code == 0 else _ending(code)
