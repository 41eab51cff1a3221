# SPDX-License-Identifier: Apache-2.0
"""detectron2's FPN and proposals against plain statements of what they do, and its classes swapped and registered."""

import copy
import math
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import detectron2_stand_in, plain_proposals
from helpers.modules import assert_none_worse, outputs_and_gradients, with_drawn_biases
from torch import nn

import fpn_fast
from fpn_fast import backends
from fpn_fast.bench import counting
from fpn_fast.nn import detectron2
from fpn_fast.testing import tolerances

CHANNELS = {"res2": 6, "res3": 8, "res4": 10, "res5": 12}
TOPS = {
    "none": lambda: None,
    "pool": detectron2.LastLevelMaxPool,
    "p6p7_of_res5": lambda: detectron2.LastLevelP6P7(12, 32),
    "p6p7_of_p5": lambda: detectron2.LastLevelP6P7(32, 32, "p5"),
}


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


class Backbone(nn.Module):
    """Maps of strides 4 to 32 of an image, without layers of a stride of its own."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict({name: nn.Conv2d(3, channels, 1) for name, channels in CHANNELS.items()})

    def output_shape(self):
        return {
            name: detectron2_stand_in.ShapeSpec(channels=channels, stride=4 * 2**i)
            for i, (name, channels) in enumerate(CHANNELS.items())
        }

    def forward(self, x):
        return {
            name: F.avg_pool2d(stage(x), 4 * 2**i, ceil_mode=True)
            for i, (name, stage) in enumerate(self.stages.items())
        }


def fpn(top="none", seed=3, names=tuple(CHANNELS), channels=32, **options):
    torch.manual_seed(seed)
    return with_drawn_biases(detectron2.FPN(Backbone(), list(names), channels, top_block=TOPS[top](), **options))


def images(height=64, width=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("top", "names", "norm", "fuse"),
    [
        ("none", ["res3", "res4"], "", "sum"),
        ("none", list(CHANNELS), "", "avg"),
        ("none", ["res5"], "GN", "sum"),
        ("pool", list(CHANNELS), "BN", "sum"),
        ("p6p7_of_res5", ["res3", "res4", "res5"], "", "sum"),
        ("p6p7_of_res5", ["res3", "res4", "res5"], "SyncBN", "avg"),
        ("p6p7_of_p5", ["res4", "res5"], nn.InstanceNorm2d, "sum"),
    ],
    ids=str,
)
def test_fpn_is_detectron2s(backend, top, names, norm, fuse):
    module = fpn(top, names=names, norm=norm, fuse_type=fuse)
    twin, wide = copy.deepcopy(module), copy.deepcopy(module).double()
    outs, found = module(images()), []
    for forward, own, dtype in (
        (module, module, torch.float32),
        (lambda x: detectron2_stand_in.pyramid(twin, x), twin, torch.float32),
        (lambda x: detectron2_stand_in.pyramid(wide, x), wide, torch.float64),
    ):
        x = images(dtype=dtype)
        made = forward(x)
        assert list(made) == list(outs)
        found.append(outputs_and_gradients(made.values(), [x, *own.parameters()]))
    first = int(names[0].removeprefix("res"))
    assert list(outs) == [f"p{first + i}" for i in range(len(outs))] == list(module.output_shape())
    for out, expected, shape in zip(*found[:2], module.output_shape().values(), strict=False):
        assert tuple(out.shape[1:]) == (shape.channels, math.ceil(64 / shape.stride), math.ceil(96 / shape.stride))
        tolerances.assert_exact(out, expected)
    assert_none_worse(*found, size=24)


def test_images_of_odd_sizes_get_an_answer():
    module = fpn()
    assert module.size_divisibility == 32
    message = "lateral 0 must be 18 x 24 pixels to fit the map above, got 17 x 24; pad the image to a multiple of the"
    with pytest.raises(ValueError, match=message):
        module(images(height=66))


def test_half_precision_channels_last_and_compile():
    module = fpn("pool", fuse_type="avg")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(images()).values(), module(images()).values(), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    module = module.to(torch.bfloat16, memory_format=torch.channels_last)
    x = images(dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    for out, expected in zip(module(x).values(), detectron2_stand_in.pyramid(module, x).values(), strict=True):
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, expected)


def test_keys_are_those_of_published_checkpoints():
    """detectron2's model zoo: R50-FPN of Faster R-CNN, RetinaNet's, and one with GN."""
    ours = {key: value for key, value in fpn("pool", channels=256).state_dict().items() if "stages" not in key}
    expected = {}
    for level, channels in zip(range(2, 6), CHANNELS.values(), strict=True):
        expected[f"fpn_lateral{level}.weight"] = (256, channels, 1, 1)
        expected[f"fpn_lateral{level}.bias"] = (256,)
        expected[f"fpn_output{level}.weight"] = (256, 256, 3, 3)
        expected[f"fpn_output{level}.bias"] = (256,)
    assert {key: tuple(value.shape) for key, value in ours.items()} == expected
    assert list(fpn().state_dict())[-8:] == [f"bottom_up.stages.{n}.{k}" for n in CHANNELS for k in ("weight", "bias")]
    retinanet = fpn("p6p7_of_res5", names=["res3", "res4", "res5"]).state_dict()
    extras = [f"top_block.{layer}.{key}" for layer in ("p6", "p7") for key in ("weight", "bias")]
    assert [key for key in retinanet if key.startswith("top_block")] == extras
    normed = [key for key in fpn(norm="GN").state_dict() if key.startswith("fpn_lateral2")]
    assert normed == [f"fpn_lateral2.{key}" for key in ("weight", "norm.weight", "norm.bias")]


def test_checkpoints_go_round_and_copies_keep_their_layers():
    module, other = fpn("p6p7_of_res5", norm="BN").eval(), fpn("p6p7_of_res5", norm="BN", seed=8).eval()
    before = other(images())
    other.load_state_dict(module.state_dict())
    for again in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.lateral_convs[0] is again.fpn_lateral5
        for name, out in module(images()).items():
            assert torch.equal(again(images())[name], out)
            assert not torch.equal(before[name], out)


def test_same_initialisation_under_the_same_seed():
    torch.manual_seed(5)
    ours = detectron2.FPN(Backbone(), list(CHANNELS), 32, top_block=detectron2.LastLevelP6P7(12, 32))
    torch.manual_seed(5)
    theirs = detectron2_stand_in.FPN(
        Backbone(), list(CHANNELS), 32, top_block=detectron2_stand_in.LastLevelP6P7(12, 32)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ours.padding_constraints == theirs.padding_constraints == {"square_size": 0}
    assert ours.output_shape() == {
        name: (shape.channels, shape.stride, None, None) for name, shape in theirs.output_shape().items()
    }
    assert detectron2.FPN(Backbone(), ["res2"], 8, square_pad=1024).padding_constraints == {"square_size": 1024}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["res2", "res4"]}, r"strides that are powers of two, each twice the last, got \[4, 16\]"),
        ({"names": ["res3", "res2"]}, r"each twice the last, got \[8, 4\]"),
        ({"names": []}, r"each twice the last, got \[\]"),
        ({"norm": "LN2"}, "norm must be '', BN, SyncBN, GN or a function of the channels, got 'LN2'"),
        ({"fuse_type": "max"}, "fuse_type must be 'sum' or 'avg', got 'max'"),
    ],
)
def test_fpn_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fpn(**options)


# Proposals

PYRAMID = [(25, 43), (13, 22), (7, 11)]
SIZES = [(100, 160), (90, 168)]
ANCHORS = {"sizes": [[24, 40], [48, 80], [96, 160]], "aspect_ratios": [[0.5, 1.0, 2.0]], "strides": [4, 8, 16]}


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_are_detectron2s(offset):
    generator = detectron2.DefaultAnchorGenerator(**ANCHORS, offset=offset)
    assert generator.num_anchors == generator.num_cell_anchors == [6, 6, 6]
    assert generator.num_features == 3
    assert not generator.state_dict()
    maps = [torch.empty(1, 1, *size) for size in PYRAMID]
    for level, (found, size) in enumerate(zip(generator(maps), PYRAMID, strict=True)):
        assert type(found) is detectron2.Boxes
        stride = ANCHORS["strides"][level]
        rows = []
        for side in ANCHORS["sizes"][level]:
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt(side * side / ratio)
                rows.append((-width / 2, -ratio * width / 2, width / 2, ratio * width / 2))
        table = torch.tensor(rows)
        assert torch.equal(generator.cell_anchors[level], table)
        assert torch.equal(generator.generate_cell_anchors(ANCHORS["sizes"][level], (0.5, 1.0, 2.0)), table)
        assert torch.equal(found.tensor, plain_proposals.grid(table, size, (stride, stride), offset))
    shared = detectron2.DefaultAnchorGenerator(sizes=[24, 40], aspect_ratios=[1.0], strides=[4, 8])
    assert torch.equal(shared.cell_anchors[0], shared.cell_anchors[1])
    options = {"sizes": np.array([[24, 40]]), "aspect_ratios": np.array([1.0]), "strides": np.array([4, 8])}
    of_numpy = detectron2.DefaultAnchorGenerator(**options, offset=np.float32(0.5))
    for a, b in zip(of_numpy(maps[:2]), shared(maps[:2]), strict=True):
        assert torch.equal(a.tensor, b.tensor)


def config(name="", **settings):
    """As much of a detectron2 configuration as a builder of anchors looks at."""
    settings = {"NAME": name, "SIZES": [[24], [48]], "ASPECT_RATIOS": [[0.5, 1.0]], "OFFSET": 0.25, **settings}
    return SimpleNamespace(MODEL=SimpleNamespace(ANCHOR_GENERATOR=SimpleNamespace(**settings)))


def test_anchors_of_a_configuration():
    shapes = [detectron2.ShapeSpec(8, stride) for stride in (4, 8)]
    expected = detectron2.DefaultAnchorGenerator(
        sizes=[[24], [48]], aspect_ratios=[[0.5, 1.0]], strides=[4, 8], offset=0.25
    )
    for made in (
        detectron2.DefaultAnchorGenerator(config(), shapes),
        detectron2.DefaultAnchorGenerator(cfg=config(OFFSET=0.5), input_shape=shapes, offset=0.25),
    ):
        assert (made.strides, made.offset) == ([4, 8], 0.25)
        assert all(torch.equal(a, b) for a, b in zip(made.cell_anchors, expected.cell_anchors, strict=True))
    for arguments, missing in (((), "sizes, aspect_ratios, strides"), ((config(),), "strides")):
        with pytest.raises(TypeError, match=f"a configuration, or {missing}, must be given"):
            detectron2.DefaultAnchorGenerator(*arguments)


def test_boxes_stand_in_for_detectron2s():
    first, second = detectron2.Boxes(torch.tensor([[0.0, 0, 4, 2], [1, 1, 3, 3]])), detectron2.Boxes(torch.empty(0, 4))
    both = detectron2.Boxes.cat([first, second, first[1]])
    assert (len(both), both.device.type, both.area().tolist()) == (3, "cpu", [8.0, 4.0, 4.0])
    assert [row.tolist() for row in both][2] == both[2].tensor[0].tolist() == [1.0, 1.0, 3.0, 3.0]
    assert torch.equal(both[torch.tensor([True, False, True])].tensor, both.tensor[::2])
    assert both.to("meta").device.type == "meta"
    assert both.clone().tensor is not both.tensor
    assert len(detectron2.Boxes.cat([])) == 0


def decoded(weights, clamp):
    """detectron2's apply_deltas."""

    def decode(anchors, deltas):
        dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(1)
        widths, heights = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
        x, y = dx * widths + (anchors[:, 0] + 0.5 * widths), dy * heights + (anchors[:, 1] + 0.5 * heights)
        w, h = torch.exp(dw.clamp(max=clamp)) * widths, torch.exp(dh.clamp(max=clamp)) * heights
        return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], 1)

    return decode


