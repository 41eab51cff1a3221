# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: the rows without pytest, the most valuable cases first, within a time limit."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fpn_fast.bench.cases import FAMILIES, Case, tiny
from fpn_fast.bench.harness import measure, refused
from fpn_fast.bench.machine import clocks, facts
from fpn_fast.bench.providers import providers
from fpn_fast.bench.rows import Results, Row


def line(row: Row) -> str:
    """`row` for a terminal."""
    label = f"{row.case!s:<72} {row.provider:<8}"
    if row.p50 is None:
        return f"{label} refused: {row.refused}"
    share = "" if row.copy_share is None else f"{row.copy_share:7.0%} of a copy"
    eager = (row.speedup or {}).get("eager")
    times = "" if eager is None else f"{eager:7.2f}x eager"
    return f"{label} {row.metric:<9} {row.p50:11.1f} us  {row.p20:11.1f} to {row.p80:<11.1f}{times}{share}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 1 where a row was refused, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for <machine>/<family>.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no case after this many seconds")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case, beyond warming up")
    parser.add_argument("--only", default="", help="comma-separated: cases whose name contains one of these")
    parser.add_argument("--providers", help="comma-separated; all by default")
    parser.add_argument("--tiny", action="store_true", help="a few pixels and rounds: walks the code, measures nothing")
    options = parser.parse_args(arguments)

    start = time.monotonic()
    names = options.providers.split(",") if options.providers else None
    machine = facts(options.device) | ({"tiny": True} if options.tiny else {})
    wanted = options.only.split(",")
    problems: list[str] = []
    for family, cases_for in FAMILIES.items():
        results = Results(options.output, family, machine)
        chosen: list[Case] = [c for c in cases_for(options.device) if any(word in str(c) for word in wanted)]
        if not chosen:
            # A file of no rows would take the place of one that has some.
            continue
        if options.tiny:
            chosen = [tiny(case) for case in chosen]
        for i, case in enumerate(chosen):
            results.machine["not_reached"] = [str(case) for case in chosen[i:]]
            if time.monotonic() - start > options.limit:
                print(f"the limit of {options.limit:.0f} s is reached: {len(chosen) - i} cases of {family} left out")
                break
            candidates = providers(case, options.device, names)
            rows, _ = measure(case, options.device, options.seconds, candidates, max_rounds=3 if options.tiny else 200)
            results.machine["not_reached"] = [str(case) for case in chosen[i + 1 :]]
            results.add(rows)
            problems += refused(rows)
            print("\n".join(map(line, rows)), flush=True)
        if options.device == "cuda":
            results.machine["clocks_after"] = clocks()
        results.save()
    for problem in problems:
        print(f"refused: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
