# SPDX-License-Identifier: Apache-2.0
"""Plots of results, by matplotlib."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from fpn_fast.bench.cases import AXES, Case, arithmetic, bytes_moved
from fpn_fast.bench.report import BASELINES, FUSED, PROVIDERS, Row, by_case

Results = dict[str, Any]


def _place(results: Results) -> str:
    machine = results["machine"]
    tiny = "tiny maps, no measurement: " if machine.get("tiny") else ""
    return f"{tiny}{machine['device']}, torch {machine['torch']}, {machine['date']}"


def _save(figure: Any, results: Results, path: Path) -> None:
    figure.suptitle(_place(results), fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def times(results: dict[str, Any], path: Path) -> None:
    """Bars of median time, p20 to p80 as whiskers, one panel for each direction and for call overhead."""
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
    _save(figure, results, path)


def speedups(found: list[Results], path: Path) -> bool:
    """A bar for each op and direction: the library's speed-up, the geometric mean over its cases, and their range.

    Returns: whether there was anything to draw; so do the plots below.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for results in found:
        for case, rows in by_case(results).items():
            own = [row for name, row in rows.items() if name in FUSED and "p50" in row]
            if not own or case.axis:
                continue
            best = min(own, key=lambda row: row["p50"])
            label = f"{case.op}\n{case.direction}" + (", call overhead" if case.overhead else "")
            for rival, times in best.get("speedup", {}).items():
                if rival in BASELINES:
                    groups.setdefault(label, {}).setdefault(rival, []).append(times)
    if not groups:
        return False
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.55 * len(groups)), layout="constrained")
    rivals = [name for name in BASELINES if any(name in each for each in groups.values())]
    height = 0.76 / len(rivals)
    for i, rival in enumerate(rivals):
        bars = [(y, each[rival]) for y, each in enumerate(groups.values()) if rival in each]
        means = [statistics.geometric_mean(times) for _, times in bars]
        # Of one case the mean may lie beside it by a rounding.
        below = [max(0.0, mean - min(times)) for mean, (_, times) in zip(means, bars, strict=True)]
        above = [max(0.0, max(times) - mean) for mean, (_, times) in zip(means, bars, strict=True)]
        places = [y + (i - (len(rivals) - 1) / 2) * height for y, _ in bars]
        axis.barh(places, means, 0.95 * height, xerr=(below, above), label=f"against {PROVIDERS[rival].strip('`')}",
                  error_kw={"lw": 0.8})  # fmt: skip
        for y, mean in zip(places, means, strict=True):
            axis.text(mean, y, f" {mean:.1f}x", va="center", fontsize=7)
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("times as fast; left of 1 the rival is faster (bar: geometric mean over cases, line: their range)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8)
    _save(figure, found[0], path)
    return True


def roofline(found: list[Results], path: Path) -> bool:
    """Each case of the library between the machine's copy bandwidth and its float32 matrix product."""
    points: dict[str, list[tuple[float, float]]] = {}
    copies = []
    for results in found:
        copies += [row["copy_gb_per_s"] for row in results["rows"] if row["provider"] == "copy"]
        for case, rows in by_case(results).items():
            operations = arithmetic(case)
            for name, row in rows.items():
                if name in FUSED and "p50" in row and operations and not case.overhead:
                    rate = operations / row["p50"] / 1e3
                    points.setdefault(f"{case.op}, {name}", []).append((operations / bytes_moved(case), rate))
    if not points or not copies:
        return False
    bandwidth, roof = statistics.median(copies), found[0]["machine"].get("matmul_gflop_per_s")
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for (label, places), marker in zip(points.items(), "os^vDP*XhH<>" * 3, strict=False):
        axis.plot(*zip(*places, strict=True), marker, label=label, ms=6, alpha=0.8)
    every = [x for places in points.values() for x, _ in places]
    low, high = min(every) / 3, max(every) * 3
    line = [low, high] if roof is None else [low, min(max(roof / bandwidth, low), high), high]
    heights = [min(bandwidth * x, roof or float("inf")) for x in line]
    axis.plot(line, heights, color="black", lw=1.2, label=f"copy, {bandwidth:.3g} GB/s"
              + ("" if roof is None else f"; float32 matrix product, {roof:.3g} GFLOP/s"))  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("least arithmetic a byte of least traffic (FLOP/B); what data decide is not counted")
    axis.set_ylabel("GFLOP/s of that arithmetic")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, found[0], path)
    return True


def growth(results: Results, path: Path) -> bool:
    """Time against what grows, a panel for each series: an op and the quantity that its cases have more and more of."""
    series: dict[tuple[str, str], dict[str, list[tuple[float, Row]]]] = {}
    for case, rows in by_case(results).items():
        if case.axis:
            lines = series.setdefault((case.op, case.axis), {})
            for name in PROVIDERS:
                if "p50" in rows.get(name, {}):
                    lines.setdefault(name, []).append((AXES[case.axis][1](case), rows[name]))
    if not series:
        return False
    columns = min(3, len(series))
    panels = -(-len(series) // columns)
    figure, axes = pyplot.subplots(
        panels, columns, figsize=(4.2 * columns, 3.4 * panels), squeeze=False, layout="constrained"
    )
    for axis, ((op, quantity), providers) in zip(axes.flat, series.items(), strict=False):
        for name, places in providers.items():
            places.sort(key=lambda place: place[0])
            xs, times = [x for x, _ in places], [row["p50"] / 1e3 for _, row in places]
            axis.plot(xs, times, "o-", label=PROVIDERS[name].strip("`"), ms=4)
            spread = [row["p20"] / 1e3 for _, row in places], [row["p80"] / 1e3 for _, row in places]
            axis.fill_between(xs, *spread, alpha=0.2)
        axis.set_title(op, fontsize=9, loc="left")
        axis.set_xlabel(AXES[quantity][0], fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(series) :]:
        axis.set_axis_off()
    _save(figure, results, path)
    return True
