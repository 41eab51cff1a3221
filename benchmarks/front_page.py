# SPDX-License-Identifier: Apache-2.0
"""The README's plot and its table of measured ratios, both made from committed results of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import detectors
from fpn_fast.bench.report import bars, by_case, load, ratio_text
from fpn_fast.bench.report import table as markdown_table

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
    Stage("Faster R-CNN R50, whole", "every stage below that it contains",
          (("inference", "detectors", "faster_rcnn-inference-800x1344-n1"),
           ("training step", "detectors", "faster_rcnn-training-320x544-n2"))),
    Stage("RetinaNet R50, whole", "every stage below that it contains",
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
        row = detectors.by_case(results)[start]["fpn_fast"]
    else:
        row = next(rows["cpp"] for case, rows in by_case(results).items() if str(case).startswith(start))
    return float(row["speedup"]["eager"])


def ratios(folder: Path) -> Iterator[tuple[Stage, list[tuple[str, float]]]]:
    """Each stage with (what, ratio) of its cases, from the results in `folder`."""
    for stage in STAGES:
        yield stage, [(what, _speedup(folder, family, start)) for what, family, start in stage.measured]


def _place(folder: Path) -> str:
    machine = load(folder / "top_down.json")["machine"]
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch'].partition('+')[0]}"


def table(folder: Path) -> str:
    lines = [["stage", "fused", "speed-up over torchvision"]]
    for stage, found in ratios(folder):
        values = ", ".join(f"{what} {ratio_text(ratio)}".strip() for what, ratio in found)
        lines.append([stage.name, stage.fused, values])
    families = {family for stage in STAGES for _, family, _ in stage.measured}
    dates = sorted({load(folder / f"{family}.json")["machine"]["date"] for family in families})
    date = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    note = f"{_place(folder)}, {date}, one 800x1344 image, float32 (training steps: two 320x544 images)."
    return f"{markdown_table(lines, left=3)}\n\n{note}\n"


def plot(folder: Path) -> str:
    ratio_bars = [
        (f"{stage.name.removesuffix(', whole')}{', ' if what else ''}{what}", ratio,
         "whole" if "whole" in stage.name else "stage")
        for stage, found in ratios(folder) for what, ratio in found
    ]  # fmt: skip
    note = (
        "800x1344, one image, float32; training steps: two 320x544 images. Logarithmic scale; the line is torchvision."
    )
    return bars(f"Speed-up over torchvision, CPU: {_place(folder)}", note, ratio_bars)
