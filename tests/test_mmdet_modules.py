# SPDX-License-Identifier: Apache-2.0
"""mmdetection's necks, extractors and proposals against plain statements of what they do; see also against_mmdet.py."""

import copy
import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import plain_proposals
from helpers.modules import assert_none_worse, outputs_and_gradients, with_drawn_biases

from fpn_fast import backends
from fpn_fast.nn import mmdet
from fpn_fast.nn.mmdet.conv_module import ConvModule
from fpn_fast.testing import tolerances

CHANNELS = [6, 8, 10, 12]
ODD = [(25, 43), (13, 22), (7, 11), (4, 6)]
EVEN = [(24, 40), (12, 20), (6, 10), (3, 5)]
RETINANET = {"type": "FPN", "in_channels": [256, 512, 1024, 2048], "out_channels": 256, "start_level": 1,
             "add_extra_convs": "on_input", "num_outs": 5}  # fmt: skip
GROUPS = {"type": "GN", "num_groups": 4, "requires_grad": True}


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def inputs(sizes=ODD, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, c, *size, generator=generator).to(dtype).requires_grad_()
        for c, size in zip(CHANNELS, sizes, strict=True)
    ]


def neck(kind="FPN", seed=3, **options):
    torch.manual_seed(seed)
    config = {"type": kind, "in_channels": CHANNELS, "out_channels": 8, "num_outs": 4, **options}
    return with_drawn_biases(mmdet.build_neck(config))


def plain(neck, maps):
    """mmdetection's forward, with the layers and settings of `neck`."""
    used = list(range(neck.start_level, neck.backbone_end_level))
    laterals = [conv(maps[i]) for conv, i in zip(neck.lateral_convs, used, strict=True)]
    for i in range(len(laterals) - 1, 0, -1):
        options = dict(neck.upsample_cfg)
        if "scale_factor" not in options:
            options["size"] = laterals[i - 1].shape[2:]
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], **options)
    outs = [neck.fpn_convs[i](laterals[i]) for i in range(len(laterals))]
    if isinstance(neck, mmdet.PAFPN):
        for i in range(len(outs) - 1):
            outs[i + 1] = outs[i + 1] + neck.downsample_convs[i](outs[i])
        outs = [outs[0]] + [neck.pafpn_convs[i - 1](outs[i]) for i in range(1, len(outs))]
    for i in range(len(laterals), neck.num_outs):
        if not neck.add_extra_convs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        elif i > len(laterals):
            outs.append(neck.fpn_convs[i](outs[-1].relu() if neck.relu_before_extra_convs else outs[-1]))
        else:
            source = {"on_input": maps[used[-1]], "on_lateral": laterals[-1], "on_output": outs[-1]}
            outs.append(neck.fpn_convs[i](source[neck.add_extra_convs]))
    return tuple(outs)


def check_forward_and_backward(module, sizes=ODD, exact_forward=True):
    twin, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    results = []
    for forward, own, dtype in (
        (module, module, torch.float32),
        (lambda maps: plain(twin, maps), twin, torch.float32),
        (lambda maps: plain(wide, maps), wide, torch.float64),
    ):
        maps = inputs(sizes, dtype)
        outs = forward(maps)
        assert isinstance(outs, tuple)
        assert len(outs) == module.num_outs
        results.append(outputs_and_gradients(outs, [*maps, *own.parameters()]))
    for out, expected in zip(results[0][: module.num_outs], results[1], strict=False):
        if exact_forward:
            tolerances.assert_exact(out, expected)
    assert_none_worse(*results, size=43)
    # Statistics of normalisations.
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_outs": 6},
        {"start_level": 1, "num_outs": 3},
        {"start_level": 1, "end_level": 2, "num_outs": 2},
        {"end_level": 3, "num_outs": 5},
        {"start_level": 3, "num_outs": 3},
        {"start_level": 1, "add_extra_convs": "on_input", "num_outs": 5},
        {"add_extra_convs": True, "num_outs": 6, "relu_before_extra_convs": True},
        {"add_extra_convs": "on_lateral", "num_outs": 7, "relu_before_extra_convs": True},
        {"add_extra_convs": "on_output", "num_outs": 6},
        {"add_extra_convs": "on_output", "end_level": 1, "num_outs": 2},
        {"norm_cfg": {"type": "BN"}, "act_cfg": {"type": "ReLU"}, "add_extra_convs": True, "num_outs": 5},
        {"norm_cfg": {"type": "SyncBN", "momentum": 0.01, "eps": 1e-3}, "no_norm_on_lateral": True},
        {"norm_cfg": GROUPS, "act_cfg": {"type": "LeakyReLU", "negative_slope": 0.2}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["FPN", "PAFPN"])
