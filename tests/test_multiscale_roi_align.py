# SPDX-License-Identifier: Apache-2.0
import math
import struct

import pytest
import torch
import torchvision
from helpers import battery
from helpers.battery import Battery, Case, Op
from torchvision.ops.poolers import LevelMapper

from fpn_fast import backends, ops, reference
from fpn_fast.ops._roi_align import _BACKWARD, _FORWARD
from fpn_fast.ops.levels import level_thresholds, thresholds_of
from fpn_fast.testing import tolerances

NAN, INF = float("nan"), float("inf")
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# For maps of 25 x 42 pixels at a quarter: an image of 100 x 168.
ROIS = (
    (0.0, 3.3, 5.1, 30.7, 41.9),
    (1.0, 20.2, 10.4, 61.3, 33.8),
    (0.0, 0.0, 0.0, 168.0, 100.0),
    (1.0, 100.5, 40.25, 120.75, 99.5),
    (0.0, 7.7, 60.1, 9.9, 63.4),
    (1.0, 55.1, 3.2, 160.9, 95.8),
    (0.0, -20.3, -11.7, 25.6, 17.2),
    (1.0, 150.2, 80.6, 190.9, 130.4),
    (0.0, 31.3, 22.2, 75.4, 70.7),
    (1.0, 0.4, 1.6, 12.3, 90.2),
)
# NaN, inverted along one axis and both, no area, infinite, far outside, huge, and images that are not there.
ODD_ROIS = (
    (0.0, NAN, 5.0, 30.0, 40.0),
    (0.0, 3.0, 5.0, 30.0, NAN),
    (0.0, 30.0, 5.0, 3.0, 40.0),
    (0.0, 3.0, 40.0, 30.0, 5.0),
    (1.0, 40.5, 50.25, 10.5, 8.25),
    (1.0, 20.0, 30.0, 20.0, 30.0),
    (0.0, 20.0, 30.0, 20.0, 60.0),
    (0.0, 3.0, 5.0, INF, 40.0),
    (0.0, 3.0, 5.0, INF, INF),
    (0.0, -INF, -INF, INF, INF),
    (1.0, INF, INF, INF, INF),
    (0.0, 1000.0, 1000.0, 1100.0, 1100.0),
    (1.0, -4000.0, -3000.0, 5000.0, 4000.0),
    (0.0, -1e30, -1e30, 1e30, 1e30),
    (1.0, 1e30, 1e30, 2e30, 2e30),
    (2.0, 3.0, 5.0, 30.0, 40.0),
    (-1.0, 3.0, 5.0, 30.0, 40.0),
    (NAN, 3.0, 5.0, 30.0, 40.0),
    (INF, 3.0, 5.0, 30.0, 40.0),
    (1e20, 3.0, 5.0, 30.0, 40.0),
    (1.0, 3.0, 5.0, 30.0, 40.0),
)
PYRAMID = ((25, 42), (13, 21), (7, 11), (4, 6))


def options(rois=ROIS, output_size=(3, 2), **others):
    # A canonical scale at which RoIs of this image are spread over all levels.
    return {"rois": rois, "output_size": output_size, "canonical_scale": 64, **others}


