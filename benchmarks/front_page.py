# SPDX-License-Identifier: Apache-2.0
"""The README's plot and its table of measured ratios, both made from committed results of a CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fpn_fast.bench.report import by_case, load

#: (what the ratio is of, results file, start of the case's name)
Measured = tuple[str, str, str]


@dataclass(frozen=True)
class Stage:
    """A row of the table: a stage of a detector, what is fused there, and the cases that stand for it.

    The cases were chosen before they were measured: 800x1344, one image, float32, the first in its family.
    """

    name: str
    fused: str
    measured: tuple[Measured, ...]


_MERGE = "resnet50_fpn_800x1344-n1-float32-channels_last"
_POOLER = "box_1000_7x7_adaptive_spread-n1-float32-channels_last"
STAGES = (
    Stage("Faster R-CNN R50, whole", "all stages below that it has",
          (("inference", "detectors", "faster_rcnn-inference-800x1344-n1"),
           ("training step", "detectors", "faster_rcnn-training-320x544-n2"))),
    Stage("RetinaNet R50, whole", "all stages below that it has",
          (("inference", "detectors", "retinanet-inference-800x1344-n1"),
           ("training step", "detectors", "retinanet-training-320x544-n2"))),
    Stage("FPN top-down merge", "upsampling and addition of all levels in one kernel",
          (("forward", "top_down", f"top_down-{_MERGE}-forward"),
           ("backward", "top_down", f"top_down-{_MERGE}-backward"))),
    Stage("RPN proposals", "anchors, top-k, decoding, clipping and NMS of all levels and images",
          (("", "generate_proposals", "generate_proposals-top_1000_800x1344-n1-"),)),
    Stage("RoIAlign over the pyramid", "level assignment and pooling of all levels in one kernel",
          (("forward", "multiscale_roi_align", f"multiscale_roi_align-{_POOLER}-forward"),
           ("backward", "multiscale_roi_align", f"multiscale_roi_align-{_POOLER}-backward"))),
    Stage("RetinaNet detections", "score threshold, top-k, decoding, clipping and NMS of all levels",
          (("", "select_detections", "select_detections-retinanet_91_classes_800x1344-n1-"),)),
    Stage("Training targets and loss", "anchor matching without an IoU matrix; focal loss with its gradient",
          (("matching", "match_anchors", "match_anchors-20_gts"),
           ("focal loss", "sigmoid_focal_loss", "sigmoid_focal_loss-retinanet_91_classes_800x1344-n1-"))),
    Stage("Masks and keypoints", "pasting of all masks; decoding of all heatmaps",
          (("masks", "paste_masks", "paste_masks-100_masks"),
           ("keypoints", "heatmaps_to_keypoints", "heatmaps_to_keypoints-20_people"))),
)  # fmt: skip


def _speedup(folder: Path, family: str, start: str) -> float:
    """How many times as fast as torchvision fpn_fast is in the first case whose name begins with `start`."""
    results = load(folder / f"{family}.json")
    if family == "detectors":
        named = {}
        for row in results["rows"]:
            kind = "training" if row["training"] else "inference"
            name = f"{row['model']}-{kind}-{row['size'][0]}x{row['size'][1]}-n{row['batch']}"
            named.setdefault(name, {})[row["provider"]] = row
        row = named[start]["fpn_fast"]
    else:
        row = next(rows["cpp"] for case, rows in by_case(results).items() if str(case).startswith(start))
    return float(row["speedup"]["eager"])


def ratios(folder: Path) -> Iterator[tuple[Stage, list[tuple[str, float]]]]:
    """Each stage with (what, ratio) of its cases, from the results in `folder`."""
    for stage in STAGES:
        yield stage, [(what, _speedup(folder, family, start)) for what, family, start in stage.measured]


def _text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _place(folder: Path) -> tuple[dict[str, Any], str]:
    machine = json.loads((folder / "top_down.json").read_text())["machine"]
    return machine, f"{machine['device']}, {machine['threads']} threads, torch {machine['torch'].partition('+')[0]}"


def table(folder: Path) -> str:
    """Markdown of the README's table."""
    lines = ["| stage | fused | speed-up over torchvision |", "| --- | --- | --- |"]
    for stage, found in ratios(folder):
        values = ", ".join(f"{what} {_text(ratio)}".strip() for what, ratio in found)
        lines.append(f"| {stage.name} | {stage.fused} | {values} |")
    machine, place = _place(folder)
    note = f"{place}, {machine['date']}, one 800x1344 image, float32 (training steps: two 320x544 images)."
    return "\n".join(lines) + f"\n\n{note}\n"


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


def plot(folder: Path) -> str:
    """The README's plot as SVG: a bar for each ratio, on a logarithmic scale, slower than torchvision to the left."""
    bars = [(f"{stage.name.removesuffix(', whole')}{', ' if what else ''}{what}", ratio, "whole" in stage.name)
            for stage, found in ratios(folder) for what, ratio in found]  # fmt: skip
    _, place = _place(folder)
    title = f"Speed-up over torchvision, CPU: {place}"
    left, width, step, top = 280, 400, 24, 64
    low = min(0.0, *(math.log2(ratio) for _, ratio, _ in bars))
    scale = width / (max(math.log2(ratio) for _, ratio, _ in bars) - low)
    one = left - low * scale
    body = [
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        '<text class="note" x="16" y="46">800x1344, one image, float32; training steps: two 320x544 images. '
        "Logarithmic scale; the line is torchvision.</text>",
    ]
    for i, (label, ratio, whole) in enumerate(bars):
        y, end = top + i * step, one + math.log2(ratio) * scale
        kind = "slower" if ratio < 1 else "whole" if whole else "stage"
        body += [
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{min(one, end):.1f}" y="{y}" width="{abs(end - one):.1f}" height="17" rx="2"/>',
            f'<text x="{max(one, end) + 6:.1f}" y="{y + 13}">{_text(ratio)}</text>',
        ]
    bottom = top + len(bars) * step
    body.append(f'<line x1="{one:.1f}" y1="{top - 6}" x2="{one:.1f}" y2="{bottom}"/>')
    return _SVG.format(height=bottom + 12, title=escape(title), body="\n".join(body))
