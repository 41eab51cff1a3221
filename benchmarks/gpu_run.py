# SPDX-License-Identifier: Apache-2.0
"""What to run on a GPU machine: two commands that stop by themselves, and leave one file each.

    python -m benchmarks.gpu_run A [--output DIR] [--budget 240] [--only kernels,...] [--dry-run]
    python -m benchmarks.gpu_run B [--output DIR] [--budget 500] ...

Sections, each in processes of its own with a time limit, so that one that hangs or fails loses none of the others:

    environment  both, always: device, driver, clocks (read, never set), versions, backends, resources of each kernel
    ceilings     A: the GPU's limits, and the constants of the cycle model that they settle
    first_tests  A: the tests marked gpu_first
    kernels      A: the time of each kernel in the first cases, beside the model's
    tools        A: memcheck, racecheck and initcheck over calls of each op, and ncu's counters, where they are there
    first_cases  B: bench --quick without torch.compile: the first case of every family before the second of any
    tests        B: the other tests marked gpu, but those marked large
    benchmarks   B: every case with every rival; those that the time does not reach are listed

The file is <output>/gpu_run_A.tar.gz, written anew after every section and every few seconds. It has gpu_run.json (the
results of the sections), a log of each program, the failures of tests as they happened, and the rows of benchmarks.
Build the compiled library before, or bring it. FPN_FAST_COMMIT in the environment says what is measured where there is
no history. --dry-run tries all of it on the CPU
with tiny maps; what needs a GPU is then recorded as skipped, and no figure is made up.
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
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kernels
from fpn_fast.bench import report
from fpn_fast.bench.cases import FAMILIES
from fpn_fast.bench.rows import write_text

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
#: Prints what the machine is, and what is installed on it.
FACTS = """
import json, torch
from fpn_fast import __main__ as command
from fpn_fast.bench import machine
facts = machine.facts("cuda" if torch.cuda.is_available() else "cpu")
print(json.dumps({**facts, "info": command.gather()}, indent=1))
"""
#: At most so many seconds from an interrupt to the kill, within the limit; between two versions of the file.
INTERRUPT_S, PACK_S = 10, 15
SANITIZERS = ("memcheck", "racecheck", "initcheck")
#: Seconds of each call.
BUDGETS = {"A": 240, "B": 500}
#: The cases of a dry run.
DRY_CASES = ("resnet50_fpn_800x1344-n1-float32-channels_first-forward", "match_anchors-20_gts")
#: One test's line of `pytest -v`, without or with xdist.
_VERDICT = re.compile(r"^(?:\S+::.* |\[gw\d+\].*?)(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)

#: A section's results, and what went wrong if something did.
Outcome = tuple[dict[str, Any], str | None]


class Run:
    """One call: its options, its budget, its folder, and what was found."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.has_gpu = options, folder, False
        self.start = self.packed = self.section_end = time.monotonic()
        self.budget: float = options.budget or BUDGETS[options.call]
        self.archive: Path = options.output.resolve() / f"gpu_run_{options.call}.tar.gz"
        self.found: dict[str, Any] = {"budget_s": self.budget, "dry_run": options.dry_run, "sections": {}}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
        if options.dry_run:
            self.variables["CUDA_VISIBLE_DEVICES"] = ""

    def section_left(self) -> float:
        """Seconds until the section's processes are killed."""
        return max(0.1, self.section_end - time.monotonic())

    def commands(self, programs: dict[str, Sequence[str]], **variables: str) -> dict[str, tuple[str | None, str]]:
        """Runs programs at the same time until the section's end. By name: what went wrong, if so, and the output."""
        running: dict[str, subprocess.Popen[bytes]] = {}
        grace = min(INTERRUPT_S, self.section_left() / 4)
        try:
            for name, arguments in programs.items():
                with self.log(name).open("wb") as log:
                    log.write(f"$ {' '.join(arguments)}\n".encode())
                    log.flush()
                    running[name] = subprocess.Popen(
                        arguments, cwd=ROOT, env=self.variables | variables, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=subprocess.STDOUT,
                        # A group of its own, so that its children end with it.
                        start_new_session=True,
                    )  # fmt: skip
            late = self.still_running(running.values(), self.section_end - grace)
            for process in late:
                # An interrupted pytest says what it has found; children that ignore this are killed.
                os.killpg(process.pid, signal.SIGINT)
            self.still_running(late, time.monotonic() + grace)
        finally:
            for process in self.still_running(running.values(), 0):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = {}
        for name, process in running.items():
            problem = f"exit code {process.returncode}" if process.returncode else None
            found[name] = (
                "stopped at its time limit" if process in late else problem,
                self.log(name).read_text(errors="replace"),
            )
        return found

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def still_running(self, processes: Iterable[subprocess.Popen[bytes]], end: float) -> list[subprocess.Popen[bytes]]:
        """Waits for `processes`; those that still run at `end`."""
        while (left := [process for process in processes if process.poll() is None]) and time.monotonic() < end:
            time.sleep(0.02)
            if time.monotonic() > self.packed + PACK_S:
                # A file may be replaced while it is read.
                with contextlib.suppress(OSError):
                    self.pack()
        return left

    def python(self, name: str, *arguments: str) -> tuple[str | None, str]:
        """Runs this Python."""
        return self.commands({name: (sys.executable, *arguments)})[name]

    def json_of(self, name: str, *arguments: str) -> Outcome:
        """The JSON object that this Python prints with `arguments`."""
        problem, output = self.python(name, *arguments)
        start = output.find("\n{")
        return (json.JSONDecoder().raw_decode(output, start + 1)[0] if start >= 0 else {}), problem

    def pack(self) -> None:
        """Writes the call's file anew, whole or not at all."""
        self.packed = time.monotonic()
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.archive.with_suffix(".partial")
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(self.folder, arcname=f"gpu_run_{self.options.call}")
        os.replace(unfinished, self.archive)

    def note(self, section: Section, entry: dict[str, Any]) -> None:
        """Keeps a section's entry."""
        self.found["sections"][section.name] = entry
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        write_text(self.folder / "gpu_run.json", json.dumps(self.found, indent=1) + "\n")
        self.pack()

    def do(self, section: Section) -> None:
        """Does one section within its time and notes its results."""
        begin = time.monotonic()
        # One second is for writing.
        left = max(0.0, self.budget - (begin - self.start) - 1)
        if left < section.least:
            reason = f"{left:.0f} s of {self.budget:.0f} s left, needs {section.least:.0f} s"
            return self.note(section, {"status": "skipped", "reason": reason})
        print(f"{section.name} ...", flush=True)
        self.section_end = begin + min(left, max(section.least, section.most * self.budget))
        try:
            results, problem = section.work(self)
        except Exception as error:  # the other sections follow, whatever went wrong in this one
            results, problem = {}, f"{type(error).__name__}: {error}"
        entry: dict[str, Any] = {"status": "ok"} if problem is None else {"status": "failed", "reason": problem}
        return self.note(section, {**entry, "seconds": round(time.monotonic() - begin, 1), "results": results})