CASES = [
    Case("ratio_2", PYRAMID, options(sampling_ratio=2)),
    Case("adaptive", PYRAMID, options()),
    Case("aligned", PYRAMID, options(sampling_ratio=2, aligned=True)),
    Case("aligned_adaptive", PYRAMID, options(aligned=True, sampling_ratio=0, level_formula="detectron2")),
    Case("mmdet", PYRAMID, options(output_size=3, sampling_ratio=1, aligned=True, level_formula="mmdet")),
    Case("7x7", PYRAMID[:2], options(rois=ROIS[:4], output_size=7, sampling_ratio=2)),
    Case("14x14", PYRAMID[1:3], options(rois=ROIS[4:7], output_size=14, sampling_ratio=2), channels=8),
    Case("one_bin_of_many_samples", PYRAMID[:3], options(output_size=1, sampling_ratio=9), channels=3),
    Case("wide_bins", PYRAMID[:1], options(output_size=(1, 5)), channels=3),
    Case("one_map", PYRAMID[:1], options(rois=ROIS + ODD_ROIS[:6], sampling_ratio=3)),
    Case("levels_of_1x1", ((1, 1), (1, 1), (2, 1)), options(sampling_ratio=2), channels=3),
    Case("eight_maps", ((9, 8), (8, 7), (7, 6), (6, 5), (5, 4), (4, 3), (3, 2), (2, 1)), options(sampling_ratio=1)),
    Case("no_rois", PYRAMID, options(rois=())),
    Case("batch_of_0", PYRAMID, options(rois=ROIS[:2]), batch=0),
    Case("one_channel", PYRAMID, options(sampling_ratio=2), channels=1),
    Case("uneven_channels", PYRAMID, options(sampling_ratio=2), channels=11),
    Case("odd_rois", PYRAMID, options(rois=ODD_ROIS, sampling_ratio=2), channels=8),
    Case("odd_rois_adaptive", PYRAMID, options(rois=ODD_ROIS), channels=8),
    Case("odd_rois_aligned", PYRAMID, options(rois=ODD_ROIS, aligned=True), channels=8),
    Case("odd_rois_aligned_ratio_2", PYRAMID, options(rois=ODD_ROIS, aligned=True, sampling_ratio=2), channels=8),
    Case("odd_rois_ratio_20", PYRAMID[:2], options(rois=ODD_ROIS[5:15], output_size=1, sampling_ratio=20), channels=3),
    Case("given_levels", PYRAMID, options(sampling_ratio=2, levels=(0, 1, 2, 3, -1, 4, 0, 1, 2, 3))),
    Case("clustered", PYRAMID[:2], options(rois=ROIS[:1] * 12 + ROIS[8:9] * 12, sampling_ratio=2), channels=8),
    Case("spread", PYRAMID, options(sampling_ratio=2)),
]


def tensors(rois, levels, device):
    rois = torch.tensor(rois, device=device).reshape(-1, 5)
    return rois, None if levels is None else torch.tensor(levels, device=device)


def pool(maps, rois, levels=None, **others):
    """The op with RoIs as numbers, so that they are constants of a compiled graph and of fake tensors' devices."""
    rois, levels = tensors(rois, levels, maps[0].device)
    scales = [2.0 ** -(2 + i) for i in range(len(maps))]
    return [ops.multiscale_roi_align(maps, rois, scales=scales, levels=levels, **others)]


def plain(maps, rois, output_size, levels=None, sampling_ratio=-1, aligned=False, **rule):
    """The reference, with its own logarithm for the levels."""
    rois, levels = tensors(rois, levels, maps[0].device)
    if levels is None and len(maps) > 1:
        levels = reference.assign_levels(rois, 2, 1 + len(maps), **rule)
    elif levels is None:
        levels = torch.zeros(len(rois), dtype=torch.int64)
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    scales = [2.0 ** -(2 + i) for i in range(len(maps))]
    arguments = (rois.to(maps[0].dtype if maps[0].dtype == torch.float64 else torch.float32), levels)
    return [reference.multiscale_roi_align(maps, *arguments, size, scales, sampling_ratio, aligned)]


def check_forward(outputs, maps, case, strides=True):
    (output,) = outputs
    (same,), (exact,) = plain(maps, **case.options), plain([m.double() for m in maps], **case.options)
    assert (output.shape, output.dtype) == (same.shape, same.dtype)
    if strides:
        channels_last = maps[0].stride(1) == 1 and not maps[0].is_contiguous()
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert output.is_contiguous(memory_format=form)
    tolerances.assert_not_worse(output, same, exact, size=max(map(max, case.sizes)))


def plain_grads(leaves, seeds, options):
    """Zeros for a map that no RoI reads, where autograd sees none."""
    outputs = plain(leaves, **options)
    if not outputs[0].requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(outputs, leaves, seeds, materialize_grads=True)