def test_neck_is_mmdetections(backend, kind, options):
    check_forward_and_backward(neck(kind, **options))


@pytest.mark.parametrize(
    ("upsample_cfg", "sizes", "exact"),
    [
        ({"mode": "bilinear"}, ODD, False),
        ({"mode": "bilinear", "align_corners": True}, ODD, False),
        ({"mode": "bilinear", "align_corners": False, "scale_factor": 2}, EVEN, False),
        ({"scale_factor": 2}, EVEN, True),
        ({"mode": "nearest", "scale_factor": 2.0}, EVEN, True),
    ],
    ids=str,
)
def test_upsampling(backend, upsample_cfg, sizes, exact):
    check_forward_and_backward(neck(upsample_cfg=upsample_cfg), sizes, exact)


def test_scale_factor_asks_for_sizes_that_fit():
    with pytest.raises(ValueError, match="with scale_factor=2, lateral 0 must be 26 x 44 pixels to fit the map above"):
        neck(upsample_cfg={"scale_factor": 2})(inputs())


def test_half_precision_and_channels_last():
    """As plain steps in the same type: nearest merges are exact in any."""
    module = neck().to(torch.bfloat16, memory_format=torch.channels_last)
    maps = [map.to(memory_format=torch.channels_last) for map in inputs(dtype=torch.bfloat16)]
    for out, expected in zip(module(maps), plain(module, maps), strict=True):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, expected)


