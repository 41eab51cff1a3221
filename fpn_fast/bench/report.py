# SPDX-License-Identifier: Apache-2.0
"""Rows to tables, what became slower since another run, and what is slower than its rival."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fpn_fast.bench.cases import Case, bytes_moved, targets

#: In the order of the columns; the last two are the library's.
PROVIDERS = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "nvidia": "NVIDIA's mapping",
    "cpp": "fpn_fast (cpp)",
    "triton": "fpn_fast (triton)",
}
FUSED = ("cpp", "triton")
BASELINES = ("eager", "compile", "nvidia")

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


#: A ratio to the results compared with, above which a row is marked.
REGRESSION = 1.1

#: (case, provider) -> time now over time before.
Changes = dict[tuple[Case, str], float]


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Changes:
    """How the library's times changed between two lists of results.

    Times are taken relative to eager's of the same run where both runs have it, so that a machine which is slower as a
    whole changes nothing.
    """

    def own(results: list[dict[str, Any]]) -> dict[tuple[Case, str], Row]:
        return {
            (case, name): row
            for each in results
            for case, rows in by_case(each).items()
            for name, row in rows.items()
            if name in FUSED and "refused" not in row
        }

    earlier, found = own(before), {}
    for key, row in own(after).items():
        if key in earlier:
            times = [each.get("speedup", {}).get("eager") for each in (earlier[key], row)]
            found[key] = times[0] / times[1] if all(times) else row["p50"] / earlier[key]["p50"]
    return found


def change_text(change: float | None) -> str:
    """A change for a table: marked where it is a regression."""
    if change is None:
        return ""
    return f"{change:.2f}x the time: REGRESSION" if change > REGRESSION else f"{change:.2f}x the time"


def cells(
    results: dict[str, Any],
    overhead: bool,
    words: tuple[str, ...] = (),
    *,
    full: bool = False,
    compared: Changes | None = None,
) -> list[list[str]]:
    """The header and lines of one table: the cases where bytes count, or those where `overhead` does.

    full: with operations, host waits and peak memory; compared: with what changed.
    """
    cases = {case: rows for case, rows in by_case(results, words).items() if case.overhead == overhead}
    if not cases:
        return []
    present = [name for name in PROVIDERS if any(name in rows for rows in cases.values())]
    fused = [name for name in present if name in FUSED]
    counted = [name for name in present if full and name != "compile"]
    # Shown where the library is held to it.
    memory = full or any(target.peak_share is not None for case in cases for target in targets(case))
    header = ["op", "case", "N", "dtype", "memory format", "direction", *(PROVIDERS[name] for name in present)]
    header += [f"{name} vs {baseline}" for name in fused for baseline in BASELINES if baseline in present]
    if not overhead:
        header += [f"{name}, share of copy" for name in fused]
    if memory:
        header += [f"peak memory, {PROVIDERS[name]}" for name in present]
    header += ["least bytes"] if full else []
    header += [f"{what}, {PROVIDERS[name]}" for what in ("operations", "host waits") for name in counted]
    header += [f"{name} against before" for name in fused if compared is not None]
    lines = [header]
    for case, rows in cases.items():
        line = [case.op, case.name, str(case.batch), case.dtype, case.memory_format, case.direction]
        line += [time_text(rows.get(name)) for name in present]
        speedups = [
            rows.get(name, {}).get("speedup", {}).get(baseline)
            for name in fused
            for baseline in BASELINES
            if baseline in present
        ]
        line += ["" if speedup is None else f"{speedup:.2f}x" for speedup in speedups]
        if not overhead:
            shares = [rows.get(name, {}).get("copy_share") for name in fused]
            line += ["" if share is None else f"{share:.0%}" for share in shares]
        if memory:
            line += [memory_text(rows.get(name)) for name in present]
        line += [f"{bytes_moved(case) / 1e6:.3g} MB"] if full else []
        line += [str(rows.get(name, {}).get(what, "")) for what in ("operations", "waits") for name in counted]
        line += [change_text(compared.get((case, name))) for name in fused] if compared is not None else []
        lines.append(line)
    return lines


def table(lines: list[list[str]]) -> list[str]:
    """A header and lines as Markdown."""
    rule = ["---"] * 6 + ["---:"] * (len(lines[0]) - 6) if lines else []
    return ["| " + " | ".join(line) + " |" for line in ([lines[0], rule, *lines[1:]] if lines else [])]


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


def markdown(
    results: dict[str, Any], words: tuple[str, ...] = (), *, full: bool = False, compared: Changes | None = None
) -> str:
    """Both tables and the caption; see :func:`cells`."""
    parts = [table(cells(results, overhead, words, full=full, compared=compared)) for overhead in (False, True)]
    return "\n\n".join(["\n".join(lines) for lines in parts if lines] + [caption(results)]) + "\n"


def slower(results: list[dict[str, Any]]) -> list[str]:
    """A line for each case of which another provider is faster than the library's best."""
    lines = []
    for each in results:
        for case, rows in by_case(each).items():
            own = [(row["p50"], name) for name, row in rows.items() if name in FUSED and "p50" in row]
            if not own:
                continue
            best = min(own)[1]
            for rival in BASELINES:
                times = rows[best].get("speedup", {}).get(rival)
                if times is not None and times < 1:
                    lines.append(f"{case}: {times:.2f}x {rival}")
    return lines


def refusals(results: list[dict[str, Any]]) -> list[str]:
    """A line for each row that was refused, its results being wrong."""
    return [
        f"{case_of(row)} {row['provider']}: {row['refused']}"
        for each in results
        for row in each["rows"]
        if "refused" in row
    ]
