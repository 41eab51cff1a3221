# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of the top-down merge, executed by the emulator and compared with plain PyTorch."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers import emulated_gpu
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, layouts_of, runs
from helpers.layouts import LAYOUTS, Layout, place

from fpn_fast import reference
from fpn_fast.testing import tolerances

# Batch, channels, and sizes from the finest map to the coarsest.
SHAPES = {
    # Whose maps halve exactly: of two, three and four levels; 16-byte vectors of 72 channels in groups of threads.
    "two_doubled": (1, 8, [(6, 16), (3, 8)]),
    "doubled": (1, 16, [(16, 32), (8, 16), (4, 8)]),
    "four_doubled": (2, 72, [(16, 24), (8, 12), (4, 6), (2, 3)]),
    # Rounded up.
    "two_halved": (1, 8, [(5, 15), (3, 8)]),
    "three_halved": (1, 16, [(9, 13), (5, 7), (3, 4)]),
    "four_halved": (2, 16, [(9, 27), (5, 14), (3, 7), (2, 4)]),
    "odd": (1, 5, [(25, 13), (13, 7), (7, 4), (4, 2)]),
    "five_levels": (1, 8, [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]),
    # The float32 index formula and integer arithmetic differ for 26 -> 44.
    "index_formula": (2, 9, [(44, 11), (26, 7)]),
    "downsampling": (2, 3, [(3, 5), (7, 4), (2, 9)]),
    "one_pixel": (1, 1, [(1, 1), (1, 1)]),
    "from_one_pixel": (2, 9, [(6, 5), (1, 1)]),
    "equal_sizes": (1, 8, [(3, 8), (3, 8), (3, 8)]),
    "empty_batch": (0, 4, [(4, 4), (2, 2)]),
    # More 16-byte vectors than a block has threads: along the channels, and in a plane.
    "many_channels": (1, 2056, [(3, 2), (1, 1)]),
    "large_planes": (1, 2, [(72, 131), (36, 65), (18, 33)]),
    # Whose gradient takes several blocks along a row of the coarsest map.
    "column_tiles": (1, 520, [(7, 25), (4, 14), (2, 7)]),
    # More than one launch holds.
    "ten_levels": (1, 2, [(10 - i, 12 - i) for i in range(10)]),
}
HALVING = ("two_doubled", "doubled", "four_doubled", "two_halved", "three_halved", "four_halved")
MODES = {"nearest": 0, "bilinear": 1, "align_corners": 2}
FORMATS = ("channels_first", "channels_last")

Maps = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    shape: str
    mode: str = "nearest"
    average: bool = False


def arguments(mode: str, average: bool) -> dict:
    """Of the reference."""
    name = "nearest" if mode == "nearest" else "bilinear"
    return {"mode": name, "align_corners": mode == "align_corners", "average": average}


def random_maps(shape: str, dtype: torch.dtype) -> Maps:
    batch, channels, sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64).to(dtype) for h, w in sizes]


def placed(maps: Maps, layouts: list[Layout]) -> Maps:
    """Layouts take turns."""
    return [place(each, layouts[i % len(layouts)]) for i, each in enumerate(maps)]


def merge(laterals: Maps, layouts: list[Layout], case: Case) -> Call:
    arguments = [placed(laterals, layouts), MODES[case.mode], case.average]
    return Call("top_down", arguments, lambda merged: check_forward(laterals, merged, case))


def gather(grads: Maps, laterals: Maps, layouts: list[Layout], case: Case) -> Call:
    """Gradients of the laterals but the finest. The op takes the finest map's gradient halved, if averaging."""
    halved = [grads[0] / 2 if case.average else grads[0], *grads[1:]]
    arguments = [placed(halved, layouts), *laterals[-1].shape[2:], MODES[case.mode], case.average]
    return Call("top_down_backward", arguments, lambda sums: check_backward(grads, laterals, sums, case))


def lateral_gradients(grads: Maps, laterals: Maps, mode: str, average: bool) -> Maps:
    """Autograd's, of all laterals but the finest, in the grads' type."""
    leaves = [lateral.to(grads[0].dtype).requires_grad_() for lateral in laterals]
    merged = reference.top_down(leaves, **arguments(mode, average))
    return list(torch.autograd.grad(merged[:-1], leaves[1:], grads))


def doubles(maps: Maps) -> Maps:
    return [map_.double() for map_ in maps]


def check_forward(laterals: Maps, merged: Maps, case: Case) -> None:
    expected = reference.top_down(laterals, **arguments(case.mode, case.average))
    exact = reference.top_down(doubles(laterals), **arguments(case.mode, case.average))
    size = max(max(lateral.shape[2:]) for lateral in laterals)
    for actual, plain, truth in zip(merged, expected, exact, strict=False):
        if case.mode == "nearest":
            torch.testing.assert_close(actual, plain, rtol=0, atol=0, equal_nan=True)
        else:
            tolerances.assert_not_worse(actual, plain, truth, size=size)


