# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of segmented NMS, executed by the emulator and compared with plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from helpers.emulated_battery import Call, EmulatedBattery, runs

from fpn_fast import reference
from fpn_fast.ops.nms import CONVENTIONS

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    """Boxes of 8 to 108 pixels. Few different scores tie; groups are from `groups`, counts of each image its boxes;
    every eleventh is bad where `bad`; with `sparse` all scores but every one of that number are no numbers."""

    boxes: int
    batch: int = 1
    groups: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    side: float = 300.0
    scores: int = 10**6
    threshold: float = 0.5
    max_output: int | None = None
    convention: str = "torchvision"
    bad: bool = False
    sparse: int = 1

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.boxes + len(self.groups))
        shape = (self.batch, self.boxes)
        centers = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * self.side - 50
        sides = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 100 + 8
        boxes = torch.cat([centers - sides / 2, centers + sides / 2], -1).to(dtype)
        scores = torch.randint(0, self.scores, shape, generator=generator) / self.scores - 0.5
        if self.bad:
            for i, value in enumerate((NAN, INF, -INF, NAN)):
                boxes[:, i::11, i] = value
            scores[:, 5::13], scores[:, 6::13] = NAN, INF
        scores[:, torch.arange(self.boxes) % self.sparse != 0] = NAN
        groups = torch.tensor(self.groups or (0,))[
            torch.randint(0, max(len(self.groups), 1), shape, generator=generator)
        ]
        return boxes, scores.to(dtype), groups, torch.tensor(self.counts or (0,) * self.batch)


FAR = (-(2**62), -1, 0, 7, 2**62)
CASES = {
    "none": Case(0),
    "one": Case(1),
    "a_chunk": Case(64),
    "a_chunk_and_one": Case(65, threshold=0.2),
    "ties": Case(300, scores=7, threshold=0.3),
    "nothing_overlaps": Case(130, threshold=1.0),
    "everything_overlaps": Case(130, threshold=-1.0),
    "counts": Case(150, batch=4, counts=(150, 0, 70, 999), max_output=20),
    "groups": Case(300, batch=2, groups=FAR, scores=50, threshold=0.3, max_output=200),
    "groups_and_counts": Case(200, batch=3, groups=(3, 1), counts=(200, -2, 77), threshold=0.3, max_output=300),
    "a_group_each": Case(150, groups=tuple(range(150)), threshold=0.0),
    "mmcv": Case(200, groups=(1, 2), threshold=0.4, convention="mmcv"),
    "offset": Case(200, batch=2, groups=(1, 0, -3, 70000), counts=(200, 90), convention="torchvision_offset"),
    "offset_without_groups": Case(70, convention="torchvision_offset"),
    "bad_numbers": Case(200, batch=2, groups=(1, 2), scores=5, bad=True),
    "bad_numbers_offset": Case(200, groups=(1, 2), bad=True, convention="torchvision_offset"),
    "no_output": Case(70, max_output=0),
}
# One block per list; boxes of several chunks, in lists and groups; a group that reaches from the first region of 8192
# boxes into the second.
CASES |= {
    "many_images": Case(140, batch=64, counts=(140, 65, *[0] * 61, 3), threshold=0.3),
    "many_chunks": Case(1200, threshold=0.3),
    "many_windows": Case(2100, side=900.0, threshold=0.3),
    "many_groups": Case(1700, groups=(*[1] * 8, 2, 0), side=500.0, threshold=0.3),
    "two_regions": Case(8320, groups=tuple(range(20)), side=400.0, threshold=0.3),
}
# So much room that regions have 2048 boxes.
SMALL_REGIONS = Case(2944, batch=63, counts=(2200, *[0] * 62), side=900.0, threshold=0.3)


class TestSegmentedNms(EmulatedBattery):
    cases: ClassVar = {**CASES, "small_regions": SMALL_REGIONS}
    cpp = runs(CASES) + runs(("ties", "groups", "offset"), types=("float64",))
    triton = (
        *runs(("one", "a_chunk_and_one", "everything_overlaps", "groups_and_counts", "mmcv", "offset", "many_chunks")),
        "groups/channels_first/float64",
    )
    kernels = (
        "nms_scores_kernel", "nms_order_kernel", "nms_groups_kernel", "nms_candidates_kernel", "greedy_nms_kernel",
        "nms_pairs_kernel", "nms_suppress_kernel", "nms_decide_kernel", "nms_output_kernel",
    )  # fmt: skip
    every_kernel = runs(["many_images", "groups", "small_regions"], types=("float64", "float32"))

    def calls(self, case, dtype, layouts):
        boxes, scores, groups, counts = case.inputs(dtype)
        limit = case.boxes if case.max_output is None else case.max_output
        given = (groups if case.groups else None, counts if case.counts else None, case.threshold, limit)
        keep, kept = reference.segmented_nms(boxes, scores, *given, case.convention)

        def check(found):
            assert torch.equal(found[1], kept)
            assert torch.equal(found[0], keep)

        yield Call("segmented_nms", [boxes, scores, *given, CONVENTIONS.index(case.convention)], check)
