# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from helpers import battery
from helpers.battery import Battery, Case, Op
from test_multiscale_roi_align import ODD_ROIS, ROIS, tensors

from fpn_fast import backends, ops
from fpn_fast.ops._roi_align import _MAX_BACKWARD as _BACKWARD
from fpn_fast.ops._roi_align import _MAX_FORWARD as _FORWARD
from fpn_fast.ops.levels import levels_by_area, thresholds_of
from fpn_fast.testing import tolerances

INF = math.inf
PYRAMID = ((9, 14), (5, 7))
SCALES = (1 / 4, 1 / 8)
# For images of 36 x 56 pixels: on both maps, over their edges, within a pixel, inverted, off the map, and infinite.
SOME_ROIS = (
    (0.0, 3.3, 5.1, 30.7, 31.9),
    (1.0, 40.2, 20.4, 61.3, 43.8),
    (0.0, 0.4, 1.6, 55.3, 35.2),
    (1.0, 12.7, 20.1, 14.9, 23.4),
)
FEW_ODD_ROIS = ((1.0, 30.5, 30.25, 10.5, 8.25), (0.0, 200.0, 200.0, 240.0, 240.0), (0.0, 3.0, 5.0, INF, 40.0))


def options(rois=SOME_ROIS, output_size=(2, 1), **others):
    # A canonical scale at which these RoIs are spread over both levels.
    return {"rois": rois, "output_size": output_size, "canonical_scale": 64, **others}


def levels_of(rois, maps):
    return levels_by_area(rois, maps, thresholds_of([2.0 ** -(2 + i) for i in range(maps)], 64, 4, "torchvision"))


def pool(maps, rois, **others):
    """The op with RoIs as numbers, so that they are constants of a compiled graph and of fake tensors' devices."""
    rois, _ = tensors(rois, None, maps[0].device)
    scales = [2.0 ** -(2 + i) for i in range(len(maps))]
    return [ops.multiscale_roi_align(maps, rois, scales=scales, pool_mode="max", **others)]


