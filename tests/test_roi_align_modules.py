# SPDX-License-Identifier: Apache-2.0
"""The RoI pooling modules against the libraries that they replace, or a plain statement of what those do."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import small_detectors
from helpers.modules import COPIES, assert_none_worse, outputs_and_gradients
from helpers.small_detectors import NAMES
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops.poolers import LevelMapper, initLevelMapper

import fpn_fast
from fpn_fast import ops
from fpn_fast.nn import MultiScaleRoIAlign, RoIAlign, _standalone
from fpn_fast.nn.detectron2 import ROIPooler
from fpn_fast.nn.mmdet import SingleRoIExtractor
from fpn_fast.testing import tolerances

SIZES = [(25, 43), (13, 22), (7, 11), (4, 6)]
SHAPES = [(100, 170), (96, 160), (100, 140)]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
SIZE = max(map(max, SIZES))
HALVES = [torch.float16, torch.bfloat16]
LAST = torch.channels_last


def pyramid(dtype=torch.float32, channels=3, batch=3, grad=False, form=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    return OrderedDict(
        (
            name,
            torch.randn(batch, channels, *size, generator=generator).to(dtype, memory_format=form).requires_grad_(grad),
        )
        for name, size in zip([*NAMES, "pool"], [*SIZES, (2, 3)], strict=True)
    )


def boxes(dtype=torch.float32, counts=(14, 0, 9)):
    """Of 8 to 900 pixels, so of every level, and reaching out of the images; some without area, some inverted twice."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator) * 150
        half = 4 * 2 ** (torch.rand(count, 2, generator=generator) * 6.8)
        found.append(torch.cat([centre - half, centre + half], 1).to(dtype))
    if counts[0] > 4:
        found[0][:5] = torch.tensor(
            [[5, 6, 5, 60], [7, 7, 7, 7], [60, 50, 20, 10], [-300, -200, 300, 300], [-90, -90, 30, 29]]
        )
    return found


def everything(dtype):
    return pyramid(dtype, grad=True), boxes(dtype)


def assert_same_pooling(ours, theirs, dtype, names=NAMES, shapes=SHAPES, make=everything):
    """Outputs and gradients. make: dtype -> (maps by name, boxes), the same numbers whatever the type."""
    results = []
    for module, kind in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        maps, rois = make(kind)
        pooled = module(maps, rois, shapes)
        results.append(outputs_and_gradients([pooled], [map for name, map in maps.items() if name in names]))
    assert ours.scales == theirs.scales
    assert vars(ours.map_levels) == vars(theirs.map_levels)
    assert results[0][0].dtype == dtype
    assert_none_worse(*results, size=SIZE)
    return results[0][0]


def pair(*arguments, **options):
    return MultiScaleRoIAlign(*arguments, **options), torchvision.ops.MultiScaleRoIAlign(*arguments, **options)


# MultiScaleRoIAlign


def test_the_boxes_are_of_every_level():
    levels = LevelMapper(2, 5)(boxes())
    assert set(levels.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "ratio"), [(7, 2), ((3, 5), 0), ([4, 2], -1)])
def test_same_output_and_gradients_as_torchvision(size, ratio, dtype, form):
    def make(dtype):
        return pyramid(dtype, grad=True, form=form), boxes(dtype)

    pooled = assert_same_pooling(*pair(NAMES, size, ratio), dtype, make=make)
    assert pooled.is_contiguous(memory_format=form)


@pytest.mark.parametrize(("scale", "level"), [(40, 4), (224, 3), (100, 5)])
def test_canonical_scale_and_level(scale, level):
    assert_same_pooling(*pair(NAMES, 3, 2, canonical_scale=scale, canonical_level=level), torch.float32)


@pytest.mark.parametrize("names", [["1"], ["3", "1"], ["2", "0"], ["pool", "1", "0"]], ids="-".join)
def test_names_choose_maps_in_the_order_of_the_dict(names):
    # Where a level between two maps is left out, torchvision's boxes of the last level have no map.
    assert_same_pooling(*pair(names, 3, 2), torch.float32, names=names)