def check_backward(grads: Maps, laterals: Maps, sums: Maps, case: Case) -> None:
    mode, average = case.mode, case.average
    exact = lateral_gradients(doubles(grads), laterals, mode, average)
    if mode != "nearest":
        size = max(max(lateral.shape[2:]) for lateral in laterals)
        expected = lateral_gradients(grads, laterals, mode, average)
        for actual, plain, truth in zip(sums, expected, exact, strict=True):
            tolerances.assert_not_worse(actual, plain, truth, size=size)
        return
    magnitudes = lateral_gradients([grad.abs() for grad in doubles(grads)], laterals, mode, average)
    terms = 0
    for level, (actual, truth, magnitude) in enumerate(zip(sums, exact, magnitudes, strict=True), 1):
        (fine_h, fine_w), (coarse_h, coarse_w) = laterals[level - 1].shape[2:], laterals[level].shape[2:]
        # The most pixels that read one of this level's, its own gradient, and what the finer level added up before.
        terms += (fine_h // coarse_h + 2) * (fine_w // coarse_w + 2) + 1
        tolerances.assert_linear(actual, truth, magnitude, terms=terms, roundings=level)


CASES = {
    "-".join([shape, mode, "avg" if average else "sum"]): Case(shape, mode, average)
    for shape, mode, average in itertools.product(SHAPES, MODES, (False, True))
}


def right() -> list[str]:
    """Every shape in both memory formats and modes; the rarer types, averaging and layouts on the richest."""
    shapes = [name for name, (_, channels, _) in SHAPES.items() if channels < 500]
    found = runs([f"{shape}-nearest-sum" for shape in shapes], FORMATS, ["float32", "bfloat16"])
    found += runs([f"{shape}-bilinear-sum" for shape in shapes if shape not in HALVING or shape == "doubled"], FORMATS)
    found += runs(["odd-nearest-avg", "odd-bilinear-avg", "odd-align_corners-sum"], FORMATS, TYPES)
    found += runs(["many_channels-nearest-sum", "column_tiles-nearest-sum"], ["channels_last"], ["float32", "float16"])
    found += runs(["doubled-nearest-sum", "odd-nearest-sum"], [*LAYOUTS, "mixed", "mixed4"], ["float16"])
    return list(dict.fromkeys(found))


class TestTopDown(EmulatedBattery):
    cases, cpp = CASES, right()
    triton = (
        *runs([f"{shape}-nearest-sum" for shape in ("doubled", "odd", "downsampling", "one_pixel", "from_one_pixel")],
              FORMATS, ["bfloat16"]),
        *runs(["odd-bilinear-avg", "from_one_pixel-align_corners-sum"], FORMATS),
        *runs(["empty_batch-nearest-sum", "equal_sizes-nearest-avg", "five_levels-nearest-sum",
               "index_formula-bilinear-sum", "ten_levels-nearest-sum"]),
    )  # fmt: skip
    far = tuple(runs(["index_formula-nearest-sum"], FORMATS))
    kernels = (
        "top_down_kernel",
        "top_down_backward_kernel",
        "top_down_trees_kernel",
        "top_down_trees_backward_kernel",
        "top_down_strips_kernel",
        "top_down_strips_backward_kernel",
    )
    every_kernel = tuple(runs([*(f"{shape}-nearest-sum" for shape in (*HALVING, "index_formula")),
                               "index_formula-bilinear-sum"], FORMATS, TYPES))  # fmt: skip

    def calls(self, case, dtype, layouts):
        laterals, grads = random_maps(case.shape, dtype), random_maps(case.shape, dtype)[:-1]
        yield merge(laterals, layouts, case)
        yield gather(grads, laterals, layouts, case)

    def outputs(self, call):
        found, _ = emulated_gpu.call(call.op, call.arguments)
        return found

    def test_an_expanded_gradient(self):
        """sum().backward() hands on one element with strides of zero."""
        laterals = random_maps("doubled", torch.float32)
        grads = [torch.ones(()).expand(lateral.shape) for lateral in laterals[:-1]]
        one = gather(grads, laterals, layouts_of("channels_first"), Case("doubled"))
        one.arguments[0] = grads
        one.check(self.outputs(one))

    @pytest.mark.parametrize("average", [False, True], ids=["sum", "avg"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_every_16_bit_pattern_is_added_and_rounded_as_pytorch_does(self, dtype, average):
        info = torch.finfo(dtype)
        tops = [0.0, 1.0, -3.14, info.smallest_normal * info.eps, -info.smallest_normal, info.max, -info.max]
        tops.append(float("-inf"))
        patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        laterals = [
            patterns.view(1, 1, 256, 256).expand(1, len(tops), 256, 256),
            torch.tensor(tops, dtype=dtype).view(1, -1, 1, 1),
        ]
        one = merge(laterals, layouts_of("channels_first"), Case("", average=average))
        one.check(self.outputs(one))

    @pytest.mark.parametrize("shape", ["four_doubled", "four_halved", "three_halved"])
    def test_the_gradient_has_the_same_bits_in_both_formats(self, shape):
        """Four pixels are added in the same order, whichever kernel does it."""
        laterals, grads = random_maps(shape, torch.float32), random_maps(shape, torch.float32)[:-1]
        first, last = (self.outputs(gather(grads, laterals, layouts_of(each), Case(shape))) for each in FORMATS)
        torch.testing.assert_close(first, last, rtol=0, atol=0)

    @pytest.mark.parametrize("layout", FORMATS)
    def test_a_nan_reaches_the_sources_of_its_pixel_only(self, layout):
        laterals, grads = random_maps("odd", torch.float16), random_maps("odd", torch.float16)[:-1]
        grads[0][0, 1, 3, 7] = float("nan")
        grads[1][0, 2, 12, 0] = float("inf")
        sums = self.outputs(gather(grads, laterals, layouts_of(layout), Case("odd")))
        exact = lateral_gradients(doubles(grads), laterals, "nearest", False)
        for actual, wanted in zip(sums, exact, strict=True):
            assert wanted.isnan().sum() == 1
            assert wanted.isinf().sum() == 1
            assert torch.equal(actual.isnan(), wanted.isnan())
            assert torch.equal(actual.isinf(), wanted.isinf())