def bilinear(feature, y, x):
    """[C, H, W] at (y, x); None off the map."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return None
    y, x = max(y, 0), max(x, 0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, along = y - top if bottom > top else 0, x - left if right > left else 0
    above = (1 - along) * feature[:, top, left] + along * feature[:, top, right]
    below = (1 - along) * feature[:, bottom, left] + along * feature[:, bottom, right]
    return (1 - down) * above + down * below


def mmcv(maps, rois, output_size, sampling_ratio=-1, aligned=False, canonical_scale=64):
    """mmcv's loop, one sample after the other, on each RoI's map, all in the maps' type; a bin without a sample is
    zero."""
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    dtype = maps[0].dtype
    rois, _ = tensors(rois, None, "cpu")
    levels = levels_of(rois, len(maps)).tolist()
    rois = rois.to(dtype)
    empty = torch.zeros(len(rois), maps[0].size(1), *size, dtype=dtype)
    rows = list(empty)
    for k, (roi, level) in enumerate(zip(rois, levels, strict=True)):
        if level < 0 or not 0 <= roi[0] < maps[0].size(0):
            continue
        image = maps[level][int(roi[0])]
        corners = roi[1:] * 2.0 ** -(2 + level) - (0.5 if aligned else 0)
        start, extent = corners[:2], corners[2:] - corners[:2]
        extent = extent if aligned else extent.clamp(min=1)
        bin_x, bin_y = extent[0] / size[1], extent[1] / size[0]
        counts = [
            sampling_ratio if sampling_ratio > 0 else max(math.ceil(b), 0) if b < 1e6 else 0 for b in (bin_y, bin_x)
        ]
        bins = []
        for ph in range(size[0]):
            for pw in range(size[1]):
                largest = torch.full_like(image[:, 0, 0], -INF)
                for iy in range(counts[0]):
                    y = start[1] + ph * bin_y + (iy + 0.5) * bin_y / counts[0]
                    for ix in range(counts[1]):
                        x = start[0] + pw * bin_x + (ix + 0.5) * bin_x / counts[1]
                        value = bilinear(image, y.item(), x.item())
                        value = torch.zeros_like(largest) if value is None else value
                        largest = torch.where(value > largest, value, largest)
                bins.append(torch.where(largest == -INF, 0, largest))
        rows[k] = torch.stack(bins, 1).unflatten(1, size)
    return [torch.stack(rows) if rows else empty]


def check_forward(outputs, maps, case, strides=True):
    (output,) = outputs
    maps = [m.detach().cpu() for m in maps]
    accumulate = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    (same,), (exact,) = (
        mmcv([m.to(accumulate) for m in maps], **case.options),
        mmcv([m.double() for m in maps], **case.options),
    )
    assert (output.shape, output.dtype) == (same.shape, maps[0].dtype)
    if strides:
        channels_last = maps[0].stride(1) == 1 and not maps[0].is_contiguous()
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert output.is_contiguous(memory_format=form)
    tolerances.assert_not_worse(output.cpu(), same.to(output.dtype), exact, size=max(map(max, case.sizes)))


def check_backward(grads, maps, seeds, case):
    maps, seeds = ([t.detach().cpu() for t in each] for each in (maps, seeds))
    leaves = [[m.to(t).requires_grad_() for m in maps] for t in (torch.float32, torch.float64)]
    if maps[0].dtype == torch.float64:
        leaves[0] = leaves[1]
    same, exact = (
        torch.autograd.grad(mmcv(each, **case.options), each, [seeds[0].to(each[0].dtype)], materialize_grads=True)
        for each in leaves
    )
    for grad, a, b in zip(grads, same, exact, strict=True):
        tolerances.assert_not_worse(grad.cpu(), a.to(grad.dtype), b, size=max(map(max, case.sizes)))


def raw(backend, maps, case):
    rois, _ = tensors(SOME_ROIS, None, maps[0].device)
    thresholds = thresholds_of(SCALES, 64, 4, "torchvision")
    return _FORWARD[backend], (maps, rois, None, 2, 3, list(SCALES), thresholds, 2, False)


CASES = [
    Case("adaptive", PYRAMID, options(rois=SOME_ROIS[:2] + FEW_ODD_ROIS[1:2], aligned=True), channels=2),
    Case("ratio_2", PYRAMID, options(rois=SOME_ROIS[1:3] + FEW_ODD_ROIS, sampling_ratio=2), channels=3),
]


class TestMultiScaleRoIAlignMax(Battery):
    op = Op(pool, None, raw, check_forward, check_backward, twice=False)
    cases, emulated = CASES, True
    tiny = Case("tiny", ((4, 6), (3, 4)), options(rois=SOME_ROIS[:2], output_size=(1, 2), sampling_ratio=2), channels=2)
    derivatives = (tiny.options,)

    def test_backward_op_is_checked_too(self, target):
        backend, device = target
        maps = self.tiny.inputs(torch.float32, device, torch.channels_last, False)
        op, arguments = raw(backend, maps, self.tiny)
        pooled, winners = op(*arguments)
        grad = torch.randn_like(pooled).requires_grad_()
        arguments = (grad, winners, arguments[1], None, 2, [4, 6, 3, 4], *arguments[5:], True)
        torch.library.opcheck(_BACKWARD[backend], arguments, test_utils=("test_schema", "test_faketensor"))

    def test_first_of_equal_samples_wins(self, target, memory_format):
        """On a map of ones, all samples are equal: the gradient is that of the first one's pixels."""
        feature = torch.ones(1, 2, 8, 8, device=target[1]).contiguous(memory_format=memory_format).requires_grad_()
        rois = torch.tensor([[0.0, 1, 2, 5, 6]], device=target[1])
        pooled = ops.multiscale_roi_align([feature], rois, 1, [1], sampling_ratio=2, pool_mode="max")
        assert (pooled == 1).all()
        grad = torch.autograd.grad(pooled.sum(), feature)[0]
        # The first of four samples, at rows 3 and 5 and columns 2 and 4.
        expected = torch.zeros_like(grad)
        expected[..., 3, 2] = 1
        assert torch.equal(grad, expected)

    def test_off_the_map_counts_as_zero(self, target):
        """Above negative values a sample off the map wins, and no pixel has a gradient; below positive ones not."""
        rois = torch.tensor([[0.0, -8, 2, 4, 6]], device=target[1])
        for sign in (-1, 1):
            feature = torch.full((1, 1, 8, 8), 2.0 * sign, device=target[1], requires_grad=True)
            pooled = ops.multiscale_roi_align([feature], rois, 1, [1], sampling_ratio=2, pool_mode="max")
            assert pooled.item() == max(2 * sign, 0)
            assert torch.autograd.grad(pooled.sum(), feature)[0].sum().item() == (sign > 0)

    def test_nan_never_wins(self, target):
        feature = torch.zeros(1, 2, 8, 8, device=target[1]).sub(3)
        feature[0, 0, 3, 2] = math.nan
        feature[0, 1] = math.nan
        rois = torch.tensor([[0.0, 1, 2, 5, 6]], device=target[1])
        pooled = ops.multiscale_roi_align([feature], rois, 1, [1], sampling_ratio=2, pool_mode="max")
        assert pooled.flatten().tolist() == [-3, 0]

    @pytest.mark.parametrize("change", [{"rois": ()}, {}], ids=["no_rois", "batch_of_0"])
    def test_nothing_to_pool(self, target, change):
        case = Case("empty", PYRAMID, options(sampling_ratio=2, **change), batch=2 if change else 0)
        maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        (output,) = pool(maps, **case.options)
        assert output.shape == (0 if change else 4, 16, 2, 1)
        assert (output == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), maps))


