# SPDX-License-Identifier: Apache-2.0
"""What a step of a detector is made of: operators, bytes, FLOPs and host synchronisations of each of its parts.

Counted, not timed, on any device as it would be on a GPU; :mod:`fpn_fast.bench.counting` says how. Needs torchvision.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast.bench.counting import Count, counted
from fpn_fast.bench.report import table
from fpn_fast.bench.svg import bars
from fpn_fast.bench.timing import timer
from fpn_fast.integrations import Entry, accelerate

#: Part -> names of its modules in models of torchvision, detectron2 and mmdetection. Modules inside belong to it too.
#: In a wrapper such as DistributedDataParallel they are below ``module`` or ``model``.
PARTS = {
    "transform": r"transform|data_preprocessor",
    "body": r"backbone(\.body|\.bottom_up)?",
    "FPN": r"backbone\.fpn|neck",
    "RPN": r"rpn(_head)?|proposal_generator",
    "pooler": r"roi_heads?\.\w*(roi_pool|pooler|roi_extractor)",
    "heads": r"head|bbox_head|roi_heads?",
}
#: The rest of a model, such as RetinaNet's selection of detections; losses with matching and sampling; gradients.
REST, LOSSES, BACKWARD = "detector", "losses", "backward"
#: Names of functions that match, sample and compute losses.
_LOSSES = re.compile(
    r"loss|^_?(sub)?sample$|training_samples$|sample_(anchors|proposals)$|targets_to_|get_targets|^_matched$"
)
#: Gigabytes per second; TFLOP per second.
Rates = tuple[float, float]


@dataclass(frozen=True)
class Budget:
    """What :func:`budget` counted: part -> its counts, and the modules that accelerate() could still swap.

    ``print`` shows a table; :meth:`as_dict` gives plain data and :meth:`plot` a drawing.
    """

    parts: dict[str, Count]
    could_swap: list[Entry]

    def as_dict(self) -> dict[str, Any]:
        """{"parts": {part: {"operators", "bytes", ...}, ..., "total": {...}}, "could_swap": [name, ...]}"""
        parts = {part: _row(count) for part, count in self.parts.items()}
        total = {what: sum(row[what] for row in parts.values()) for what in _ROW}
        return {"parts": {**parts, "total": total}, "could_swap": [entry.name for entry in self.could_swap]}

    def table(self, rates: Rates | None = None) -> str:
        """Markdown: a line for each part. `rates`: GB/s and TFLOP/s, which add the time of a roofline model."""
        lines = [["part", "operators", "GB", "GFLOP", "host synchronisations", "uploads"]]
        lines[0] += ["ms, modelled"] if rates else []
        for part, row in self.as_dict()["parts"].items():
            cells = [str(row["operators"]), f"{row['bytes'] / 1e9:.2f}", f"{row['flops'] / 1e9:.1f}"]
            cells += [str(row["syncs"]), str(row["uploads"])]
            lines.append([part, *cells, *([f"{self._seconds(part, rates) * 1e3:.2f}"] if rates else [])])
        found = table(lines, left=1)
        if rates:
            found += f"\n\nThe last column is a model, not measured: {rates[0]:g} GB/s and {rates[1]:g} TFLOP/s."
        if self.could_swap:
            found += f"\n\naccelerate() could swap {', '.join(entry.name or 'the model' for entry in self.could_swap)}."
        return found

    def plot(self, title: str = "Bytes of a step, by part") -> str:
        """An SVG of horizontal bars, one for each part."""
        sizes = {part: count.bytes.total() / 1e9 for part, count in self.parts.items()}
        note = "GB of all operators' inputs and outputs, counted, not timed."
        return bars(title, note, [(part, "stage", size, f"{size:.2f}") for part, size in sizes.items()])

    def _seconds(self, part: str, rates: Rates) -> float:
        """Each operator takes the longer of its time for bytes and for FLOPs."""
        counts = self.parts.values() if part == "total" else [self.parts[part]]
        return sum(
            max(count.bytes[name] / (rates[0] * 1e9), count.flops[name] / (rates[1] * 1e12))
            for count in counts
            for name in count.operators
        )

    def __str__(self) -> str:
        return self.table()


_ROW = ("operators", "bytes", "flops", "syncs", "uploads")


def _row(count: Count) -> dict[str, int]:
    values = count.operations, count.bytes.total(), count.flops.total(), count.syncs.total(), count.uploads
    return dict(zip(_ROW, values, strict=True))


def budget(model: nn.Module, images: Any, targets: Any = None) -> Budget:
    """Counts one step of `model` by part: in training forward and backward without the optimiser, else an evaluation.

    A copy of the model runs twice, and the second run is counted. The model, its gradients and its statistics and the
    state of random numbers on the CPU stay as they are.

    Args:
        model: a detector of torchvision, detectron2 or mmdetection, accelerated or not, in training or evaluation.
        images: its first argument. On a GPU the counts are the same as on a CPU.
        targets: its second argument, if it takes one. In training the model must return its losses by name:
            mmdetection's does so in a module that calls it as ``self.model(images, targets, mode="loss")``.

    Raises:
        TypeError: `model` is not a module, or returned no losses in training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    copied = copy.deepcopy(model)
    part_of = {id(module): part for name, module in copied.named_modules() if (part := _part(name, module))}
    parts: dict[str, Count] = defaultdict(Count)
    backward = False

    def running() -> Count:
        """Of the innermost call of a part that is on the stack."""
        return parts[BACKWARD if backward else _part_on_stack(part_of)]

    def step() -> None:
        nonlocal backward
        copied.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(model.training):
            found = copied(images) if targets is None else copied(images, targets)
            if not model.training:
                return
            if not isinstance(found, dict) or not found or not all(isinstance(each, Tensor) for each in found.values()):
                raise TypeError(f"in training the model must return a dictionary of losses, got {type(found).__name__}")
            backward = True
            try:
                loss: Any = sum(found.values())
                loss.backward()
            finally:
                backward = False

    with torch.random.fork_rng(devices=[]):
        counted(step, running)
    order = [*PARTS, REST, LOSSES, BACKWARD]
    ordered = {part: parts[part] for part in order if part in parts and parts[part].operations}
    return Budget(ordered, accelerate(copied).swapped)


def measured_rates(device: torch.device | str) -> Rates:
    """GB/s of a copy of 256 MB and TFLOP/s of a float32 product of 2048 x 2048 matrices, medians, on `device`."""
    source = torch.rand(1 << 26, device=device)
    target, side = torch.empty_like(source), 2048
    matrix = source[: side * side].view(side, side)
    clock = timer(torch.device(device).type)

    def seconds(call: Any) -> float:
        clock.elapsed(call)
        return sorted(clock.elapsed(call) for _ in range(5))[2]

    copying, product = seconds(lambda: target.copy_(source)), seconds(lambda: torch.mm(matrix, matrix))
    return 2 * source.nbytes / copying / 1e9, 2 * side**3 / product / 1e12


def _part(name: str, module: nn.Module) -> str | None:
    if hasattr(module, "bottom_up"):
        # detectron2's pyramid, which has the name of a backbone and calls the body.
        return "FPN"
    return next((part for part, names in PARTS.items() if re.fullmatch(rf"(mod(el|ule)\.)*({names})", name)), None)


def _part_on_stack(part_of: dict[int, str]) -> str:
    """Of the frames up to this file's own, which call the model."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename != __file__:
        if _LOSSES.search(frame.f_code.co_name):
            return LOSSES
        if part := part_of.get(id(frame.f_locals.get("self"))):
            return part
        frame = frame.f_back
    return REST
