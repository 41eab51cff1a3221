# SPDX-License-Identifier: Apache-2.0
"""Results files to Markdown tables, plots, and the blocks of the README that hold figures.

    python benchmarks/report.py                             the tables of every results file
    python benchmarks/report.py --plot                      and a PNG beside each file
    python benchmarks/report.py --readme README.md          writes the README's blocks anew
    python benchmarks/report.py --readme README.md --check  fails where they differ from the files
    python benchmarks/report.py --targets                   fails where the library misses what it is held to

A block is ``<!-- benchmark:FAMILY MACHINE [WORD ...] -->`` to ``<!-- /benchmark -->``. MACHINE is a folder's name or a
device type that only one folder has; of the cases, those are shown that have every WORD in their name. The census is of
no machine: ``<!-- census -->`` to ``<!-- /census -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import census  # noqa: E402
from fpn_fast.bench.cases import Case, targets  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
#: In the order of the columns; the last two are the library's.
PROVIDERS = {"eager": "eager", "compile": "`torch.compile`", "cpp": "fpn_fast (cpp)", "triton": "fpn_fast (triton)"}
FUSED = ("cpp", "triton")
BASELINES = ("eager", "compile")
_BLOCK = re.compile(r"(<!-- benchmark:(\w+) (\S+)((?: \S+)*) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
_CENSUS = re.compile(r"(<!-- census -->\n).*?(<!-- /census -->)", re.DOTALL)

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """A results file: its machine and its rows."""
    return json.loads(path.read_text())


def case_of(row: Row) -> Case:
    """The case that `row` measured."""
    # A file from before a field was there has the field's default.
    fields = {name: row[name] for name in Case.__dataclass_fields__ if name in row}
    return Case(**{**fields, "levels": tuple(map(tuple, row["levels"]))})


def metric(machine: dict[str, Any], case: Case) -> str:
    """What a table shows: on a GPU the time of the GPU, but where call overhead counts the caller's wait."""
    return "gpu_cold" if machine["device_type"] == "cuda" and not case.overhead else "wall"


def by_case(results: dict[str, Any], words: tuple[str, ...] = ()) -> dict[Case, dict[str, Row]]:
    """Case -> provider -> its row of the case's metric, or its refused one."""
    found: dict[Case, dict[str, Row]] = {}
    for row in results["rows"]:
        case = case_of(row)
        if all(word in str(case) for word in words):
            rows = found.setdefault(case, {})
            if row["metric"] in (metric(results["machine"], case), "none"):
                rows[row["provider"]] = row
    return found


def time_text(row: Row | None) -> str:
    """A median time with its unit, to three digits."""
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    value, unit = (row["p50"] / 1e3, "ms") if row["p50"] >= 1e3 else (row["p50"], "us")
    return f"{value:.3g} {unit}" if value < 1e3 else f"{value:.0f} {unit}"


def memory_text(row: Row | None) -> str:
    """The peak memory of a call, to three digits."""
    if row is None or "peak_bytes" not in row:
        return ""
    value = row["peak_bytes"] / 1e6
    return f"{value:.3g} MB" if value < 1e3 else f"{value:.0f} MB"


def table(results: dict[str, Any], overhead: bool, words: tuple[str, ...] = ()) -> list[str]:
    """The lines of one Markdown table: the cases where bytes count, or those where `overhead` does."""
    cases = {case: rows for case, rows in by_case(results, words).items() if case.overhead == overhead}
    if not cases:
        return []
    present = [name for name in PROVIDERS if any(name in rows for rows in cases.values())]
    fused = [name for name in present if name in FUSED]
    # Shown where the library is held to it.
    memory = any(target.peak_share is not None for case in cases for target in targets(case))
    header = ["op", "case", "N", "dtype", "memory format", "direction", *(PROVIDERS[name] for name in present)]
    header += [f"{name} vs {baseline}" for name in fused for baseline in BASELINES if baseline in present]
    if not overhead:
        header += [f"{name}, share of copy" for name in fused]
    if memory:
        header += [f"peak memory, {PROVIDERS[name]}" for name in present]
    lines = [header, ["---"] * 6 + ["---:"] * (len(header) - 6)]
    for case, rows in cases.items():
        cells = [case.op, case.name, str(case.batch), case.dtype, case.memory_format, case.direction]
        cells += [time_text(rows.get(name)) for name in present]
        speedups = [
            rows.get(name, {}).get("speedup", {}).get(baseline)
            for name in fused
            for baseline in BASELINES
            if baseline in present
        ]
        cells += ["" if speedup is None else f"{speedup:.2f}x" for speedup in speedups]
        if not overhead:
            shares = [rows.get(name, {}).get("copy_share") for name in fused]
            cells += ["" if share is None else f"{share:.0%}" for share in shares]
        if memory:
            cells += [memory_text(rows.get(name)) for name in present]
        lines.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def caption(results: dict[str, Any]) -> str:
    """Where, when and of what the figures are."""
    machine = results["machine"]
    what = "GPU time from memory (call overhead: wall time)" if machine["device_type"] == "cuda" else "wall time"
    tiny = "A walk through the code with tiny maps, no measurement: " if machine.get("tiny") else ""
    place = tiny + machine["device"] + (f", {machine['threads']} threads" if machine["device_type"] == "cpu" else "")
    settings = "".join(f", {name}={value}" for name, value in machine["allocator"].items())
    copies = [row["copy_gb_per_s"] for row in results["rows"] if row["provider"] == "copy"]
    copy = f" Copies in the same rounds reach {min(copies):.3g} to {max(copies):.3g} GB/s." if copies else ""
    refused = sorted({f"{case_of(row)} {row['provider']}" for row in results["rows"] if "refused" in row})
    note = f" Refused, their results being wrong: {'; '.join(refused)}." if refused else ""
    return (
        f"{place}, torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {machine['date']}{settings}: "
        f"median {what}; ratios are medians over rounds, above 1 where fpn_fast is faster.{copy}{note}"
    )


