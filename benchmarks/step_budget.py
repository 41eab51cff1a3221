# SPDX-License-Identifier: Apache-2.0
"""What a step of three detectors is made of, before and after accelerate(); see fpn_fast/profile.py.

    python -m benchmarks.step_budget --bandwidth 4000 --tflops 500        every table; the last column models an H200
    python -m benchmarks.step_budget --model "Faster R-CNN" --measure     rates of this machine
    python -m benchmarks.step_budget --json benchmarks/results/step_budget.json

ResNet-50 with frozen batch norm and three trainable stages, as torchvision's pretrained detectors have it; one image of
800x1344 in float32. A training step is forward and backward; the optimiser is PyTorch's on all sides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fpn_fast
from benchmarks.detectors import build
from fpn_fast.__main__ import ends_with_its_reader
from fpn_fast.bench import report
from fpn_fast.bench.machine import commit
from fpn_fast.bench.rows import write_rows
from fpn_fast.bench.svg import bars
from fpn_fast.nn import pack_targets
from fpn_fast.nn.static_sampling import use_static_sampling
from fpn_fast.profile import Budget, budget, measured_rates

SIZE, SMALL = (800, 1344), (96, 128)
TARGETS = 8
MODELS = {"Faster R-CNN": "faster_rcnn", "Mask R-CNN": "mask_rcnn", "RetinaNet": "retinanet"}
VARIANTS: dict[str, Callable[[Any], object]] = {
    "torchvision": lambda model: None,
    "accelerated": fpn_fast.accelerate,
    "accelerated, static sampling": lambda model: (fpn_fast.accelerate(model), use_static_sampling(model)),
    "StaticTraining": fpn_fast.accelerate,
    "StaticDetector": fpn_fast.accelerate,
}
#: The mode of a variant that has only one.
MODES = {"accelerated, static sampling": "training", "StaticTraining": "training", "StaticDetector": "evaluation"}


def targets(name: str, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Of one image: objects of all sizes, from an eighth of the image to the whole."""
    corners = torch.linspace(0.875, 0, TARGETS)[:, None] * torch.tensor(size[::-1])
    boxes = torch.cat([corners, torch.tensor(size[::-1]).expand(TARGETS, 2)], 1)
    labels = torch.arange(1, TARGETS + 1)
    masks = {"masks": torch.ones(TARGETS, *size, dtype=torch.uint8)} if name == "Mask R-CNN" else {}
    return [{"boxes": boxes, "labels": labels, **masks}]


def cases(models: list[str]) -> Iterator[tuple[str, str, str]]:
    """(model, "training" or "evaluation", variant)."""
    for name in models:
        for mode in ("training", "evaluation"):
            for variant in VARIANTS:
                samples = variant != "accelerated, static sampling" or name != "RetinaNet"
                if MODES.get(variant, mode) == mode and samples:
                    yield name, mode, variant


def count_case(name: str, mode: str, variant: str, size: tuple[int, int] = SIZE) -> Budget:
    model = build(MODELS[name], size, [torch.rand(3, *SMALL)]).train(mode == "training")
    VARIANTS[variant](model)
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator)]
    if variant == "StaticDetector":
        return budget(fpn_fast.StaticDetector(model, size, 1), torch.stack(images))
    if variant == "StaticTraining":
        training = fpn_fast.StaticTraining(model, size, 1, max_targets=TARGETS)
        return budget(training, torch.stack(images), pack_targets(targets(name, size), TARGETS, canvas=size))
    return budget(model, images, targets(name, size) if mode == "training" else None)