def check_backward(grads, maps, seeds, case):
    leaves = [[m.detach().to(t).requires_grad_() for m in maps] for t in (torch.float32, torch.float64)]
    if maps[0].dtype == torch.float64:
        leaves[0] = leaves[1]
    same, exact = (plain_grads(each, [s.to(each[0].dtype) for s in seeds], case.options) for each in leaves)
    for grad, a, b in zip(grads, same, exact, strict=True):
        tolerances.assert_not_worse(grad, a.to(grad.dtype), b, size=max(map(max, case.sizes)))


def raw(backend, maps, case):
    rois, _ = tensors(ROIS, None, maps[0].device)
    thresholds = thresholds_of((1 / 4, 1 / 8), 64, 4, "torchvision")
    return _FORWARD[backend], (maps, rois, None, 2, 3, [1 / 4, 1 / 8], thresholds, 2, False)


class TestMultiScaleRoIAlign(Battery):
    op = Op(pool, plain, raw, check_forward, check_backward, twice=False)
    cases, emulated = CASES, True
    tiny = Case(
        "tiny", ((5, 7), (3, 4)), options(rois=ROIS[:2] + ROIS[6:7], output_size=2, sampling_ratio=2), channels=2
    )
    derivatives = (
        tiny.options,
        options(rois=ROIS[:3], output_size=2),
        options(rois=ROIS[:3] + ODD_ROIS[2:9], output_size=(1, 2), aligned=True, sampling_ratio=1),
    )

    def test_backward_op_is_checked_too(self, target):
        backend, device = target
        rois, _ = tensors(ROIS, None, device)
        grad = torch.randn(len(ROIS), 2, 2, 3, device=device, requires_grad=True)
        thresholds = thresholds_of((1 / 4, 1 / 8), 64, 4, "torchvision")
        arguments = (grad, rois, None, 2, [5, 7, 3, 4], [1 / 4, 1 / 8], thresholds, 2, False, True)
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(_BACKWARD[backend], arguments, test_utils=utilities)

    def test_one_graph_for_any_number_of_rois(self, target):
        torch._dynamo.reset()
        maps = self.tiny.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        function = lambda rois: ops.multiscale_roi_align(maps, rois, 2, (1 / 4, 1 / 8), canonical_scale=64)  # noqa: E731
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for count in (10, 7, 3, 9):
            rois, _ = tensors(ROIS[:count], None, target[1])
            torch._dynamo.mark_dynamic(rois, 0)
            assert torch.equal(compiled(rois), function(rois))
        assert len(graphs) == 1

    def test_rows_without_level_are_zero_and_get_no_gradient(self, target):
        maps = CASES[0].inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        absent = [i for i, roi in enumerate(ODD_ROIS) if i not in (4, 5, 6, 12, 20)]
        (output,) = pool(maps, tuple(ODD_ROIS[i] for i in absent), output_size=2, sampling_ratio=2, canonical_scale=64)
        assert torch.equal(output, torch.zeros_like(output))
        for grad in torch.autograd.grad(output.sum(), maps):
            assert torch.equal(grad, torch.zeros_like(grad))

    def test_rois_are_read_in_float32(self, target):
        """Corners that half precision would move by up to 4 pixels."""
        rois = ((0.0, 101.3, 51.7, 140.9, 90.2), (1.0, 99.1, 33.3, 167.7, 99.9))
        maps = CASES[0].inputs(torch.bfloat16, target[1], torch.channels_last, grad=False)
        (half,) = pool(maps, rois, output_size=3, sampling_ratio=2)
        (full,) = pool([m.float() for m in maps], rois, output_size=3, sampling_ratio=2)
        assert torch.equal(half, full.bfloat16())

    def test_backward_follows_the_forward_backend(self, target):
        feature = torch.randn(1, 2, 8, 8, device=target[1], requires_grad=True)
        rois = torch.tensor([[0.0, 0, 0, 8, 8]], device=target[1])
        pooled = ops.roi_align(feature, rois, 2, sampling_ratio=2)
        with backends.use("reference"):
            grad = torch.autograd.grad(pooled.sum(), feature)[0]
        assert grad.sum().item() == pytest.approx(8)

    def test_no_feature_is_kept_for_the_gradient(self, target):
        feature = torch.randn(1, 2, 8, 8, device=target[1], requires_grad=True)
        rois = torch.tensor([[0.0, 0, 0, 8, 8]], device=target[1])
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            ops.roi_align(feature, rois, 2)
        assert feature.shape not in kept


