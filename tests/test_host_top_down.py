# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the top-down merge, run on the CPU and compared with plain PyTorch."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from host_kernels import run
from host_kernels.battery import TYPES, Call, HostBattery, layouts_of
from host_kernels.layouts import LAYOUTS, Layout, place, poisoned

from fpn_fast import reference
from fpn_fast.testing import tolerances

# Batch, channels, and sizes from the finest map to the coarsest.
SHAPES = {
    "doubled": (1, 16, [(16, 32), (8, 16), (4, 8)]),
    "odd": (1, 5, [(25, 13), (13, 7), (7, 4), (4, 2)]),
    "five_levels": (1, 3, [(13, 22), (7, 11), (4, 6), (2, 3), (1, 2)]),
    # The float32 index formula and integer arithmetic differ for 26 -> 44.
    "index_formula": (2, 9, [(44, 11), (26, 7)]),
    "downsampling": (2, 3, [(3, 5), (7, 4), (2, 9)]),
    "one_pixel": (1, 1, [(1, 1), (1, 1)]),
    "from_one_pixel": (2, 9, [(6, 5), (1, 1)]),
    "equal_sizes": (1, 8, [(3, 8), (3, 8), (3, 8)]),
    "empty_batch": (0, 4, [(4, 4), (2, 2)]),
    # More 16-byte vectors than a block has threads: along the channels, and in a plane.
    "many_channels": (1, 2056, [(3, 2), (2, 1)]),
    "large_planes": (1, 2, [(72, 130), (36, 65), (18, 33)]),
    # Whose gradient takes several blocks along a row of the coarsest map.
    "column_tiles": (1, 520, [(7, 25), (4, 13), (2, 7)]),
    # More than one launch holds.
    "ten_levels": (1, 2, [(10 - i, 12 - i) for i in range(10)]),
}
MODES = {"nearest": 0, "bilinear": 1, "align_corners": 2}
FORMATS = ("channels_first", "channels_last")

Maps = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """along_channels: the axis that threads run along; by default that of the memory."""

    shape: str
    mode: str = "nearest"
    average: bool = False
    along_channels: bool | None = None


def arguments(mode: str, average: bool) -> dict:
    """Of the reference."""
    name = "nearest" if mode == "nearest" else "bilinear"
    return {"mode": name, "align_corners": mode == "align_corners", "average": average}


def random_maps(shape: str, dtype: torch.dtype) -> Maps:
    batch, channels, sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64).to(dtype) for h, w in sizes]


def merge(laterals: Maps, layouts: list[Layout], case: Case) -> Call:
    inputs = [place(lateral, layouts[i % len(layouts)]) for i, lateral in enumerate(laterals)]
    outputs = [poisoned(tuple(m.shape), layouts[i % len(layouts)], m.dtype) for i, m in enumerate(laterals[:-1])]
    return call("forward", case, layouts, inputs, outputs, lambda merged: check_forward(laterals, merged, case))


def gather(grads: Maps, laterals: Maps, layouts: list[Layout], case: Case) -> Call:
    """Gradients of the laterals but the finest. The op takes the finest map's gradient halved, if averaging."""
    halved = [grads[0] / 2 if case.average else grads[0], *grads[1:]]
    inputs = [place(grad, layouts[i % len(layouts)]) for i, grad in enumerate(halved)]
    coarser = enumerate(laterals[1:], 1)
    outputs = [poisoned(tuple(m.shape), layouts[i % len(layouts)], m.dtype) for i, m in coarser]
    return call("backward", case, layouts, inputs, outputs, lambda sums: check_backward(grads, laterals, sums, case))


def call(kernel: str, case: Case, layouts: list[Layout], inputs: Maps, outputs: Maps, check) -> Call:
    along_channels = layouts[0].channels_last if case.along_channels is None else case.along_channels
    numbers = [run.DTYPES[inputs[0].dtype], MODES[case.mode], int(case.average), int(along_channels)]
    return Call(kernel, numbers, inputs, outputs, check)


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
# Whichever axis the threads run along, and whatever the strides: slower at most.
AXES = {"along_columns": False, "along_channels": True}
CASES |= {f"{shape}-{mode}-{axis}": Case(shape, mode, False, on) for shape, mode, (axis, on) in itertools.product(
    ("doubled", "odd"), ("nearest", "bilinear"), AXES.items())}  # fmt: skip


def right() -> list[str]:
    """Every shape in both memory formats and all modes; the rarer types and averaging on the two richest shapes."""
    found = []
    for (name, case), layout, dtype in itertools.product(CASES.items(), FORMATS, TYPES):
        everywhere = dtype in ("float32", "bfloat16") and not case.average
        # One block per plane: thousands of blocks that differ in nothing.
        too_many_blocks = SHAPES[case.shape][1] > 500 and layout == "channels_first"
        if case.along_channels is None and (everywhere or case.shape in ("doubled", "odd")) and not too_many_blocks:
            found.append(f"{name}/{layout}/{dtype}")
    shapes = ("doubled-nearest/float32", "doubled-nearest/bfloat16", "odd-nearest/float32", "odd-bilinear/float16")
    for (name, dtype), axis, layout in itertools.product((s.split("/") for s in shapes), AXES, [*LAYOUTS, "mixed"]):
        found.append(f"{name}-{axis}/{layout}/{dtype}")
    return found


class TestTopDown(HostBattery):
    program, cases, right = "top_down_main", CASES, right()
    addresses = (
        *(f"doubled-nearest-sum/{layout}/bfloat16" for layout in LAYOUTS),
        *(f"odd-bilinear-sum/{layout}/float16" for layout in LAYOUTS),
        *(f"{shape}-nearest-sum/channels_last" for shape in ("odd", "downsampling", "many_channels", "ten_levels")),
    )
    races = tuple(f"odd-{mode}-sum/{layout}" for mode in ("nearest", "bilinear") for layout in FORMATS)
    alone = tuple(
        f"{run}/{dtype}"
        for run in ("odd-nearest-sum/channels_first", "odd-nearest-sum/channels_last",
                    "large_planes-nearest-sum/channels_first", "column_tiles-nearest-sum/channels_last")
        for dtype in ("float32", "float16")
    )  # fmt: skip
    far = tuple(f"index_formula-nearest-sum/{layout}" for layout in FORMATS)

    def calls(self, case, dtype, layouts):
        laterals, grads = random_maps(case.shape, dtype), random_maps(case.shape, dtype)[:-1]
        yield merge(laterals, layouts, case)
        yield gather(grads, laterals, layouts, case)

    @pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
    def test_offsets_of_more_than_31_bits(self, text, axis):
        for call in self.calls_of(text):
            assert all(map(torch.equal, self.outputs(call), self.outputs(call, spread=axis)))

    @pytest.mark.parametrize("along_channels", AXES.values(), ids=AXES)
    def test_an_expanded_gradient(self, along_channels):
        """sum().backward() hands on one element with strides of zero."""
        case, laterals = Case("doubled", along_channels=along_channels), random_maps("doubled", torch.float32)
        grads = [torch.ones(()).expand(lateral.shape) for lateral in laterals[:-1]]
        one = gather(grads, laterals, layouts_of("channels_first"), case)
        one.inputs = grads
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