def environment(run: Run) -> Outcome:
    results, problem = run.json_of("environment", "-c", FACTS)
    run.has_gpu = results.get("device_type") == "cuda"
    problems = [problem]
    if run.has_gpu:
        unknown = "the commit is unknown; FPN_FAST_COMMIT in the environment says it"
        problems += [unknown if results["commit"] is None else None]
        problems += [results["info"]["backends"]["cuda"][name] for name in ("cpp", "triton")]
    return results, "; ".join(filter(None, problems)) or None


def ceilings(run: Run) -> Outcome:
    return run.json_of("ceilings", "-m", "benchmarks.ceilings")


def run_tests(run: Run, name: str, marked: str, where: Iterable[str]) -> Outcome:
    """The tests that are marked so; at the time limit, those that have ended."""
    arguments = [*where, "-m", f"{marked} and not large", "-v", "--continue-on-collection-errors"]
    arguments += ["-p", "no:cacheprovider"]
    if run.has_gpu and importlib.util.find_spec("xdist"):
        # Most of a test's time is Triton's compiler, on the CPU. A worker that loses the GPU ends, and another follows.
        arguments += ["-n", str(min(16, os.cpu_count() or 1)), "--max-worker-restart", "100"]
    failures = run.folder / f"{name}_failures.txt"
    run.variables["FPN_FAST_FAILURES"] = str(failures)
    problem, output = run.python(name, "-m", "pytest", *arguments)
    words = _VERDICT.findall(output)
    results: dict[str, Any] = {word.lower(): words.count(word) for word in sorted(set(words))}
    said = failures.read_text() if failures.exists() else ""
    results["failures"] = re.findall(r"^FAILED (.+)$", said, re.MULTILINE)
    # 5: none of the tests is marked so.
    return results, None if problem == "exit code 5" else problem


