# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of multi-level RoIAlign, mean and max, executed by the emulator and compared with plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import emulated_gpu
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, layouts_of, runs
from helpers.layouts import LAYOUTS, Layout, place
from torch.utils._pytree import tree_leaves

from fpn_fast import reference
from fpn_fast.ops.levels import levels_by_area, thresholds_of
from fpn_fast.reference._roi_align import axis_samples
from fpn_fast.reference.multiscale_roi_align import axis_weights
from fpn_fast.testing import tolerances

FORMATS = ("channels_first", "channels_last")
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
    pool_mode: str = "avg"

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
        maps = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        # With many zeros, which a sample off the map may be as large as.
        return [m.relu() for m in maps] if self.pool_mode == "max" else maps

    def grad(self, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.rois), self.channels, *self.output_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def level_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        if self.levels is not None:
            return torch.tensor(self.levels, dtype=torch.int64)
        return levels_by_area(self.roi_tensor(dtype), len(self.sizes), self.thresholds)

    def given_levels(self) -> torch.Tensor | None:
        return None if self.levels is None else torch.tensor(self.levels, dtype=torch.int64)

    @property
    def options(self) -> tuple:
        return self.scales, self.thresholds, self.sampling_ratio, self.aligned

    def pool(self, dtype: torch.dtype, layouts: list[Layout]) -> list:
        """The arguments of a forward op."""
        features, rois = self.placed_features(dtype, layouts), self.roi_tensor(dtype)
        return [features, rois, self.given_levels(), *self.output_size, *self.options]

    def gather(self, inputs: Maps, dtype: torch.dtype, layouts: list[Layout]) -> list:
        """The arguments of a backward op."""
        sizes = [number for size in self.sizes for number in size]
        rest = [self.roi_tensor(dtype), self.given_levels(), self.batch, sizes, *self.options]
        return [*inputs, *rest, layouts[0].channels_last]

    def placed_features(self, dtype: torch.dtype, layouts: list[Layout]) -> Maps:
        """Layouts take turns."""
        return [place(feature, layouts[i % len(layouts)]) for i, feature in enumerate(self.features(dtype))]

    def forward(self, dtype: torch.dtype, layouts: list[Layout]) -> Call:
        numbers = (self.level_tensor(dtype), self.output_size, self.scales, self.sampling_ratio, self.aligned)
        rois, features = self.roi_tensor(dtype), self.features(dtype)

        def check(found: Maps) -> None:
            plain = reference.multiscale_roi_align(features, rois, *numbers)
            exact = reference.multiscale_roi_align([feature.double() for feature in features], rois, *numbers)
            tolerances.assert_not_worse(found[0], plain, exact, size=max(map(max, self.sizes)))

        return Call("multiscale_roi_align", self.pool(dtype, layouts), check)

    def backward(self, dtype: torch.dtype, layouts: list[Layout], grad: torch.Tensor | None = None) -> Call:
        numbers = (self.level_tensor(dtype), self.batch, self.sizes, self.scales, self.sampling_ratio, self.aligned)
        rois, own = self.roi_tensor(dtype), self.grad(dtype) if grad is None else grad

        def check(sums: Maps) -> None:
            plain, exact = (reference.multiscale_roi_align_backward(g, rois, *numbers) for g in (own, own.double()))
            for actual, expected, truth in zip(sums, plain, exact, strict=True):
                tolerances.assert_not_worse(actual, expected, truth, size=max(map(max, self.sizes)))

        inputs = [place(own, layouts[0]) if grad is None else grad]
        return Call("multiscale_roi_align_backward", self.gather(inputs, dtype, layouts), check)


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

#: RoIs of the same few pixels.
CROWD: Boxes = [(0, i % 11 - 1, i % 7 - 1, i % 11 + 4, i % 7 + 3) for i in range(1100)]

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
    "crowded": Case(CROWD, output_size=(1, 2), batch=1, channels=1, sizes=((2, 3),)),
}


