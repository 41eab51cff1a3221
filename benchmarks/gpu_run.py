# SPDX-License-Identifier: Apache-2.0
"""Everything to run on a GPU machine, in one command that stops by itself.

    python benchmarks/gpu_run.py [--output DIR] [--budget 540] [--library DIR | build] [--only tests,...] [--dry-run]

Sections, each in processes of its own with a time limit, so that one that hangs or fails loses none of the others:

    library      always: whether the compiled library is there; with --library it is copied from a folder, or built
    environment  always: device, driver, clocks (read, never set), versions, backends, resources of each kernel
    ceilings     copy bandwidth, L2 read rate, graph replay and launch latency
    tests        the tests marked gpu
    sanitizer    memcheck and racecheck over calls of each kernel, where compute-sanitizer is installed
    benchmarks   every case, the most valuable first; those that the time does not reach are listed

The folder gets gpu_run.json (written after every section), gpu_run.log (all that the sections print), failures.txt
(each test's failure, written as it happens) and <machine>/<family>.json (rows, written after every case). --dry-run
tries all of it on the CPU with tiny maps; what needs a GPU is then recorded as skipped, and no figure is made up.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from fpn_fast.bench import report  # noqa: E402
from fpn_fast.bench.rows import write_text  # noqa: E402

NO_GPU = "skipped: no GPU"
LIBRARY_FILES = ("_C.abi3.so", "_C_cuda.abi3.so")
#: At most so many seconds from an interrupt to the kill, within the limit.
INTERRUPT_S = 10
SANITIZER_TOOLS = ("memcheck", "racecheck")
#: The cases of a dry run: some of each family.
DRY_CASES = (
    "resnet50_fpn_800x1344-n1-float32-channels_last",
    "ratio_2_spread-n1-bfloat16-channels_last",
    "top_1000_800x1344-n1-float32-channels_last",
    "block_end_2048x25x42-n1-float32-channels_last",
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

#: A section's results, and what went wrong if something did.
Outcome = tuple[dict[str, Any], str | None]


class Run:
    """One run: its options, its budget, its folder, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.has_gpu = options, False
        self.start = self.section_end = time.monotonic()
        self.output: Path = options.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "gpu_run.log"
        self.log.write_text("")
        self.found: dict[str, Any] = {"budget_s": options.budget, "dry_run": options.dry_run, "sections": {}}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
        if options.dry_run:
            self.variables["CUDA_VISIBLE_DEVICES"] = ""

    def section_left(self) -> float:
        """Seconds until the section's processes are killed."""
        return max(0.0, self.section_end - time.monotonic())

    def command(
        self, *arguments: str, variables: dict[str, str] | None = None, share: float = 1.0
    ) -> tuple[str | None, str]:
        """Runs a program for at most `share` of the section's time: what went wrong, if so, and its output."""
        with self.log.open("ab+") as log:
            log.write(f"\n$ {' '.join(arguments)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=self.variables | (variables or {}), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that its children end with it.
                start_new_session=True,
            )  # fmt: skip
            limit = max(0.1, share * self.section_left())
            grace = min(INTERRUPT_S, limit / 4)
            try:
                code = process.wait(limit - grace)
                problem = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                problem = "stopped at its time limit"
                # An interrupted pytest says what it has found; children that ignore this are killed.
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(begin)
            return problem, log.read().decode(errors="replace")

    def python(self, *arguments: str) -> tuple[str | None, str]:
        """Runs this Python."""
        return self.command(sys.executable, *arguments)

    def json_of(self, *arguments: str) -> Outcome:
        """The JSON object that this Python prints with `arguments`."""
        problem, output = self.python(*arguments)
        start = f"\n{output}".find("\n{")
        return (json.JSONDecoder().raw_decode(output, start)[0] if start >= 0 else {}), problem

    def note(self, section: Section, entry: dict[str, Any]) -> None:
        """Keeps a section's entry, and writes gpu_run.json, whole or not at all."""
        self.found["sections"][section.name] = entry
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        write_text(self.output / "gpu_run.json", json.dumps(self.found, indent=1) + "\n")

    def do(self, section: Section) -> None:
        """Does one section within its time and notes its results."""
        begin, budget = time.monotonic(), self.options.budget
        # One second is for writing.
        left = max(0.0, budget - (begin - self.start) - 1)
        if left < section.least:
            reason = f"{left:.0f} s of {budget:.0f} s left, needs {section.least:.0f} s"
            return self.note(section, {"status": "skipped", "reason": reason})
        print(f"{section.name} ...", flush=True)
        self.section_end = begin + min(left, max(section.least, section.most * budget))
        try:
            results, problem = section.work(self)
        except Exception as error:  # the other sections follow, whatever went wrong in this one
            results, problem = {}, f"{type(error).__name__}: {error}"
        entry: dict[str, Any] = {"status": "ok"} if problem is None else {"status": "failed", "reason": problem}
        return self.note(section, {**entry, "seconds": round(time.monotonic() - begin, 1), "results": results})


