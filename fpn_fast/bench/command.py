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

from fpn_fast.bench.cases import FAMILIES, Case, tiny

#: Seconds for each case beyond warming up, and with --quick; most of a case's time is torch.compile's.
SECONDS, QUICK_SECONDS = 4.0, 0.5
SUMMARY = "measures every op on this machine against torchvision and torch.compile"
_DESCRIPTION = """\
Measures every op against the eager sequence it replaces, as torchvision writes it, and against torch.compile. What
gives wrong results is refused and has no figures; what is slower than its rival is shown as plainly as what is faster.

Writes <output>/<machine>/<family>.json after every case, and at the end report.md, report.html (one page that holds
everything) and, with matplotlib, plots as PNG. Exits with 0; 1 if a row was refused or, with --compare, if one became
slower; 2 for bad arguments."""


def add_arguments(commands: Any) -> argparse.ArgumentParser:
    """Adds ``bench`` to the commands of ``python -m fpn_fast``."""
    parser = commands.add_parser(
        "bench", help=SUMMARY, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("fpn_fast_bench"), help="folder; %(default)s by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU where there is one")
    parser.add_argument("--family", nargs="+", metavar="FAMILY", choices=list(FAMILIES), help="only these: %(choices)s")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only cases of these ops")
    parser.add_argument("--only", default="", help="comma-separated: cases whose name contains one of these")
    parser.add_argument("--providers", help="comma-separated, of eager, compile, nvidia, cpp, triton; all by default")
    parser.add_argument("--quick", action="store_true", help="the first case of each family and direction, briefly")
    parser.add_argument("--seconds", type=float, help=f"for each case, beyond warming up; {SECONDS:g} by default")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no case after this many seconds")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="earlier results, a file or a machine's folder")
    parser.add_argument("--tiny", action="store_true", help="a few pixels and rounds: walks the code, measures nothing")
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
    """Family -> the cases that are wanted; ValueError where there is nothing to measure or to measure with."""
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
            # Of equal keys a dict keeps the last, and the first case is the one that counts most.
            wanted = list({(c.op, c.direction): c for c in reversed(wanted)}.values())[::-1]
        cases[family] = [tiny(case) for case in wanted] if options.tiny else wanted
    if not any(cases.values()):
        raise ValueError(f"no case has {options.only!r} in its name")
    return {family: each for family, each in cases.items() if each}


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The results in a file, or in all files of a machine's folder."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    try:
        found = [json.loads(file.read_text()) for file in files]
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path}: {error}") from None
    if not found or not all(isinstance(each, dict) and {"machine", "rows"} <= set(each) for each in found):
        raise ValueError(f"--compare {path}: no results of fpn_fast bench there")
    return found


def _line(row: Any) -> str:
    """`row` for a terminal."""
    label = f"{row.case!s:<72} {row.provider:<8}"
    if row.p50 is None:
        return f"{label} refused: {row.refused}"
    share = "" if row.copy_share is None else f"{row.copy_share:7.0%} of a copy"
    eager = (row.speedup or {}).get("eager")
    times = "" if eager is None else f"{eager:7.2f}x eager"
    return f"{label} {row.metric:<9} {row.p50:11.1f} us  {row.p20:11.1f} to {row.p80:<11.1f}{times}{share}"