def by_case(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(model, mode) -> variant -> its parts."""
    grouped: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        grouped.setdefault((row["model"], row["mode"]), {})[row["variant"]] = row["parts"]
    return grouped


#: Title, key, unit, format.
COLUMNS = (
    ("operators", "operators", 1, ".0f"),
    ("GB", "bytes", 1e9, ".2f"),
    ("GFLOP", "flops", 1e9, ".0f"),
    ("host synchronisations", "syncs", 1, ".0f"),
)
BOTH = ("torchvision", "accelerated")
#: The columns of a table of both; the FLOPs are the same.
OF_BOTH = [(column, which) for column in COLUMNS for which in BOTH if (column[0], which) != ("GFLOP", BOTH[1])]


def _cell(parts: dict[str, Any], part: str, column: tuple[str, str, float, str]) -> str:
    _, key, unit, form = column
    return format(parts.get(part, {key: 0})[key] / unit, form)


def table(found: dict[str, Any], words: tuple[str, ...] = ()) -> str:
    """Markdown. With a mode as `words`: a line for each part of each model; without: a line for each whole step."""
    if words:
        titles = [column[0] if column[0] == "GFLOP" else f"{column[0]}: {which}" for column, which in OF_BOTH]
        lines = [["model", "part", *titles]]
    else:
        lines = [["step", "variant", *(column[0] for column in COLUMNS)]]
    for (model, mode), variants in by_case(found).items():
        if not words:
            for variant, parts in variants.items():
                lines.append([f"{model}, {mode}", variant, *(_cell(parts, "total", column) for column in COLUMNS)])
        elif mode in words:
            for part in variants[BOTH[0]]:
                lines.append([model, part, *(_cell(variants[which], part, column) for column, which in OF_BOTH)])
    note = (
        "Counted, not timed: one image of 800x1344, float32, ResNet-50 with frozen batch norm, three trainable stages; "
        f"torch {found['torch']}, torchvision {found['torchvision']}, commit {found['commit'] or 'unknown'}."
    )
    return f"{report.table(lines, left=2)}\n\n{note}\n"


def plot(found: dict[str, Any]) -> str:
    """An SVG: the bytes of each part of a step of Faster R-CNN, torchvision's and accelerated."""
    rows = []
    for (model, mode), variants in by_case(found).items():
        for part in variants["torchvision"] if model == "Faster R-CNN" else ():
            for variant, kind in (("torchvision", "stage"), ("accelerated", "whole")):
                size = variants[variant].get(part, {"bytes": 0})["bytes"] / 1e9
                rows.append((f"{mode}, {part}, {variant}", kind, size, f"{size:.2f}"))
    note = "GB of all operators' inputs and outputs, counted, not timed; one 800x1344 image, float32."
    return bars("Faster R-CNN R50-FPN: bytes of a step, by part", note, rows)


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_budget", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", nargs=2, type=int, default=SIZE, metavar=("H", "W"), help="pixels")
    parser.add_argument("--bandwidth", type=float, help="GB/s, for a column of modelled times")
    parser.add_argument("--tflops", type=float, help="TFLOP/s, for the same")
    parser.add_argument("--measure", action="store_true", help="measure both rates on this machine")
    parser.add_argument("--json", type=Path, help="file for the counts")
    parser.add_argument("--plot", type=Path, help="file for an SVG, with Faster R-CNN among the models")
    options = parser.parse_args(arguments)
    if (options.bandwidth is None) != (options.tflops is None):
        parser.error("--bandwidth and --tflops go together")
    rates = None if options.bandwidth is None else (options.bandwidth, options.tflops)
    if options.measure:
        rates = measured_rates("cuda" if torch.cuda.is_available() else "cpu")
    head = {**{name: importlib.metadata.version(name) for name in ("torch", "torchvision")}, "commit": commit()}
    rows = []
    for name, mode, variant in cases(options.model):
        counted = count_case(name, mode, variant, tuple(options.size))
        print(f"{name}, {mode}, {variant}\n\n{counted.table(rates)}\n", flush=True)
        rows.append({"model": name, "mode": mode, "variant": variant, **counted.as_dict()})
    found = {**head, "rows": rows}
    if options.json is not None:
        write_rows(options.json, head, rows)
    if options.plot is not None:
        options.plot.write_text(plot(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