@pytest.mark.parametrize(
    ("weights", "clamp", "least", "offset"),
    [((1.0, 1.0, 1.0, 1.0), math.log(1000 / 16), 0.0, 0.0), ((2.0, 2.0, 0.5, 0.5), 0.4, 12.0, 0.5)],
)
def test_proposals_are_detectron2s(backend, weights, clamp, least, offset):
    generator = detectron2.DefaultAnchorGenerator(**ANCHORS, offset=offset)
    logits, deltas = plain_proposals.head(PYRAMID, 6)
    anchors = [each.tensor for each in generator([torch.empty(1, 1, *size) for size in PYRAMID])]
    expected = plain_proposals.propose(
        logits, deltas, anchors, SIZES, decoded(weights, clamp), pre=150, post=120, thresh=0.6, least=least,
        convention="torchvision",
    )  # fmt: skip
    assert all(len(boxes) > 20 for boxes, _ in expected)
    padded = detectron2.find_top_rpn_proposals(
        logits, deltas, generator, SIZES, pre_nms_topk=150, post_nms_topk=120, nms_thresh=0.6, min_box_size=least,
        box2box_weights=weights, scale_clamp=clamp,
    )  # fmt: skip
    assert [tuple(each.shape) for each in padded] == [(2, 120, 4), (2, 120), (2,)]
    plain_proposals.check(detectron2.proposals_of_images(*padded), expected, 2**-23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 1.0}, "offset must be 0 to below 1 stride, got 1.0"),
        ({"sizes": [[32], [64]]}, "sizes must be a list for each of the 3 strides, or one list"),
        ({"aspect_ratios": []}, "aspect_ratios must be a list for each of the 3 strides"),
    ],
)
def test_anchor_generator_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        detectron2.DefaultAnchorGenerator(**{**ANCHORS, **change})


