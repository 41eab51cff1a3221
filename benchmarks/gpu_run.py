# SPDX-License-Identifier: Apache-2.0
"""Everything that a GPU machine is asked, in one run that stops by itself.

    python benchmarks/gpu_run.py --output DIR [--budget 540] [--library DIR | build] [--only tests,...] [--dry-run]

Sections, each a process of its own with a time limit, so that one which hangs or fails loses none of the others:

    environment  device, driver, clocks (read, never set), versions, backends, what each kernel takes of the GPU
    library      with --library: the compiled library brought into the checkout, or built there
    ceilings     copy bandwidth, L2 read rate, graph replay and launch latency
    tests        the tests marked gpu
    sanitizer    memcheck and racecheck over one call of each kernel, where compute-sanitizer is there
    benchmarks   every case, the most valuable first; those that time does not reach are listed

The folder gets gpu_run.json (written after every section), gpu_run.log (all that the sections print) and
<machine>/<family>.json (rows, written after every case). --dry-run walks all of it on the CPU with tiny maps; what
needs a GPU is then recorded as skipped, and no figure is made up.
"""

from __future__ import annotations

import argparse
import json
import os
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

from benchmarks import gpu_sections  # noqa: E402
from fpn_fast.bench import report  # noqa: E402


@dataclass(frozen=True)
class Section:
    """least: seconds without which it is not started; most: the share of the whole budget that it may take."""

    name: str
    work: Callable[[Run], gpu_sections.Outcome]
    least: float
    most: float


#: In the order of their value; what one leaves of its share is there for those after it.
SECTIONS = (
    Section("library", gpu_sections.library, 30, 0.5),
    Section("environment", gpu_sections.environment, 5, 0.2),
    Section("ceilings", gpu_sections.ceilings, 10, 0.15),
    Section("tests", gpu_sections.tests, 20, 0.35),
    Section("sanitizer", gpu_sections.sanitizer, 20, 0.2),
    Section("benchmarks", gpu_sections.benchmarks, 20, 1.0),
)
#: Those that --only can choose.
CHOICES = ("ceilings", "tests", "sanitizer", "benchmarks")


class Run:
    """One run: its options, its budget, its folder, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.monotonic()
        self.section_end = self.start
        self.has_gpu = False
        self.output: Path = options.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "gpu_run.log"
        self.log.write_text("")
        self.found: dict[str, Any] = {"budget_s": options.budget, "dry_run": options.dry_run, "sections": {}}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
        if options.dry_run:
            self.variables["CUDA_VISIBLE_DEVICES"] = ""

    def left(self) -> float:
        """Seconds of the budget that are left, with one kept for writing."""
        return max(0.0, self.options.budget - (time.monotonic() - self.start) - 1)

    def section_left(self) -> float:
        """Seconds until the section's processes are killed."""
        return max(0.0, self.section_end - time.monotonic())

    def command(
        self, arguments: list[str], variables: dict[str, str] | None = None, share: float = 1.0
    ) -> tuple[int | None, str]:
        """Runs a process for at most `share` of the section's time: its exit code (None if killed) and its output."""
        limit = max(0.1, share * self.section_left())
        begin = self.log.stat().st_size
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(arguments)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**self.variables, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that what it starts ends with it.
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
        with self.log.open("rb") as log:
            log.seek(begin)
            return code, log.read().decode(errors="replace")

    def module(self, name: str, *arguments: str) -> tuple[int | None, str]:
        """Runs a module of this Python for at most the section's time."""
        return self.command([sys.executable, "-m", name, *arguments])

    def skip(self, section: Section, reason: str) -> None:
        """Notes that `section` is left out."""
        self.found["sections"][section.name] = {"status": "skipped", "reason": reason}
        self.save()

    def do(self, section: Section) -> None:
        """Does one section within its time and notes what it found."""
        left = self.left()
        if left < section.least:
            reason = f"{left:.0f} s of {self.options.budget:.0f} s left, needs {section.least:.0f} s"
            return self.skip(section, reason)
        print(f"{section.name} ...", flush=True)
        begin = time.monotonic()
        self.section_end = begin + min(left, max(section.least, section.most * self.options.budget))
        try:
            results, problem = section.work(self)
        except Exception as error:  # whatever one section's fault is, the others follow
            results, problem = {}, f"{type(error).__name__}: {error}"
        entry: dict[str, Any] = {"status": "ok"} if problem is None else {"status": "failed", "reason": problem}
        entry |= {"seconds": round(time.monotonic() - begin, 1), "results": results}
        self.found["sections"][section.name] = entry
        self.save()

    def save(self) -> None:
        """Writes gpu_run.json, whole or not at all."""
        unfinished = self.output / "gpu_run.partial"
        unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(unfinished, self.output / "gpu_run.json")


def summary(run: Run) -> str:
    """The short table that ends the output."""
    lines = []
    for name, entry in run.found["sections"].items():
        seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
        lines.append(f"{name:<12} {entry['status']:<8} {seconds}  {entry.get('reason', '')}".rstrip())
        for key, value in entry.get("results", {}).items():
            if name in ("ceilings", "tests", "sanitizer"):
                lines.append(f"    {key}: {value}")
    for file in run.found["sections"].get("benchmarks", {}).get("results", {}).get("files", []):
        results = report.load(run.output / file)
        lines.append(f"{'':<69}" + "".join(f"{name:>10}" for name in (*report.PROVIDERS, "copy")) + "  cpp vs eager")
        for case, rows in report.by_case(results).items():
            times = [report.time_text(rows.get(name)) for name in (*report.PROVIDERS, "copy")]
            speedup = rows.get("cpp", {}).get("speedup", {}).get("eager")
            ratio = "" if speedup is None else f"{speedup:.2f}x"
            lines.append(f"{case!s:<69}" + "".join(f"{text:>10}" for text in times) + f"{ratio:>14}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which the run has ended")
    parser.add_argument(
        "--library", help='folder that holds a prebuilt library, or "build"; by default what the checkout has'
    )
    parser.add_argument("--only", default=",".join(CHOICES), help=f"comma-separated, of {', '.join(CHOICES)}")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny maps")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(CHOICES):
        parser.error(f"--only takes {', '.join(CHOICES)}, not {', '.join(sorted(unknown))}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 1 where a section failed, else 0."""
    options = parse(arguments)
    run = Run(options)
    for section in SECTIONS:
        if section.name == "library" and options.library is None:
            continue
        if section.name in CHOICES and section.name not in options.only:
            continue
        if section.name in CHOICES and not run.has_gpu and not options.dry_run:
            run.skip(section, "no GPU; --dry-run walks the run without one")
            continue
        run.do(section)
        if section.name == "environment":
            environment = run.found["sections"]["environment"].get("results", {})
            run.has_gpu = environment.get("device_type") == "cuda"
    run.found["seconds"] = round(time.monotonic() - run.start, 1)
    run.save()
    print(summary(run))
    sections = run.found["sections"].values()
    ran_on_gpu = run.has_gpu or options.dry_run
    return 0 if ran_on_gpu and all(entry["status"] != "failed" for entry in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
