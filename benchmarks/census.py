# SPDX-License-Identifier: Apache-2.0
"""Operations and host synchronisations, counted on a CPU as they would be on a GPU; see fpn_fast/bench/counting.py.

    python -m benchmarks.census                                                   a detector's selections
    python -m benchmarks.census --training                                        a training step, forward and backward
    python -m benchmarks.census --json benchmarks/results/census.json             and the results of the docs' table
    python -m benchmarks.census --training --json benchmarks/results/training_syncs.json

A training step leaves out the optimiser, which is PyTorch's on all sides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet, roi_heads
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fpn_fast
from fpn_fast import nn
from fpn_fast.__main__ import ends_with_its_reader
from fpn_fast.bench import report, scenes
from fpn_fast.bench.cases import FAMILIES, tiny
from fpn_fast.bench.counting import Count, count
from fpn_fast.bench.machine import commit
from fpn_fast.bench.providers import op_of
from fpn_fast.bench.rows import write_rows
from fpn_fast.nn.static_sampling import use_static_sampling

DETECTIONS, PROPOSALS, CLASSES = 100, 1000, 91
#: (torchvision's call, ours).
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def _of_family(family: str, batch: int, small: bool) -> Pair:
    """A family's first case, for `batch` images."""
    case = FAMILIES[family]("cpu")[0]
    op = op_of(case := replace(tiny(case) if small else case, batch=batch))
    inputs = op.inputs(torch.device("cpu"))
    return lambda: op.eager(inputs), lambda: op.fused(inputs)


def _roi_head(batch: int, small: bool) -> Pair:
    """Faster R-CNN's selection of detections from 1,000 proposals per image."""
    rows, size = (20, (50, 84)) if small else (PROPOSALS, (800, 1344))
    generator = torch.Generator().manual_seed(0)
    boxes, _, labels = scenes.detections(rows, CLASSES - 1, *size)
    logits = torch.randn(batch * rows, CLASSES, generator=generator)
    logits[torch.arange(batch * rows), labels.repeat(batch) + 1] += 6
    deltas = torch.randn(batch * rows, 4 * CLASSES, generator=generator) * 0.3
    arguments = (None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, DETECTIONS)

    def call(kind: type) -> Callable[[], Any]:
        heads = kind(*arguments).eval()
        return lambda: heads.postprocess_detections(logits, deltas, [boxes] * batch, [size] * batch)

    return call(roi_heads.RoIHeads), call(nn.RoIHeads)


def _masks(batch: int, small: bool) -> Pair:
    """Mask R-CNN's pasting, which both do image by image."""
    theirs, mine = (lambda c=call: [c() for _ in range(batch)] for call in _of_family("paste_masks", 1, small))
    return theirs, mine


STAGES: dict[str, Callable[[int, bool], Pair]] = {
    "RPN, 800x1344, 1000 candidates a level": lambda batch, small: _of_family("generate_proposals", batch, small),
    "RetinaNet, 800x1344, 91 classes": lambda batch, small: _of_family("select_detections", batch, small),
    "RoI head, 1000 proposals, 91 classes": _roi_head,
    "mask pasting, 100 masks": _masks,
}

MODELS: dict[str, Callable[..., torch.nn.Module]] = {
    "Faster R-CNN": FasterRCNN,
    "Mask R-CNN": MaskRCNN,
    "RetinaNet": RetinaNet,
}
VARIANTS: dict[str, Callable[[torch.nn.Module], object]] = {
    "torchvision": lambda model: None,
    "accelerated": fpn_fast.accelerate,
    "accelerated, static sampling": lambda model: (fpn_fast.accelerate(model), use_static_sampling(model)),
}
#: Pixels; counts depend neither on the size nor on the backbone.
SIDE = 96


def _counted(counted: Count) -> dict[str, Any]:
    causes = dict(sorted(counted.syncs.items()))
    return {"operations": counted.operations, "syncs": counted.syncs.total(), "syncs_by_cause": causes}


def rows(batches: Sequence[int] = (1, 8), small: bool = False) -> list[dict[str, Any]]:
    """One row for each stage, batch and library; `small` with tiny inputs."""
    found = []
    for stage, pair_of in STAGES.items():
        for batch in batches:
            for library, call in zip(("torchvision", "fpn_fast"), pair_of(batch, small), strict=True):
                with torch.no_grad():
                    found.append({"stage": stage, "batch": batch, "library": library, **_counted(count(call))})
    return found


def count_step(name: str, variant: str, images: int) -> Count:
    """What a forward and backward of a model does, on images with two objects each."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = MODELS[name](backbone, num_classes=3, min_size=SIDE, max_size=SIDE).train()
    VARIANTS[variant](model)
    batch = [torch.rand(3, SIDE, SIDE) for _ in range(images)]
    boxes = torch.tensor([[8.0, 10, 40, 44], [30.0, 20, 90, 80]])
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 10:44, 8:40] = masks[1, 20:80, 30:90] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in range(images)]

    def run() -> None:
        with torch.enable_grad():
            sum(model(batch, targets).values()).backward()

    # The transform draws the size of an image from values on the host: no synchronisation.
    with mock.patch.object(GeneralizedRCNNTransform, "torch_choice", lambda transform, sizes: sizes[0]):
        return count(run)


def training_rows(batches: Sequence[int] = (1, 2)) -> list[dict[str, Any]]:
    """One row for each model, batch and variant. RetinaNet samples no anchors."""
    return [
        {"model": name, "batch": images, "variant": variant, **_counted(count_step(name, variant, images))}
        for name in MODELS
        for images in batches
        for variant in VARIANTS
        if name != "RetinaNet" or "static" not in variant
    ]


def table(found: dict[str, Any]) -> str:
    if "model" in found["rows"][0]:
        lines = [["training step", "N", "variant", "operations", "host synchronisations"]]
        lines += [
            [row["model"], str(row["batch"]), row["variant"], str(row["operations"]), str(row["syncs"])]
            for row in found["rows"]
        ]
        return report.table(lines, left=3) + "\n"
    lines = [["stage", "N", *(f"{what}: {library}" for what in ("operations", "host synchronisations")
                              for library in ("torchvision", "fpn_fast"))]]  # fmt: skip
    by_key = {(row["stage"], row["batch"], row["library"]): row for row in found["rows"]}
    for stage, batch in dict.fromkeys((row["stage"], row["batch"]) for row in found["rows"]):
        both = [by_key[stage, batch, library] for library in ("torchvision", "fpn_fast")]
        lines.append([stage, str(batch), *(str(row[what]) for what in ("operations", "syncs") for row in both)])
    note = (
        "Counted on a CPU, not timed: operations that the dispatcher hands to a backend, without views and "
        f"allocations, and the host synchronisations that the same calls cause on a GPU; torch {found['torch']}, "
        f"torchvision {found['torchvision']}, commit {found['commit'] or 'unknown'}."
    )
    return f"{report.table(lines, left=1)}\n\n{note}\n"


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.census", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--training", action="store_true", help="count a training step in place of the selections")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args(arguments)
    head = {**{name: importlib.metadata.version(name) for name in ("torch", "torchvision")}, "commit": commit()}
    found = training_rows() if options.training else rows()
    if options.json is not None:
        write_rows(options.json, head, found)
    print(table({**head, "rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
