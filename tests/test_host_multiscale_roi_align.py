# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of multi-level RoIAlign, run on the CPU and compared with plain PyTorch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from host_kernels import run
from host_kernels.layouts import LAYOUTS, Layout, only_the_map_was_written, place, poisoned

from fpn_fast import reference
from fpn_fast.ops.levels import levels_by_area, thresholds_of
from fpn_fast.reference.multiscale_roi_align import axis_weights
from fpn_fast.testing import tolerances

PROGRAM = "multiscale_roi_align_main"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAN, INF = math.nan, math.inf

Maps = list[torch.Tensor]
Boxes = list[tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """A call. RoIs are (image, x1, y1, x2, y2); `levels` are given, or a RoI of 32 by 32 pixels belongs to the second
    map."""

    rois: Boxes
    output_size: tuple[int, int] = (3, 3)
    batch: int = 2
    channels: int = 8
    sizes: tuple[tuple[int, int], ...] = ((10, 13), (5, 7))
    sampling_ratio: int = 2
    aligned: bool = True
    levels: tuple[int, ...] | None = None

    @property
    def scales(self) -> list[float]:
        return [0.25 / 2**level for level in range(len(self.sizes))]

    @property
    def thresholds(self) -> list[float]:
        return thresholds_of(self.scales, 32, 3, "torchvision") if self.levels is None else []

    def roi_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        coordinates = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor(self.rois, dtype=torch.float64).reshape(-1, 5).to(coordinates)

    def features(self, dtype: torch.dtype) -> Maps:
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.batch, self.channels, *size) for size in self.sizes]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def grad(self, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.rois), self.channels, *self.output_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def level_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        if self.levels is not None:
            return torch.tensor(self.levels, dtype=torch.int64)
        return levels_by_area(self.roi_tensor(dtype), len(self.sizes), self.thresholds)