# Channels that are 16-byte accesses: tiles of many RoIs in parts, and RoIs of more bins on a tile than one round has.
WIDE = {
    "crowded_parts": replace(CASES["crowded"], channels=8, rois=CROWD[::12], sizes=((2, 9),)),
    "crowded_rounds": replace(CASES["crowded"], channels=8),
    "many_bins_together": replace(CASES["many_bins"], channels=8),
    "many_lanes": Case(random_rois(20), output_size=(2, 2), channels=304, sizes=((4, 9),)),
    "bad_together": replace(CASES["bad"], channels=8),
    "bad_adaptive_together": replace(CASES["bad_adaptive"], channels=8),
}
SIXTEEN = replace(CASES["random"], rois=random_rois(3), channels=16)
CASES |= WIDE | {
    "sixteen_channels": SIXTEEN,
    # What a map that is no small one has; most of its tiles have no RoI.
    "tiles_of_several_lines": Case(random_rois(3, largest=200), batch=2, channels=4, sizes=((70, 66),)),
    "few_blocks": Case(random_rois(2, images=1), (3, 2), batch=1, channels=8, sizes=((5, 9),)),
    "ten_rois": Case(random_rois(10, images=1), batch=1, sizes=((5, 9),)),
}


class TestMultiScaleRoIAlign(EmulatedBattery):
    cases = CASES
    # Every case in both memory formats; the rarer types on the two plainest; any strides, slower at most.
    cpp = (
        *runs([name for name in CASES if name not in WIDE], ["channels_first"]),
        *runs(CASES, ["channels_last"], ["bfloat16"]),
        *runs(["crowded_parts"], ["channels_last"], ["float32", "float64"]),
        *runs(("random", "seven"), ["channels_last"], ["float32", "float64"]),
        *runs(["sixteen_channels"], [*LAYOUTS, "mixed"], ["float16"]),
    )
    triton = (
        *runs(("random", "bad", "one_pixel", "one_line"), FORMATS),
        *runs(("bad_adaptive", "five_levels", "given_levels", "many_samples", "no_images", "no_rois")),
        *runs(("seven", "adaptive", "sixteen_channels"), ["channels_last"], ["bfloat16"]),
    )
    far = tuple(runs(["sixteen_channels"], FORMATS))
    kernels = (
        "multiscale_roi_align_kernel", "multiscale_roi_align_backward_kernel",
        "multiscale_roi_align_backward_strided_kernel", "roi_lists_kernel", "roi_tiles_kernel", "roi_plan_kernel",
        "roi_parts_kernel", "transpose_maps_kernel",
    )  # fmt: skip
    every_kernel = (
        *runs(["random", "few_blocks"], ["channels_first"], TYPES),
        *runs(["crowded_parts"], ["channels_last"], TYPES),
    )

    def calls(self, case, dtype, layouts):
        yield case.forward(dtype, layouts)
        yield case.backward(dtype, layouts)

    def outputs(self, call):
        return tree_leaves(emulated_gpu.call(call.op, call.arguments)[0])

    @pytest.mark.parametrize("size", [(2, 640), (640, 2)], ids=["columns", "rows"])
    @pytest.mark.parametrize("layout", FORMATS)
    def test_bins_that_read_more_pixels_than_the_table_lists(self, layout, size):
        output_size = (1, 32) if size[1] > size[0] else (32, 1)
        case = Case([(0, -9, -9, 2600, 2600)], output_size, batch=1, channels=3, sizes=(size,), sampling_ratio=0)
        call = case.forward(torch.float64, layouts_of(layout))
        call.check(self.outputs(call))

    def test_an_unaligned_map_slows_itself_alone(self):
        aligned, other = LAYOUTS["channels_last"], LAYOUTS["channels_last-misaligned"]
        counted = []
        for layouts in ([aligned, aligned], [other, aligned], [other, other]):
            call = replace(SIXTEEN, levels=(0, 1, 0)).forward(torch.float16, layouts)
            found, [(kernel, counters)] = emulated_gpu.call(call.op, call.arguments)
            call.check(tree_leaves(found))
            # The template's argument kChannelsLast.
            assert "Lb1E" in kernel
            counted.append(counters["warp_instructions"])
        assert counted[0] < counted[1] < counted[2]

    def test_an_expanded_gradient(self):
        """sum().backward() hands on one element with strides of zero."""
        case = CASES["random"]
        grad = torch.ones(()).expand(case.grad(torch.float32).shape)
        call = case.backward(torch.float32, layouts_of("channels_first"), grad)
        call.check(self.outputs(call))

    @pytest.mark.parametrize("layout", FORMATS)
    def test_a_nan_reaches_the_pixels_that_its_bin_reads_only(self, layout):
        case = replace(CASES["random"], rois=[(1, 6, 3, 40, 33), (1, 2, 2, 50, 38)], levels=(0, 0), channels=16)
        k, channel, row, column = 0, 5, 1, 2
        grad = case.grad(torch.float32)
        grad[k, channel, row, column] = NAN
        layouts = layouts_of(layout)
        finest, _ = self.outputs(case.backward(torch.float32, layouts, place(grad, layouts[0])))
        (_, x1, y1, x2, y2), (height, width) = case.rois[k], case.sizes[0]
        numbers = (case.scales[0], case.sampling_ratio, case.aligned, torch.float32)
        rows = axis_weights(axis_samples(y1, y2, height, 3, *numbers), height)
        cols = axis_weights(axis_samples(x1, x2, width, 3, *numbers), width)
        expected = torch.zeros(finest.shape, dtype=torch.bool)
        expected[1, channel] = (rows[row] != 0)[:, None] & (cols[column] != 0)
        assert torch.equal(finest.isnan(), expected)