def test_compiles_in_one_graph():
    module = neck("PAFPN", add_extra_convs="on_output", num_outs=5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(inputs()), module(inputs()), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_configuration_that_everyone_copies():
    """mmdetection's RetinaNet: built and run as written; keys and shapes are those of its published checkpoints."""
    module = mmdet.build_neck(RETINANET)
    expected = {}
    for i, channels in enumerate((512, 1024, 2048)):
        expected[f"lateral_convs.{i}.conv.weight"] = (256, channels, 1, 1)
        expected[f"lateral_convs.{i}.conv.bias"] = (256,)
    for i, channels in enumerate((256, 256, 256, 2048, 256)):
        expected[f"fpn_convs.{i}.conv.weight"] = (256, channels, 3, 3)
        expected[f"fpn_convs.{i}.conv.bias"] = (256,)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == expected
    assert list(module.state_dict()) == list(expected)
    maps = [torch.rand(1, 256 * 2**i, 32 >> i, 32 >> i) for i in range(4)]
    assert [tuple(out.shape) for out in module(maps)] == [(1, 256, s, s) for s in (16, 8, 4, 2, 1)]
    # mmdetection's configurations may name the library of a type.
    assert type(mmdet.build_neck({**RETINANET, "type": "mmdet.PAFPN"})) is mmdet.PAFPN


def test_keys_with_normalisation():
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for norm, name, keys in (({"type": "BN"}, "bn", statistics), ({"type": "SyncBN"}, "bn", statistics),
                             (GROUPS, "gn", statistics[:2])):  # fmt: skip
        module = neck("PAFPN", norm_cfg=norm, no_norm_on_lateral=True, num_outs=5, add_extra_convs=True)
        expected = [f"lateral_convs.{i}.conv.{key}" for i in range(4) for key in ("weight", "bias")]
        for layers, count in (("fpn_convs", 5), ("downsample_convs", 3), ("pafpn_convs", 3)):
            for i in range(count):
                expected += [f"{layers}.{i}.conv.weight", *(f"{layers}.{i}.{name}.{key}" for key in keys)]
        assert list(module.state_dict()) == expected
    frozen = neck(norm_cfg={**GROUPS, "requires_grad": False})
    assert {key.rpartition(".")[0][-2:] for key, p in frozen.named_parameters() if not p.requires_grad} == {"gn"}


@pytest.mark.parametrize("kind", ["FPN", "PAFPN"])
def test_checkpoints_go_round(kind):
    options = {"norm_cfg": {"type": "BN"}, "add_extra_convs": "on_input", "num_outs": 5}
    module, other = neck(kind, **options).eval(), neck(kind, seed=9, **options).eval()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert not torch.equal(module(inputs())[0], other(inputs())[0])
    other.load_state_dict(torch.load(buffer))
    for again in (other, copy.deepcopy(module)):
        for a, b in zip(again(inputs()), module(inputs()), strict=True):
            assert torch.equal(a, b)


def test_weights_are_drawn_as_mmdetection_draws_them():
    """Xavier's uniform distribution; for init_cfg=None mmcv's normal one, of the fan out. Biases are zero."""
    drawn = mmdet.FPN([512], 64, 1, init_cfg=None), mmdet.FPN([512], 64, 1), mmdet.PAFPN([512, 512], 64, 2)
    for neck, again in zip(drawn, (False, True, True), strict=True):
        before = copy.deepcopy(neck)
        neck.init_weights()
        pairs = zip(neck.parameters(), before.parameters(), strict=True)
        changed = {not torch.equal(a, b) for a, b in pairs if a.any()}
        assert changed == {again}
    for module, layer, uniform in (
        (drawn[0], "lateral_convs", False), (drawn[1], "lateral_convs", True), (drawn[1], "fpn_convs", True),
        (drawn[2], "downsample_convs", True), (drawn[2], "pafpn_convs", True),
    ):  # fmt: skip
        conv = getattr(module, layer)[0].conv
        fan_out = conv.weight[:, 0].numel()
        fans = fan_out + conv.weight[0].numel()
        deviation = math.sqrt(2 / fans) if uniform else math.sqrt(2 / fan_out)
        # Of 32768 or more numbers: their deviation is known to 0.4 %, a uniform one's bound is almost reached.
        assert abs(conv.weight.std().item() / deviation - 1) < 0.02
        largest = conv.weight.abs().max().item() / deviation
        assert (1.71 < largest <= math.sqrt(3) * 1.00001) if uniform else largest > 3
        assert not conv.bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "HRFPN"}, "type must be one of FPN, PAFPN, NASFPN.*, got 'HRFPN'"),
        ({"type": None}, "type must be one of FPN, PAFPN.*, got None"),
        ({"num_out": 3, "stem": 1}, "FPN has no argument num_out, stem; it has in_channels, out_channels, num_outs"),
        ({"type": "PAFPN", "upsample_cfg": {}}, "PAFPN has no argument upsample_cfg"),
        ({"add_extra_convs": "on_top"}, "add_extra_convs must be one of .*, got 'on_top'"),
        ({"num_outs": 3}, "num_outs must be at least 4, one for each stage, got 3"),
        ({"end_level": 2}, "num_outs must be 3 for an end_level before the last stage's.*, got 4"),
        ({"end_level": 4}, "end_level must be -1 or a stage from 0 to 3, got 4"),
        ({"start_level": 2, "end_level": 1}, "end_level must be -1 or a stage from 2 to 3, got 1"),
        ({"start_level": 4}, "start_level must be one of the 4 stages, got 4"),
        ({"conv_cfg": {"type": "DCN"}}, "conv_cfg must be None, for an ordinary convolution, got {'type': 'DCN'}"),
        ({"norm_cfg": {"type": "LN"}}, "norm_cfg must be of type BN, BN2d, SyncBN, GN, got 'LN'"),
        ({"norm_cfg": {"type": "GN"}}, "norm_cfg of type 'GN' must have num_groups"),
        ({"act_cfg": {"type": "Mish"}}, "act_cfg must be of type ReLU.*, got 'Mish'"),
        ({"upsample_cfg": {"mode": "bicubic"}}, "mode must be 'nearest' or 'bilinear', got 'bicubic'"),
        ({"upsample_cfg": {"antialias": True}}, "upsample_cfg has unknown keys antialias"),
        ({"upsample_cfg": {"scale_factor": 1.5}}, "scale_factor must be a positive integer, got 1.5"),
        ({"upsample_cfg": {"align_corners": True}}, "align_corners goes with mode 'bilinear'"),
        ({"init_cfg": {"type": "Normal"}}, "init_cfg must be None or .*, got {'type': 'Normal'}"),
    ],
    ids=str,
)
def test_necks_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        neck(**{"kind": change.get("type", "FPN"), **{k: v for k, v in change.items() if k != "type"}})


def test_conv_module_is_its_layers_in_order():
    module = ConvModule(6, 8, 3, 2, norm_cfg=GROUPS, act_cfg={"type": "Tanh"})
    map = inputs()[0]
    conv = F.conv2d(map, module.conv.weight, None, 2, 1)
    assert torch.equal(module(map), F.group_norm(conv, 4, module.gn.weight, module.gn.bias, 1e-5).tanh())