def of_images(rois):
    """[K, 5] -> torchvision's boxes of each image, and the order of the rows that it gives."""
    order = torch.argsort(rois[:, 0], stable=True)
    return [rois[rois[:, 0] == i, 1:] for i in range(2)], order


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("sampling_ratio", [2, 0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvisions_pooler(backend, sampling_ratio, dtype):
    rois = torch.tensor(ROIS + ODD_ROIS[4:7] + ODD_ROIS[11:12], dtype=dtype)
    boxes, order = of_images(rois)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], (4, 3), sampling_ratio, canonical_scale=64)
    maps = CASES[0].inputs(dtype, "cpu", torch.contiguous_format, grad=True)
    theirs = pooler(dict(zip("0123", maps, strict=True)), boxes, [(100, 168)] * 2)
    with backends.use(backend):
        ours = ops.multiscale_roi_align(
            maps, rois[order], (4, 3), pooler.scales, sampling_ratio=sampling_ratio, canonical_scale=64
        )
        seed = torch.randn_like(theirs)
        grads = torch.autograd.grad(ours, maps, seed)
    exact = plain([m.double() for m in maps], rois[order].tolist(), (4, 3), sampling_ratio=sampling_ratio,
                  canonical_scale=64)[0]  # fmt: skip
    tolerances.assert_not_worse(ours, theirs, exact, size=42)
    for grad, other in zip(grads, torch.autograd.grad(theirs, maps, seed), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_roi_align_equals_torchvisions(sampling_ratio, aligned):
    feature = torch.randn(2, 5, 25, 42, requires_grad=True)
    # One map has no rule of levels: what is inverted keeps what RoIAlign's arithmetic makes of it. torchvision's
    # adaptive grid of an aligned and inverted RoI asks for a negative amount of memory.
    inverted = () if aligned and sampling_ratio == 0 else ODD_ROIS[2:5]
    rois = torch.tensor(ROIS + inverted + ODD_ROIS[5:7] + ODD_ROIS[11:12])
    arguments = ((5, 3), 1 / 4, sampling_ratio, aligned)
    theirs = torchvision.ops.roi_align(feature, rois, *arguments)
    ours = ops.roi_align(feature, rois, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(o, feature, seed)[0] for o in (ours, theirs)), rtol=1e-5, atol=1e-5
    )
    boxes, order = of_images(rois)
    assert torch.equal(ops.roi_align(feature, boxes, *arguments), ours[order])


def neighbours(area, count):
    """The float32 numbers around `area`."""
    bits = torch.tensor(area).view(torch.int32) + torch.arange(-count, count + 1, dtype=torch.int32)
    return bits.view(torch.float32)


def rois_of_areas(areas):
    rois = torch.zeros(len(areas), 5)
    rois[:, 3], rois[:, 4] = areas, 1
    return rois


def wrongly_rounded_roots(areas):
    """Where this torch's square root is not the nearest number: a library behind it may be off by a unit."""
    exact = torch.tensor([struct.unpack("f", struct.pack("f", math.sqrt(a)))[0] for a in areas.tolist()])
    return areas.sqrt() != exact


@pytest.mark.parametrize("formula", ["torchvision", "detectron2", "mmdet"])
@pytest.mark.parametrize(("scale", "level"), [(224, 4), (56, 2), (100, 3)])
def test_levels_at_and_next_to_their_thresholds(formula, scale, level):
    rule = {"canonical_scale": scale, "canonical_level": level, "level_formula": formula}
    thresholds = level_thresholds(2, 5, scale, level, formula)
    assert len(set(thresholds)) == 3
    for i, threshold in enumerate(thresholds):
        areas = neighbours(threshold, 2000)
        rois = rois_of_areas(areas)
        found = ops.assign_levels(rois, SCALES, **rule)
        # Exactly here the level begins.
        assert found.tolist() == [i] * 2000 + [i + 1] * 2001
        by_logarithm = reference.assign_levels(rois, 2, 5, **rule)
        assert not ((found != by_logarithm) & ~wrongly_rounded_roots(areas)).any()
        if formula == "torchvision":
            assert torch.equal(LevelMapper(2, 5, scale, level)([rois[:, 1:]]), by_logarithm)


