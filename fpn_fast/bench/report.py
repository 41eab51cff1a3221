# SPDX-License-Identifier: Apache-2.0
"""Rows to tables, a plot and one HTML page; what became slower since another run, and what is slower than a rival."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpn_fast.bench.cases import Case, bytes_moved, targets
from fpn_fast.bench.machine import KEEP_FREED_MEMORY

#: In the order of the columns; the last two are the library's.
PROVIDERS = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "nvidia": "NVIDIA's mapping",
    "cpp": "fpn_fast (cpp)",
    "triton": "fpn_fast (triton)",
}
_CASE_COLUMNS = {"op": "op", "case": "name", "N": "batch", "dtype": "dtype", "memory format": "memory_format",
                 "direction": "direction"}  # fmt: skip
FUSED = ("cpp", "triton")
BASELINES = ("eager", "compile", "nvidia")
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


def time_text(row: Row | None) -> str:
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    value, unit = (row["p50"] / 1e3, "ms") if row["p50"] >= 1e3 else (row["p50"], "us")
    return f"{value:.3g} {unit}" if value < 1e3 else f"{value:.0f} {unit}"


def memory_text(row: Row | None) -> str:
    if row is None or "peak_bytes" not in row:
        return ""
    value = row["peak_bytes"] / 1e6
    return f"{value:.3g} MB" if value < 1e3 else f"{value:.0f} MB"


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Changes:
    """How the library's times changed between two lists of results.

    Times are relative to eager's in the same run where both runs have it, so a machine that is slower as a whole
    changes nothing.
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


def cells(
    results: dict[str, Any], overhead: bool, words: tuple[str, ...] = (), *, full: bool = False,
    compared: Changes | None = None,
) -> list[list[str]]:  # fmt: skip
    """The header and lines of one table: the cases where bytes count, or those where call `overhead` does.

    full: with operations, host synchronisations and peak memory; compared: with what changed since an earlier run.
    """
    cases = {case: rows for case, rows in by_case(results, words).items() if case.overhead == overhead}
    if not cases:
        return []
    present = [name for name in PROVIDERS if any(name in rows for rows in cases.values())]
    fused = [name for name in present if name in FUSED]
    counted = [name for name in present if name != "compile"]
    rivals = [name for name in present if name in BASELINES]
    memory = present if full or any("peak" in targets(case) for case in cases) else []
    found = list(cases.values())

    def text(value: float | None, form: str, unit: str = "") -> str:
        return "" if value is None else format(value, form) + unit

    def of(name: str, key: str, form: str) -> list[str]:
        return [text(rows.get(name, {}).get(key), form) for rows in found]

    def speedups(name: str, rival: str) -> list[str]:
        return [text(rows.get(name, {}).get("speedup", {}).get(rival), ".2f", "x") for rows in found]

    columns = [(head, [str(getattr(case, field)) for case in cases]) for head, field in _CASE_COLUMNS.items()]
    columns += [(PROVIDERS[name], [time_text(rows.get(name)) for rows in found]) for name in present]
    columns += [(f"{name} vs {rival}", speedups(name, rival)) for name in fused for rival in rivals]
    if not overhead:
        columns += [(f"{name}, share of copy", of(name, "copy_share", ".0%")) for name in fused]
    columns += [(f"peak memory, {PROVIDERS[name]}", [memory_text(rows.get(name)) for rows in found]) for name in memory]
    if full:
        columns += [("least bytes", [f"{bytes_moved(case) / 1e6:.3g} MB" for case in cases])]
        columns += [(f"operations, {PROVIDERS[name]}", of(name, "operations", "d")) for name in counted]
        columns += [(f"host synchronisations, {PROVIDERS[name]}", of(name, "syncs", "d")) for name in counted]
    for name in fused if compared is not None else ():
        changed = [(compared or {}).get((case, name)) for case in cases]
        marks = [text(each, ".2f", "x the time" + ": REGRESSION" * ((each or 0) > REGRESSION)) for each in changed]
        columns.append((f"{name} against before", marks))
    return [[head for head, _ in columns], *map(list, zip(*(values for _, values in columns), strict=True))]