LARGER = (
    ("many_rois", ROIS + ODD_ROIS, {"output_size": (3, 2), "sampling_ratio": 2}),
    ("adaptive", ROIS, {"output_size": (2, 2)}),
    ("adaptive_aligned", ROIS + ODD_ROIS[4:7] + ODD_ROIS[11:12], {"output_size": (2, 2), "aligned": True}),
    ("one_sample", ODD_ROIS, {"output_size": 1, "sampling_ratio": 1, "aligned": True}),
)
MAPS = ((25, 42), (13, 21), (7, 11), (4, 6))


@pytest.mark.parametrize("relu", [False, True], ids=["normal", "after_relu"])
@pytest.mark.parametrize(("name", "rois", "others"), LARGER, ids=[each[0] for each in LARGER])
def test_equals_mmcvs_loop(name, rois, others, relu):
    case = Case(name, MAPS, {"rois": rois, "canonical_scale": 64, **others}, channels=4)
    maps = case.inputs(torch.float64, "cpu", torch.contiguous_format, grad=False)
    maps = [(m.relu() if relu else m).requires_grad_() for m in maps]
    with backends.use("cpp"):
        outputs = pool(maps, **case.options)
        check_forward(outputs, maps, case)
    # The loop's gradient too is that of the first of equal samples, of which there are many after a ReLU.
    seeds = [torch.randn_like(outputs[0])]
    check_backward(torch.autograd.grad(outputs, maps, seeds), maps, seeds, case)


@pytest.mark.parametrize("dtype", battery.DTYPES, ids=str)
@pytest.mark.parametrize("sampling_ratio", [2, 0, 1, 20])
@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
def test_compiled_and_reference_choose_the_same_samples(dtype, sampling_ratio, aligned):
    """Bit for bit, values and winners, also among the many equal samples after a ReLU."""
    # The reference takes its time over many samples.
    rois, _ = tensors(ROIS + ODD_ROIS if sampling_ratio < 20 else ROIS[5:7] + ODD_ROIS[12:15], None, "cpu")
    rois = rois.double() if dtype == torch.float64 else rois
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    thresholds = thresholds_of(scales, 64, 4, "torchvision")
    for sign, form in zip((1, -1), battery.FORMATS.values(), strict=True):
        maps = Case("same", MAPS, channels=5).inputs(dtype, "cpu", form, grad=False)
        maps = [sign * m.relu() for m in maps]
        found = [
            _FORWARD[backend](maps, rois, None, 3, 2, scales, thresholds, sampling_ratio, aligned)
            for backend in ("cpp", "reference")
        ]
        for a, b in zip(*found, strict=True):
            tolerances.assert_exact(a, b)


def test_a_grid_larger_than_the_map():
    """What is left out of it lies off the map: a negative map loses to it, whatever the side."""
    feature = torch.full((1, 1, 6, 6), -1.0)
    for box in ((-4e4, 0, 5, 5), (0, 0, 4e4, 5), (0, -4e4, 5, 5), (0, 0, 5, 4e4), (-4e4, -4e4, 4e4, 4e4)):
        rois = torch.tensor([[0.0, *box]])
        for backend in ("cpp", "reference"):
            with backends.use(backend):
                assert ops.multiscale_roi_align([feature], rois, 1, [1], pool_mode="max").item() == 0
                assert ops.multiscale_roi_align([-feature], rois, 1, [1], pool_mode="max").item() == 1


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_errors(backend):
    rois = torch.zeros(1, 5)
    with backends.use(backend):
        with pytest.raises(ValueError, match="pool_mode must be 'avg' or 'max', got 'median'"):
            ops.multiscale_roi_align([torch.zeros(1, 1, 4, 4)], rois, 2, [1], pool_mode="median")
        with pytest.raises(ValueError, match=r"at most 16000 x 16000 pixels.*got \(1, 1, 1, 16001\) at 0"):
            ops.multiscale_roi_align([torch.zeros(1, 1, 1, 16001)], rois, 2, [1], pool_mode="max")


def test_the_op_itself_refuses_what_it_cannot_number():
    wide, rois = torch.zeros(1, 1, 1, 16001), torch.zeros(1, 5)
    with pytest.raises(RuntimeError, match="takes maps of at most 16000"):
        _FORWARD["cpp"]([wide], rois, None, 1, 1, [1.0], [INF], 2, False)
    grad, winners = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="takes a winner for each bin"):
        _BACKWARD["cpp"](grad, winners, rois, None, 1, [4, 4], [1.0], [INF], 2, False, False)
    with pytest.raises(RuntimeError, match="takes int32 winners"):
        _BACKWARD["cpp"](grad, grad, rois, None, 1, [4, 4], [1.0], [INF], 2, False, False)
