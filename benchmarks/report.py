# SPDX-License-Identifier: Apache-2.0
"""Writes committed results into the README, the docs and the plots.

    python benchmarks/report.py          writes every table and the plots anew
    python benchmarks/report.py --check  exits with 1 where one of them differs from the results

A table stands between ``<!-- table: NAME [WORD ...] -->`` and ``<!-- /table -->``. NAME is a family of
``fpn_fast bench``, or ``detectors`` (benchmarks/detectors.py), ``step_budget`` (benchmarks/step_budget.py),
``ablation`` or ``ablation_float64`` (examples/ablation.py), ``gpu_model`` (benchmarks/gpu_model.py), ``family``
(benchmarks/family.py), or ``summary`` or
``session``, which are the README's. With WORDs, a family's table has the cases whose name holds all of them, that of
step_budget the parts of steps in that mode, and that of gpu_model a family's figures or the constants. Times are of
the CPU that was measured last.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import detectors, family_drawings, gpu_model, step_budget  # noqa: E402
from benchmarks import family as family_counts  # noqa: E402
from examples import ablation  # noqa: E402
from fpn_fast.__main__ import ends_with_its_reader  # noqa: E402
from fpn_fast.bench.cases import FAMILIES  # noqa: E402
from fpn_fast.bench.report import by_case, load, markdown, row_text  # noqa: E402
from fpn_fast.bench.report import table as markdown_table  # noqa: E402
from fpn_fast.bench.svg import bars  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "img" / "speedup.svg"
BUDGET_PLOT = PLOT.with_name("step-budget.svg")
_TABLE = re.compile(r"(<!-- table: (\w+)((?: \S+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)

_MERGE = "resnet50_fpn_800x1344-n1-float32-channels_last"
_POOLER = "box_1000_7x7_adaptive_spread-n1-float32-channels_last"
_BLOCK = "frozen_batch_norm-block_end_256x200x336-n1-float32-channels_last"


def _whole(model: str) -> tuple[tuple[str, ...], ...]:
    """A detector's inference and training step, in either memory format."""
    return tuple(
        (f"{what}{note}", "detectors", f"{model}-{case}", provider)
        for what, case in (("inference", "inference-800x1344-n1"), ("training step", "training-320x544-n2"))
        for note, provider in (("", "fpn_fast"), (" (channels_last)", "fpn_fast, channels_last"))
    )


#: The front page's rows: (stage of a detector, what is fused there, the cases that stand for it: what the ratio is of,
#: results file, start of the case's name, and the provider, if not "cpp"). The cases were chosen before they were
#: measured: 800x1344, one image, float32, the first in its family.
STAGES = (
    ("Faster R-CNN R50, whole", "every stage below that it contains", _whole("faster_rcnn")),
    ("RetinaNet R50, whole", "every stage below that it contains", _whole("retinanet")),
    ("Ends of a ResNet's blocks", "frozen batch norm, residual and ReLU in one pass",
     (("forward", "frozen_batch_norm", f"{_BLOCK}-forward"),
      ("backward", "frozen_batch_norm", f"{_BLOCK}-backward"))),
    ("FPN top-down merge", "upsampling and addition of all levels in one kernel",
     (("forward", "top_down", f"top_down-{_MERGE}-forward"),
      ("backward", "top_down", f"top_down-{_MERGE}-backward"))),
    ("Proposals and detections", "anchors, score threshold, top-k, decoding, clipping and NMS of all levels and images",
     (("RPN", "generate_proposals", "generate_proposals-top_1000_800x1344-n1-"),
      ("RetinaNet", "select_detections", "select_detections-retinanet_91_classes_800x1344-n1-"))),
    ("RoIAlign over the pyramid", "level assignment and pooling of all levels in one kernel",
     (("forward", "multiscale_roi_align", f"multiscale_roi_align-{_POOLER}-forward"),
      ("backward", "multiscale_roi_align", f"multiscale_roi_align-{_POOLER}-backward"))),
    ("Training targets and loss", "anchor matching without an IoU matrix; focal loss with its gradient",
     (("matching", "match_anchors", "match_anchors-20_gts"),
      ("focal loss", "sigmoid_focal_loss", "sigmoid_focal_loss-retinanet_91_classes_800x1344-n1-"))),
    ("Masks and keypoints", "pasting of all masks; decoding of all heatmaps",
     (("masks", "paste_masks", "paste_masks-100_masks"),
      ("keypoints", "heatmaps_to_keypoints", "heatmaps_to_keypoints-20_people"))),
)  # fmt: skip


