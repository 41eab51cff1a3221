# SPDX-License-Identifier: Apache-2.0
"""Operations and host waits of a training step, forward and backward, counted on a CPU as they would be on a GPU.

    python -m benchmarks.training_waits
    python -m benchmarks.training_waits --json benchmarks/results/training_waits.json

What is counted, and how, is said in `fpn_fast.bench.counting`. The optimiser is left out: PyTorch's own, on all sides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fpn_fast
from fpn_fast.bench.counting import Count, count
from fpn_fast.bench.machine import commit
from fpn_fast.bench.rows import write_text
from fpn_fast.nn.static_sampling import use_static_sampling

MODELS: dict[str, Callable[..., nn.Module]] = {
    "Faster R-CNN": FasterRCNN,
    "Mask R-CNN": MaskRCNN,
    "RetinaNet": RetinaNet,
}
FORMS: dict[str, Callable[[nn.Module], object]] = {
    "torchvision": lambda model: None,
    "accelerated": fpn_fast.accelerate,
    "accelerated, static sampling": lambda model: (fpn_fast.accelerate(model), use_static_sampling(model)),
}
BATCHES = (1, 2)
# Counts depend neither on the size nor on the backbone.
SIDE = 96


def step_of(model: nn.Module, images: int) -> Callable[[], None]:
    """One forward and backward on pictures with two boxes each."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, SIDE, SIDE, generator=generator) for _ in range(images)]
    boxes = torch.tensor([[8.0, 10, 40, 44], [30.0, 20, 90, 80]])
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 10:44, 8:40] = masks[1, 20:80, 30:90] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in range(images)]

    def run() -> None:
        with torch.enable_grad():
            sum(model(pictures, targets).values()).backward()

    return run


def count_step(name: str, form: str, images: int) -> Count:
    """What a step of a model in one of its forms does."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = MODELS[name](backbone, num_classes=3, min_size=SIDE, max_size=SIDE).train()
    FORMS[form](model)
    # Draws the size that an image is resized to, with numbers of the host: no GPU is waited for.
    with mock.patch.object(GeneralizedRCNNTransform, "torch_choice", lambda transform, sizes: sizes[0]):
        return count(step_of(model, images))


def rows() -> list[dict[str, Any]]:
    """One row for each model, batch and form."""
    found = []
    for name in MODELS:
        for images in BATCHES:
            for form in FORMS:
                if "static" in form and name == "RetinaNet":
                    # It takes all anchors.
                    continue
                counted = count_step(name, form, images)
                waits = {"waits": counted.waits.total(), "waits_by_cause": dict(sorted(counted.waits.items()))}
                found.append({"model": name, "batch": images, "form": form, "operations": counted.operations, **waits})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| training step | N | form | operations | host waits |", "| --- | ---: | --- | ---: | ---: |"]
    for row in found:
        lines.append(f"| {row['model']} | {row['batch']} | {row['form']} | {row['operations']} | {row['waits']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_waits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args(arguments)
    found = rows()
    print(table(found))
    if options.json is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
        lines = ",\n".join(json.dumps(row) for row in found)
        head = json.dumps({**versions, "commit": commit()})[1:-1]
        write_text(options.json, f'{{{head},\n"rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