# Its own classes, by a stand-in: there is no package of detectron2 to install.


@pytest.fixture
def integration(monkeypatch):
    detectron2_stand_in.install(monkeypatch)
    module = fpn_fast.integrations.detectron2
    yield module
    # Its classes are of the stand-in.
    del sys.modules[module.__name__], fpn_fast.integrations.detectron2


def detector(**options):
    torch.manual_seed(0)
    return detectron2_stand_in.Detector(Backbone(), **options)


def test_accelerate_swaps_detectron2s_classes(integration):
    model = detector()
    state, (boxes, pooled, _) = copy.deepcopy(model.state_dict()), model.eval()(images(), SIZES[:2])
    report = fpn_fast.accelerate(model)
    names = ["detectron2.FPN", "detectron2.RPN", "detectron2.ROIPooler"]
    assert sorted(e.module for e in report.swapped) == sorted(names)
    assert isinstance(model.backbone, detectron2_stand_in.FPN)
    again, pooled_again, losses = model(images(), SIZES[:2])
    assert losses == {}
    for ours, theirs in zip(again, boxes, strict=True):
        assert ours.image_size == theirs.image_size
        assert len(ours.objectness_logits) > 20
        torch.testing.assert_close(ours.objectness_logits, theirs.objectness_logits, rtol=2**-22, atol=0)
        torch.testing.assert_close(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor, rtol=2**-22, atol=2**-14)
    # Of the same boxes to a few bits; their corners move samples by as much, and sums round.
    torch.testing.assert_close(pooled_again, pooled, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == list(state)
    undone = fpn_fast.restore(model)
    assert len(undone.swapped) == 3
    assert type(model.backbone) is detectron2_stand_in.FPN


def residual_blocks(norm):
    """Blocks with and without a shortcut, and their norms' numbers drawn."""
    torch.manual_seed(0)
    make = detectron2_stand_in
    model = nn.Sequential(
        make.FrozenBatchNorm2d(8),
        make.BasicBlock(8, 12, stride=2, norm=norm),
        make.BottleneckBlock(12, 24, bottleneck_channels=6, stride=2, norm=norm),
        make.BottleneckBlock(24, 24, bottleneck_channels=6, norm=norm),
    )
    for module in model.modules():
        if isinstance(module, (make.FrozenBatchNorm2d, nn.BatchNorm2d)):
            for vector in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(vector, 0.5, 1.5)
            module.bias.data.sub_(1)
            module.running_mean.sub_(1)
    return model.eval()


def check_blocks(fast, plain, calls):
    """In float64, to rounding; calls: of the op."""
    x = torch.rand(2, 8, 17, 14, dtype=torch.float64)
    found = []
    for model in (fast.double(), plain.double()):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
    assert not torch.equal(*found[1][0])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11 * other.abs().max().item())
    with torch.no_grad():
        assert counting.count(lambda: fast(x)).operators["fpn_fast::frozen_batch_norm"] == calls


