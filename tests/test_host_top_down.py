# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the top-down merge, run on the CPU and compared with plain PyTorch."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from host_kernels import run
from host_kernels.layouts import LAYOUTS, Layout, only_the_map_was_written, place, poisoned

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
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {name: LAYOUTS[name] for name in ("channels_first", "channels_last")}

Maps = list[torch.Tensor]


def arguments(mode: str, average: bool) -> dict:
    """Of the reference."""
    name = "nearest" if mode == "nearest" else "bilinear"
    return {"mode": name, "align_corners": mode == "align_corners", "average": average}


def random_maps(shape: str, dtype: torch.dtype) -> Maps:
    batch, channels, sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, h, w, generator=generator, dtype=torch.float64).to(dtype) for h, w in sizes]


def launch(
    kernel: str,
    inputs: Maps,
    outputs: Maps,
    mode: str,
    average: bool,
    channels_last: bool,
    **options,
) -> Maps:
    """The outputs as the kernel leaves them. It must have kept the inputs, and all around the outputs, as they were."""
    numbers = [run.DTYPES[inputs[0].dtype], MODES[mode], int(average), int(channels_last)]
    maps = [*inputs, *outputs]
    results = run.run("top_down_main", kernel, numbers, maps, **options)
    for before, after in zip(inputs, results, strict=False):
        assert run.storage_bytes(before) == run.storage_bytes(after), "an input was written"
    for before, after in zip(maps, results, strict=True):
        assert only_the_map_was_written(before, after), "something beside an output was written"
    return results[len(inputs) :]


def rotated(layouts: Sequence[Layout], count: int) -> list[Layout]:
    return [layouts[i % len(layouts)] for i in range(count)]


def merge(laterals: Maps, layouts: Sequence[Layout], mode: str, average: bool, channels_last: bool, **options) -> Maps:
    levels = rotated(layouts, len(laterals))
    inputs = [place(lateral, layout) for lateral, layout in zip(laterals, levels, strict=True)]
    outputs = [poisoned(tuple(m.shape), layout, m.dtype) for m, layout in zip(laterals[:-1], levels, strict=False)]
    return launch("forward", inputs, outputs, mode, average, channels_last, **options)


def gather(
    grads: Maps,
    coarsest: torch.Tensor,
    layouts: Sequence[Layout],
    mode: str,
    average: bool,
    channels_last: bool,
    **options,
) -> Maps:
    """Gradients of the laterals but the finest. The op takes the finest map's gradient halved, if averaging."""
    levels = rotated(layouts, len(grads) + 1)
    halved = [grads[0] / 2 if average else grads[0], *grads[1:]]
    inputs = [place(grad, layout) for grad, layout in zip(halved, levels, strict=False)]
    sizes = [tuple(map_.shape) for map_ in (*grads[1:], coarsest)]
    outputs = [poisoned(size, layout, coarsest.dtype) for size, layout in zip(sizes, levels[1:], strict=True)]
    return launch("backward", inputs, outputs, mode, average, channels_last, **options)


def lateral_gradients(grads: Maps, laterals: Maps, mode: str, average: bool) -> Maps:
    """Autograd's, of all laterals but the finest, in the grads' type."""
    leaves = [lateral.to(grads[0].dtype).requires_grad_() for lateral in laterals]
    merged = reference.top_down(leaves, **arguments(mode, average))
    return list(torch.autograd.grad(merged[:-1], leaves[1:], grads))


def doubles(maps: Maps) -> Maps:
    return [map_.double() for map_ in maps]


def check_forward(laterals: Maps, merged: Maps, mode: str, average: bool) -> None:
    expected = reference.top_down(laterals, **arguments(mode, average))
    exact = reference.top_down(doubles(laterals), **arguments(mode, average))
    size = max(max(lateral.shape[2:]) for lateral in laterals)
    for actual, plain, truth in zip(merged, expected, exact, strict=False):
        if mode == "nearest":
            torch.testing.assert_close(actual, plain, rtol=0, atol=0, equal_nan=True)
        else:
            tolerances.assert_not_worse(actual, plain, truth, size=size)


def check_backward(grads: Maps, laterals: Maps, sums: Maps, mode: str, average: bool) -> None:
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


def parity_cases() -> list:
    """Every shape in both memory formats and all modes; the rarer types and averaging on the two richest shapes."""
    cases = []
    for shape, layout, mode, dtype, average in itertools.product(SHAPES, FORMATS, MODES, DTYPES, (False, True)):
        everywhere = dtype in ("float32", "bfloat16") and not average
        # One block per plane: thousands of blocks that differ in nothing.
        too_many_blocks = SHAPES[shape][1] > 500 and layout == "channels_first"
        if (everywhere or shape in ("doubled", "odd")) and not too_many_blocks:
            name = "-".join([shape, layout, mode, dtype, "avg" if average else "sum"])
            cases.append(pytest.param(shape, FORMATS[layout], mode, DTYPES[dtype], average, id=name))
    return cases


@pytest.mark.parametrize(("shape", "layout", "mode", "dtype", "average"), parity_cases())
def test_forward_and_backward(shape, layout, mode, dtype, average):
    laterals = random_maps(shape, dtype)
    check_forward(laterals, merge(laterals, [layout], mode, average, layout.channels_last), mode, average)
    grads = random_maps(shape, dtype)[:-1]
    sums = gather(grads, laterals[-1], [layout], mode, average, layout.channels_last)
    check_backward(grads, laterals, sums, mode, average)