@pytest.mark.parametrize("names", [NAMES, ["1"]], ids=["four_maps", "one_map"])
def test_no_boxes(names):
    ours, theirs = pair(names, (3, 5), 2)
    maps = pyramid(grad=True)
    pooled = ours(maps, boxes(counts=(0, 0, 0)), SHAPES)
    assert pooled.shape == theirs(maps, boxes(counts=(0, 0, 0)), SHAPES).shape == (0, 3, 3, 5)
    for map in torch.autograd.grad(pooled.sum(), [maps[name] for name in names]):
        assert not map.any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_scales_stay_those_of_the_first_call(count):
    ours, theirs = pair(NAMES, 3, 2)
    for module in (ours, theirs):
        module(pyramid(), boxes(), SHAPES)

    def fewer(dtype):
        return OrderedDict(list(pyramid(dtype, grad=True).items())[4 - count : 4]), boxes(dtype)

    # Image shapes are not looked at again.
    assert_same_pooling(ours, theirs, torch.float32, make=fewer, shapes=[])
    assert ours.scales == SCALES


@pytest.mark.parametrize("count", [1, 2])
def test_scales_of_fewer_maps_leave_the_coarse_maps_unused(count):
    def make(dtype):
        maps, rois = everything(dtype)
        # Of several maps a box inverted along one axis has no level, even if only one of them is used.
        rois[0][5] = torch.tensor([70, 10, 20, 50])
        return OrderedDict((name, map if name in NAMES[:count] else map.detach()) for name, map in maps.items()), rois

    ours, theirs = pair(NAMES, 3, 2)
    for module in (ours, theirs):
        module(OrderedDict(list(pyramid().items())[:count]), boxes(), SHAPES)
    assert_same_pooling(ours, theirs, torch.float32, names=NAMES[:count], shapes=[], make=make)


@pytest.mark.parametrize(
    "mapper",
    [initLevelMapper(2, 5, 100, 4), initLevelMapper(2, 5, 60, 3, eps=0.4), initLevelMapper(3, 4), lambda boxes: THIRD],
    ids=["constants", "eps", "levels", "function"],
)
def test_a_level_mapper_put_there_by_hand_is_used(mapper):
    for module in (poolers := pair(NAMES, 3, 2)):
        module.scales, module.map_levels = list(SCALES), mapper
    out, expected = (m(pyramid(torch.float64), boxes(torch.float64), []) for m in poolers)
    tolerances.assert_not_worse(out, expected, expected, size=SIZE)


THIRD = torch.arange(23) // 8


def test_scale_inference_equals_torchvisions():
    for height in (1, 2, 3, 5, 11, 12, 25, 45, 46, 90, 91, 181, 182, 400):
        for whole in (1, 2, 64, 100, 127, 128, 129, 511, 512, 800, 1333):
            ours, theirs = pair(["0"], 1, 1)
            for module in (ours, theirs):
                module({"0": torch.zeros(1, 1, height, 4)}, [torch.zeros(0, 4)], [(whole, 16), (1, 1)])
            assert ours.scales == theirs.scales
            assert vars(ours.map_levels) == vars(theirs.map_levels)
            # The square of a number of 16 bits overflows.
            for kind in (np.int16, np.float32):
                ours.scales = None
                ours({"0": torch.zeros(1, 1, height, 4)}, [torch.zeros(0, 4)], [(kind(whole), kind(16))])
                assert ours.scales == theirs.scales


def test_sizes_are_numbers_of_numpy():
    maps, found = [*pyramid().values()][:2], boxes()
    numbers = np.array([1 / 4, 1 / 8], dtype=np.float32), np.int64(2)
    of_numpy = detectron2s(output_size=np.int64(3), scales=numbers[0], sampling_ratio=numbers[1])
    assert torch.equal(of_numpy(maps, found), detectron2s(output_size=3, sampling_ratio=2)(maps, found))
    sizes = [
        kind(["0"], np.array([3, 5]), 2).output_size for kind in (MultiScaleRoIAlign, _standalone.MultiScaleRoIAlign)
    ]
    assert sizes == [(3, 5), (3, 5)]
    assert torch.equal(
        mmdetections(np.array([4, 8]), np.int64(56), output_size=np.array([3, 3]))(maps, rois_of(found)),
        mmdetections([4, 8], output_size=3)(maps, rois_of(found)),
    )