def table(lines: list[list[str]], left: int = 6) -> str:
    """A header and lines as Markdown, the first `left` columns to the left."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def place(machine: dict[str, Any]) -> str:
    """Device, threads, versions, commit, date and allocator that figures belong to."""
    threads = f", {machine['threads']} threads" if machine["device_type"] == "cpu" else ""
    settings = "".join(f", {name}={value}" for name, value in machine["allocator"].items())
    if machine["allocator"] == KEEP_FREED_MEMORY:
        settings = ", glibc keeping freed memory"
    commit = machine["commit"] or "unknown"
    return f"{machine['device']}{threads}, torch {machine['torch']}, commit {commit}, {machine['date']}{settings}"


def caption(results: dict[str, Any]) -> str:
    """Where, when and of what the figures are."""
    machine = results["machine"]
    what = "GPU time from memory (call overhead: wall time)" if machine["device_type"] == "cuda" else "wall time"
    tiny = "A walk through the code with tiny maps, no measurement: " if machine.get("tiny") else ""
    copies = [row["copy_gb_per_s"] for row in results["rows"] if row["provider"] == "copy"]
    copy = f" Copies in the same rounds reach {min(copies):.3g} to {max(copies):.3g} GB/s." if copies else ""
    refused = sorted(refusals([results]))
    note = f" Refused: {'; '.join(refused)}." if refused else ""
    return (
        f"{tiny}{place(machine)}: median {what}; ratios are medians over rounds, above 1 where fpn_fast is faster."
        f"{copy}{note}"
    )


def markdown(
    results: dict[str, Any], words: tuple[str, ...] = (), *, full: bool = False, compared: Changes | None = None
) -> str:
    """Both tables and the caption; see :func:`cells`."""
    parts = [cells(results, overhead, words, full=full, compared=compared) for overhead in (False, True)]
    return "\n\n".join([*(table(lines) for lines in parts if lines), caption(results)]) + "\n"


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


_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img"
 font-family="system-ui, sans-serif">
<title>{title}</title>
<style>
text {{ fill: #1f2328; font-size: 13px }} .title {{ font-size: 15px; font-weight: 600 }}
.note {{ fill: #59636e; font-size: 12px }}
.whole {{ fill: #0a6b5d }} .stage {{ fill: #2f6fbd }} .slower {{ fill: #c4452e }} line {{ stroke: #8c959f }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .note {{ fill: #9198a1 }}
.whole {{ fill: #2ea893 }} .stage {{ fill: #5a9bea }} .slower {{ fill: #f0765c }}
}}
</style>
{body}
</svg>
"""


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def bars(title: str, note: str, ratios: Sequence[tuple[str, float, str]]) -> str:
    """An SVG of horizontal bars, readable in light and dark, on a logarithmic scale: what is slower points to the left.

    ratios: (label, speed-up, ``whole`` or ``stage``).
    """
    left, width, step, top = 280, 400, 24, 64
    powers = [0.0, *(math.log2(ratio) for _, ratio, _ in ratios)]
    scale = width / max(max(powers) - min(powers), 1e-3)
    one = left - min(powers) * scale
    body = [
        f'<text class="title" x="16" y="26">{html.escape(title)}</text>',
        f'<text class="note" x="16" y="46">{html.escape(note)}</text>',
    ]
    for i, (label, ratio, kind) in enumerate(ratios):
        y, end = top + i * step, one + math.log2(ratio) * scale
        body += [
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>',
            f'<rect class="{"slower" if ratio < 1 else kind}" x="{min(one, end):.1f}" y="{y}" '
            f'width="{abs(end - one):.1f}" height="17" rx="2"/>',
            f'<text x="{max(one, end) + 6:.1f}" y="{y + 13}">{ratio_text(ratio)}</text>',
        ]
    bottom = top + len(ratios) * step
    body.append(f'<line x1="{one:.1f}" y1="{top - 6}" x2="{one:.1f}" y2="{bottom}"/>')
    return _SVG.format(height=bottom + 12, title=html.escape(title), body="\n".join(body))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
 color-scheme: light dark }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 12px } svg { max-width: 760px }
td, th { border: 1px solid #8888; padding: 3px 7px; text-align: left; white-space: nowrap }
tr.slower td { background: #f0b42940 } tr.refused td, tr.regression td { background: #f0765c50 }
"""
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


def _html_table(lines: list[str]) -> str:
    header, _, *rows = (html.escape(line[2:-2].replace("`", "")).split(" | ") for line in lines)

    def kind(row: list[str]) -> str:
        if "refused" in row:
            return "refused"
        if any(text.endswith("REGRESSION") for text in row):
            return "regression"
        ratios = [text for name, text in zip(header, row, strict=True) if " vs " in name and text]
        return "slower" if any(float(text[:-1]) < 1 for text in ratios) else ""

    body = [f'<tr class="{kind(row)}">' + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows]
    body.insert(0, "<tr>" + "".join(f"<th>{name}</th>" for name in header) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(body) + "\n</table></div>"


def _html(block: str) -> str:
    """One heading, list, table or paragraph of :func:`document`."""
    if block.startswith("| "):
        return _html_table(block.splitlines())
    if block.startswith("- "):
        return "<ul>\n" + "\n".join(f"<li>{html.escape(line[2:])}</li>" for line in block.splitlines()) + "\n</ul>"
    tag = {"#": "h1", "##": "h2"}.get(block.partition(" ")[0], "p")
    return f"<{tag}>{html.escape(block.lstrip('# '))}</{tag}>"


def page(found: dict[str, dict[str, Any]], compared: Changes | None = None) -> str:
    """:func:`document` with a plot as one HTML page that fetches nothing; rows where a rival is faster are yellow,
    refused and regressed ones red."""
    groups: dict[str, list[float]] = {}
    for results in found.values():
        for case, rows in by_case(results).items():
            own = [row for name, row in rows.items() if name in FUSED and "eager" in row.get("speedup", {})]
            if own and not case.axis:
                label = f"{case.op}, {case.direction}" + (", call overhead" if case.overhead else "")
                groups.setdefault(label, []).append(min(own, key=lambda row: row["p50"])["speedup"]["eager"])
    means = [(label, statistics.geometric_mean(ratios), "stage") for label, ratios in groups.items()]
    title, *body = map(_html, document(found, compared).strip().split("\n\n"))
    plot = [bars("Speed-up over eager", "Geometric mean over the cases; logarithmic scale.", means)] if means else []
    return "\n".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fpn_fast benchmarks</title>',
        f"<style>{_STYLE}</style></head>\n<body>", title, *plot, *body, "</body></html>\n",
    ])  # fmt: skip
