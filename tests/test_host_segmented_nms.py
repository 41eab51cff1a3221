# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of segmented NMS, run on the CPU and compared with plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from host_kernels import run
from host_kernels.battery import Call, HostBattery, runs

from fpn_fast import reference
from fpn_fast.ops.nms import CONVENTIONS

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    """Boxes of 8 to 108 pixels. Few different scores tie; groups are from `groups`, counts of each image its boxes."""

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
        groups = torch.tensor(self.groups or (0,))[
            torch.randint(0, max(len(self.groups), 1), shape, generator=generator)
        ]
        return boxes, scores.to(dtype), groups, torch.tensor(self.counts or (0,) * self.batch)


def call_of(case: Case, dtype: torch.dtype, kernel: str = "nms") -> Call:
    boxes, scores, groups, counts = case.inputs(dtype)
    limit = case.boxes if case.max_output is None else case.max_output
    outputs = [torch.full((case.batch, limit), -7), torch.full((case.batch,), -7)]
    numbers = [run.DTYPES[dtype], int(bool(case.groups)), int(bool(case.counts)), CONVENTIONS.index(case.convention)]

    def check(found: list[torch.Tensor]) -> None:
        keep, kept = reference.segmented_nms(
            boxes, scores, groups if case.groups else None, counts if case.counts else None, case.threshold, limit,
            case.convention,
        )  # fmt: skip
        assert torch.equal(found[1], kept)
        assert torch.equal(found[0], keep)

    threshold = torch.tensor([case.threshold], dtype=torch.float64)
    return Call(kernel, numbers, [threshold, boxes, scores, groups, counts], outputs, check)


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
# A region of 2048 boxes and what follows it; a large group that begins within a chunk, among small ones.
CASES |= {
    "a_region": Case(1200, threshold=0.3),
    "two_regions": Case(2300, side=900.0, threshold=0.3),
    "many_groups": Case(1700, groups=(*[1] * 8, 2, 0), side=500.0, threshold=0.3),
}


class TestSegmentedNms(HostBattery):
    program, cases = "segmented_nms_main", CASES
    right = runs(CASES) + runs(("ties", "groups", "offset", "many_groups"), types=("float64",))
    addresses = ("groups_and_counts", "offset", "bad_numbers", "many_groups")
    races = ("groups_and_counts", "a_region")

    def calls(self, case, dtype, layouts):
        yield call_of(case, dtype)

    @pytest.mark.parametrize("groups", [(), FAR], ids=["no_groups", "groups"])
    def test_sorts_more_than_one_merge_holds(self, groups):
        """33 runs: by group, each by score, descending, then by index."""
        case = Case(32 * 2048 + 70, groups=groups, scores=30000, bad=True)
        boxes, scores, labels, _ = case.inputs(torch.float32)
        order, counts = self.outputs(call_of(case, torch.float32, "sort"))
        valid = (boxes.isfinite().all(-1) & scores.isfinite())[0].nonzero().flatten()
        expected = valid[scores[0, valid].sort(descending=True, stable=True).indices]
        if groups:
            # As unsigned numbers, negative ones are the highest.
            unsigned = labels.bitwise_xor(torch.iinfo(torch.int64).min)[0, expected]
            expected = expected[unsigned.sort(descending=True, stable=True).indices]
        assert counts.tolist() == [len(valid)]
        assert torch.equal(order[0, : len(valid)], expected)