def _measure(options: argparse.Namespace, chosen: dict[str, list[Case]], device_type: str) -> dict[str, Any]:
    """Family -> its results file, written after every case; the families that were reached."""
    from fpn_fast.bench import harness, machine, providers
    from fpn_fast.bench.rows import Results
    from fpn_fast.verify.report import Progress

    begin = time.monotonic()
    names = options.providers.split(",") if options.providers else None
    facts = machine.facts(device_type) | {"matmul_gflop_per_s": round(machine.matmul_gflop_per_s(device_type), 1)}
    facts |= {"tiny": True} if options.tiny else {}
    seconds = options.seconds if options.seconds is not None else QUICK_SECONDS if options.quick else SECONDS
    progress, done, total = Progress(sys.stderr), 0, sum(map(len, chosen.values()))
    found: dict[str, Any] = {}
    for family, cases in chosen.items():
        results = Results(options.output, family, facts)
        for i, case in enumerate(cases):
            results.machine["not_reached"] = [str(each) for each in cases[i:]]
            if time.monotonic() - begin > options.limit:
                print(f"the limit of {options.limit:.0f} s is reached: {len(cases) - i} cases of {family} left out")
                break
            progress(done, total, str(case))
            # Where nothing is measured the graphs are made and run; code for them would take most of the time.
            compiler = "aot_eager" if options.tiny else "inductor"
            candidates = providers.providers(case, device_type, names, compiler=compiler)
            rounds = 3 if options.tiny else harness.MAX_ROUNDS
            rows, _ = harness.measure(case, device_type, seconds, candidates, max_rounds=rounds)
            results.machine["not_reached"] = [str(each) for each in cases[i + 1 :]]
            results.add(rows)
            done += 1
            progress.clear()
            print("\n".join(map(_line, rows)), flush=True)
        if device_type == "cuda":
            results.machine["clocks_after"] = machine.clocks()
        results.save()
        if results.rows:
            found[family] = results.path
    return found


def _finish(found: dict[str, Path], before: list[dict[str, Any]] | None) -> int:
    """Writes the reports of the results files; returns the exit code."""
    from fpn_fast.bench import page, report

    results = {family: report.load(path) for family, path in found.items()}
    compared = None if before is None else report.changes(before, list(results.values()))
    folder = next(iter(found.values())).parent
    figures = _figures(results, folder)
    note = "" if figures else NO_PLOTS
    tables = [
        f"## {family}\n\n{report.markdown(each, full=True, compared=compared)}" for family, each in results.items()
    ]
    (folder / "report.md").write_text("\n".join(["# fpn_fast benchmarks\n", *tables]))
    (folder / "report.html").write_text(page.page(results, figures, compared, note))
    print(f"\nwritten to {folder}: report.html, report.md, {', '.join(path.name for path in found.values())}")
    if note:
        print(note)
    refused, slower = report.refusals(list(results.values())), report.slower(list(results.values()))
    worse = [f"{case} {name}: {change:.2f}x the time" for (case, name), change in (compared or {}).items()
             if change > report.REGRESSION]  # fmt: skip
    if compared is not None and not compared:
        print("nothing to compare: the earlier results have none of these cases")
    for title, lines in (("a rival is faster", slower), ("slower than before", worse)):
        print(*(f"{title}: {line}" for line in lines), sep="\n", end="\n" if lines else "")
    print(*(f"refused: {line}" for line in refused), sep="\n", end="\n" if refused else "", file=sys.stderr)
    return 1 if refused or worse else 0


NO_PLOTS = "No plots: they need matplotlib (pip install matplotlib)."


def _figures(results: dict[str, dict[str, Any]], folder: Path) -> dict[Path, str]:
    """The PNG files that matplotlib made of `results`, and their captions; none without it."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from fpn_fast.bench import plots

    every, figures = list(results.values()), {}
    if plots.speedups(every, folder / "speedups.png"):
        figures[folder / "speedups.png"] = "How many times as fast as its rivals each op is."
    if plots.roofline(every, folder / "roofline.png"):
        figures[folder / "roofline.png"] = "Each kernel under the machine's roofline."
    if "growth" in results and plots.growth(results["growth"], folder / "growth.png"):
        figures[folder / "growth.png"] = "Time against RoIs, anchors, ground truths, batch and image size."
    for family, each in results.items():
        if family != "growth":
            plots.times(each, folder / f"{family}.png")
            figures[folder / f"{family}.png"] = f"{family}: median time of each case, p20 to p80 as whiskers."
    return figures
