# SPDX-License-Identifier: Apache-2.0
"""Rows to Markdown; what became slower since another run, and what is slower than a rival."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fpn_fast.bench.cases import Case, bytes_moved
from fpn_fast.bench.machine import KEEP_FREED_MEMORY

#: In the order of the columns; the last two are the library's.
PROVIDERS = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "nvidia": "NVIDIA's mapping",
    "cpp": "fpn_fast (cpp)",
    "triton": "fpn_fast (triton)",
}
FUSED, BASELINES = ("cpp", "triton"), ("eager", "compile", "nvidia")
_CASE_COLUMNS = {"op": "op", "case": "name", "N": "batch", "dtype": "dtype", "memory format": "memory_format",
                 "direction": "direction"}  # fmt: skip
#: Ops whose tables always show the peak memory.
MEMORY_COUNTS = ("match_anchors",)
#: A time relative to an earlier run's, above which a row is marked.
REGRESSION = 1.1

Row = dict[str, Any]
#: (case, provider) -> time now over time before.
Changes = dict[tuple[Case, str], float]


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def case_of(row: Row) -> Case:
    """The case that `row` measured; fields that an older file lacks have their defaults."""
    fields = {name: row[name] for name in Case.__dataclass_fields__ if name in row}
    return Case(**{**fields, "levels": tuple(map(tuple, row["levels"]))})


def by_case(results: dict[str, Any], words: tuple[str, ...] = ()) -> dict[Case, dict[str, Row]]:
    """Case -> provider -> the row to show, or its refused one.

    On a GPU that is the GPU's time from memory; the caller's where call overhead counts, and on a CPU.
    """
    found: dict[Case, dict[str, Row]] = {}
    for row in results["rows"]:
        case = case_of(row)
        if all(word in str(case) for word in words):
            on_gpu = results["machine"]["device_type"] == "cuda" and not case.overhead
            rows = found.setdefault(case, {})
            if row["metric"] in ("gpu_cold" if on_gpu else "wall", "none"):
                rows[row["provider"]] = row
    return found


def _amount(value: float, unit: str) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:.3g} {unit}" if value < 1e3 else f"{value:.0f} {unit}"


def time_text(row: Row | None) -> str:
    if row is None or "refused" in row:
        return "" if row is None else "refused"
    return _amount(row["p50"] / 1e3, "ms") if row["p50"] >= 1e3 else _amount(row["p50"], "us")


def row_text(row: Row) -> str:
    """The line that ``bench`` prints."""
    text = f"  {row['provider']:<8} "
    if "refused" in row:
        return f"{text}refused: {row['refused']}"
    text += f"{row['metric']:<9} {row['p50']:10.1f} us {row['p20']:10.1f} to {row['p80']:<10.1f}"
    if "eager" in row.get("speedup", {}):
        text += f"{row['speedup']['eager']:7.2f}x eager"
    if "copy_share" in row and row["provider"] != "copy":
        text += f"{row['copy_share']:7.0%} of a copy"
    return text.rstrip()


def memory_text(size: float) -> str:
    return _amount(size / 1e6, "MB")


def change_text(change: float | None) -> str:
    if change is None:
        return ""
    return f"{change:.2f}x the time" + (": REGRESSION" if change > REGRESSION else "")


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Changes:
    """How the library's times changed between two lists of results.

    Times are relative to eager's in the same run where both runs have it, so a machine that is slower as a whole
    changes nothing.
    """
    earlier, now = (
        {
            (case, name): row
            for each in results
            for case, rows in by_case(each).items()
            for name, row in rows.items()
            if name in FUSED and "refused" not in row
        }
        for results in (before, after)
    )
    found = {}
    for key in (key for key in now if key in earlier):
        times = [each[key].get("speedup", {}).get("eager") for each in (earlier, now)]
        found[key] = times[0] / times[1] if all(times) else now[key]["p50"] / earlier[key]["p50"]
    return found


def table(lines: list[list[str]], left: int = 6) -> str:
    """A header and lines as Markdown, the first `left` columns to the left."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def absent(known: Iterable[Any], measured: Iterable[Any]) -> str:
    """A paragraph of the cases without rows; empty where there are none."""
    missing = [name for name in map(str, known) if name not in set(map(str, measured))]
    return f"Not measured: {', '.join(missing)}.\n\n" if missing else ""


def place(machine: dict[str, Any]) -> str:
    """Device, threads, versions, commit, date and allocator that figures belong to."""
    threads = f", {machine['threads']} threads" if machine["device_type"] == "cpu" else ""
    settings = "".join(f", {name}={value}" for name, value in machine["allocator"].items()) or ", default allocator"
    if machine["allocator"] == KEEP_FREED_MEMORY:
        settings = ", glibc keeping freed memory"
    commit = machine["commit"] or "unknown"
    return f"{machine['device']}{threads}, torch {machine['torch']}, commit {commit}, {machine['date']}{settings}"