def library(run: Run) -> Outcome:
    """Builds the compiled library in the checkout, or copies it there."""
    if run.options.dry_run:
        return {"library": "skipped: dry run"}, None
    if run.options.library == "build":
        return {"library": "built"}, run.python("setup.py", "build_ext", "--inplace")[0]
    source = Path(run.options.library).resolve()
    found = [name for name in LIBRARY_FILES if (source / name).exists()]
    for name in found:
        if source != ROOT / "fpn_fast":
            shutil.copy2(source / name, ROOT / "fpn_fast" / name)
    missing = [name for name in LIBRARY_FILES if name not in found]
    return {"library": str(source), "files": found}, f"{source} lacks {', '.join(missing)}" if missing else None


def environment(run: Run) -> Outcome:
    results, problem = run.json_of("-m", "fpn_fast.bench.machine")
    run.has_gpu = results.get("device_type") == "cuda"
    info, other = run.json_of("-m", "fpn_fast", "info", "--json")
    return {**results, "info": info}, problem or other


def tests(run: Run) -> Outcome:
    """The tests marked gpu; at the time limit, those that have ended."""
    arguments = ["tests", "-m", "gpu", "-v", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if run.has_gpu and importlib.util.find_spec("xdist"):
        # Most of a test's time is Triton's compiler, on the CPU; and a crash of the device ends one worker only.
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    failures = run.output / "failures.txt"
    failures.unlink(missing_ok=True)
    run.variables["FPN_FAST_FAILURES"] = str(failures)
    problem, output = run.python("-m", "pytest", *arguments)
    words = _VERDICT.findall(output)
    results: dict[str, Any] = {word.lower(): words.count(word) for word in sorted(set(words))}
    said = failures.read_text() if failures.exists() else ""
    results["failures"] = re.findall(r"^FAILED (.+)$", said, re.MULTILINE)
    # 5: none of the tests is marked gpu.
    return results, None if problem == "exit code 5" else problem


def sanitizer(run: Run) -> Outcome:
    """Every kernel on small odd sizes, forward and backward: a sanitizer slows it a hundredfold."""
    # Ratios of two and others, channels that do and do not fill accesses of 16 bytes, and sizes on either side of the
    # kernels' blocks and tiles.
    shapes = str(ROOT / "benchmarks" / "sanitizer_shapes.json")
    program = (sys.executable, "-m", "fpn_fast", "verify", "--backends", "cpp", "--shapes", shapes)
    if not run.has_gpu:
        return dict.fromkeys(SANITIZER_TOOLS, NO_GPU), run.command(*program)[0]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(paths))
    if tool is None:
        return dict.fromkeys(SANITIZER_TOOLS, "skipped: no compute-sanitizer"), None
    results, problems = {}, []
    for i, name in enumerate(SANITIZER_TOOLS):
        # Without the caching allocator every tensor is an allocation of its own, whose ends memcheck knows.
        variables, share = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, 1 / (len(SANITIZER_TOOLS) - i)
        command = (tool, "--tool", name, "--error-exitcode", "9", *program)
        problem, output = run.command(*command, variables=variables, share=share)
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
        results[name] = "; ".join([*summary, problem or "exit code 0"])
        problems += [f"{name}: {results[name]}"] if problem else []
    return results, "; ".join(problems) or None