@pytest.mark.parametrize("kind", ["FrozenBatchNorm2d", "BatchNorm2d"])
def test_residual_blocks(integration, kind):
    plain = residual_blocks(getattr(nn, kind, None) or detectron2_stand_in.FrozenBatchNorm2d)
    fast, kinds = copy.deepcopy(plain), [type(module) for module in plain.modules()]
    report = fpn_fast.accelerate(fast)
    notes = {entry.name: entry.note for entry in report.swapped if entry.name in ("0", "1", "2", "3")}
    assert notes == {
        "0": "now fpn_fast.FrozenBatchNorm2d",
        "1": "now fpn_fast.BasicBlock",
        **dict.fromkeys("23", "now fpn_fast.BottleneckBlock"),
    }
    check_blocks(fast, plain, 1 + 2 + 3 + 3)
    if kind == "BatchNorm2d":
        check_blocks(fast.train(), plain.train(), 1)
        fast.eval(), plain.eval()
    for dtype in (torch.float32, torch.bfloat16):
        own, other = (model.to(dtype)(torch.rand(1, 8, 9, 9).to(dtype)) for model in (fast, plain))
        assert own.dtype == other.dtype == dtype
    fpn_fast.restore(fast)
    assert [type(module) for module in fast.modules()] == kinds


