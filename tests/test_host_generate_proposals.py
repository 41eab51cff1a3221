# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of proposal generation, run on the CPU and compared with plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from host_kernels import run
from host_kernels.layouts import LAYOUTS, Layout, place

from fpn_fast import reference
from fpn_fast.ops.generate_proposals import CONVENTIONS

PROGRAM = "generate_proposals_main"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {name: LAYOUTS[name] for name in ("channels_first", "channels_last")}
NAN, INF = math.nan, math.inf

Maps = list[torch.Tensor]
# As fpn_fast.reference.generate_proposals has them.
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
    """Logits of `kinds` different values, or units apart; every tenth value of the maps bad where `bad`."""

    sizes: tuple[tuple[int, int], ...] = ((9, 14), (5, 7), (1, 2))
    pre_nms_top_n: int = 60
    post_nms_top_n: int = 50
    batch: int = 2
    anchors: int = 3
    kinds: int = 0
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
        return torch.tensor([[72 // height, 112 // width] for height, width in self.sizes])

    def maps(self, dtype: torch.dtype) -> tuple[Maps, Maps]:
        generator = torch.Generator().manual_seed(0)
        objectness, deltas = [], []
        for height, width in self.sizes:
            shape = (self.batch, self.anchors, height, width)
            count = math.prod(shape)
            logits = torch.randperm(count, generator=generator).double()
            logits = logits % self.kinds - self.kinds // 2 if self.kinds else logits / count * 16 - 9
            codes = torch.randn(self.batch, 4 * self.anchors, height, width, generator=generator).double() * 0.3
            if self.bad:
                for i, value in enumerate((NAN, INF, -INF)):
                    logits.view(-1)[i::10], codes.view(-1)[i::31] = value, value
            objectness.append(logits.view(shape).to(dtype)), deltas.append(codes.to(dtype))
        return objectness, deltas


def check(case: Case, dtype: torch.dtype = torch.float32, layouts: list[Layout] | None = None, **options) -> None:
    """Every element of the outputs is the reference's, and no input is written."""
    layouts = layouts or [FORMATS["channels_first"]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    settings = {**DEFAULTS, **case.options}
    objectness, deltas = case.maps(dtype)
    sizes, limits = case.image_sizes.to(wide), (case.pre_nms_top_n, case.post_nms_top_n)
    tables, strides = list(case.cells.to(wide)), case.strides.tolist()
    expected = reference.generate_proposals(objectness, deltas, tables, strides, sizes, *limits, **settings)

    scalars = [settings[name] for name in ("nms_thresh", "score_thresh", "min_size", "scale_clamp", "center_offset",
                                           "center_clamp")]  # fmt: skip
    scalars += [value for name in ("weights", "means", "stds") for value in settings[name]]
    flags = [int(settings[name]) for name in ("strict_size", "logits_out", "symmetric_clamp", "mean_center")]
    numbers = [run.DTYPES[dtype], case.pre_nms_top_n, *flags, CONVENTIONS.index(settings["convention"])]
    inputs = [torch.tensor(scalars, dtype=torch.float64), case.cells, case.strides, sizes]
    maps = [*objectness, *deltas]
    inputs += [place(each, layouts[i % len(layouts)]) for i, each in enumerate(maps)]
    outputs = [torch.full_like(each, -7) for each in expected]
    results = run.run(PROGRAM, "generate_proposals", numbers, [*inputs, *outputs], **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    # float64 has no exponential of more digits to round: see test_generate_proposals.py.
    unit = 2**-51 if dtype == torch.float64 else 0
    for actual, right in zip(results[len(inputs) :], expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=unit, atol=2**11 * unit)


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
LARGE = {
    # A level of two runs.
    "two_spans": Case(((56, 52), (5, 7)), batch=1, pre_nms_top_n=70),
    # More logits in one bin than a block has room for.
    "many_ties": Case(((40, 41),), batch=1, kinds=2, pre_nms_top_n=900, post_nms_top_n=300),
    # More boxes of a level than one block suppresses, of spans that are not cut, some with bad deltas.
    "many_boxes": Case(((40, 41),), batch=1, kinds=700, bad=True, pre_nms_top_n=1500, post_nms_top_n=1500),
}


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_equals_the_reference(name):
    check({**CASES, **LARGE}[name])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_and_layout(dtype):
    layouts = list(LAYOUTS.values())
    for i in range(0, len(layouts), 4):
        check(Case(((9, 14), (4, 4))), dtype, layouts[i:] + layouts[:i])


@pytest.mark.parametrize("name", ["bad_numbers", "mmdet", "many_ties"])
def test_no_stray_access_and_no_undefined_arithmetic(name):
    check({**CASES, **LARGE}[name], layouts=[LAYOUTS["channels_last-cropped"]], flavour="address")


@pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
def test_offsets_of_more_than_31_bits(axis):
    """Maps whose last element is 2^31 elements from the first, along any axis."""
    check(CASES["plain"], spread=axis)


@pytest.mark.parametrize("name", ["plain", "many_ties"])
def test_no_data_race(name):
    check({**CASES, **LARGE}[name], layouts=[LAYOUTS["channels_first"]], flavour="thread")