def benchmarks(run: Run) -> Outcome:
    """Every case, into <machine>/<family>.json."""
    size = ["--tiny", "--only", ",".join(DRY_CASES)] if run.options.dry_run else ["--seconds", "2"]
    # A case that has begun needs time to end, most of it for torch.compile.
    limit = max(5.0, run.section_left() - 30)
    before = {path: path.stat().st_mtime_ns for path in run.output.glob("*/*.json")}
    problem, _ = run.python("-m", "benchmarks", "--output", str(run.output), *size, "--limit", f"{limit:.0f}")
    files = [path for path in sorted(run.output.glob("*/*.json")) if before.get(path) != path.stat().st_mtime_ns]
    results: dict[str, Any] = {"files": [str(path.relative_to(run.output)) for path in files]}
    for path in files:
        found = report.load(path)
        results[path.stem] = {
            "cases": len(report.by_case(found)),
            "not_reached": found["machine"].get("not_reached", []),
            "refused": report.refusals([found]),
        }
    return results, problem


@dataclass(frozen=True)
class Section:
    """least: seconds without which it is not started; most: the share of the budget that it may take."""

    name: str
    work: Callable[[Run], Outcome]
    least: float
    most: float


#: In the order of their value; time that one leaves unused goes to those after it.
SECTIONS = (
    Section("library", library, 30, 0.5),
    Section("environment", environment, 5, 0.2),
    Section("ceilings", lambda run: run.json_of("-m", "benchmarks.ceilings"), 10, 0.15),
    Section("tests", tests, 20, 0.35),
    Section("sanitizer", sanitizer, 20, 0.2),
    Section("benchmarks", benchmarks, 20, 1.0),
)
#: Those that always run, and all.
ALWAYS = ("library", "environment")
CHOICES = tuple(section.name for section in SECTIONS)


def summary(run: Run) -> str:
    lines = []
    for name, entry in run.found["sections"].items():
        seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
        lines.append(f"{name:<12} {entry['status']:<8} {seconds}  {entry.get('reason', '')}".rstrip())
        if name in ("ceilings", "tests", "sanitizer"):
            lines += [f"    {key}: {value}" for key, value in entry.get("results", {}).items()]
    for file in run.found["sections"].get("benchmarks", {}).get("results", {}).get("files", []):
        lines += ["", report.markdown(report.load(run.output / file))]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 1 where a section failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text, keywords in (
        ("--output", "folder for results and logs (default: %(default)s)",
         {"type": Path, "default": Path("output/gpu")}),
        ("--budget", "seconds for the whole run (default: 540)", {"type": float, "default": 540}),
        ("--library", 'folder of a prebuilt library, or "build" (default: the library in the checkout)',
         {"default": ROOT / "fpn_fast"}),
        ("--only", f"sections, of {', '.join(CHOICES)} (default: all)", {"default": ",".join(CHOICES)}),
        ("--dry-run", "try everything on the CPU, with tiny maps", {"action": "store_true"}),
    ):  # fmt: skip
        parser.add_argument(name, help=text, **keywords)
    options = parser.parse_args(arguments)
    chosen = {*options.only.split(","), *ALWAYS}
    if unknown := chosen - set(CHOICES):
        parser.error(f"--only takes {', '.join(CHOICES)}, not {', '.join(sorted(unknown))}")
    run = Run(options)
    for section in SECTIONS:
        if section.name not in chosen:
            continue
        if section.name in ALWAYS or run.has_gpu or options.dry_run:
            run.do(section)
        else:
            run.note(section, {"status": "skipped", "reason": "no GPU; --dry-run tries the run without one"})
    print(summary(run))
    sections = run.found["sections"].values()
    return 0 if (run.has_gpu or options.dry_run) and all(entry["status"] != "failed" for entry in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