def test_swapped_after_its_first_call_and_back():
    module = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)
    before = module(pyramid(), boxes(), SHAPES)
    mapper = module.map_levels
    fpn_fast.accelerate(module)
    assert type(module) is MultiScaleRoIAlign
    fused = module(pyramid(), boxes(), [])
    assert module.map_levels is mapper
    fpn_fast.restore(module)
    assert torch.equal(module(pyramid(), boxes(), []), before)
    exact = module(OrderedDict((n, m.double()) for n, m in pyramid().items()), [box.double() for box in boxes()], [])
    tolerances.assert_not_worse(fused, before, exact, size=SIZE)
    # First called as ours: what it kept serves torchvision's.
    module = MultiScaleRoIAlign(NAMES, 3, 2)
    module(pyramid(), boxes(), SHAPES)
    fpn_fast.restore(module)
    assert torch.equal(module(pyramid(), boxes(), []), before)


# Types


@pytest.mark.parametrize("ratio", [2, 0])
def test_autocast_keeps_features_half_and_boxes_exact(ratio):
    maps = pyramid(torch.bfloat16, grad=True)
    rois = boxes()
    ours, theirs = pair(NAMES, 7, ratio)
    exact = theirs(OrderedDict((n, m.double()) for n, m in maps.items()), [box.double() for box in rois], SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, plain = ours(maps, rois, SHAPES), theirs(maps, rois, SHAPES)
    assert pooled.dtype == plain.dtype == torch.bfloat16
    # torchvision makes float32 copies of the maps and rounds once, too.
    tolerances.assert_not_worse(pooled, plain, exact, size=SIZE)
    # Without autocast torchvision has no bfloat16.
    assert torch.equal(ours(maps, rois, SHAPES), pooled)
    # With boxes in bfloat16, as an extractor that follows its features has them, the result is another one.
    rounded = ours(maps, [box.bfloat16() for box in rois], SHAPES)
    error, rounding = ((each.double() - exact).abs().max() for each in (pooled, rounded))
    assert error < rounding / 10


def test_autocast_with_maps_of_several_types():
    maps = pyramid()
    maps["0"] = maps["0"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, plain = (module(maps, boxes(), SHAPES) for module in pair(NAMES, 7, 2))
    exact = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2)(
        OrderedDict((n, m.double()) for n, m in maps.items()), [box.double() for box in boxes()], SHAPES
    )
    assert pooled.dtype == plain.dtype == torch.bfloat16
    tolerances.assert_not_worse(pooled, plain, exact, size=SIZE)


def test_no_host_waits():
    """FakeTensorMode refuses what depends on numbers that only a GPU knows; it needs none."""
    with FakeTensorMode():
        maps = {name: torch.empty(2, 8, *size, device="cuda") for name, size in zip(NAMES, SIZES, strict=True)}
        rois = [torch.empty(5, 4, device="cuda"), torch.empty(0, 4, device="cuda")]
        ours, theirs = pair(NAMES, 7, 2)
        pooled = ours(maps, rois, SHAPES[:2])
        assert (pooled.shape, pooled.device.type, ours.scales) == ((5, 8, 7, 7), "cuda", SCALES)
        with pytest.raises(DynamicOutputShapeException):
            theirs(maps, rois, SHAPES[:2])
        ours.map_levels = initLevelMapper(2, 5, eps=0.1)
        assert ours(maps, rois, []).shape == (5, 8, 7, 7)
        features, levels = list(maps.values()), SCALES
        for strict in (False, True):
            halves = [feature.half() for feature in features]
            pooler = ROIPooler(7, levels, 0, "ROIAlignV2", strict=strict)
            assert pooler(halves, rois).shape == (5, 8, 7, 7)
            extractor = SingleRoIExtractor(ROI_LAYER, 8, STRIDES, strict=strict)
            assert extractor(halves, torch.empty(5, 5, device="cuda"), 1.5).shape == (5, 8, 7, 7)


def test_compiles_whole():
    torch._dynamo.reset()
    ours = MultiScaleRoIAlign(NAMES, 3, 2)
    compiled = torch.compile(ours, fullgraph=True)
    # The first call infers scales.
    for counts in ((4, 0, 3), (9, 2, 1), (6, 1, 8)):
        maps, rois = pyramid(grad=True), boxes(counts=counts)
        features = list(maps.values())[:4]
        found, expected = (outputs_and_gradients([m(maps, rois, SHAPES)], features) for m in (compiled, ours))
        assert all(map(torch.equal, found, expected))
    assert ours.scales == SCALES


def test_compiles_whole_with_levels_given_and_one_map():
    for build in (
        lambda: (MultiScaleRoIAlign(["1"], 3, 2), (pyramid(grad=True), boxes(), SHAPES)),
        lambda: (ROIPooler(3, SCALES, 2, "ROIAlignV2", strict=True), (list(pyramid(grad=True).values())[:4], boxes())),
    ):
        torch._dynamo.reset()
        module, arguments = build()
        features = [arguments[0]["1"]] if isinstance(arguments[0], dict) else arguments[0]
        both = torch.compile(module, fullgraph=True), module
        found, expected = (outputs_and_gradients([each(*arguments)], features) for each in both)
        assert all(map(torch.equal, found, expected))


def test_maps_of_one_scale_compile():
    """As those of torchvision's MobileNet pyramids: no RoI's area decides between them."""
    torch._dynamo.reset()
    maps = {name: torch.randn(3, 8, 12, 20, requires_grad=True) for name in "01"}
    ours, theirs = (cls(["0", "1"], 3, 2) for cls in (MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    called = (module(maps, boxes(), SHAPES) for module in (theirs, ours, compiled))
    expected, *found = (outputs_and_gradients([pooled], [maps["0"]]) for pooled in called)
    for values in found:
        torch.testing.assert_close(values, expected)


# As modules


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("called", [False, True])
def test_copies(called, copied):
    ours = MultiScaleRoIAlign(NAMES, 3, 2)
    if called:
        ours(pyramid(), boxes(), SHAPES)
    again = copied(ours)
    assert type(again) is MultiScaleRoIAlign
    assert again.scales == ours.scales == (SCALES if called else None)
    assert torch.equal(again(pyramid(), boxes(), SHAPES), ours(pyramid(), boxes(), SHAPES))


def test_same_attributes_text_and_state_as_torchvision():
    ours, theirs = pair(NAMES, 7, 2, canonical_scale=200)
    roi_aligns = [kind((7, 5), 0.25, 2, aligned=True) for kind in (RoIAlign, torchvision.ops.RoIAlign)]
    alone = [_standalone.MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=200)]
    alone.append(_standalone.RoIAlign((7, 5), 0.25, 2, aligned=True))
    for a, b, c in zip((ours, roi_aligns[0]), (theirs, roi_aligns[1]), alone, strict=True):
        assert isinstance(a, type(b))
        public = [{k: v for k, v in vars(m).items() if not k.startswith("_") and k != "training"} for m in (a, b, c)]
        assert public[0] == public[1] == public[2]
        assert repr(a) == repr(b) == repr(c)
        assert not a.state_dict()
    assert _standalone.MultiScaleRoIAlign(NAMES, [7, 5], 2).output_size == (7, 5)


def test_the_standalone_level_mapper_is_torchvisions():
    for arguments in ((2, 5), (3, 4, 100), (2, 5, 60, 3)):
        mapper, expected = _standalone.LevelMapper(*arguments), LevelMapper(*arguments)
        assert {**vars(mapper), "eps": mapper.eps} == vars(expected)
        assert torch.equal(mapper(boxes()), expected(boxes()))


@pytest.mark.parametrize("given", [lambda found: found, lambda found: rois_of(found)], ids=["list", "tensor"])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_the_op(aligned, given):
    arguments, feature = ((3, 5), 0.25, 2, aligned), pyramid()["0"]
    module = torchvision.ops.RoIAlign(*arguments)
    assert len(fpn_fast.accelerate(module).swapped) == 1
    assert torch.equal(module(feature, given(boxes())), ops.roi_align(feature, rois_of(boxes()), *arguments))


def test_a_detector_is_built_with_ours():
    pooler = MultiScaleRoIAlign(NAMES, 7, 2)
    assert FasterRCNN(small_detectors.backbone(), num_classes=3, box_roi_pool=pooler).roi_heads.box_roi_pool is pooler
    assert MaskRCNN(small_detectors.backbone(), num_classes=3, mask_roi_pool=pooler).roi_heads.mask_roi_pool is pooler


# detectron2 and mmdetection, by what their sources say. Where a rounding of theirs is not the subject all is float64.


def rois_of(found):
    return torch.cat([torch.cat([torch.full_like(box[:, :1], i), box], 1) for i, box in enumerate(found)])


def pool_by_level(maps, rois, levels, size, scales, ratio, aligned, dtype):
    """torchvision's RoIAlign level by level, computed in `dtype`: [K, C, *size]; zero where a level has no map."""
    pooled = torch.zeros(len(rois), maps[0].size(1), *size, dtype=dtype)
    for level, (map, scale) in enumerate(zip(maps, scales, strict=True)):
        chosen = levels == level
        pooled[chosen] = torchvision.ops.roi_align(map.to(dtype), rois[chosen].to(dtype), size, scale, ratio, aligned)
    return pooled


def detectron2_pool(maps, found, size, scales, ratio, aligned, dtype, canonical=(224, 4), rounding=None):
    boxes = torch.cat(found)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(canonical[1] + torch.log2(torch.sqrt(area) / canonical[0] + 1e-8))
    first, last = -int(torch.tensor(scales[0]).log2()), -int(torch.tensor(scales[-1]).log2())
    levels = level.clamp(first, last).long() - first
    rois = rois_of(found)
    rois = rois.to(rounding) if rounding else rois
    return pool_by_level(maps, rois, levels, size, scales, ratio, aligned, dtype)


def mmdet_pool(maps, rois, size, strides, ratio, aligned, dtype, finest_scale=56, factor=None, rounding=None):
    rois = rois.to(rounding) if rounding else rois
    scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    levels = torch.floor(torch.log2(scale / finest_scale + 1e-6)).clamp(0, len(maps) - 1).long()
    if factor is not None:
        centre, extent = (rois[:, 1:3] + rois[:, 3:]) * 0.5, (rois[:, 3:] - rois[:, 1:3]) * factor
        rois = torch.cat([rois[:, :1], centre - extent * 0.5, centre + extent * 0.5], 1)
    return pool_by_level(maps, rois, levels, size, [1 / stride for stride in strides], ratio, aligned, dtype)


ROI_LAYER = {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}
STRIDES = [4, 8, 16, 32]


def assert_pools_as(module, statement, shape, dtype, strict):
    """Class 3, outputs and gradients of module(maps) and of statement(maps, the type to compute in, whether boxes are
    rounded first); in half precision far nearer to it than to the other rounding."""
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for function, kind in (
        (module, dtype),
        (lambda maps: statement(maps, wide, strict).to(dtype), dtype),
        (lambda maps: statement(maps, torch.float64, strict), torch.float64),
    ):
        maps = [map.to(dtype).to(kind).requires_grad_() for map in list(pyramid().values())[:4]]
        results.append(outputs_and_gradients([function(maps)], maps))
    pooled, exact = results[0][0], results[2][0]
    assert (pooled.dtype, pooled.shape) == (dtype, shape)
    assert_none_worse(*results, size=SIZE)
    if dtype in HALVES:
        other = statement([map.to(dtype) for map in list(pyramid().values())[:4]], torch.float64, not strict)
        assert (pooled - exact).abs().max() < (pooled - other).abs().max() / 10


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("kind", "size", "ratio", "canonical"),
    [("ROIAlignV2", 7, 0, (224, 4)), ("ROIAlign", (3, 5), 2, (100, 3)), ("ROIAlignV2", [2, 2], 2, (60, 4))],
)
def test_roi_pooler_is_detectron2s(kind, size, ratio, canonical, dtype, strict):
    found, both = boxes(), (size, size) if isinstance(size, int) else tuple(size)
    pooler = ROIPooler(size, SCALES, ratio, kind, *canonical, strict=strict)

    def statement(maps, compute, rounded):
        rounding = dtype if rounded else None
        return detectron2_pool(maps, found, both, SCALES, ratio, kind == "ROIAlignV2", compute, canonical, rounding)

    # Half of the images have detectron2's Boxes.
    given = [found[0], SimpleNamespace(tensor=found[1]), SimpleNamespace(tensor=found[2])]
    assert_pools_as(lambda maps: pooler(maps, given), statement, (23, 3, *both), dtype, strict)


def test_roi_pooler_of_one_map_and_of_nothing():
    found, maps = boxes(), list(pyramid(grad=True).values())
    pooler = ROIPooler(3, (1 / 8,), 2, "ROIAlignV2")
    expected = torchvision.ops.roi_align(maps[1].double(), rois_of(found).double(), 3, 1 / 8, 2, True)
    plain = torchvision.ops.roi_align(maps[1], rois_of(found), 3, 1 / 8, 2, True)
    tolerances.assert_not_worse(pooler(maps[1:2], found), plain, expected, size=SIZE)
    for batch, lists in ((0, []), (2, [torch.zeros(0, 4)] * 2)):
        maps = list(pyramid(torch.float16, batch=batch, grad=True).values())[:4]
        pooled = ROIPooler((2, 3), SCALES, 0, "ROIAlign")(maps, lists)
        assert (pooled.shape, pooled.dtype) == ((0, 3, 2, 3), torch.float16)
        assert [grad.any().item() for grad in torch.autograd.grad(pooled.sum(), maps)] == [False] * 4


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("layer", "finest", "factor"),
    [({}, 56, None), ({"output_size": (3, 5), "sampling_ratio": 2, "aligned": False}, 30, None), ({}, 20, 1.3)],
    ids=["adaptive", "sampled", "rescaled"],
)
def test_single_roi_extractor_is_mmdetections(layer, finest, factor, dtype, strict):
    options = {**ROI_LAYER, **layer}
    size = options["output_size"]
    both = (size, size) if isinstance(size, int) else size
    extractor = SingleRoIExtractor(options, 3, STRIDES, finest, strict=strict)
    rois = rois_of(boxes())

    def statement(maps, compute, rounded):
        arguments = (both, STRIDES, options["sampling_ratio"], options.get("aligned", True), compute)
        return mmdet_pool(maps, rois, *arguments, finest, factor, dtype if rounded else None)

    call = lambda maps: extractor(tuple(maps), rois, factor)  # noqa: E731
    assert_pools_as(call, statement, (23, 3, *both), dtype, strict)