@pytest.mark.parametrize(
    ("shape", "dtype", "mode"),
    [
        ("doubled", torch.float32, "nearest"),
        ("doubled", torch.bfloat16, "nearest"),
        ("odd", torch.float32, "nearest"),
        ("odd", torch.float16, "bilinear"),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["along_columns", "along_channels"])
@pytest.mark.parametrize("names", [*([name] for name in LAYOUTS), list(LAYOUTS)], ids=[*LAYOUTS, "mixed"])
def test_any_layout(names, channels_last, shape, dtype, mode):
    """Whichever axis the threads run along, and whatever the strides: slower at most."""
    layouts = [LAYOUTS[name] for name in names]
    laterals = random_maps(shape, dtype)
    check_forward(laterals, merge(laterals, layouts, mode, False, channels_last), mode, False)
    grads = random_maps(shape, dtype)[:-1]
    sums = gather(grads, laterals[-1], layouts, mode, False, channels_last)
    check_backward(grads, laterals, sums, mode, False)


@pytest.mark.parametrize("channels_last", [False, True], ids=["along_columns", "along_channels"])
def test_an_expanded_gradient(channels_last):
    """sum().backward() hands on one element with strides of zero."""
    laterals = random_maps("doubled", torch.float32)
    grads = [torch.ones(()).expand(lateral.shape) for lateral in laterals[:-1]]
    outputs = [poisoned(tuple(lateral.shape), FORMATS["channels_first"], torch.float32) for lateral in laterals[1:]]
    check_backward(
        grads, laterals, launch("backward", grads, outputs, "nearest", False, channels_last), "nearest", False
    )


@pytest.mark.parametrize("average", [False, True], ids=["sum", "avg"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_pattern_is_added_and_rounded_as_pytorch_does(dtype, average):
    info = torch.finfo(dtype)
    tops = [0.0, 1.0, -3.14, info.smallest_normal * info.eps, -info.smallest_normal, info.max, -info.max, float("-inf")]
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    laterals = [
        patterns.view(1, 1, 256, 256).expand(1, len(tops), 256, 256),
        torch.tensor(tops, dtype=dtype).view(1, -1, 1, 1),
    ]
    check_forward(laterals, merge(laterals, [FORMATS["channels_first"]], "nearest", average, False), "nearest", average)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_a_nan_reaches_the_sources_of_its_pixel_only(layout):
    laterals, grads = random_maps("odd", torch.float16), random_maps("odd", torch.float16)[:-1]
    grads[0][0, 1, 3, 7] = float("nan")
    grads[1][0, 2, 12, 0] = float("inf")
    sums = gather(grads, laterals[-1], [layout], "nearest", False, layout.channels_last)
    exact = lateral_gradients(doubles(grads), laterals, "nearest", False)
    for actual, wanted in zip(sums, exact, strict=True):
        assert wanted.isnan().sum() == 1
        assert wanted.isinf().sum() == 1
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert torch.equal(actual.isinf(), wanted.isinf())


def both_directions(shape: str, layout: Layout, mode: str, dtype: torch.dtype, **options) -> Maps:
    laterals, grads = random_maps(shape, dtype), random_maps(shape, dtype)[:-1]
    merged = merge(laterals, [layout], mode, False, layout.channels_last, **options)
    return merged + gather(grads, laterals[-1], [layout], mode, False, layout.channels_last, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ("odd", "channels_first"),
        ("odd", "channels_last"),
        ("large_planes", "channels_first"),
        ("column_tiles", "channels_last"),
    ],
)
def test_blocks_are_independent(shape, layout, dtype):
    """Each element is written by one block, and needs nothing that another block writes."""
    layout = LAYOUTS[layout]
    laterals, grads = random_maps(shape, dtype), random_maps(shape, dtype)[:-1]
    for kernel, inputs, outputs in (("forward", laterals, laterals[:-1]), ("backward", grads, laterals[1:])):
        maps = [place(map_, layout) for map_ in inputs]
        maps += [poisoned(tuple(map_.shape), layout, dtype) for map_ in outputs]
        numbers = [run.DTYPES[dtype], MODES["nearest"], 0, int(layout.channels_last)]
        together = run.run("top_down_main", kernel, numbers, maps)[len(inputs) :]
        writers = [torch.zeros(map_.shape, dtype=torch.int) for map_ in outputs]
        for alone in run.block_by_block("top_down_main", kernel, numbers, maps):
            for count, one, all_ in zip(writers, alone[len(inputs) :], together, strict=True):
                written = ~one.isnan()
                assert torch.equal(one[written], all_[written])
                count += written
        assert all((count == 1).all() for count in writers)


@pytest.mark.parametrize("axis", range(4), ids=list("nchw"))
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_offsets_of_more_than_31_bits(layout, axis):
    """Maps whose last element is 2^31 elements from the first, along any axis."""
    near, far = (
        both_directions("index_formula", layout, "nearest", torch.float32, **o) for o in ({}, {"spread": axis})
    )
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "mode"), [("doubled", torch.bfloat16, "nearest"), ("odd", torch.float16, "bilinear")]
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_stray_access_and_no_undefined_arithmetic(layout, shape, dtype, mode):
    both_directions(shape, layout, mode, dtype, flavour="address")


@pytest.mark.parametrize("shape", ["odd", "downsampling", "many_channels", "ten_levels"])
def test_no_stray_access_in_rarer_shapes(shape):
    both_directions(shape, FORMATS["channels_last"], "nearest", torch.float32, flavour="address")


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_no_data_race(layout, mode):
    both_directions("odd", layout, mode, torch.float32, flavour="thread")
