# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of detections, of dense heads and given boxes, executed by the emulator and compared with PyTorch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, check_selected, runs
from helpers.layouts import Layout, place

from fpn_fast import reference

NAN, INF = math.nan, math.inf
SCALE_CLAMP = math.log(1000 / 16)
IMAGE_SIZES = ((70.0, 100), (60, 112), (50, 40))


@dataclass(frozen=True)
class Maps:
    """A dense head: logits of `kinds` different values, or units apart; every tenth value bad where `bad`."""

    sizes: tuple[tuple[int, int], ...] = ((9, 14), (5, 7), (1, 2))
    batch: int = 2
    anchors: int = 2
    classes: int = 3
    kinds: int = 0
    bad: bool = False
    centered: bool = False
    distances: bool = False
    score_thresh: float = 0.3
    pre_nms_top_n: int = 60
    nms_thresh: float = 0.5
    max_detections: int = 50
    weights: tuple[float, ...] = (1.0, 1.0, 2.0, 4.0)

    @property
    def cells(self) -> torch.Tensor:
        """Of level l anchors of about 2 ** l * 16 pixels, each of another shape."""
        shapes = torch.tensor([[12.0 + i % 9, 20 - i % 7] for i in range(self.anchors)]).view(-1, 2)
        corners = torch.cat([-shapes / 2, shapes / 2], 1)
        return torch.stack([corners * 2**level for level in range(len(self.sizes))]).double()

    @property
    def strides(self) -> torch.Tensor:
        return torch.tensor([[72 // height, 112 // width] for height, width in self.sizes])

    def maps(self, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """Logits, deltas and, or none, centerness."""
        generator = torch.Generator().manual_seed(0)
        logits, deltas, centers = [], [], []
        for height, width in self.sizes:
            shape = (self.batch, self.anchors * self.classes, height, width)
            count = math.prod(shape)
            numbers = torch.randperm(count, generator=generator).double()
            logits.append(numbers % self.kinds - self.kinds // 2 if self.kinds else numbers / count * 14 - 8)
            codes = torch.randn(self.batch, 4 * self.anchors, height, width, generator=generator).double() * 0.3
            deltas.append(codes.abs() if self.distances else codes)
            centers.append(torch.randn(self.batch, self.anchors, height, width, generator=generator).double())
            if self.bad:
                for i, value in enumerate((NAN, INF, -INF)):
                    logits[-1].view(-1)[i::10], deltas[-1].view(-1)[i::31] = value, value
                    centers[-1].view(-1)[i::13] = value
            logits[-1] = logits[-1].view(shape)
        return [[m.to(dtype) for m in maps] for maps in (logits, deltas, centers if self.centered else [])]

    def call(self, dtype: torch.dtype, layouts: list[Layout]) -> Call:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        maps, sizes = self.maps(dtype), torch.tensor(IMAGE_SIZES[: self.batch], dtype=wide).view(-1, 2)
        limits = (self.score_thresh, self.pre_nms_top_n, self.nms_thresh, self.max_detections)
        expected = reference.select_detections(
            *maps, list(self.cells.to(wide)), self.strides.tolist(), sizes, *limits, self.weights, SCALE_CLAMP,
            self.distances,
        )  # fmt: skip
        turns = itertools.cycle(layouts)
        placed = [[place(each, next(turns)) for each in part] or None for part in maps]
        numbers = self.cells.flatten().tolist(), self.strides.flatten().tolist()
        rule = self.weights, SCALE_CLAMP, self.distances
        return Call("select_detections", [*placed, *numbers, sizes, *limits, *rule], check_selected(expected, dtype))


MAPS = {
    "plain": Maps(),
    "few_wanted": Maps(pre_nms_top_n=5, max_detections=7, batch=3),
    "all_wanted": Maps(batch=1, pre_nms_top_n=10**6, max_detections=900, score_thresh=-1.0),
    "none_before": Maps(pre_nms_top_n=0, max_detections=3),
    "none_after": Maps(max_detections=0),
    "nothing_passes": Maps(score_thresh=1.0),
    "ties": Maps(kinds=5, pre_nms_top_n=40, nms_thresh=0.8),
    "bad_numbers": Maps(bad=True, kinds=9),
    "centered": Maps(centered=True, anchors=1, distances=True),
    "centered_all": Maps(((5, 7),), centered=True, score_thresh=0.0, pre_nms_top_n=1000),
    "centered_bad": Maps(centered=True, bad=True, kinds=9, distances=True),
    # A level of two runs, and candidates that more than one block suppresses.
    "two_spans": Maps(((40, 56), (5, 7)), batch=1, classes=2, pre_nms_top_n=1200, score_thresh=0.2),
    # More logits in one bin than a block has room for, that are cut back.
    "many_ties": Maps(((40, 41),), batch=1, classes=2, kinds=2, pre_nms_top_n=300, max_detections=300),
    "centered_spans": Maps(((40, 56),), batch=1, centered=True, pre_nms_top_n=70, score_thresh=0.2),
}


@dataclass(frozen=True)
class Boxes:
    """Given boxes, of 8 to 68 pixels; logits of `kinds` different values, which tie; every eleventh bad where `bad`; of
    class 1 higher by `favour`."""

    boxes: int = 70
    classes: int = 4
    batch: int = 2
    shared: bool = False
    counts: tuple[int, ...] = ()
    kinds: int = 0
    bad: bool = False
    favour: float = 0.0
    score_thresh: float = 0.05
    min_size: float = 1e-2
    class_top_n: int | None = None
    nms_thresh: float = 0.5
    max_detections: int = 50

    def tables(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Logits, deltas and boxes."""
        generator = torch.Generator().manual_seed(self.boxes)
        shape = (self.batch, self.boxes)
        corners, sides = (torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 60 for _ in range(2))
        logits = torch.randn(*shape, self.classes, generator=generator, dtype=torch.float64) * 2
        logits[..., 1:2] += self.favour
        if self.kinds:
            logits = (logits * self.kinds / 4).round()
        numbers = 4 * (1 if self.shared else self.classes)
        deltas = torch.randn(*shape, numbers, generator=generator, dtype=torch.float64)
        boxes = torch.cat([corners, corners + sides + 8], 2)
        if self.bad:
            for i, value in enumerate((NAN, INF, -INF)):
                logits[:, i::11, i], deltas[:, i + 3 :: 11, 1], boxes[:, i + 6 :: 11, i] = value, value, value
        return [each.to(dtype) for each in (logits, deltas, boxes)]

    def call(self, dtype: torch.dtype, layouts: list[Layout]) -> Call:
        tables, sizes = self.tables(dtype), torch.tensor(IMAGE_SIZES[: self.batch], dtype=dtype).view(-1, 2)
        counts = torch.tensor(self.counts or (0,) * self.batch)
        rule = (
            counts if self.counts else None, sizes, self.score_thresh, self.min_size, self.class_top_n, self.nms_thresh,
            self.max_detections, (10.0, 10.0, 5.0, 5.0), SCALE_CLAMP,
        )  # fmt: skip
        expected = reference.select_box_detections(*tables, *rule)
        return Call("select_box_detections", [*tables, *rule], check_selected(expected, dtype))


BOXES = {
    "plain": Boxes(),
    "shared": Boxes(shared=True, counts=(70, 33)),
    "counts": Boxes(50, batch=3, counts=(0, -3, 999), max_detections=300),
    "class_top": Boxes(150, classes=3, class_top_n=9, kinds=8, max_detections=20),
    "class_top_none": Boxes(20, class_top_n=0),
    "class_top_all": Boxes(20, class_top_n=999),
    "ties": Boxes(90, classes=3, kinds=3, score_thresh=0.0, nms_thresh=0.8, max_detections=150),
    "bad_numbers": Boxes(90, kinds=5, bad=True, max_detections=300),
    "large_boxes_only": Boxes(min_size=30.0),
    "nothing_passes": Boxes(score_thresh=1.0),
    "everything_passes": Boxes(40, score_thresh=-1.0, nms_thresh=1.0, max_detections=200),
    "no_boxes": Boxes(0),
    "one_box": Boxes(1),
    "background_only": Boxes(5, classes=1),
    "no_output": Boxes(20, max_detections=0),
    # More places of a class than one block sorts, or suppresses where there are few lists.
    "two_runs": Boxes(2100, classes=2, batch=1, score_thresh=0.7, nms_thresh=0.4, class_top_n=1030),
    # As many lists as let one block suppress a long one, which the first is.
    "many_lists": Boxes(1070, classes=65, batch=1, favour=12.0, score_thresh=0.01, shared=True, class_top_n=1040),
}


class TestDetections(EmulatedBattery):
    """Of dense heads, and "boxes-" of given boxes."""

    cases: ClassVar = {
        **MAPS, **{f"boxes-{name}": case for name, case in BOXES.items()},
        # Four maps of each kind, in every layout over the types; test_emulated_generate_proposals.py has all of each.
        "three_maps": Maps(((9, 14), (4, 4), (3, 5)), centered=True),
        "boxes-some": Boxes(counts=(70, 33)),
        "boxes-few": Boxes(classes=3, class_top_n=9),
    }  # fmt: skip
    cpp = (
        *runs([*MAPS, *(f"boxes-{name}" for name in BOXES)]),
        *(f"three_maps/mixed{3 * i}/{dtype}" for i, dtype in enumerate(TYPES)),
        *runs(("boxes-some", "boxes-few"), types=("float64",)),
    )
    triton = (
        *runs(("plain", "ties", "bad_numbers", "centered_bad"), ("channels_last",)),
        *runs(("boxes-shared", "boxes-class_top", "boxes-bad_numbers")),
        "three_maps/channels_first/bfloat16",
    )
    far = ("centered/channels_last-cropped",)
    kernels = (
        "count_scores_kernel", "select_scores_kernel", "decode_candidates_kernel", "gather_detections_kernel",
        "box_probabilities_kernel", "decode_boxes_kernel", "keep_boxes_kernel", "box_detections_kernel",
    )  # fmt: skip
    # Only without a threshold are scores counted.
    every_kernel = (
        *runs(["three_maps", "centered_all"], types=TYPES),
        *runs(["boxes-some"], types=("float32", "float64")),
    )

    def calls(self, case, dtype, layouts):
        yield case.call(dtype, layouts)