def test_single_roi_extractor_keeps_the_level_of_large_rois_in_half_precision():
    """300 x 300 pixels are more than float16 has: mmdetection takes the last map, for any size from 256 on."""
    maps = [torch.full((1, 1, *size), float(level), dtype=torch.float16) for level, size in enumerate(SIZES)]
    rois = torch.tensor([[0.0, 0, 0, side, side] for side in (50, 150, 300, 500)])
    levels = {
        strict: SingleRoIExtractor(ROI_LAYER, 1, STRIDES, strict=strict)(maps, rois)[:, 0, 0, 0].tolist()
        for strict in (False, True)
    }
    assert levels == {False: [0, 1, 2, 3], True: [0, 1, 3, 3]}


def test_single_roi_extractor_of_one_map_and_of_more_than_it_takes():
    rois, maps = rois_of(boxes()), list(pyramid().values())
    extractor = SingleRoIExtractor(ROI_LAYER, 3, [8])
    assert (extractor.num_inputs, extractor.out_channels) == (1, 3)
    bigger = extractor.roi_rescale(rois, 2.0)
    # Coordinates below 2^10 have units of 2^-14; a few of them.
    units = {"rtol": 0, "atol": 2**-12}
    torch.testing.assert_close(bigger[:, 3:] - bigger[:, 1:3], 2 * (rois[:, 3:] - rois[:, 1:3]), **units)
    torch.testing.assert_close(bigger[:, 3:] + bigger[:, 1:3], rois[:, 3:] + rois[:, 1:3], **units)
    for factor, taken in ((None, rois), (2.0, bigger)):
        plain, exact = (
            torchvision.ops.roi_align(maps[1].to(kind), taken.to(kind), 7, 1 / 8, 0, True)
            for kind in (torch.float32, torch.float64)
        )
        for strict in (False, True):
            extractor.strict = strict
            tolerances.assert_not_worse(extractor(maps[1:2], rois, factor), plain, exact, size=SIZE)
    assert SingleRoIExtractor(ROI_LAYER, 3, STRIDES)(maps, rois[:0]).shape == (0, 3, 7, 7)
    four, all = (SingleRoIExtractor(ROI_LAYER, 3, STRIDES)(each, rois) for each in (maps[:4], maps))
    assert torch.equal(four, all)


