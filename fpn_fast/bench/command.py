# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast bench``: its arguments, and what it writes and exits with."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fpn_fast.bench import report
from fpn_fast.bench.cases import FAMILIES, Case, in_turn, tiny

#: Seconds per case after warming up, and with --quick. torch.compile takes most of a case's time.
SECONDS, QUICK_SECONDS = 4.0, 0.5
SUMMARY = "measures every op on this machine against torchvision and torch.compile"
_DESCRIPTION = """\
Measures every op against the eager code that it replaces and against torch.compile. A provider with a wrong result is
refused and has no figures. Cases in which a rival is faster are listed at the end.

On Linux the command starts itself again with two settings that make glibc keep freed memory, for all providers alike.
An allocator in LD_PRELOAD, or settings of your own, are kept and recorded instead.

Writes <output>/<machine>/<family>.json after every case, and report.md at the end. Exits with 0; with 1 if a row was
refused or, with --compare, became slower; with 2 for bad arguments."""


def add_arguments(commands: Any) -> argparse.ArgumentParser:
    """Adds ``bench`` to the commands of ``python -m fpn_fast``."""
    parser = commands.add_parser(
        "bench", help=SUMMARY, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, text, keywords in (
        ("--output", "folder for results (default: %(default)s)", {"type": Path, "default": Path("fpn_fast_bench")}),
        ("--device", "where to measure (default: cuda if there is a GPU)", {"choices": ("cpu", "cuda")}),
        ("--family", "families of cases to measure, of %(choices)s (default: all)",
         {"nargs": "+", "metavar": "FAMILY", "choices": list(FAMILIES)}),
        ("--ops", "ops to measure (default: all)", {"nargs": "+", "metavar": "OP"}),
        ("--only", "measure only cases whose name contains one of these texts, separated by commas",
         {"default": "", "metavar": "TEXTS"}),
        ("--providers", "providers to measure, separated by commas: eager, compile, cpp, triton (default: all)",
         {"metavar": "NAMES"}),
        ("--quick", f"the first case of each family and direction, {QUICK_SECONDS:g} s each", {"action": "store_true"}),
        ("--seconds", f"seconds per case after warming up (default: {SECONDS:g})", {"type": float}),
        ("--limit", "start no case after this many seconds (default: no limit)",
         {"type": float, "default": float("inf"), "metavar": "SECONDS"}),
        ("--compare", "mark cases that became slower than in these results: a file, or a folder of files",
         {"type": Path, "metavar": "FILE"}),
        ("--tiny", "tiny maps and three rounds, to try the command; no measurement", {"action": "store_true"}),
    ):  # fmt: skip
        parser.add_argument(name, help=text, **keywords)
    parser.set_defaults(run=bench, parser=parser)
    return parser


def bench(options: argparse.Namespace) -> int:
    """Runs ``bench`` with parsed arguments; returns the exit code."""
    device_type = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = _chosen(options, device_type)
        before = None if options.compare is None else _earlier(options.compare)
    except ValueError as error:
        # Exits with 2.
        options.parser.error(str(error))
    found = _measure(options, chosen, device_type)
    return _finish(found, before) if found else 0


def _chosen(options: argparse.Namespace, device_type: str) -> dict[str, list[Case]]:
    """Family -> the chosen cases; ValueError where there are none, or nothing to measure with."""
    if importlib.util.find_spec("torchvision") is None:
        raise ValueError("bench measures against torchvision, which is not installed: pip install torchvision")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here")
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueError(f"--seconds must be 0 or more, got {options.seconds}")
    cases = {family: FAMILIES[family](device_type) for family in options.family or FAMILIES}
    known = {case.op for each in cases.values() for case in each}
    if unknown := set(options.ops or ()) - known:
        raise ValueError(
            f"there are no cases of {', '.join(sorted(unknown))}; there are some of {', '.join(sorted(known))}"
        )
    words = options.only.split(",")
    for family, each in cases.items():
        wanted = [c for c in each if any(w in str(c) for w in words) and (not options.ops or c.op in options.ops)]
        if options.quick and family != "growth":
            # A dict keeps the last of equal keys, and a family begins with its most valuable case.
            wanted = list({(c.op, c.direction): c for c in reversed(wanted)}.values())[::-1]
        cases[family] = [tiny(case) for case in wanted] if options.tiny else wanted
    if not any(cases.values()):
        raise ValueError(f"no case has {options.only!r} in its name")
    return {family: each for family, each in cases.items() if each}


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The results in a file, or in all files of a machine's folder."""
    try:
        found = [json.loads(file.read_text()) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--compare {path}: {error}") from None
    if not found or not all(isinstance(each, dict) and {"machine", "rows"} <= set(each) for each in found):
        raise ValueError(f"--compare {path}: no results of fpn_fast bench there")
    return found


def _measure(options: argparse.Namespace, chosen: dict[str, list[Case]], device_type: str) -> dict[str, Path]:
    """Family -> its results file, for the families that were reached: every family's first case before a second of any.
    A file is written after every case."""
    # These need torchvision.
    from fpn_fast.bench import harness, machine, providers
    from fpn_fast.bench.rows import Results, Row, as_dict
    from fpn_fast.verify.report import Progress

    begin = time.monotonic()
    names = options.providers.split(",") if options.providers else None
    facts = machine.facts(device_type) | ({"tiny": True} if options.tiny else {})
    seconds = options.seconds if options.seconds is not None else QUICK_SECONDS if options.quick else SECONDS
    # A trial makes and runs the graphs; generating code for them would take most of its time.
    compiler, rounds = ("aot_eager", 3) if options.tiny else ("inductor", harness.MAX_ROUNDS)
    order, progress, found = in_turn(chosen), Progress(sys.stderr), {}
    results = {
        family: Results(options.output, family, facts | {"not_reached": list(map(str, cases))})
        for family, cases in chosen.items()
    }
    for done, (family, case) in enumerate(order):
        if time.monotonic() - begin > options.limit:
            break
        progress(done, len(order), str(case))
        try:
            candidates = providers.providers(case, device_type, names, compiler=compiler)
            rows = harness.measure(case, device_type, seconds, candidates, max_rounds=rounds)
        except Exception as error:
            # Of the inputs, or of the reference; other cases may run.
            rows = [Row(case, "reference", "none", "none", refused=harness.does_not_run(error))]
        results[family].machine["not_reached"].remove(str(case))
        results[family].add(rows)
        found[family] = results[family].path
        progress.clear()
        print("\n".join([str(case), *(report.row_text(as_dict(row)) for row in rows)]), flush=True)
    for family in found:
        if device_type == "cuda":
            results[family].machine["clocks_after"] = machine.clocks()
        results[family].save()
    for family, each in results.items():
        if left := each.machine["not_reached"]:
            print(f"the limit of {options.limit:.0f} s is reached: {len(left)} cases of {family} left out")
    return found


def _finish(found: dict[str, Path], before: list[dict[str, Any]] | None) -> int:
    """Writes the report of the results files; returns the exit code."""
    results = {family: report.load(path) for family, path in found.items()}
    every = list(results.values())
    compared = None if before is None else report.changes(before, every)
    path = next(iter(found.values())).with_name("report.md")
    path.write_text(report.document(results, compared))
    print(f"\nwritten to {path.parent}: report.md, {', '.join(each.name for each in found.values())}")
    if compared is not None and not compared:
        print("nothing to compare: the earlier results have none of these cases")
    worse = [
        f"{case} {name}: {report.change_text(change)}"
        for (case, name), change in (compared or {}).items()
        if change > report.REGRESSION
    ]
    refused = report.refusals(every)
    for title, lines in (("a rival is faster", report.slower(every)), ("slower than before", worse)):
        for line in lines:
            print(f"{title}: {line}")
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    return 1 if refused or worse else 0
