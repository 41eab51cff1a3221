# SPDX-License-Identifier: Apache-2.0
"""Operations and host waits of a detector's selections, counted on a CPU as they would be on a GPU.

    python -m benchmarks.census                                          the table
    python -m benchmarks.census --json benchmarks/results/census.json    and the file of the README's table

What counts as one is said in fpn_fast/bench/counting.py; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection import roi_heads

from fpn_fast import nn
from fpn_fast.bench import scenes, selection
from fpn_fast.bench.cases import FAMILIES, tiny
from fpn_fast.bench.counting import count
from fpn_fast.bench.machine import commit
from fpn_fast.bench.rows import write_text

BATCHES = (1, 8)
DETECTIONS, PROPOSALS, CLASSES = 100, 1000, 91


#: (torchvision's call, ours).
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def _of_family(family: str, batch: int, small: bool) -> Pair:
    """A family's first case, in batches of `batch`."""
    case = FAMILIES[family]("cpu")[0]
    case = replace(tiny(case) if small else case, batch=batch)
    op = selection.OPS[family](case)
    inputs = op.inputs(case, torch.device("cpu"))
    return lambda: op.eager(inputs), lambda: op.fused(inputs)


def _roi_head(batch: int, small: bool) -> Pair:
    """Faster R-CNN's choice of detections among 1,000 proposals an image."""
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
    calls = _of_family("paste_masks", 1, small)
    theirs, mine = (lambda call=call: [call() for _ in range(batch)] for call in calls)
    return theirs, mine


STAGES: dict[str, Callable[[int, bool], Pair]] = {
    "RPN, 800x1344, 1000 candidates a level": lambda batch, small: _of_family("generate_proposals", batch, small),
    "RetinaNet, 800x1344, 91 classes": lambda batch, small: _of_family("select_detections", batch, small),
    "RoI head, 1000 proposals, 91 classes": _roi_head,
    "mask pasting, 100 masks": _masks,
}


def rows(batches: Sequence[int] = BATCHES, small: bool = False) -> list[dict[str, Any]]:
    """One row for each stage, batch and library; `small` with tiny inputs."""
    found = []
    for stage, pair_of in STAGES.items():
        for batch in batches:
            for library, call in zip(("torchvision", "fpn_fast"), pair_of(batch, small), strict=True):
                with torch.no_grad():
                    counted = count(call)
                found.append(
                    {
                        "stage": stage,
                        "batch": batch,
                        "library": library,
                        "operations": counted.operations,
                        "waits": counted.waits.total(),
                        "waits_by_cause": dict(sorted(counted.waits.items())),
                    }
                )
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown of a census."""
    lines = [
        "| stage | N | operations: torchvision | fpn_fast | host synchronisations: torchvision | fpn_fast |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_key = {(row["stage"], row["batch"], row["library"]): row for row in found["rows"]}
    for stage, batch in dict.fromkeys((row["stage"], row["batch"]) for row in found["rows"]):
        numbers = [
            str(by_key[stage, batch, library][what])
            for what in ("operations", "waits")
            for library in ("torchvision", "fpn_fast")
        ]
        lines.append(f"| {stage} | {batch} | {' | '.join(numbers)} |")
    versions = f"torch {found['torch']}, torchvision {found['torchvision']}, commit {found['commit'] or 'unknown'}"
    note = (
        "Counted on a CPU, not timed: operations that the dispatcher hands to a backend, without views and "
        f"allocations, and the host synchronisations that the same calls cause on a GPU; {versions}."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.census", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the counts")
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to walk the code")
    options = parser.parse_args(arguments)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    found = {**versions, "commit": commit(), "rows": rows(small=options.tiny)}
    print(table(found))
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in found.pop("rows"))
        write_text(options.json, f'{{{json.dumps(found)[1:-1]},\n"rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