def test_single_roi_extractor_takes_the_largest_sample():
    maps = [torch.randn(2, 3, 64 // 2**i, 64 // 2**i) for i in range(2)]
    rois = torch.tensor([[0.0, 10, 20, 70, 90], [1, 3, 5, 250, 200]])
    extractor = SingleRoIExtractor({**ROI_LAYER, "pool_mode": "max"}, 3, STRIDES[:2])
    layer = {key: value for key, value in extractor.roi_layer.items() if key in ("sampling_ratio", "aligned")}
    expected = ops.multiscale_roi_align(
        maps,
        rois,
        extractor.roi_layer["output_size"],
        [1 / stride for stride in STRIDES[:2]],
        canonical_scale=56,
        canonical_level=2,
        level_formula="mmdet",
        pool_mode="max",
        **layer,
    )
    assert torch.equal(extractor(maps, rois), expected)
    assert not torch.equal(expected, SingleRoIExtractor(ROI_LAYER, 3, STRIDES[:2])(maps, rois))


def detectron2s(**options):
    return ROIPooler(**{"output_size": 7, "scales": (1 / 4, 1 / 8), "sampling_ratio": 0, "pooler_type": "ROIAlignV2",
                        **options})  # fmt: skip


def mmdetections(strides=STRIDES, finest=56, **layer):
    return SingleRoIExtractor({**ROI_LAYER, **layer}, 3, strides, finest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda maps, found: MultiScaleRoIAlign(NAMES, 3, 2)(maps, found, []), "image_shapes must have"),
        (lambda maps, found: MultiScaleRoIAlign(NAMES, 3, 2)({"a": maps["0"]}, found, SHAPES),
         r"maps of featmap_names \['0', '1', '2', '3'\], got \['a'\]"),
        (lambda maps, found: MultiScaleRoIAlign(NAMES, 3, 2)(OrderedDict(reversed(maps.items())), found, SHAPES),
         "finest first"),
        (lambda maps, found: MultiScaleRoIAlign(NAMES, 3, 2)(maps, [torch.rand(3, 5)], SHAPES),
         r"boxes must be \[L, 4\]"),
        (lambda *_: detectron2s(pooler_type="ROIPool"),
         "pooler_type must be one of ROIAlign, ROIAlignV2, got 'ROIPool'"),
        (lambda *_: detectron2s(pooler_type="ROIAlignRotated"), "got 'ROIAlignRotated'"),
        (lambda *_: detectron2s(scales=(1 / 4, 1 / 6)), "scales must be powers of two"),
        (lambda *_: detectron2s(scales=(1 / 4, 1 / 16)), "scales must each be half of the one before"),
        (lambda *_: detectron2s(scales=(1 / 8, 1 / 4)), "scales must each be half of the one before"),
        (lambda *_: detectron2s(scales=(2, 1)), "scales must be positive and at most 1"),
        (lambda *_: detectron2s(scales=()), "scales must be positive and at most 1"),
        (lambda *_: detectron2s(output_size=(7, 7, 7)), "output_size must be one integer or two"),
        (lambda *_: detectron2s(output_size=(7, 0)), "output_size must be one or two positive integers"),
        (lambda *_: detectron2s(canonical_box_size=0), "canonical_box_size must be a positive number"),
        (lambda maps, found: detectron2s()(list(maps.values())[:3], found),
         "x must have a map for each of the 2 scales, got 3"),
        (lambda maps, found: detectron2s()(list(maps.values())[:2], found[:1]),
         "box_lists must be one for each of the 3 images, got 1"),
        (lambda *_: mmdetections(pool_mode="median"), "pool_mode must be 'avg' or 'max', got 'median'"),
        (lambda *_: mmdetections(type="RoIPool"), "roi_layer must be of type 'RoIAlign', got 'RoIPool'"),
        (lambda *_: mmdetections(clockwise=True, angle=3), "roi_layer has unknown keys angle, clockwise"),
        (lambda *_: SingleRoIExtractor({"type": "RoIAlign"}, 3, STRIDES), "roi_layer must have an output_size"),
        (lambda *_: mmdetections([]), "featmap_strides must be positive"),
        (lambda *_: mmdetections(finest=0), "finest_scale must be a positive number"),
        (lambda _, found: mmdetections()((), rois_of(found)), "at least one map"),
    ],
    ids=range(23),
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(pyramid(), boxes())


def test_attributes_and_what_mmcv_takes_beside():
    assert (detectron2s().min_level, detectron2s().max_level) == (2, 3)
    layer = {**ROI_LAYER, "use_torchvision": True, "spatial_scale": 0.5, "pool_mode": "avg"}
    assert SingleRoIExtractor(layer, 3, STRIDES, init_cfg={"type": "Normal"}).init_cfg == {"type": "Normal"}
