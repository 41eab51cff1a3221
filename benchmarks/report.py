# SPDX-License-Identifier: Apache-2.0
"""Results files to Markdown tables, plots, and the blocks of the README that hold figures.

    python benchmarks/report.py                             the tables of every results file
    python benchmarks/report.py --plot                      and a PNG beside each file
    python benchmarks/report.py --readme README.md          writes the README's blocks anew
    python benchmarks/report.py --readme README.md --check  fails where they differ from the files
    python benchmarks/report.py --targets                   fails where the library misses what it is held to

A block is ``<!-- benchmark:FAMILY MACHINE [WORD ...] -->`` to ``<!-- /benchmark -->``. MACHINE is a folder's name or a
device type that only one folder has; of the cases, those are shown that have every WORD in their name. FAMILY is one of
``fpn_fast bench`` or ``detectors``, of benchmarks/detectors.py. The census is of no machine: ``<!-- census -->`` to
``<!-- /census -->``; and the accuracies of examples/ablation.py, ``<!-- NAME -->`` to ``<!-- /ablation -->`` with the
name of their file, which begins with ablation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import census, detectors  # noqa: E402
from examples import ablation  # noqa: E402
from fpn_fast.bench.cases import targets  # noqa: E402
from fpn_fast.bench.report import Row, by_case, load, markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- benchmark:(\w+) (\S+)((?: \S+)*) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
_CENSUS = re.compile(r"(<!-- census -->\n).*?(<!-- /census -->)", re.DOTALL)

_ABLATION = re.compile(r"(<!-- (ablation\w*) -->\n).*?(<!-- /ablation -->)", re.DOTALL)


def find(folder: Path, family: str, machine: str) -> Path:
    """The results file of `family` on `machine`, a folder's name or a device type; ValueError if there is not one."""
    named = folder / machine / f"{family}.json"
    if named.exists():
        return named
    found = []
    for path in sorted(folder.glob(f"*/{family}.json")):
        facts = load(path)["machine"]
        # A run with an allocator setting is an extra, which must be named.
        if facts["device_type"] == machine and not facts["allocator"]:
            found.append(path)
    if len(found) != 1:
        raise ValueError(f"{family} on {machine}: expected one results file in {folder}, found {len(found)}")
    return found[0]


def tables(path: Path, words: tuple[str, ...] = ()) -> str:
    """Markdown of a results file."""
    results = load(path)
    return detectors.table(results) if path.stem == "detectors" else markdown(results, words)


def render_readme(text: str, folder: Path) -> str:
    """`text` with every block made anew from the files in `folder`."""

    def block(match: re.Match[str]) -> str:
        begin, family, machine, words, end = match.groups()
        path = find(folder, family, machine)
        return begin + tables(path, tuple(words.split())) + end

    def counts(match: re.Match[str]) -> str:
        begin, end = match.groups()
        return begin + census.table(json.loads((folder / "census.json").read_text())) + end

    def accuracies(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        found = json.loads((folder / f"{name}.json").read_text())
        return begin + ablation.table(found["rows"], found["command"]) + end

    return _ABLATION.sub(accuracies, _CENSUS.sub(counts, _BLOCK.sub(block, text)))


def target_lines(results: dict[str, Any]) -> tuple[list[str], bool]:
    """One line for each thing that the library is held to on a CPU, and whether all of them are met.

    It is held to them where nobody set how memory is allocated, as users have it; other runs are extras.
    """
    lines, all_met = [], True
    if results["machine"]["device_type"] != "cpu" or results["machine"]["allocator"]:
        return lines, all_met
    for case, rows in by_case(results).items():
        for target in targets(case):
            times = rows.get("cpp", {}).get("speedup", {}).get(target.provider)
            value = "no figure" if times is None else f"{times:.2f}x"
            held = [(times is not None and times >= target.times, f"{value} {target.provider}, wants {target.times}x")]
            if target.peak_share is not None:
                share = peak_share(rows, target.provider)
                value = "no figure" if share is None else f"{share:.1%}"
                text = f"{value} of {target.provider}'s peak memory, wants {target.peak_share:.0%} at most"
                held.append((share is not None and share <= target.peak_share, text))
            for met, text in held:
                all_met &= met
                lines.append(f"{'met   ' if met else 'MISSED'} {case}: {text}")
    return lines, all_met


def peak_share(rows: dict[str, Row], provider: str) -> float | None:
    """The library's peak memory as a share of the provider's; None where either was not measured."""
    own, other = (rows.get(name, {}).get("peak_bytes") for name in ("cpp", provider))
    return None if own is None or not other else own / other


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="results files; by default all in --results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of machines' folders")
    parser.add_argument("--readme", type=Path, help="file whose blocks are written anew")
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing, fail on a difference")
    parser.add_argument("--plot", action="store_true", help="a PNG beside each file")
    parser.add_argument("--targets", action="store_true", help="only what the library is held to; fails on a miss")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        before = options.readme.read_text()
        after = render_readme(before, options.results)
        if not options.check:
            options.readme.write_text(after)
        elif before != after:
            print(f"{options.readme} and the results differ; run python benchmarks/report.py --readme {options.readme}")
            return 1
        return 0
    passed = True
    for path in options.files or sorted(options.results.glob("*/*.json")):
        results = load(path)
        if options.targets:
            lines, met = (detectors.target_lines if path.stem == "detectors" else target_lines)(results)
            passed &= met
            print(*lines, sep="\n")
            continue
        print(f"## {path.stem}: {path.parent.name}\n\n{tables(path)}")
        if options.plot and path.stem != "detectors":
            from fpn_fast.bench import plots

            plots.times(results, path.with_suffix(".png"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