# RoI extractors

LAYER = {"type": "RoIAlign", "output_size": 3, "sampling_ratio": 2}
STRIDES = [4, 8, 16, 32]


def rois():
    generator = torch.Generator().manual_seed(2)
    centre, half = torch.rand(9, 2, generator=generator) * 150, 4 * 2 ** (torch.rand(9, 2, generator=generator) * 5)
    return torch.cat([torch.arange(9)[:, None] % 2, centre - half, centre + half], 1)


def generic(maps, boxes, aggregation, factor, dtype):
    """Every level for every RoI, one after the other."""
    if factor is not None:
        centre, half = (boxes[:, 1:3] + boxes[:, 3:]) * 0.5, (boxes[:, 3:] - boxes[:, 1:3]) * factor * 0.5
        boxes = torch.cat([boxes[:, :1], centre - half, centre + half], 1)
    pooled = [
        torchvision.ops.roi_align(map.to(dtype), boxes.to(dtype), 3, 1 / stride, 2, True)
        for map, stride in zip(maps, STRIDES, strict=True)
    ]
    return sum(pooled) if aggregation == "sum" else torch.cat(pooled, 1)


# The factor and the aggregation are PyTorch's steps around the op, which Triton's interpreter takes seconds for.
@pytest.mark.parametrize(
    ("backend", "aggregation", "factor"),
    [*itertools.product(("cpp", "reference"), ("sum", "concat"), (None, 1.4)), ("triton", "sum", None)],
    indirect=["backend"],
)
def test_generic_extractor_is_mmdetections(backend, aggregation, factor):
    channels = 2 if aggregation == "sum" else 8
    extractor = mmdet.build_roi_extractor(
        {"type": "GenericRoIExtractor", "aggregation": aggregation, "roi_layer": LAYER, "out_channels": channels,
         "featmap_strides": STRIDES}
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(2, 2, *size, generator=generator, requires_grad=True) for size in ODD]
    found = [
        outputs_and_gradients([out], maps)
        for out in (extractor(maps, rois(), factor), *(generic(maps, rois(), aggregation, factor, dtype) for dtype in (
            torch.float32, torch.float64)))
    ]  # fmt: skip
    assert_none_worse(*found, size=43)


def test_levels_of_rois_are_mmdetections():
    extractor = mmdet.SingleRoIExtractor(LAYER, 8, STRIDES, 10)
    sides = (rois()[:, 3:] - rois()[:, 1:3]).prod(1).sqrt()
    levels = torch.floor(torch.log2(sides / 10 + 1e-6))
    for count in (1, 3, 4):
        expected = levels.clamp(0, count - 1).long()
        assert torch.equal(extractor.map_roi_levels(rois(), count), expected)
    assert expected.unique().tolist() == [0, 1, 2, 3]


def test_generic_extractor_of_no_rois_fewer_maps_and_max():
    maps = [torch.randn(2, 8, *size) for size in ODD]
    extractor = mmdet.GenericRoIExtractor(roi_layer=LAYER, out_channels=8, featmap_strides=STRIDES)
    assert extractor(maps, rois()[:0]).shape == (0, 8, 3, 3)
    # With a single map too, where mmdetection forgets the factor.
    single = mmdet.SingleRoIExtractor(LAYER, 8, STRIDES)
    assert torch.equal(extractor(maps[:1], rois(), 2.0), single(maps[:1], rois(), 2.0))
    assert torch.equal(extractor([*maps, maps[0]], rois()), extractor(maps, rois()))
    largest = mmdet.GenericRoIExtractor(
        roi_layer={**LAYER, "pool_mode": "max"}, out_channels=8, featmap_strides=STRIDES
    )
    assert (largest(maps, rois()) >= extractor(maps, rois())).all()
    assert not torch.equal(largest(maps, rois()), extractor(maps, rois()))
    assert "aggregation='sum', roi_layer=dict(" in repr(extractor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "aggregation must be 'sum' or 'concat', got 'mean'"),
        ({"pre_cfg": {"type": "ConvModule"}}, "pre_cfg must be None: mmcv's plugins are not supported"),
        ({"post_cfg": {"type": "GeneralizedAttention"}}, "post_cfg must be None"),
        ({"roi_layer": {**LAYER, "type": "RoIPool"}}, "roi_layer must be of type 'RoIAlign', got 'RoIPool'"),
        ({"featmap_strides": [4, 0]}, "featmap_strides must be positive"),
        ({"finest_scale": 56}, "GenericRoIExtractor has no argument finest_scale"),
    ],
    ids=str,
)
def test_generic_extractor_refuses(options, message):
    right = {"type": "GenericRoIExtractor", "roi_layer": LAYER, "out_channels": 8, "featmap_strides": STRIDES}
    with pytest.raises(ValueError, match=message):
        mmdet.build_roi_extractor({**right, **options})