@pytest.mark.parametrize("change", ["conv hook", "norm hook", "activation", "norm", "shortcut", "patched"])
def test_a_changed_block_runs_detectron2s_code(integration, change):
    plain = residual_blocks(detectron2_stand_in.FrozenBatchNorm2d)
    fast = copy.deepcopy(plain)
    for model in (plain, fast):
        block = model[2]
        if change == "conv hook":
            block.conv2.register_forward_hook(lambda module, given, output: output * 2)
        elif change == "norm hook":
            block.conv2.norm.register_forward_hook(lambda module, given, output: output * 2)
        elif change == "activation":
            block.conv2.activation = nn.functional.softplus
        elif change == "norm":
            block.conv2.norm = nn.GroupNorm(2, 6)
        elif change == "shortcut":
            block.shortcut.register_forward_hook(lambda module, given, output: output * 2)
        else:
            block.conv2.forward = lambda x, own=block.conv2: own.norm(nn.Conv2d.forward(own, x) * 3)
    notes = {entry.name: entry.note for entry in fpn_fast.accelerate(fast).swapped}
    expected = {"conv hook": "conv2 (hooks)", "norm hook": "conv2.norm (hooks)", "norm": "conv2.norm (GroupNorm)",
                "patched": "conv2 (forward)"}.get(change)  # fmt: skip
    assert (f"where you changed {expected}" in notes["2"]) if expected else (";" not in notes["2"])
    # As a whole; but for a shortcut of its own, which is called as it is.
    alone = {"shortcut": 1 + 2 + 3 + 3 + 1, "norm": 1 + 2 + 3 + 3}
    check_blocks(fast, plain, alone.get(change, 1 + 2 + 4 + 3))


def test_detectron2_builds_our_modules_by_its_configurations(integration, monkeypatch):
    class Mine(detectron2.DefaultAnchorGenerator):
        pass

    def pyramid_of_mine(cfg, input_shape):
        return detectron2.FPN(Backbone(), list(CHANNELS), 8)

    registries = detectron2_stand_in.BACKBONE_REGISTRY, detectron2_stand_in.ANCHOR_GENERATOR_REGISTRY
    for registry, thing in zip(registries, (pyramid_of_mine, Mine), strict=True):
        registry.register(thing)
    cfg = config("Mine")
    cfg.MODEL.BACKBONE = SimpleNamespace(NAME="pyramid_of_mine")
    made = detectron2_stand_in.build_backbone(cfg)
    assert type(made) is detectron2.FPN
    assert isinstance(made, detectron2_stand_in.Backbone)
    assert not isinstance(Backbone(), detectron2_stand_in.Backbone)
    shapes = list(made.output_shape().values())[:2]
    maps = list(made(images()).values())[:2]
    anchors = detectron2_stand_in.build_anchor_generator(cfg, shapes)(maps)
    assert [type(each) for each in anchors] == [detectron2_stand_in.Boxes] * 2
    assert len(detectron2_stand_in.Boxes.cat(anchors).tensor) == 2 * sum(m.shape[2] * m.shape[3] for m in maps)