def pooling(rois: Boxes, **others) -> Case:
    """A call in max mode."""
    options = {"output_size": (3, 2), "channels": 3, "sizes": ((12, 14), (6, 7)), "aligned": False, **others}
    return Case(rois, pool_mode="max", **options)


MAX_ROIS = [(0, 3.3, 5.1, 30.7, 41.9), (1, 20.2, 10.4, 51.3, 33.8), (0, -20.3, -11.7, 25.6, 17.2),
            (1, 40.4, 30.6, 62.3, 60.2), (1, 12.1, 7.9, 15.2, 44.4)]  # fmt: skip
ODD_ROIS = [
    (0, NAN, 4, 30, 28), (2, 4, 4, 30, 28), (0, 30, 4, 4, 28), (1, 30, 28, 4, 4), (0, 10, 10, 10, 10),
    (0, 4, -INF, 30, INF), (1, 4, 4, INF, 28), (1, -1e4, -1e4, 1e4, 1e4), (0, -3e38, -3e38, 3e38, 3e38),
    (0, 1e5, 1e5, 1e5 + 30, 1e5 + 20), (1, 3, 2, 7, 50),
]  # fmt: skip
MAX_CASES = {
    "ratio_2": pooling(MAX_ROIS),
    "adaptive": pooling(MAX_ROIS, sampling_ratio=0, aligned=True),
    "adaptive_unaligned": pooling(MAX_ROIS[:3], output_size=(1, 2), sampling_ratio=-1),
    "many_samples": pooling(MAX_ROIS[:2], output_size=(1, 1), sampling_ratio=40),
    "odd": pooling(ODD_ROIS, sampling_ratio=1, aligned=True),
    "odd_adaptive": pooling(ODD_ROIS, sampling_ratio=0, aligned=True, channels=1),
    "no_rois": pooling([]),
    "no_images": pooling(MAX_ROIS, batch=0),
    "many_channels": pooling(MAX_ROIS[:1], channels=150),
    "three_rois": pooling(MAX_ROIS[:3]),
}


class TestMultiScaleRoIAlignMax(EmulatedBattery):
    """In max mode; pooled values and winners are the reference's bit for bit."""

    cases = MAX_CASES
    cpp = (*runs(MAX_CASES, FORMATS), *runs(["three_rois"], ("mixed", "mixed3", "mixed6", "mixed9"), TYPES))
    triton = (*runs(("ratio_2", "odd"), FORMATS), "adaptive/channels_last/bfloat16")
    far = ("three_rois/channels_last",)
    kernels = ("multiscale_roi_align_max_kernel", "multiscale_roi_align_max_backward_kernel")
    every_kernel = tuple(runs(["three_rois"], FORMATS, TYPES))

    def calls(self, case, dtype, layouts):
        rois, levels = case.roi_tensor(dtype), case.level_tensor(dtype)
        numbers = (case.scales, case.sampling_ratio, case.aligned)
        expected = reference.multiscale_roi_align_max(case.features(dtype), rois, levels, case.output_size, *numbers)

        def check(found):
            assert all(map(torch.equal, found, expected))

        yield Call("multiscale_roi_align_max", case.pool(dtype, layouts), check)
        grad = case.grad(dtype)

        def check_sums(sums):
            plain, exact = (
                reference.multiscale_roi_align_max_backward(
                    each, expected[1], rois, levels, case.batch, case.sizes, *numbers
                )
                for each in (grad, grad.double())
            )
            for actual, right, truth in zip(sums, plain, exact, strict=True):
                tolerances.assert_not_worse(actual, right, truth, size=14)

        inputs = [place(grad, layouts[0]), place(expected[1], layouts[0])]
        yield Call("multiscale_roi_align_max_backward", case.gather(inputs, dtype, layouts), check_sums)