def first_tests(run: Run) -> Outcome:
    # Collecting the other files would take its time in every worker.
    lines = (TESTS / "gpu_first.txt").read_text().splitlines()
    files = dict.fromkeys(line.partition("::")[0] for line in lines if "::" in line)
    return run_tests(run, "first_tests", "gpu_first", [str(TESTS.parent / file) for file in files])


def other_tests(run: Run) -> Outcome:
    return run_tests(run, "tests", "gpu and not gpu_first", [str(TESTS)])


def kernel_times(run: Run) -> Outcome:
    # A case that has begun needs time to end.
    size = "--tiny" if run.options.dry_run else f"--limit={run.section_left() - 15:.0f}"
    return run.json_of("kernels", "-m", "benchmarks.kernels", size)


def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(paths))


def tools(run: Run) -> Outcome:
    """Every kernel on small odd sizes, forward and backward: a sanitizer slows it a hundredfold. At the same time ncu
    counts instructions, where the cases of the section before are called once."""
    if not run.has_gpu:
        return dict.fromkeys((*SANITIZERS, "ncu"), "skipped: no GPU"), None
    # Ratios of two and others, channels that do and do not fill accesses of 16 bytes, and sizes on either side of the
    # kernels' blocks and tiles.
    shapes = ("--shapes", str(ROOT / "benchmarks" / "sanitizer_shapes.json"), "--cases", "1")
    calls = (sys.executable, "-m", "fpn_fast", "verify", "--backends", "cpp", *shapes)
    sanitizer, ncu = tool("compute-sanitizer"), tool("ncu")
    programs: dict[str, Sequence[str]] = {}
    if sanitizer is not None:
        programs = {name: (sanitizer, "--tool", name, "--error-exitcode", "9", *calls) for name in SANITIZERS}
    counts, timed = run.folder / "ncu.csv", run.found["sections"].get("kernels", {}).get("results", {})
    if ncu is not None:
        programs["ncu"] = (
            ncu, "--profile-from-start", "off", "--clock-control", "none", "--metrics", kernels.COUNTER, "--csv",
            "--log-file", str(counts), sys.executable, "-m", "benchmarks.kernels", "--once",
        )  # fmt: skip
    # Without the caching allocator every tensor is an allocation of its own, whose ends memcheck knows.
    found = run.commands(programs, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    results, problems = {}, []
    for name in (*SANITIZERS, "ncu"):
        problem, output = found.get(name, (None, ""))
        if name == "ncu" and counts.exists():
            problem = kernels.with_counts(timed, counts.read_text()) or problem
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
        results[name] = "; ".join([*summary, problem or "exit code 0"]) if name in found else "skipped: not installed"
        problems += [f"{name}: {results[name]}"] if problem else []
    return results, "; ".join(problems) or None


def benchmarks(run: Run, name: str, *options: str) -> Outcome:
    """Cases, into <name>/<machine>/<family>.json."""
    # A case that has begun needs time to end, most of it for torch.compile.
    limit = max(5.0, run.section_left() - 30)
    output = run.folder / name
    problem, _ = run.python(name, "-m", "benchmarks", "--output", str(output), f"--limit={limit:.0f}", *options)
    results: dict[str, Any] = {}
    for path in sorted(output.glob("*/*.json")):
        found = report.load(path)
        results[path.stem] = {
            "file": str(path.relative_to(run.folder)),
            "cases": len(report.by_case(found)),
            "not_reached": found["machine"].get("not_reached", []),
            "refused": report.refusals([found]),
        }
    return results, problem


def first_cases(run: Run) -> Outcome:
    # A series is no first case.
    families = [family for family in FAMILIES if family != "growth"]
    dry = ("--tiny", "--only", ",".join(DRY_CASES)) if run.options.dry_run else ()
    return benchmarks(run, "first_cases", "--quick", *dry, "--providers", "eager,cpp,triton", "--family", *families)


def every_case(run: Run) -> Outcome:
    options = ("--tiny", "--only", DRY_CASES[0]) if run.options.dry_run else ("--seconds=2",)
    return benchmarks(run, "benchmarks", *options)


@dataclass(frozen=True)
class Section:
    """calls: those that it belongs to. least: seconds without which it is not started; most: the share of the budget
    that it may take."""

    name: str
    calls: str
    work: Callable[[Run], Outcome]
    least: float
    most: float


#: In the order of their value; time that one leaves unused goes to those after it.
SECTIONS = (
    Section("environment", "AB", environment, 5, 0.2),
    Section("ceilings", "A", ceilings, 10, 0.15),
    Section("first_tests", "A", first_tests, 20, 0.4),
    Section("kernels", "A", kernel_times, 20, 0.3),
    Section("tools", "A", tools, 20, 1.0),
    Section("first_cases", "B", first_cases, 20, 0.4),
    Section("tests", "B", other_tests, 20, 0.5),
    Section("benchmarks", "B", every_case, 20, 1.0),
)
CHOICES = tuple(section.name for section in SECTIONS)


def summary(run: Run) -> str:
    lines = []
    for name, entry in run.found["sections"].items():
        seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
        lines.append(f"{name:<12} {entry['status']:<8} {seconds}  {entry.get('reason', '')}".rstrip())
        results = entry.get("results", {})
        if name == "kernels":
            lines += [f"    {line}" for line in kernels.lines(results)]
        elif name in ("ceilings", "first_tests", "tests", "tools"):
            lines += [f"    {key}: {value}" for key, value in results.items()]
        elif name in ("first_cases", "benchmarks"):
            tables = (report.markdown(report.load(run.folder / each["file"])) for each in results.values())
            lines += [line for table in tables for line in ("", table)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 1 where a section failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=BUDGETS, help="which sections")
    for name, text, keywords in (
        ("--output", "folder for the file (default: %(default)s)", {"type": Path, "default": Path("output/gpu")}),
        ("--budget", "seconds for the whole call (default: 240 for A, 500 for B)", {"type": float}),
        ("--only", f"sections, of {', '.join(CHOICES)} (default: all of the call)", {"default": ",".join(CHOICES)}),
        ("--dry-run", "try everything on the CPU, with tiny maps", {"action": "store_true"}),
    ):  # fmt: skip
        parser.add_argument(name, help=text, **keywords)
    options = parser.parse_args(arguments)
    chosen = {*options.only.split(","), "environment"}
    if unknown := chosen - set(CHOICES):
        parser.error(f"--only takes {', '.join(CHOICES)}, not {', '.join(sorted(unknown))}")
    # A background job of a shell ignores interrupts, and so would the programs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        for section in SECTIONS:
            if section.name not in chosen or options.call not in section.calls:
                continue
            if section.name == "environment" or run.has_gpu or options.dry_run:
                run.do(section)
            else:
                run.note(section, {"status": "skipped", "reason": "no GPU; --dry-run tries the call without one"})
        print(summary(run))
    sections = run.found["sections"].values()
    return 0 if (run.has_gpu or options.dry_run) and all(entry["status"] != "failed" for entry in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