@pytest.mark.parametrize("target", battery.TARGETS)
@pytest.mark.parametrize("formula", ["torchvision", "detectron2", "mmdet"])
def test_kernels_take_the_level_that_assign_levels_says(target, formula):
    backend, device = target
    if backend == "triton" and device == "cpu" and not backends.triton_interprets():
        pytest.skip("Triton runs on the GPU here")
    thresholds = level_thresholds(2, 5, 224, 4, formula)
    rois = rois_of_areas(torch.cat([neighbours(t, 2) for t in thresholds]))
    # Powers of two: the area stays what it is, and the centre is on every map.
    rois[:, 3], rois[:, 4] = rois[:, 3] / 256, 256
    expected = ops.assign_levels(rois, SCALES, level_formula=formula)
    # Each map holds its own level's number.
    maps = [torch.full((1, 1, 64, 64), float(i), device=device) for i in range(4)]
    with backends.use(backend):
        pooled = ops.multiscale_roi_align(maps, rois.to(device), 1, SCALES, sampling_ratio=1, level_formula=formula)
    assert pooled.flatten().tolist() == expected.tolist()


def test_levels_of_odd_rois():
    levels = ops.assign_levels(torch.tensor(ODD_ROIS[:15]), SCALES)
    #             NaN  NaN one one both none none inf inf inf  inf-inf far 0  huge huge
    assert levels.tolist() == [-1, -1, -1, -1, 0, 0, 0, 3, 3, 3, -1, 0, 3, 3, 3]
    assert torch.equal(levels, reference.assign_levels(torch.tensor(ODD_ROIS[:15]), 2, 5))
    # A map left out: the rule still counts its level, and what falls beyond the last map has none.
    rois = rois_of_areas(torch.tensor([10.0, 112.0**2, 224.0**2, 448.0**2]))
    assert ops.assign_levels(rois, (1 / 4, 1 / 16)).tolist() == [0, 1, -1, -1]


