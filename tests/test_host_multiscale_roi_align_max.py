# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of multi-level RoIAlign in max mode, run on the CPU and compared with plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from host_kernels import run
from host_kernels.layouts import LAYOUTS, Layout, only_the_map_was_written, place, poisoned

from fpn_fast import reference
from fpn_fast.ops.levels import levels_by_area, thresholds_of
from fpn_fast.testing import tolerances

PROGRAM = "multiscale_roi_align_max_main"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {name: LAYOUTS[name] for name in ("channels_first", "channels_last")}
SCALES = [1 / 4, 1 / 8]
SIZES = ((12, 14), (6, 7))
NAN, INF = math.nan, math.inf

Maps = list[torch.Tensor]

ROIS = (
    (0, 3.3, 5.1, 30.7, 41.9),
    (1, 20.2, 10.4, 51.3, 33.8),
    (0, -20.3, -11.7, 25.6, 17.2),
    (1, 40.4, 30.6, 62.3, 60.2),
    (1, 12.1, 7.9, 15.2, 44.4),
)
ODD_ROIS = (
    (0, NAN, 4, 30, 28),
    (2, 4, 4, 30, 28),
    (0, 30, 4, 4, 28),
    (1, 30, 28, 4, 4),
    (0, 10, 10, 10, 10),
    (0, 4, -INF, 30, INF),
    (1, 4, 4, INF, 28),
    (1, -1e4, -1e4, 1e4, 1e4),
    (0, -3e38, -3e38, 3e38, 3e38),
    (0, 1e5, 1e5, 1e5 + 30, 1e5 + 20),
    (1, 3, 2, 7, 50),
)


@dataclass(frozen=True)
class Case:
    """A call on SIZES; RoIs are (image, x1, y1, x2, y2)."""

    rois: tuple[tuple[float, ...], ...] = ROIS
    output_size: tuple[int, int] = (3, 2)
    batch: int = 2
    channels: int = 3
    sampling_ratio: int = 2
    aligned: bool = False

    @property
    def thresholds(self) -> list[float]:
        return thresholds_of(SCALES, 32, 3, "torchvision")

    def roi_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        coordinates = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor(self.rois, dtype=torch.float64).reshape(-1, 5).to(coordinates)

    def random(self, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def features(self, dtype: torch.dtype) -> Maps:
        """With many zeros, as after a ReLU, which a sample off the map may be as large as."""
        return [self.random(i, (self.batch, self.channels, *size), dtype).relu() for i, size in enumerate(SIZES)]

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rois = self.roi_tensor(dtype)
        levels = levels_by_area(rois, len(SIZES), self.thresholds)
        numbers = (levels, self.output_size, SCALES, self.sampling_ratio, self.aligned)
        return reference.multiscale_roi_align_max(self.features(dtype), rois, *numbers)


CASES = {
    "ratio_2": Case(),
    "adaptive": Case(sampling_ratio=0, aligned=True),
    "adaptive_unaligned": Case(rois=ROIS[:3], output_size=(1, 2), sampling_ratio=-1),
    "many_samples": Case(rois=ROIS[:2], output_size=(1, 1), sampling_ratio=40),
    "odd": Case(rois=ODD_ROIS, sampling_ratio=1, aligned=True),
    "odd_adaptive": Case(rois=ODD_ROIS, sampling_ratio=0, aligned=True, channels=1),
    "no_rois": Case(rois=()),
    "no_images": Case(batch=0),
    "many_channels": Case(rois=ROIS[:1], channels=150),
}


def launch(kernel: str, case: Case, inputs: Maps, outputs: Maps, channels_last: bool, **options) -> Maps:
    """The outputs as the kernels leave them, which must have kept the inputs, and all around the outputs."""
    dtype = inputs[0].dtype
    numbers = [run.DTYPES[dtype], int(channels_last), case.sampling_ratio, int(case.aligned)]
    tables = [case.roi_tensor(dtype), *(torch.tensor(each, dtype=torch.float64) for each in (SCALES, case.thresholds))]
    inputs = [*tables, *inputs]
    results = run.run(PROGRAM, kernel, numbers, [*inputs, *outputs], **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    for before, after in zip(outputs, results[len(inputs) :], strict=True):
        assert only_the_map_was_written(before, after), "something beside an output was written"
    return results[len(inputs) :]


def check(case: Case, dtype: torch.dtype, layouts: list[Layout], **options) -> None:
    """Both directions. Pooled values and winners are the reference's bit for bit."""
    layout = layouts[0]
    pooled, winners = case.expected(dtype)
    features = [place(feature, layouts[i % len(layouts)]) for i, feature in enumerate(case.features(dtype))]
    outputs = [poisoned(tuple(pooled.shape), layout, kind) for kind in (dtype, torch.int32)]
    results = launch("forward", case, features, outputs, layout.channels_last, **options)
    assert torch.equal(results[0], pooled)
    assert torch.equal(results[1], winners)

    grad = case.random(2, tuple(pooled.shape), dtype)
    sums = [
        poisoned((case.batch, case.channels, *size), layouts[(i + 1) % len(layouts)], dtype)
        for i, size in enumerate(SIZES)
    ]
    inputs = [place(grad, layout), place(winners, layout)]
    sums = launch("backward", case, inputs, sums, layout.channels_last, **options)
    rois = case.roi_tensor(dtype)
    levels = levels_by_area(rois, len(SIZES), case.thresholds)
    numbers = (levels, case.batch, SIZES, SCALES, case.sampling_ratio, case.aligned)
    plain, exact = (
        reference.multiscale_roi_align_max_backward(each, winners, rois, *numbers) for each in (grad, grad.double())
    )
    for actual, expected, truth in zip(sums, plain, exact, strict=True):
        tolerances.assert_not_worse(actual, expected, truth, size=14)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, layout):
    check(CASES[name], torch.float32, [layout])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_and_layout(dtype):
    layouts = list(LAYOUTS.values())
    for i in range(0, len(layouts), 3):
        check(Case(ROIS[:3]), dtype, layouts[i:] + layouts[:i])


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["adaptive", "odd"])
def test_no_stray_access_and_no_undefined_arithmetic(name, layout):
    check(CASES[name], torch.float32, [layout], flavour="address")


@pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
def test_offsets_of_more_than_31_bits(axis):
    """Maps, bins and gradients whose last element is 2^31 elements from the first, along any axis."""
    check(CASES["many_samples"], torch.float32, [LAYOUTS["channels_last"]], spread=axis)


def test_no_data_race():
    check(CASES["ratio_2"], torch.float32, [FORMATS["channels_last"]], flavour="thread")


def test_blocks_are_independent():
    """Each element is written by one block, and needs nothing that another block writes."""
    case = CASES["many_channels"]
    pooled, _ = case.expected(torch.float32)
    outputs = [poisoned(tuple(pooled.shape), FORMATS["channels_last"], kind) for kind in (torch.float32, torch.int32)]
    tables = [case.roi_tensor(torch.float32)]
    tables += [torch.tensor(each, dtype=torch.float64) for each in (SCALES, case.thresholds)]
    tensors = [*tables, *case.features(torch.float32), *outputs]
    written = torch.zeros(pooled.shape, dtype=torch.int)
    for alone in run.block_by_block(PROGRAM, "forward", [run.DTYPES[torch.float32], 1, 2, 0], tensors):
        here = ~alone[-2].isnan()
        assert torch.equal(alone[-2][here], pooled[here])
        written += here
    assert (written == 1).all()
