# SPDX-License-Identifier: Apache-2.0
"""One HTML page that holds all of a run: figures, tables and what they mean, with nothing to fetch."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from fpn_fast.bench.report import Changes, caption, cells, refusals, slower

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222 }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #555 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 12px }
td, th { border: 1px solid #ddd; padding: 3px 7px; text-align: left; white-space: nowrap } th { background: #f4f4f4 }
tr.slower td { background: #fff3d6 } tr.refused td, tr.regression td { background: #ffdcd6 }
"""
_HOW = """
<p>Each provider of a case is computed from the same inputs, checked against the reference in float64, and then sampled
in turn, round by round. A provider whose results differ is <em>refused</em> and has no figures. Times are medians;
a ratio is the median of the ratios within each round, above 1 where fpn_fast is faster. <em>Share of copy</em> is the
least traffic that the case can do, as a share of what a copy of as many bytes reaches in the same rounds.
<em>Operations</em> and <em>host waits</em> are counted, not timed. Rows where a rival is faster are yellow, refused and
regressed ones red.</p>
"""


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    label = html.escape(text)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>'


def _kind(header: list[str], line: list[str]) -> str:
    """The class of a table's line: what a reader should look at."""
    if "refused" in line:
        return "refused"
    if any(text.endswith("REGRESSION") for text in line):
        return "regression"
    ratios = [float(text[:-1]) for name, text in zip(header, line, strict=True) if " vs " in name and text]
    return "slower" if any(ratio < 1 for ratio in ratios) else ""


def _table(lines: list[list[str]]) -> str:
    header = "".join(f"<th>{html.escape(name.strip('`'))}</th>" for name in lines[0])
    rows = "\n".join(
        f'<tr class="{_kind(lines[0], line)}">' + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
        for line in lines[1:]
    )
    return f'<div class="wide"><table>\n<tr>{header}</tr>\n{rows}\n</table></div>'


def _list(title: str, lines: list[str]) -> str:
    items = "\n".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2>\n<ul>\n{items}\n</ul>" if lines else ""


def page(
    found: dict[str, dict[str, Any]], figures: dict[Path, str], compared: Changes | None = None, note: str = ""
) -> str:
    """The page.

    found: family -> its results; figures: PNG file -> its caption; compared: what changed since another run; note: a
    sentence to begin with.
    """
    every = list(found.values())
    parts = [f"<p>{html.escape(note)}</p>"] if note else []
    parts += [_image(path, text) for path, text in figures.items()]
    parts += [
        _list("Refused: the results were wrong", refusals(every)),
        _list("Where a rival is faster", slower(every)),
        "<h2>How to read this</h2>" + _HOW,
    ]
    for family, results in found.items():
        tables = [cells(results, overhead, full=True, compared=compared) for overhead in (False, True)]
        parts.append(f"<h2>{html.escape(family)}</h2>")
        parts += [_table(lines) for lines in tables if lines]
        parts.append(f"<p>{html.escape(caption(results))}</p>")
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fpn_fast benchmarks</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>fpn_fast benchmarks</h1>\n{body}\n</body></html>\n"
    )