@pytest.mark.parametrize("own_anchors", [False, True])
def test_training_has_the_losses_and_gradients_of_before(integration, own_anchors):
    plain = detector().train()
    if own_anchors:
        # Another generator than detectron2's, whose anchors the proposals know too.
        options = {"aspect_ratios": [[0.5, 1.0, 2.0]], "strides": [4, 8, 16, 32], "offset": 0.5}
        plain.proposal_generator.anchor_generator = detectron2.DefaultAnchorGenerator(
            sizes=[[12 * 2**i, 20 * 2**i] for i in range(4)], **options
        )
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    assert fast.proposal_generator._knows_anchors()
    targets = [torch.tensor([[5.0, 6, 60, 50]]), torch.tensor([[20.0, 10, 80, 60], [1, 1, 30, 30]])]
    found = []
    for model in (plain, fast):
        boxes, _, losses = model(images(), SIZES[:2], targets)
        sum(losses.values()).backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}, boxes))
    (expected, grads, boxes), (losses, fast_grads, fast_boxes) = found
    assert losses == expected
    assert len(boxes[0].objectness_logits) == len(fast_boxes[0].objectness_logits) > 20
    for name, grad in grads.items():
        assert (grad is None) == (fast_grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(fast_grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="gt_instances must have the boxes of each image in training"):
        fast(images(), SIZES[:2])


def test_what_has_no_fused_form_is_left(integration):
    class Mine(detectron2_stand_in.DefaultAnchorGenerator):
        pass

    model = detector(pooler_type="ROIPool", output_size=3)
    report = fpn_fast.accelerate(model)
    assert [e.note for e in report.left] == ["its layers are RoIPool, which has no fused implementation"]
    hooked = detector()
    for module in hooked.modules():
        if type(module) is detectron2_stand_in.ROIAlign:
            module.register_forward_hook(lambda *_: None)
    assert "its layers have forward hooks" in fpn_fast.accelerate(hooked).left[0].note
    oblong = detector(output_size=(3, 5))
    assert "detectron2 makes its output_size (3, 5) square" in fpn_fast.accelerate(oblong).left[0].note
    # An RPN whose anchors are made in another way takes detectron2's steps.
    plain = detector().eval()
    plain.proposal_generator.anchor_generator.__class__ = Mine
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    assert type(fast.proposal_generator) is integration.RPN
    for ours, theirs in zip(fast(images(), SIZES[:2])[0], plain(images(), SIZES[:2])[0], strict=True):
        assert torch.equal(ours.objectness_logits, theirs.objectness_logits)


@pytest.mark.parametrize(
    "path", ["predict_proposals", "box2box_transform.apply_deltas", "anchor_generator.forward", "anchor_generator hook"]
)
@pytest.mark.parametrize("is_class", [False, True], ids=["instance", "class"])
def test_a_replaced_step_is_called(integration, path, is_class, monkeypatch):
    model, calls = detector().eval(), []
    fpn_fast.accelerate(model)
    model(images(), SIZES[:2])
    owner = model.proposal_generator
    if path.endswith(" hook"):
        owner.anchor_generator.register_forward_hook(lambda *_: calls.append(path))
    else:
        *parts, name = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        if is_class:
            owner = next(kind for kind in type(owner).__mro__ if name in vars(kind))
        step = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append(path) or step(*given))
    model(images(), SIZES[:2])
    assert calls


def test_cell_anchors_are_read_once(integration):
    model = detector().eval()
    fpn_fast.accelerate(model)
    first = model.proposal_generator._cell_values()
    assert model.proposal_generator._cell_values() is first
    model.proposal_generator.anchor_generator.cell_anchors[0] = torch.zeros(6, 4)
    assert model.proposal_generator._cell_values()[0] == [[0.0] * 4] * 6


def test_register_names_them_in_the_registries(integration, monkeypatch):
    names = integration.register()
    assert names == ["build_fast_resnet_fpn_backbone", "build_fast_retinanet_resnet_fpn_backbone", "build_fast_rpn"]
    assert integration.register() == names
    backbones, proposals = detectron2_stand_in.BACKBONE_REGISTRY, detectron2_stand_in.PROPOSAL_GENERATOR_REGISTRY
    monkeypatch.setattr(detectron2_stand_in, "bottom_up_of", Backbone)
    for name in names[:2]:
        made = backbones.get(name)(detectron2_stand_in.Config(), None)
        assert type(made) is integration.FPN
        assert len(made(images())) == (5 if name == names[0] else 6)
    assert type(proposals.get(names[2])(detectron2_stand_in.Config(), None)) is integration.RPN