def ratios(folder: Path) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """Each stage, what is fused there, and how many times as fast as torchvision fpn_fast is in each of its cases."""
    for stage, fused, measured in STAGES:
        found = []
        for what, family, start, *provider in measured:
            results, name = load(folder / f"{family}.json"), provider[0] if provider else "cpp"
            cases: Any = detectors.by_case(results) if family == "detectors" else by_case(results)
            row = next(rows[name] for case, rows in cases.items() if str(case).startswith(start))
            found.append((what, float(row["speedup"]["eager"])))
        yield stage, fused, found


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def measured_last() -> Path:
    """The folder of the CPU that was measured last."""
    machines = {path.parent: load(path)["machine"] for path in sorted(RESULTS.glob("*/top_down.json"))}
    return max((path for path in machines if machines[path]["device_type"] == "cpu"), key=lambda p: machines[p]["date"])


def session(folder: Path) -> str:
    """What `bench` prints of a case."""
    case, rows = next(iter(by_case(load(folder / "select_detections.json")).items()))
    lines = ["$ fpn-fast bench --family select_detections", "...", str(case), *map(row_text, rows.values()), "...",
             f"written to fpn_fast_bench/{folder.name}: report.md, select_detections.json"]  # fmt: skip
    return "```\n" + "\n".join(lines) + "\n```\n"


def _place(folder: Path) -> str:
    machine = load(folder / "top_down.json")["machine"]
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch'].partition('+')[0]}"


def summary(folder: Path) -> str:
    """The README's table."""
    lines = [["stage", "fused", "speed-up over torchvision"]]
    for stage, fused, found in ratios(folder):
        lines.append([stage, fused, ", ".join(f"{what} {ratio_text(ratio)}".strip() for what, ratio in found)])
    families = {family for _, _, measured in STAGES for _, family, *_ in measured}
    dates = sorted({load(folder / f"{family}.json")["machine"]["date"] for family in families})
    date = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    note = f"{_place(folder)}, {date}, one 800x1344 image, float32 (training steps: two 320x544 images)."
    return f"{markdown_table(lines, left=3)}\n\n{note}\n"


def plot(folder: Path) -> str:
    """An SVG of horizontal bars on a logarithmic scale, for light and dark: what is slower points to the left."""
    found = []
    for stage, _, of_stage in ratios(folder):
        for what, ratio in of_stage:
            label = f"{stage.removesuffix(', whole')}{', ' if what else ''}{what}"
            kind = "slower" if ratio < 1 else "whole" if "whole" in stage else "stage"
            found.append((label, kind, math.log2(ratio), ratio_text(ratio)))
    title = f"Speed-up over torchvision, CPU: {_place(folder)}"
    note = (
        "800x1344, one image, float32; training steps: two 320x544 images. Logarithmic scale; the line is torchvision."
    )
    return bars(title, note, found)


def table(name: str, words: tuple[str, ...] = ()) -> str:
    """Markdown of one table."""
    if name in ("summary", "session"):
        return {"summary": summary, "session": session}[name](measured_last())
    if name == "gpu_model":
        return gpu_model.table(words)
    if name == "family":
        return family_counts.table(load(RESULTS / "family.json"))
    if name == "step_budget":
        return step_budget.table(load(RESULTS / "step_budget.json"), words)
    if name.startswith("ablation"):
        found = load(RESULTS / f"{name}.json")
        return ablation.table(found["rows"], found["command"])
    results = load(measured_last() / f"{name}.json")
    if name == "detectors":
        return detectors.table(results)
    known = [case for case in FAMILIES[name](results["machine"]["device_type"]) if all(w in str(case) for w in words)]
    return markdown(results, words, known=known)


def pages() -> dict[Path, str]:
    """Every file that holds figures, as it must be: README.md and the docs with tables, and the plots."""
    budgets = load(RESULTS / "step_budget.json")
    found = {PLOT: plot(measured_last()), BUDGET_PLOT: step_budget.plot(budgets), **family_drawings.pages()}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        if _TABLE.search(text):
            found[path] = _TABLE.sub(lambda of: of[1] + table(of[2], tuple(of[3].split())) + of[4], text)
    return found


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    options = parser.parse_args(arguments)
    differing = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in differing.items():
        if options.check:
            print(f"{path.relative_to(ROOT)} differs from the results; run python benchmarks/report.py")
        else:
            path.write_text(text)
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
