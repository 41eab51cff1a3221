# SPDX-License-Identifier: Apache-2.0
"""Writes committed results into the README, the docs and the README's plot.

    python benchmarks/report.py            writes every table and the plot anew
    python benchmarks/report.py --check    exits with 1 where one of them differs from the results
    python benchmarks/report.py --targets  exits with 1 where a result misses what the library is held to

A table stands between ``<!-- table: NAME [WORD ...] -->`` and ``<!-- /table -->``. NAME is a family of
``fpn_fast bench``, or ``detectors`` (benchmarks/detectors.py), ``census`` (benchmarks/census.py), ``ablation`` or
``ablation_float64`` (examples/ablation.py), or ``summary``, which is the README's. With WORDs, a family's table has the
cases whose name holds all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import census, detectors, front_page  # noqa: E402
from examples import ablation  # noqa: E402
from fpn_fast.__main__ import ends_with_its_reader  # noqa: E402
from fpn_fast.bench.cases import targets  # noqa: E402
from fpn_fast.bench.report import by_case, load, markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
#: The folder of the machine whose figures the pages show.
MACHINE = "amd-epyc-2-threads"
PLOT = ROOT / "docs" / "img" / "speedup.svg"
_TABLE = re.compile(r"(<!-- table: (\w+)((?: \S+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(name: str, words: tuple[str, ...] = (), folder: Path = RESULTS) -> str:
    """Markdown of one table, from the results in `folder`."""
    machine = folder / MACHINE
    if name == "summary":
        return front_page.table(machine)
    if name == "census":
        return census.table(load(folder / "census.json"))
    if name.startswith("ablation"):
        found = json.loads((folder / f"{name}.json").read_text())
        return ablation.table(found["rows"], found["command"])
    results = load(machine / f"{name}.json")
    return detectors.table(results) if name == "detectors" else markdown(results, words)


def render(text: str, folder: Path = RESULTS) -> str:
    return _TABLE.sub(lambda found: found[1] + table(found[2], tuple(found[3].split()), folder) + found[4], text)


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Every file that holds figures, as it must be: README.md and the docs with tables, and the plot."""
    texts = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    return {path: render(text, folder) for path, text in texts.items() if _TABLE.search(text)} | {
        PLOT: front_page.plot(folder / MACHINE)
    }


def held(results: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether each target of the library on a CPU is met, and what was measured."""
    for case, rows in by_case(results).items() if results["machine"]["device_type"] == "cpu" else ():
        own = rows.get("cpp", {})
        peak, other = own.get("peak_bytes"), rows.get("eager", {}).get("peak_bytes")
        share = peak / other if peak is not None and other else None
        values = {**own.get("speedup", {}), "copy": own.get("copy_share"), "peak": share}
        for what, bound in targets(case).items():
            value, text = values.get(what), f"times as fast as {what}, wants {bound:g}"
            if what == "peak":
                text = f"of eager's peak memory, wants {bound:.0%} at most"
            elif what == "copy":
                text = f"of a copy's bandwidth, wants {bound:.0%}"
            met = value is not None and (value <= bound if what == "peak" else value >= bound)
            yield met, f"{case}: {'no figure' if value is None else format(value, '.3g')} {text}"


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    parser.add_argument("--targets", action="store_true", help="print the targets; exit with 1 where one is missed")
    options = parser.parse_args(arguments)
    if options.targets:
        found = [
            each
            for path in sorted(RESULTS.glob("*/*.json"))
            for each in (detectors.held if path.stem == "detectors" else held)(load(path))
        ]
        for met, text in found:
            print("met   " if met else "MISSED", text)
        return 0 if all(met for met, _ in found) else 1
    differing = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in differing:
        if options.check:
            print(f"{path.relative_to(ROOT)} differs from the results; run python benchmarks/report.py")
        else:
            path.write_text(pages()[path])
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