def test_autocast_promotes_to_the_widest_and_keeps_boxes():
    maps = [torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.randn(1, 4, 4, 4)]
    rois = torch.tensor([[0.0, 1.3, 2.7, 20.1, 30.9]])
    with pytest.raises(TypeError, match="features must be of one dtype outside autocast"):
        ops.multiscale_roi_align(maps, rois, 2, SCALES[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = ops.multiscale_roi_align(maps, rois, 2, SCALES[:2])
        half = ops.multiscale_roi_align([m.bfloat16() for m in maps], rois, 2, SCALES[:2])
    assert torch.equal(pooled, ops.multiscale_roi_align([m.float() for m in maps], rois, 2, SCALES[:2]))
    assert half.dtype == torch.bfloat16


FEATURES = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
BOX = torch.tensor([[0.0, 0, 0, 4, 4]])
ERRORS = [
    ({"features": []}, ValueError, "features must hold at least one map"),
    ({"features": [torch.zeros(1, 2, 4, 4, dtype=torch.int32)] * 2}, TypeError, "features must be float64.*int32 at 0"),
    ({"features": FEATURES[:1] * 9, "scales": [1] * 9}, ValueError, "features must be 1 to 8 maps, got 9"),
    ({"scales": (1.0,)}, ValueError, "scales must be one for each of the 2 features, got 1"),
    ({"scales": (0.25, -1.0)}, ValueError, "scales must be positive"),
    ({"scales": (1 / 8, 1 / 4)}, ValueError, "maps must be finest first"),
    ({"rois": [[0, 0, 0, 4, 4]]}, TypeError, "rois must be a tensor, got list"),
    ({"rois": torch.zeros(3, 4)}, ValueError, r"rois must be \[K, 5\].*got \(3, 4\)"),
    ({"rois": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "rois must be float64.*int64"),
    ({"rois": torch.zeros(3, 5, device="meta")}, ValueError, "rois must be on the device of features, cpu, got meta"),
    ({"output_size": 0}, ValueError, "output_size must be 1 to 1024 bins along each axis, got 0"),
    ({"output_size": (7, 2000)}, ValueError, "output_size must be 1 to 1024"),
    ({"sampling_ratio": 2000}, ValueError, "sampling_ratio must be at most 1024, got 2000"),
    ({"level_formula": "mine"}, ValueError, "level_formula must be one of torchvision.*'mine'"),
    ({"canonical_scale": 0}, ValueError, "canonical_scale must be a positive number"),
    ({"levels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"levels must be \[K\].*got \(2,\)"),
    ({"levels": torch.zeros(1)}, TypeError, "levels must be of an integer type, got torch.float32"),
]


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[e[2][:24] for e in ERRORS])
def test_errors(backend, change, error, message):
    arguments = {"features": FEATURES, "rois": BOX, "output_size": 2, "scales": (1 / 4, 1 / 8), **change}
    with backends.use(backend), pytest.raises(error, match=message):
        ops.multiscale_roi_align(**arguments)


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_boxes_of_several_dtypes_keep_their_digits(backend, dtype):
    """Whichever image comes first, as one without boxes, whose table is of float32."""
    feature = torch.rand(2, 3, 12, 16, dtype=torch.float64).to(dtype)
    boxes = [torch.zeros(0, 4), torch.tensor([[1 / 3, 1 / 7, 40 / 3, 60 / 7]], dtype=torch.float64)]
    expected = ops.roi_align(feature, torch.tensor([[1, 1 / 3, 1 / 7, 40 / 3, 60 / 7]], dtype=torch.float64), 3)
    assert torch.equal(ops.roi_align(feature, boxes, 3), expected)


def test_errors_of_boxes():
    with pytest.raises(ValueError, match=r"boxes must be \[L, 4\].*got \(2, 5\) at 1"):
        ops.roi_align(FEATURES[0], [torch.zeros(2, 4), torch.zeros(2, 5)], 2)
    with pytest.raises(ValueError, match="a tensor for each image, got an empty"):
        ops.roi_align(FEATURES[0], [], 2)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", [t for t in battery.TARGETS if "cpp" in t.id or t.marks])
def test_coco_size(target, dtype, memory_format):
    """800 x 1344, P2 to P5, batch of 2, 16 channels, 60 RoIs of every size."""
    backend, device = target
    centre, extent = torch.rand(60, 2) * torch.tensor([1344.0, 800.0]), torch.exp(2 + 4.5 * torch.rand(60, 2))
    image = torch.arange(60).remainder(2)[:, None]
    rois = torch.cat([image, centre - extent / 2, centre + extent / 2], 1).tolist()
    sizes = ((200, 336), (100, 168), (50, 84), (25, 42))
    case = Case("coco", sizes, {"rois": rois, "output_size": 7, "sampling_ratio": 2})
    maps = case.inputs(dtype, device, memory_format, grad=True)
    with backends.use(backend):
        outputs = pool(maps, **case.options)
        check_forward(outputs, maps, case)
        seeds = [torch.randn_like(o) for o in outputs]
        check_backward(torch.autograd.grad(outputs, maps, seeds), maps, seeds, case)


@pytest.mark.large
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
def test_more_than_2_to_31_elements(device, memory_format):
    feature = torch.zeros(2, 256, 2064, 2048, dtype=torch.bfloat16, device=device)
    feature = feature.contiguous(memory_format=memory_format)
    feature[-1, :, -1, -1] = torch.arange(256, device=device)
    rois = torch.tensor([[1.0, 2047, 2063, 2048, 2064]], device=device)
    feature.requires_grad_()
    pooled = ops.roi_align(feature, rois, 1, sampling_ratio=1, aligned=True)
    assert torch.equal(pooled.flatten(), feature[-1, :, -1, -1])
    grad = torch.autograd.grad(pooled.sum(), feature)[0]
    assert (grad[-1, :, -1, -1] == 1).all()
    assert grad.float().sum() == 256
