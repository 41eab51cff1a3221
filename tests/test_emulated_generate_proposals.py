# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of proposal generation, executed by the emulator and compared with plain PyTorch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, check_selected, runs
from helpers.layouts import place

from fpn_fast import reference
from fpn_fast.ops.generate_proposals import CONVENTIONS

NAN, INF = math.nan, math.inf

Maps = list[torch.Tensor]
# As fpn_fast.reference.generate_proposals has them, in the order of the op.
DEFAULTS: dict[str, Any] = {
    "nms_thresh": 0.7,
    "score_thresh": 0.0,
    "min_size": 1e-3,
    "weights": (1.0,) * 4,
    "means": (0.0,) * 4,
    "stds": (1.0,) * 4,
    "scale_clamp": math.log(1000 / 16),
    "symmetric_clamp": False,
    "mean_center": False,
    "center_offset": 0.0,
    "center_clamp": INF,
    "strict_size": False,
    "logits_out": False,
    "convention": "torchvision",
}


@dataclass(frozen=True)
class Case:
    """Logits of `kinds` different values, or units apart, or the first `high` 1 and the others 0; every tenth value bad
    where `bad`."""

    sizes: tuple[tuple[int, int], ...] = ((9, 14), (5, 7), (1, 2))
    pre_nms_top_n: int = 60
    post_nms_top_n: int = 50
    batch: int = 2
    anchors: int = 3
    kinds: int = 0
    high: int = 0
    bad: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def image_sizes(self) -> torch.Tensor:
        return torch.tensor([[70.0, 100], [60, 112], [50, 40]])[: self.batch]

    @property
    def cells(self) -> torch.Tensor:
        """Of level l anchors of about 2 ** l * 16 pixels, each of another shape."""
        shapes = torch.tensor([[12.0 + i % 9, 20 - i % 7] for i in range(self.anchors)]).view(-1, 2)
        corners = torch.cat([-shapes / 2, shapes / 2], 1)
        return torch.stack([corners * 2**level for level in range(len(self.sizes))]).double()

    @property
    def strides(self) -> torch.Tensor:
        return torch.tensor([[max(72 // height, 1), max(112 // width, 1)] for height, width in self.sizes])

    def maps(self, dtype: torch.dtype) -> tuple[Maps, Maps]:
        generator = torch.Generator().manual_seed(0)
        objectness, deltas = [], []
        for height, width in self.sizes:
            shape = (self.batch, self.anchors, height, width)
            count = math.prod(shape)
            logits = torch.randperm(count, generator=generator).double()
            logits = logits % self.kinds - self.kinds // 2 if self.kinds else logits / count * 16 - 9
            if self.high:
                logits = (torch.arange(count) < self.high).double()
            codes = torch.randn(self.batch, 4 * self.anchors, height, width, generator=generator).double() * 0.3
            if self.bad:
                for i, value in enumerate((NAN, INF, -INF)):
                    logits.view(-1)[i::10], codes.view(-1)[i::31] = value, value
            objectness.append(logits.view(shape).to(dtype)), deltas.append(codes.to(dtype))
        return objectness, deltas


CASES = {
    "plain": Case(),
    "one_level": Case(((9, 14),), batch=3),
    "few_wanted": Case(pre_nms_top_n=5, post_nms_top_n=7),
    "all_wanted": Case(pre_nms_top_n=500, post_nms_top_n=2000),
    "none_before": Case(pre_nms_top_n=0, post_nms_top_n=3),
    "none_after": Case(post_nms_top_n=0),
    "no_images": Case(batch=0),
    "no_anchors": Case(anchors=0),
    "ties": Case(kinds=5, pre_nms_top_n=40),
    "bad_numbers": Case(bad=True, kinds=9),
    "good_scores_only": Case(options={"score_thresh": 0.4}),
    "detectron2": Case(options={"min_size": 0.0, "strict_size": True, "logits_out": True, "center_offset": 0.5}),
    "mmdet": Case(
        options={
            "symmetric_clamp": True, "mean_center": True, "convention": "mmcv", "means": (0.1, -0.1, 0.05, 0.0),
            "stds": (0.5, 0.5, 2.0, 2.0), "center_clamp": 8.0, "min_size": 0.0, "strict_size": True,
        }
    ),
    # More cell anchors than one launch's arguments hold.
    "many_anchors": Case(((3, 4),), anchors=70, pre_nms_top_n=100),
}  # fmt: skip
CASES |= {
    # A level of two runs.
    "two_spans": Case(((56, 52), (5, 7)), batch=1, pre_nms_top_n=70),
    # Spans of 4096 logits; more of them in one bin than a block has room for.
    "long_spans": Case(((425, 426),), batch=1, high=5000, pre_nms_top_n=90),
    "many_ties": Case(((40, 41),), batch=1, kinds=2, pre_nms_top_n=900, post_nms_top_n=300),
    # More boxes of a level than one block suppresses, of spans that are not cut, some with bad deltas.
    "many_boxes": Case(((40, 41),), batch=1, kinds=700, bad=True, pre_nms_top_n=1500, post_nms_top_n=1500),
    "two_maps": Case(((9, 14), (4, 4))),
}


# A level of more runs than one merge takes.
MANY_RUNS = Case(((300, 304),), batch=1, pre_nms_top_n=70)


class TestGenerateProposals(EmulatedBattery):
    cases: ClassVar = {**CASES, "many_runs": MANY_RUNS}
    cpp = runs(CASES) + runs(["two_maps"], ("mixed", "mixed4", "mixed8"), TYPES)
    triton = (
        *runs(("plain", "few_wanted", "ties", "bad_numbers", "mmdet"), ("channels_last",)),
        "detectron2/channels_first/bfloat16",
    )
    far = ("plain",)
    kernels = (
        "count_logits_kernel", "select_logits_kernel", "decode_proposals_kernel", "head_setup_kernel",
        "merge_proposals_kernel", "merge_runs_kernel",
    )  # fmt: skip
    every_kernel = (*runs(["two_maps"], types=TYPES), *runs(["many_runs"], types=("float32", "float64")))

    def calls(self, case, dtype, layouts):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        settings = {**DEFAULTS, **case.options}
        maps, sizes = case.maps(dtype), case.image_sizes.to(wide)
        limits, tables, strides = (case.pre_nms_top_n, case.post_nms_top_n), case.cells.to(wide), case.strides
        expected = reference.generate_proposals(*maps, list(tables), strides.tolist(), sizes, *limits, **settings)
        rule = list({**settings, "convention": CONVENTIONS.index(settings["convention"])}.values())
        turns = itertools.cycle(layouts)
        placed = [[place(each, next(turns)) for each in part] for part in maps]
        numbers = case.cells.flatten().tolist(), strides.flatten().tolist()
        yield Call("generate_proposals", [*placed, *numbers, sizes, *limits, *rule], check_selected(expected, dtype))
