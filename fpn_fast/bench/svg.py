# SPDX-License-Identifier: Apache-2.0
"""A drawing of horizontal bars as SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence

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


def bars(title: str, note: str, rows: Sequence[tuple[str, str, float, str]]) -> str:
    """Bars from a common line to the right, or to the left where a length is negative, for light and dark.

    rows: label, kind (``whole``, ``stage`` or ``slower``: its colour), length, and the text at its end.
    """
    left, width, step, top = 330, 360, 24, 64
    lengths = [0.0, *(length for _, _, length, _ in rows)]
    scale = width / (max(lengths) - min(lengths) or 1.0)
    one = left - min(lengths) * scale
    title = html.escape(title)
    body = [f'<text class="title" x="16" y="26">{title}</text>', f'<text class="note" x="16" y="46">{note}</text>']
    for i, (label, kind, length, text) in enumerate(rows):
        y, end = top + i * step, one + length * scale
        body += [
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>',
            f'<rect class="{kind}" x="{min(one, end):.1f}" y="{y}" width="{abs(end - one):.1f}" height="17" rx="2"/>',
            f'<text x="{max(one, end) + 6:.1f}" y="{y + 13}">{text}</text>',
        ]
    bottom = top + len(rows) * step
    body.append(f'<line x1="{one:.1f}" y1="{top - 6}" x2="{one:.1f}" y2="{bottom}"/>')
    return _SVG.format(height=bottom + 12, title=title, body="\n".join(body))