# Proposals

SIZES = [(100, 160), (90, 168)]
CONFIG = {"nms_pre": 120, "max_per_img": 100, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}
GENERATORS = {
    "rpn": {"strides": STRIDES, "ratios": [0.5, 1.0, 2.0], "scales": [8]},
    "retinanet": {"strides": STRIDES, "ratios": [0.5, 1.0], "octave_base_scale": 4, "scales_per_octave": 3},
    "ratios_first": {"strides": STRIDES, "ratios": [0.5, 1.7], "scales": [2, 3], "scale_major": False},
    "offset": {"strides": [(4, 8), (8, 16), 16, 32], "ratios": [1.0], "scales": [4, 6], "center_offset": 0.5},
    "sizes": {"strides": STRIDES, "ratios": [1.0], "scales": [2.5], "base_sizes": [9, 18, 36, 72]},
    "centers": {"strides": STRIDES, "ratios": [3.0], "scales": [2.5], "centers": [(1, 2), (3, 4), (5, 6), (7, 8)]},
}


def table(options, level):
    """[A, 4], the boxes of all ratios and scales, in numbers of Python."""
    stride = options["strides"][level]
    base = options.get("base_sizes", [min(stride) if isinstance(stride, tuple) else stride] * 4)[level]
    scales = options.get("scales")
    if scales is None:
        octave = options["scales_per_octave"]
        scales = [options["octave_base_scale"] * 2 ** (i / octave) for i in range(octave)]
    x = y = options.get("center_offset", 0) * base
    if "centers" in options:
        x, y = options["centers"][level]
    pairs = [(r, s) for r in options["ratios"] for s in scales]
    if not options.get("scale_major", True):
        pairs = [(r, s) for s in scales for r in options["ratios"]]
    sides = [(base * s / math.sqrt(r), base * s * math.sqrt(r)) for r, s in pairs]
    return torch.tensor([(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for w, h in sides])


@pytest.mark.parametrize("name", GENERATORS)
def test_anchors_are_mmdetections(name):
    options = GENERATORS[name]
    generator = mmdet.AnchorGenerator(**options)
    priors = generator.grid_priors(ODD)
    assert generator.num_levels == len(priors) == 4
    for level, (width, height) in enumerate(generator.strides):
        expected = table(options, level)
        assert generator.num_base_priors[level] == generator.num_base_anchors[level] == len(expected)
        # A product of three rounded numbers, and a sum, of at most 512 pixels.
        torch.testing.assert_close(generator.base_anchors[level], expected, rtol=4 * 2**-24, atol=4 * 2**-15)
        grid = plain_proposals.grid(generator.base_anchors[level], ODD[level], (width, height))
        assert torch.equal(priors[level], grid)
        assert torch.equal(generator.single_level_grid_priors(ODD[level], level), grid)
        chosen = torch.tensor([len(grid) - 1, 0, 3, 3])
        assert torch.equal(generator.sparse_priors(chosen, ODD[level], level), grid[chosen])
        assert generator.sparse_priors(chosen, ODD[level], level, torch.float64).dtype == torch.float64
        single = generator.single_level_grid_anchors(generator.base_anchors[level], ODD[level], (width, height))
        assert torch.equal(single, grid)
    assert all(torch.equal(a, b) for a, b in zip(generator.grid_anchors(ODD), priors, strict=True))
    assert repr(generator).startswith(f"AnchorGenerator(strides={generator.strides}, ratios=")


@pytest.mark.parametrize("shape", [(64, 96), (61, 93, 3), (1, 1), (4000, 1)], ids=str)
def test_valid_flags_are_mmdetections(shape):
    generator = mmdet.AnchorGenerator(**GENERATORS["offset"])
    for (height, width), (x, y), flags in zip(ODD, generator.strides, generator.valid_flags(ODD, shape), strict=True):
        expected = [
            row * y < shape[0] and column * x < shape[1] for row in range(height) for column in range(width)
            for _ in range(2)
        ]  # fmt: skip
        assert flags.dtype == torch.bool
        assert flags.tolist() == expected
        assert any(expected)


def test_numbers_of_numpy_are_numbers():
    options = {"strides": np.array([4, 8], dtype=np.int8), "ratios": np.array([0.5, 1.0]), "scales": np.array([8.0])}
    ours = mmdet.AnchorGenerator(**options)
    usual = mmdet.AnchorGenerator(strides=[4, 8], ratios=[0.5, 1.0], scales=[8.0])
    assert ours.strides == usual.strides == [(4, 4), (8, 8)]
    sizes = [(3, 40), (2, 20)]
    for a, b in zip(ours.grid_priors(np.array(sizes)), usual.grid_priors(sizes), strict=True):
        assert torch.equal(a, b)
    options = {"in_channels": [8, 8], "out_channels": 4, "num_outs": 2}
    neck = mmdet.FPN(**options, upsample_cfg={"scale_factor": np.int64(2)})
    assert [tuple(each.shape) for each in neck([torch.rand(1, 8, 4, 6), torch.rand(1, 8, 2, 3)])] == [
        (1, 4, 4, 6), (1, 4, 2, 3),
    ]  # fmt: skip


def decode(coder):
    """mmdetection's delta2bbox."""

    def decoded(priors, deltas):
        deltas = deltas * torch.tensor(coder.stds) + torch.tensor(coder.means)
        centres, sides = (priors[:, :2] + priors[:, 2:]) * 0.5, priors[:, 2:] - priors[:, :2]
        limit, moves = abs(math.log(16 / 1000)), sides * deltas[:, :2]
        if coder.add_ctr_clamp:
            moves, grown = moves.clamp(-coder.ctr_clamp, coder.ctr_clamp), deltas[:, 2:].clamp(max=limit)
        else:
            grown = deltas[:, 2:].clamp(-limit, limit)
        half = sides * grown.exp() * 0.5
        return torch.cat([centres + moves - half, centres + moves + half], 1)

    return decoded


CODERS = [
    {},
    {"target_means": (0.1, 0.0, -0.1, 0.2), "target_stds": (0.5, 0.6, 9.0, 9.0)},
    {"target_stds": (1.0, 1.0, 9.0, 9.0), "add_ctr_clamp": True, "ctr_clamp": 3},
]


def coded(shape, dtype=torch.float32):
    """Boxes [*shape, 4], others of as many, and codes of three classes."""
    generator = torch.Generator().manual_seed(4)
    corners = torch.rand(2, *shape, 2, 2, generator=generator) * 60
    corners[..., 1, :] += corners[..., 0, :] + 1
    boxes, others = corners.flatten(-2).to(dtype)
    return boxes, others, torch.randn(*shape, 12, generator=generator).to(dtype) * 3


@pytest.mark.parametrize("options", CODERS, ids=["plain", "means_and_stds", "centre_clamp"])
def test_codes_of_boxes_are_mmdetections(options):
    coder = mmdet.DeltaXYWHBBoxCoder(**options)
    assert coder.encode_size == 4
    boxes, others, codes = coded((40,))
    expected = decode(coder)(boxes.repeat_interleave(3, 0), codes.view(-1, 4)).view(40, 12)
    assert torch.equal(coder.decode(boxes, codes), expected)
    assert torch.equal(coder.decode(boxes, codes[:, :4]), expected[:, :4])
    edges = torch.tensor([50.0, 40.0] * 6)
    clipped = torch.minimum(expected.clamp(min=0), edges)
    assert not torch.equal(clipped, expected)
    for limit in ((40, 50), (40, 50, 3), torch.tensor([40, 50])):
        assert torch.equal(coder.decode(SimpleNamespace(tensor=boxes), codes, max_shape=limit), clipped)
    assert torch.equal(mmdet.DeltaXYWHBBoxCoder(**options, clip_border=False).decode(boxes, codes, (40, 50)), expected)
    # Of a batch, with a size per image, and of no boxes.
    pairs = [torch.stack([each, each]) for each in (boxes, codes)]
    assert torch.equal(coder.decode(*pairs, max_shape=[(40, 50), (400, 5000)])[0], clipped)
    assert torch.equal(coder.decode(*pairs), torch.stack([expected, expected]))
    assert coder.decode(boxes[:0], codes[:0]).shape == (0, 12)
    # mmdetection's bbox2delta, in float32.
    for dtype in (torch.float32, torch.float64):
        found = coder.encode(boxes.to(dtype), SimpleNamespace(tensor=others.to(dtype)))
        x, y, w, h = (
            (boxes[:, 0] + boxes[:, 2]) * 0.5,
            (boxes[:, 1] + boxes[:, 3]) * 0.5,
            *(boxes[:, 2:] - boxes[:, :2]).T,
        )
        gx, gy = (others[:, 0] + others[:, 2]) * 0.5, (others[:, 1] + others[:, 3]) * 0.5
        gw, gh = (others[:, 2:] - others[:, :2]).T
        deltas = torch.stack([(gx - x) / w, (gy - y) / h, torch.log(gw / w), torch.log(gh / h)], 1)
        assert torch.equal(found, (deltas - torch.tensor(coder.means)) / torch.tensor(coder.stds))
    # There and back; a clamped centre or side does not come back.
    if not coder.add_ctr_clamp:
        torch.testing.assert_close(coder.decode(boxes, found, wh_ratio_clip=1e-9), others, rtol=1e-4, atol=1e-3)


def test_boxes_on_an_edge_have_the_gradient_of_a_clamp():
    """Which torch releases state differently; in a batch, mmdetection's comparisons pass it on."""
    at_edge = torch.tensor(0.0, requires_grad=True)
    at_edge.clamp(0, 8).backward()
    codes, boxes = torch.zeros(2, 4, requires_grad=True), torch.tensor([[0.0, 0, 8, 8], [-9, -9, -1, -1]])
    for batch, passed in (((), at_edge.grad.item()), ((1,), 1.0)):
        decoded = mmdet.DeltaXYWHBBoxCoder().decode(
            boxes.expand(*batch, 2, 4), codes.expand(*batch, 2, 4), max_shape=[(8, 8)] if batch else (8, 8)
        )
        (grad,) = torch.autograd.grad(decoded.sum(), codes)
        assert grad.tolist() == [[16.0 * passed, 16.0 * passed, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("coder", CODERS, ids=["plain", "means_and_stds", "centre_clamp"])
@pytest.mark.parametrize("name", ["rpn", "retinanet", "offset"])
def test_proposals_are_mmdetections(backend, name, coder):
    generator, coder = mmdet.AnchorGenerator(**GENERATORS[name]), mmdet.DeltaXYWHBBoxCoder(**coder)
    logits, deltas = plain_proposals.head(ODD, generator.num_base_priors[0])
    expected = plain_proposals.propose(
        logits, deltas, generator.grid_priors(ODD), SIZES, decode(coder),
        pre=120, post=100, thresh=0.7, least=0, convention="mmcv", score=torch.sigmoid,
    )  # fmt: skip
    assert all(len(boxes) > 20 for boxes, _ in expected)
    padded = mmdet.predict_proposals(logits, deltas, generator, coder, SIZES, CONFIG)
    assert [tuple(each.shape) for each in padded] == [(2, 100, 4), (2, 100), (2,)]
    plain_proposals.check(mmdet.proposals_of_images(*padded), expected, 2**-23)
    again = mmdet.predict_proposals(logits, deltas, generator, coder, torch.tensor(SIZES), CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(padded, again, strict=True))


@pytest.mark.parametrize("nms_pre", [0, -1, None])
def test_all_candidates_and_any_size(nms_pre):
    """Without nms_pre all are candidates; without min_bbox_size one without area, here outside of the image, is too."""
    generator, coder = mmdet.AnchorGenerator([8], [1.0], [1.0]), mmdet.DeltaXYWHBBoxCoder()
    logits, deltas = torch.arange(40.0).view(1, 1, 2, 20), torch.zeros(1, 4, 2, 20)
    config = {"max_per_img": 100, "nms": {"iou_threshold": 0.7}}
    if nms_pre is not None:
        config["nms_pre"] = nms_pre
    # 3 of 20 columns, from the middle of the fourth on, are right of the image.
    sizes = [(100, 130)]
    for least, count in (({}, 40), ({"min_bbox_size": -1}, 40), ({"min_bbox_size": 0}, 34)):
        found = mmdet.predict_proposals([logits], [deltas], generator, coder, sizes, {**config, **least})
        assert found[2].item() == count


def test_half_precision_gives_float32():
    generator, coder = mmdet.AnchorGenerator(**GENERATORS["rpn"]), mmdet.DeltaXYWHBBoxCoder()
    logits, deltas = plain_proposals.head(ODD, 3, torch.bfloat16)
    found = mmdet.predict_proposals(logits, deltas, generator, coder, SIZES, CONFIG)
    wide = [m.float() for m in logits], [m.float() for m in deltas]
    expected = mmdet.predict_proposals(*wide, generator, coder, SIZES, CONFIG)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmdet.AnchorGenerator([4], [1.0], [1.0], use_box_type=True), "use_box_type must be False"),
        (lambda: mmdet.AnchorGenerator([4], [1.0]), "scales, or octave_base_scale and scales_per_octave, must be"),
        (lambda: mmdet.AnchorGenerator([4], [1.0], [1.0], octave_base_scale=4, scales_per_octave=3), "and not both"),
        (lambda: mmdet.AnchorGenerator([4], [1.0], [1.0], center_offset=1.5), "center_offset must be 0 to 1"),
        (lambda: mmdet.AnchorGenerator([4], [1.0], [1.0], centers=[(1, 1)], center_offset=0.5), "without a center_off"),
        (lambda: mmdet.AnchorGenerator([4, 8], [1.0], [1.0], [4]), "base_sizes must be one for each of the 2 strides"),
        (lambda: mmdet.AnchorGenerator([4, 8], [1.0], [1.0], centers=[(1, 1)]), "centers must be one for each of"),
        (lambda: predict({}, clip_border=False), "clip_border must be True"),
        (lambda: mmdet.DeltaXYWHBBoxCoder(use_box_type=True), "use_box_type must be False"),
        (lambda: mmdet.DeltaXYWHBBoxCoder().encode(torch.rand(3, 4), torch.rand(2, 4)), "as many of both"),
        (lambda: mmdet.DeltaXYWHBBoxCoder().decode(torch.rand(3, 4), torch.rand(3, 6)), "pred_bboxes must be"),
        (lambda: mmdet.DeltaXYWHBBoxCoder().decode(torch.rand(3, 4), torch.rand(2, 4)), "pred_bboxes must be"),
        (lambda: mmdet.AnchorGenerator([4, 8], [1.0], [1.0]).grid_priors([(1, 1)]), "each of the 2 maps, got 1"),
        (lambda: mmdet.AnchorGenerator([4, 8], [1.0], [1.0]).valid_flags([(1, 1)], (4, 4)), "each of the 2 maps"),
        (lambda: mmdet.AnchorGenerator([4], [1.0], [1.0]).single_level_valid_flags((1, 2), (1, 3), 1),
         "valid_size must be at most featmap_size"),
        (lambda: predict({"nms_post": 3}), "cfg has unknown keys nms_post; it may have nms_pre, max_per_img"),
        (lambda: predict({"nms": {"type": "nms"}}), "cfg's nms must have iou_threshold, got"),
        (lambda: predict({"nms": {"type": "soft_nms", "iou_threshold": 0.5}}), "must be of type 'nms', got 'soft_nms'"),
        (lambda: predict({"nms": {"iou_threshold": 0.5, "class_agnostic": True}}), "unknown keys class_agnostic"),
        (lambda: predict({"nms": None}), "cfg's nms must have iou_threshold"),
        (lambda: mmdet.build_neck({"type": "FPN", "out_channels": 8}),
         "FPN needs in_channels, num_outs, got out_channels"),
        (lambda: mmdet.build_roi_extractor({"type": "SingleRoIExtractor"}),
         "SingleRoIExtractor needs roi_layer, out_channels, featmap_strides, got nothing"),
        (lambda: neck()(inputs()[:3]), "inputs must be a map for each of the 4 stages, got 3"),
        (lambda: concatenate([torch.rand(1, 8, 4, 4)] * 2), "feats must have out_channels 8 channels, got 16"),
        (lambda: concatenate([]), "feats must hold at least one map"),
    ],
    ids=range(25),
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def concatenate(maps):
    return mmdet.GenericRoIExtractor("concat", roi_layer=LAYER, out_channels=8, featmap_strides=STRIDES)(maps, rois())


def predict(change, **coder):
    maps = torch.zeros(1, 1, 2, 2), torch.zeros(1, 4, 2, 2)
    generator = mmdet.AnchorGenerator([4], [1.0], [1.0])
    return mmdet.predict_proposals(
        maps[:1], maps[1:], generator, mmdet.DeltaXYWHBBoxCoder(**coder), [(8, 8)], {**CONFIG, **change}
    )