def caption(results: dict[str, Any]) -> str:
    """Where, when and of what the figures are."""
    machine = results["machine"]
    what = "GPU time from memory (call overhead: wall time)" if machine["device_type"] == "cuda" else "wall time"
    tiny = "A walk through the code with tiny maps, no measurement: " if machine.get("tiny") else ""
    copies = [row["copy_gb_per_s"] for row in results["rows"] if row["provider"] == "copy" and "p50" in row]
    copy = f" Copies in the same rounds reach {min(copies):.3g} to {max(copies):.3g} GB/s." if copies else ""
    refused = sorted(refusals([results]))
    note = f" Refused: {'; '.join(refused)}." if refused else ""
    return (
        f"{tiny}{place(machine)}: median {what}; ratios are medians over rounds, above 1 where fpn_fast is faster."
        f"{copy}{note}"
    )


def markdown(
    results: dict[str, Any],
    words: tuple[str, ...] = (),
    *,
    full: bool = False,
    compared: Changes | None = None,
    known: Iterable[Case] = (),
) -> str:
    """The table of a family's cases whose names hold all of `words`, and its caption.

    known: cases that it names as not measured where they have no rows. full: with operations, host synchronisations and
    memory; compared: with what changed since an earlier run.
    """
    cases = by_case(results, words)
    present = [name for name in PROVIDERS if any(name in rows for rows in cases.values())]
    fused, rivals = ([name for name in present if name in of] for of in (FUSED, BASELINES))
    memory = full or any(case.op in MEMORY_COUNTS for case in cases)

    def line(case: Case, rows: dict[str, Row]) -> dict[str, str]:
        def of(name: str, key: str, text: Callable[[Any], str]) -> str:
            return text(rows[name][key]) if key in rows.get(name, {}) else ""

        cells = {head: str(getattr(case, key)) for head, key in _CASE_COLUMNS.items()}
        cells |= {PROVIDERS[name]: time_text(rows.get(name)) for name in present}
        for name in fused:
            ratios = rows.get(name, {}).get("speedup", {})
            cells |= {f"{name} vs {rival}": f"{ratios[rival]:.2f}x" if rival in ratios else "" for rival in rivals}
        cells |= {f"{name}, share of copy": of(name, "copy_share", "{:.0%}".format) for name in fused}
        if memory:
            cells |= {f"peak memory, {PROVIDERS[name]}": of(name, "peak_bytes", memory_text) for name in present}
        if full:
            cells["least bytes"] = memory_text(bytes_moved(case))
            for what, key in (("operations", "operations"), ("host synchronisations", "syncs")):
                cells |= {f"{what}, {PROVIDERS[name]}": of(name, key, str) for name in present if name != "compile"}
        if compared is not None:
            cells |= {f"{name} against before": change_text(compared.get((case, name))) for name in fused}
        return cells

    lines = [line(case, rows) for case, rows in cases.items()]
    found = f"{table([list(lines[0]), *(list(each.values()) for each in lines)])}\n\n" if lines else ""
    return f"{found}{absent(known, cases)}{caption(results)}\n"


def slower(results: list[dict[str, Any]]) -> list[str]:
    """A line for each case in which another provider is faster than the library's best."""
    lines = []
    for each in results:
        for case, rows in by_case(each).items():
            own = [(row["p50"], name) for name, row in rows.items() if name in FUSED and "p50" in row]
            speedup = rows[min(own)[1]].get("speedup", {}) if own else {}
            lines += [f"{case}: {speedup[rival]:.2f}x {rival}" for rival in BASELINES if speedup.get(rival, 1) < 1]
    return lines


def refusals(results: list[dict[str, Any]]) -> list[str]:
    """A line for each row that was refused."""
    return [
        f"{case_of(row)} {row['provider']}: {row['refused']}"
        for each in results
        for row in each["rows"]
        if "refused" in row
    ]


_HOW = """\
Every provider of a case is computed from the same inputs, checked against the reference in float64, and then sampled in
turn, round by round. A provider whose result differs, or whose backend did not compute it, is refused and has no
figures. Times are medians. A ratio is the median of the ratios within each round, above 1 where fpn_fast is faster.
Share of copy is the least traffic of the case, as a share of the bandwidth of a copy in the same rounds. Operations and
host synchronisations are counted, not timed."""


def document(found: dict[str, dict[str, Any]], compared: Changes | None = None) -> str:
    """All of a run as Markdown. found: family -> its results; compared: what changed since another run."""
    every = list(found.values())
    parts = ["# fpn_fast benchmarks"]
    for title, lines in (("Refused", refusals(every)), ("Where a rival is faster", slower(every))):
        parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
    parts += ["## How to read this", _HOW]
    for family, results in found.items():
        parts += [f"## {family}", markdown(results, full=True, compared=compared).rstrip()]
    return "\n\n".join(parts) + "\n"