def markdown(results: dict[str, Any], words: tuple[str, ...] = ()) -> str:
    """Both tables and the caption."""
    parts = [table(results, overhead, words) for overhead in (False, True)]
    return "\n\n".join(["\n".join(lines) for lines in parts if lines] + [caption(results)]) + "\n"


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


def render_readme(text: str, folder: Path) -> str:
    """`text` with every block made anew from the files in `folder`."""

    def block(match: re.Match[str]) -> str:
        begin, family, machine, words, end = match.groups()
        return begin + markdown(load(find(folder, family, machine)), tuple(words.split())) + end

    def counts(match: re.Match[str]) -> str:
        begin, end = match.groups()
        return begin + census.table(json.loads((folder / "census.json").read_text())) + end

    return _CENSUS.sub(counts, _BLOCK.sub(block, text))


def target_lines(results: dict[str, Any]) -> tuple[list[str], bool]:
    """One line for each thing that the library is held to on a CPU, and whether all of them are met."""
    lines, all_met = [], True
    for case, rows in by_case(results).items():
        if results["machine"]["device_type"] != "cpu":
            continue
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


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of median time, p20 to p80 as whiskers, one panel for each direction and for call overhead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[Case, dict[str, Row]]] = {}
    for case, rows in by_case(results).items():
        panels.setdefault("call overhead" if case.overhead else case.direction, {})[case] = rows
    width = max(11.0, *(1.1 * len(cases) for cases in panels.values()))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(width, 4 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (title, cases) in zip(axes[:, 0], panels.items(), strict=True):
        scale, unit = (1, "us") if title == "call overhead" else (1e3, "ms")
        present = [name for name in PROVIDERS if any("p50" in rows.get(name, {}) for rows in cases.values())]
        bar = 0.8 / max(len(present), 1)
        for i, name in enumerate(present):
            bars = [(x, rows[name]) for x, rows in enumerate(cases.values()) if "p50" in rows.get(name, {})]
            below = [(row["p50"] - row["p20"]) / scale for _, row in bars]
            above = [(row["p80"] - row["p50"]) / scale for _, row in bars]
            places = [x + (i - (len(present) - 1) / 2) * bar for x, _ in bars]
            heights = [row["p50"] / scale for _, row in bars]
            axis.bar(places, heights, bar, yerr=(below, above), label=PROVIDERS[name].strip("`"), error_kw={"lw": 0.8})
        copies = [(x, rows["copy"]["p50"] / scale) for x, rows in enumerate(cases.values()) if "copy" in rows]
        if copies:
            ends = [x - 0.4 for x, _ in copies], [x + 0.4 for x, _ in copies]
            axis.hlines([y for _, y in copies], *ends, color="black", lw=1.2, label="copy of as many bytes")
        labels = [
            f"{case.op} {case.name}\n{case.direction}" if case.overhead
            else f"{textwrap.fill(case.name.replace('_', ' '), 16)}\nN={case.batch}\n{case.dtype}\n{case.memory_format}"
            for case in cases
        ]  # fmt: skip
        axis.set_xticks(range(len(cases)), labels, fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(title, loc="left")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=8)
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, {machine['date']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
            lines, met = target_lines(results)
            passed &= met
            print(*lines, sep="\n")
            continue
        print(f"## {path.stem}: {path.parent.name}\n\n{markdown(results)}")
        if options.plot:
            plot(results, path.with_suffix(".png"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