def random_rois(count: int, *, seed: int = 0, images: int = 2, smallest: float = 2, largest: float = 50) -> Boxes:
    """RoIs of log-uniform sizes, some beyond the edges of 52 by 40 pixels."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.empty(count, 2).uniform_(math.log(smallest), math.log(largest), generator=generator))
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([52.0, 40.0])
    image = torch.randint(images, (count, 1), generator=generator)
    return [tuple(row) for row in torch.cat([image, centre - size / 2, centre + size / 2], 1).tolist()]


BAD_ROIS: Boxes = [
    (0, 4, 4, 30, 28),
    (0, NAN, 4, 30, 28),
    (1, 4, 4, 30, NAN),
    (NAN, 4, 4, 30, 28),
    (-1, 4, 4, 30, 28),
    (2, 4, 4, 30, 28),
    (1e9, 4, 4, 30, 28),
    # Images 0 and 1.
    (-0.5, 4, 4, 30, 28),
    (1.75, 4, 4, 30, 28),
    # Inverted along one axis, the other, both; without area.
    (0, 30, 4, 4, 28),
    (0, 4, 28, 30, 4),
    (1, 30, 28, 4, 4),
    (0, 10, 10, 10, 10),
    (1, 10, 4, 10, 28),
    # Infinite along one axis or both, larger than any map, and off the map.
    (0, 4, -INF, 30, INF),
    (0, -INF, -INF, INF, INF),
    (1, 4, 4, INF, 28),
    (1, -1e6, -1e6, 1e6, 1e6),
    (0, -3e38, -3e38, 3e38, 3e38),
    (0, 1e5, 1e5, 1e5 + 30, 1e5 + 20),
    (1, -500, 4, -400, 28),
    (1, 3, 2, 7, 50),
]

CASES = {
    "random": Case(random_rois(7), channels=9),
    "seven": Case(random_rois(3), output_size=(7, 7), channels=16),
    "fourteen": Case(random_rois(2), output_size=(14, 14), channels=5),
    # More bins on a tile than one round of the gradient takes, along each axis.
    "many_bins": Case(random_rois(2, largest=20), output_size=(35, 19), channels=2, sizes=((9, 11),)),
    "one_sample": Case(random_rois(4), output_size=(2, 5), sampling_ratio=1, aligned=False),
    "three_samples": Case(random_rois(4), output_size=(4, 3), sampling_ratio=3, aligned=False),
    "adaptive": Case(random_rois(4), output_size=(2, 3), sampling_ratio=0),
    "adaptive_unaligned": Case(random_rois(4), output_size=(3, 2), sampling_ratio=-1, aligned=False),
    "many_samples": Case(random_rois(2), output_size=(2, 2), sampling_ratio=40),
    "one_pixel": Case(random_rois(4), sizes=((1, 1),)),
    "one_line": Case(random_rois(4), sizes=((1, 20), (20, 1))),
    "five_levels": Case(random_rois(6, smallest=8, largest=300), sizes=((9, 11), (5, 6), (3, 3), (2, 2), (1, 1))),
    "given_levels": Case(random_rois(6), levels=(1, 0, -1, 1, 2, 0)),
    "bad": Case(BAD_ROIS),
    "bad_adaptive": Case(BAD_ROIS, sampling_ratio=0, aligned=False),
    "bad_one_level": Case(BAD_ROIS, sizes=((10, 13),)),
    "bad_one_level_adaptive": Case(BAD_ROIS, sizes=((10, 13),), sampling_ratio=0),
    "bad_many_samples": Case(BAD_ROIS, sizes=((10, 13),), sampling_ratio=20, output_size=(2, 2)),
    "no_rois": Case([]),
    "no_images": Case([(0, 4, 4, 30, 28)], batch=0),
    # Several blocks along the channels, and more channels than a block has lanes for.
    "many_channels": Case(random_rois(1), channels=304, output_size=(2, 2), sizes=((4, 9),)),
    # More RoIs on one tile than a block lists at once.
    "crowded": Case(
        [(0, i % 11 - 1, i % 7 - 1, i % 11 + 4, i % 7 + 3) for i in range(1100)],
        output_size=(1, 2),
        batch=1,
        channels=1,
        sizes=((2, 3),),
    ),
}


def launch(kernel: str, case: Case, inputs: Maps, outputs: Maps, dtype: torch.dtype, **options) -> Maps:
    """The outputs as the kernels leave them. The inputs, and all around the outputs, must be as they were."""
    tensors = call(case, inputs, outputs, dtype)
    results = run.run(PROGRAM, kernel, numbers_of(case, dtype), tensors, **options)
    for before, after in zip(tensors[: -len(outputs)], results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    for before, after in zip(outputs, results[-len(outputs) :], strict=True):
        assert only_the_map_was_written(before, after), "something beside an output was written"
    return results[-len(outputs) :]


def numbers_of(case: Case, dtype: torch.dtype) -> list[int]:
    return [run.DTYPES[dtype], case.sampling_ratio, int(case.aligned), int(case.levels is not None)]


def call(case: Case, inputs: Maps, outputs: Maps, dtype: torch.dtype) -> Maps:
    """All that the program is given."""
    scales, thresholds = (torch.tensor(table, dtype=torch.float64) for table in (case.scales, case.thresholds))
    levels = torch.tensor(case.levels or [], dtype=torch.int64)
    return [case.roi_tensor(dtype), scales, thresholds, levels, *inputs, *outputs]


def forward_maps(case: Case, dtype: torch.dtype, layouts: list[Layout]) -> tuple[Maps, Maps]:
    """Features and the poisoned output. Layouts take turns."""
    features = [place(feature, layouts[i % len(layouts)]) for i, feature in enumerate(case.features(dtype))]
    return features, [poisoned((len(case.rois), case.channels, *case.output_size), layouts[0], dtype)]


def backward_maps(case: Case, dtype: torch.dtype, layouts: list[Layout]) -> tuple[Maps, Maps]:
    shapes = [(case.batch, case.channels, *size) for size in case.sizes]
    sums = [poisoned(shape, layouts[(i + 1) % len(layouts)], dtype) for i, shape in enumerate(shapes)]
    return [place(case.grad(dtype), layouts[0])], sums


def pool(case: Case, dtype: torch.dtype, layouts: list[Layout], **options) -> torch.Tensor:
    return launch("forward", case, *forward_maps(case, dtype, layouts), dtype, **options)[0]


def gather(case: Case, dtype: torch.dtype, layouts: list[Layout], **options) -> Maps:
    return launch("backward", case, *backward_maps(case, dtype, layouts), dtype, **options)


def check_forward(case: Case, dtype: torch.dtype, pooled: torch.Tensor) -> None:
    levels = case.level_tensor(dtype)
    numbers = (levels, case.output_size, case.scales, case.sampling_ratio, case.aligned)
    rois, features = case.roi_tensor(dtype), case.features(dtype)
    plain = reference.multiscale_roi_align(features, rois, *numbers)
    exact = reference.multiscale_roi_align([feature.double() for feature in features], rois, *numbers)
    tolerances.assert_not_worse(pooled, plain, exact, size=max(max(size) for size in case.sizes))


def check_backward(case: Case, dtype: torch.dtype, sums: Maps, grad: torch.Tensor | None = None) -> None:
    levels = case.level_tensor(dtype)
    numbers = (levels, case.batch, case.sizes, case.scales, case.sampling_ratio, case.aligned)
    rois, grad = case.roi_tensor(dtype), case.grad(dtype) if grad is None else grad
    plain = reference.multiscale_roi_align_backward(grad, rois, *numbers)
    exact = reference.multiscale_roi_align_backward(grad.double(), rois, *numbers)
    for actual, expected, truth in zip(sums, plain, exact, strict=True):
        tolerances.assert_not_worse(actual, expected, truth, size=max(max(size) for size in case.sizes))


def parity_cases() -> list:
    """Every case in both memory formats; the rarer types on the two plainest."""
    pairs = [("channels_first", "float32"), ("channels_last", "bfloat16")]
    more = [("channels_first", "float16"), ("channels_last", "float32"), ("channels_last", "float64")]
    cases = [(name, *pair) for name, pair in itertools.product(CASES, pairs)]
    return cases + [(name, *pair) for name, pair in itertools.product(("random", "seven"), more)]


@pytest.mark.parametrize(("name", "layout", "dtype"), parity_cases())
def test_forward_and_backward(name, layout, dtype):
    case, dtype, layout = CASES[name], DTYPES[dtype], LAYOUTS[layout]
    check_forward(case, dtype, pool(case, dtype, [layout]))
    check_backward(case, dtype, gather(case, dtype, [layout]))


@pytest.mark.parametrize("names", [*([name] for name in LAYOUTS), list(LAYOUTS)], ids=[*LAYOUTS, "mixed"])
def test_any_layout(names):
    """Whatever the strides: slower at most."""
    case, layouts = replace(CASES["random"], rois=random_rois(3), channels=16), [LAYOUTS[name] for name in names]
    check_forward(case, torch.float16, pool(case, torch.float16, layouts))
    check_backward(case, torch.float16, gather(case, torch.float16, layouts))


@pytest.mark.parametrize("size", [(2, 640), (640, 2)], ids=["columns", "rows"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_bins_that_read_more_pixels_than_the_table_lists(layout, size):
    output_size = (1, 32) if size[1] > size[0] else (32, 1)
    case = Case([(0, -9, -9, 2600, 2600)], output_size, batch=1, channels=3, sizes=(size,), sampling_ratio=0)
    check_forward(case, torch.float64, pool(case, torch.float64, [LAYOUTS[layout]]))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_tiles_of_several_lines(layout):
    """What a map that is no small one has; most of its tiles have no RoI."""
    case = Case(random_rois(3, largest=200), batch=2, channels=4, sizes=((70, 66),))
    check_backward(case, torch.float32, gather(case, torch.float32, [LAYOUTS[layout]]))


def test_an_expanded_gradient():
    """sum().backward() hands on one element with strides of zero."""
    case = CASES["random"]
    grad = torch.ones(()).expand(case.grad(torch.float32).shape)
    _, sums = backward_maps(case, torch.float32, [LAYOUTS["channels_first"]])
    check_backward(case, torch.float32, launch("backward", case, [grad], sums, torch.float32), grad)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_nan_reaches_the_pixels_that_its_bin_reads_only(layout):
    case = replace(CASES["random"], rois=[(1, 6, 3, 40, 33), (1, 2, 2, 50, 38)], levels=(0, 0), channels=16)
    k, channel, row, column = 0, 5, 1, 2
    grad = case.grad(torch.float32)
    grad[k, channel, row, column] = NAN
    _, sums = backward_maps(case, torch.float32, [LAYOUTS[layout]])
    finest, _ = launch("backward", case, [place(grad, LAYOUTS[layout])], sums, torch.float32)
    (_, x1, y1, x2, y2), (height, width) = case.rois[k], case.sizes[0]
    numbers = (case.scales[0], case.sampling_ratio, case.aligned, torch.float32)
    rows, _ = axis_weights(y1, y2, height, 3, *numbers)
    cols, _ = axis_weights(x1, x2, width, 3, *numbers)
    expected = torch.zeros(finest.shape, dtype=torch.bool)
    expected[1, channel] = (rows[row] != 0)[:, None] & (cols[column] != 0)
    assert torch.equal(finest.isnan(), expected)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_blocks_are_independent(layout, kernel):
    """Each element is written by one block, and needs nothing that another block writes."""
    case = Case(random_rois(2, images=1), (3, 2), batch=1, channels=8, sizes=((5, 9),))
    make = forward_maps if kernel == "forward" else backward_maps
    inputs, outputs = make(case, torch.float32, [LAYOUTS[layout]])
    (together,) = launch(kernel, case, inputs, outputs, torch.float32)
    writers = torch.zeros(together.shape, dtype=torch.int)
    tensors = call(case, inputs, outputs, torch.float32)
    for *_, alone in run.block_by_block(PROGRAM, kernel, numbers_of(case, torch.float32), tensors):
        written = ~alone.isnan()
        assert torch.equal(alone[written], together[written])
        writers += written
    assert (writers == 1).all()


@pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_offsets_of_more_than_31_bits(layout, axis):
    """Maps, bins and gradients whose last element is 2^31 elements from the first, along any axis."""
    case, layouts = replace(CASES["random"], rois=random_rois(3), channels=16), [LAYOUTS[layout]]
    check_forward(case, torch.float32, pool(case, torch.float32, layouts, spread=axis))
    check_backward(case, torch.float32, gather(case, torch.float32, layouts, spread=axis))


@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("random", "channels_first-cropped", "float16"),
        ("random", "channels_last-misaligned", "bfloat16"),
        ("seven", "channels_last", "bfloat16"),
        ("bad", "channels_last", "float32"),
        ("bad_one_level_adaptive", "channels_first", "float32"),
        ("many_bins", "channels_first", "float64"),
        ("no_rois", "channels_last", "float32"),
        ("no_images", "channels_first", "float32"),
    ],
)
def test_no_stray_access_and_no_undefined_arithmetic(name, layout, dtype):
    case, dtype, layouts = CASES[name], DTYPES[dtype], [LAYOUTS[layout]]
    pool(case, dtype, layouts, flavour="address")
    gather(case, dtype, layouts, flavour="address")


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_no_data_race(layout):
    case = Case(random_rois(10, images=1), batch=1, sizes=((5, 9),))
    pool(case, torch.float32, [LAYOUTS[layout]], flavour="thread")
    gather(case, torch.float32, [LAYOUTS[layout]], flavour="thread")
