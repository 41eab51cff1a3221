# SPDX-License-Identifier: Apache-2.0
"""Drawings of the members of the pyramid family, which benchmarks/report.py writes.

One SVG each in docs/img, from the graph that the module runs where it is data (BiFPN, PAN, QuadFPN and NAS-FPN),
and from the tables below elsewhere. Rows are levels, coarse above fine.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from fpn_fast.nn import effdet
from fpn_fast.nn.mmdet.nas_fpn import CELLS

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "img"
#: A drawing: columns of nodes, each with its inputs. A name's first digit is its level.
Columns = list[dict[str, tuple[str, ...]]]


def column(text: str) -> dict[str, tuple[str, ...]]:
    """``"P5=C5 P4=C4+P5"`` -> {"P5": ("C5",), "P4": ("C4", "P5")}"""
    return {name: tuple(inputs.split("+")) for name, _, inputs in (each.partition("=") for each in text.split())}


_TOP_DOWN, _OUTPUTS = "P5=C5 P4=C4+P5 P3=C3+P4 P2=C2+P3", "O5=P5 O4=P4 O3=P3 O2=P2"
TABLES = {
    "fpn": ("FPN", [_TOP_DOWN, "O5=P5 O4=P4 O3=P3 O2=P2 O6=O5"]),
    "panet": ("PANet, the paper's form", [_TOP_DOWN, _OUTPUTS, "N2=O2 N3=O3+N2 N4=O4+N3 N5=O5+N4"]),
    "pafpn": ("mmdetection's PAFPN", [_TOP_DOWN, _OUTPUTS, "S3=O3+O2 S4=O4+S3 S5=O5+S4", "N3=S3 N4=S4 N5=S5"]),
    "yolox": ("YOLOX's PAFPN (concatenations)", ["R5=C5 T4=C4+R5 R4=T4 T3=C3+R4", "N3=T3 N4=R4+N3 N5=R5+N4"]),
    "bfp": ("BFP (of five levels)", ["M4=P2+P3+P4+P5+P6", "O2=M4+P2 O3=M4+P3 O4=M4+P4 O5=M4+P5 O6=M4+P6"]),
    "semantic": ("Panoptic FPN's semantic branch", ["A5=P5 A4=P4 A3=P3", "B4=A5 B3=A4", "D3=B4", "S2=P2+A3+B3+D3"]),
    "vitdet": ("ViTDet's pyramid of one map", ["P5=C4 P4=C4 P3=C4 P2=C4"]),
    "upernet": ("UPerNet", ["P5=C5", "P4=C4+P5 P3=C3+P4 P2=C2+P3", "O4=P4 O3=P3 O2=P2", "S2=O2+O3+O4+P5"]),
    "carafe": ("FPN with learned upsampling", ["P6=C5 P5=C5+P6 P4=C4+P5 P3=C3+P4 P2=C2+P3",
                                               "O6=P6 O5=P5 O4=P4 O3=P3 O2=P2"]),
}  # fmt: skip


def of_graph(name: str) -> Columns:
    """A cell of effdet's graph; a column is a run of nodes in one direction."""
    names, columns = [f"P{level + 3}" for level in range(5)], []
    previous = direction = 0
    for i, node in enumerate(effdet.graph(name, 5)):
        step = node.level - previous
        if not columns or step == 0 or step * direction < 0:
            columns.append({})
            step = 0
        previous, direction = node.level, step
        names.append(f"{chr(ord('a') + i)}{node.level + 3}")
        columns[-1][names[-1]] = tuple(names[k] for k in node.inputs)
    return columns


def of_cells() -> Columns:
    """A stage of NAS-FPN; a column is a cell."""
    latest, columns = {f"p{level}": f"P{level}" for level in range(3, 8)}, []
    for i, (name, result, first, second) in enumerate(CELLS):
        node = f"{chr(ord('a') + i)}{name[-1]}"
        columns.append({node: (latest[first], latest[second])})
        latest[result] = node
    return columns


def drawings() -> dict[str, tuple[str, Columns]]:
    """File name -> (title, columns)."""
    found = {name: (title, [column(each) for each in columns]) for name, (title, columns) in TABLES.items()}
    titles = {"bifpn_fa": "A cell of BiFPN", "pan_fa": "A cell of effdet's PAN", "qufpn_fa": "A cell of QuadFPN"}
    found |= {name.partition("_")[0]: (title, of_graph(name)) for name, title in titles.items()}
    return {**found, "nas-fpn": ("A stage of NAS-FPN", of_cells())}


_STYLE = """
text { fill: #1f2328; font-size: 12px; text-anchor: middle }
.title { font-size: 15px; font-weight: 600; text-anchor: start }
circle { fill: #eef1f4; stroke: #59636e } path { fill: none; stroke-width: 1.6 }
.same { stroke: #8c959f } .up { stroke: #2f6fbd } .down { stroke: #c4452e }
.key { text-anchor: start; fill: #59636e }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } circle { fill: #22272e; stroke: #9198a1 }
.key { fill: #9198a1 } .up { stroke: #5a9bea } .down { stroke: #f0765c } }"""


def svg(title: str, columns: Columns) -> str:
    """One drawing, for light and dark."""
    nodes = {name: i for i, each in enumerate(columns, start=1) for name in each}
    sources = {source for each in columns for inputs in each.values() for source in inputs}
    nodes |= dict.fromkeys(sorted(sources - nodes.keys()), 0)
    levels = [int(re.search(r"\d", name).group()) for name in nodes]
    top, dx, dy = max(levels), 84 if len(columns) < 7 else 62, 56
    at = {name: (40 + dx * i, 64 + dy * (top - int(name[1]))) for name, i in nodes.items()}
    body = [f'<text class="title" x="16" y="26">{html.escape(title)}</text>']
    for each in columns:
        for name, inputs in each.items():
            for source in inputs:
                (x1, y1), (x2, y2) = at[source], at[name]
                kind = "same" if source[1] == name[1] else "up" if source[1] > name[1] else "down"
                # A line within a column, or past a node of its row, bends around what is between.
                bend = 24 if x1 == x2 else 28 + 6 * (x2 - x1) // dx if y1 == y2 and x2 - x1 > dx else 0
                middle = (x1 + x2) / 2 + (bend if x1 == x2 else 0), (y1 + y2) / 2 - (bend if y1 == y2 else 0)
                body.append(f'<path class="{kind}" d="M{x1} {y1} Q{middle[0]:.0f} {middle[1]:.0f} {x2} {y2}"/>')
    for name, (x, y) in at.items():
        body.append(f'<circle cx="{x}" cy="{y}" r="15"/><text x="{x}" y="{y + 4}">{html.escape(name)}</text>')
    height, width = 64 + dy * (top - min(levels)) + 56, max(345, 80 + dx * len(columns))
    key = (("same", "same size"), ("up", "upsampled"), ("down", "downsampled"))
    for i, (kind, text) in enumerate(key):
        x, y = 16 + 105 * i, height - 14
        body.append(f'<path class="{kind}" d="M{x} {y} h18"/><text class="key" x="{x + 23}" y="{y + 4}">{text}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}\n</style>\n'
        + "\n".join(body) + "\n</svg>\n"
    )  # fmt: skip


def pages() -> dict[Path, str]:
    """Every file with its text."""
    return {FOLDER / f"family-{name}.svg": svg(title, columns) for name, (title, columns) in drawings().items()}
