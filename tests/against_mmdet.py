# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # mmcv's stand-in comes before mmdetection
"""Our modules against mmdetection's own, which `make test-mmdet` installs; no part of the default run.

Same weights, inputs and configurations: outputs and gradients. mmcv's compiled ops are tests/helpers/mmcv_stand_in.py.
"""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import mmcv_stand_in
from helpers.modules import assert_none_worse, outputs_and_gradients

mmcv_stand_in.install()

from mmdet import registry
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from test_mmdet_modules import (
    CHANNELS,
    CODERS,
    CONFIG,
    EVEN,
    GENERATORS,
    GROUPS,
    LAYER,
    ODD,
    SIZES,
    STRIDES,
    coded,
    inputs,
    rois,
)

import fpn_fast
from fpn_fast.bench import cases, counting, providers
from fpn_fast.bench.rois import random_rois
from fpn_fast.integrations import mmdet as integration
from fpn_fast.nn import mmdet

# mmengine reports every weight that it draws.
logging.disable(logging.WARNING)
# Names in a configuration are mmdetection's.
init_default_scope("mmdet")
MODELS = registry.MODELS
FASTER_RCNN = Path(registry.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "faster-rcnn_r50_fpn.py"

NECKS = [
    {"type": "FPN", "num_outs": 5},
    {"type": "FPN", "num_outs": 5, "start_level": 1, "add_extra_convs": "on_input"},
    {"type": "FPN", "num_outs": 3, "start_level": 1, "end_level": 3},
    {"type": "FPN", "num_outs": 2, "start_level": 1, "end_level": 2, "add_extra_convs": "on_output"},
    {"type": "FPN", "num_outs": 7, "add_extra_convs": "on_lateral", "relu_before_extra_convs": True},
    {"type": "FPN", "num_outs": 6, "add_extra_convs": True, "norm_cfg": {"type": "BN"}, "act_cfg": {"type": "ReLU"}},
    {"type": "FPN", "num_outs": 4, "norm_cfg": GROUPS, "no_norm_on_lateral": True},
    {"type": "FPN", "num_outs": 4, "norm_cfg": {"type": "SyncBN", "requires_grad": False}},
    {"type": "FPN", "num_outs": 4, "act_cfg": {"type": "LeakyReLU", "negative_slope": 0.1}},
    {"type": "FPN", "num_outs": 4, "upsample_cfg": {"mode": "bilinear", "align_corners": False}},
    {"type": "FPN", "num_outs": 4, "upsample_cfg": {"mode": "nearest", "scale_factor": 2}},
    {"type": "PAFPN", "num_outs": 5},
    {"type": "PAFPN", "num_outs": 6, "start_level": 1, "add_extra_convs": "on_output", "relu_before_extra_convs": True},
    {"type": "PAFPN", "num_outs": 5, "add_extra_convs": "on_lateral", "norm_cfg": GROUPS},
]


def results(module, maps, *more):
    found = module(maps, *more)
    leaves = [each for each in [*maps, *module.parameters()] if each.requires_grad]
    return outputs_and_gradients(found if isinstance(found, tuple) else [found], leaves)


def compare(theirs, others, arguments):
    """Outputs and gradients of `others` are no worse than mmdetection's; arguments(dtype) are maps and what follows."""
    exact = results(copy.deepcopy(theirs).double(), *arguments(torch.float64))
    expected = results(theirs, *arguments(torch.float32))
    for module in others:
        assert_none_worse(results(module, *arguments(torch.float32)), expected, exact, size=43)


@pytest.mark.parametrize("cfg", NECKS, ids=str)
def test_necks(cfg):
    cfg = {**cfg, "in_channels": CHANNELS, "out_channels": 8}
    theirs, ours = MODELS.build(copy.deepcopy(cfg)), mmdet.build_neck(cfg)
    theirs.init_weights()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.init_weights()
    ours.load_state_dict(theirs.state_dict())
    sizes = EVEN if "scale_factor" in cfg.get("upsample_cfg", {}) else ODD
    registered = MODELS.build({**copy.deepcopy(cfg), "type": f"Fast{cfg['type']}"})
    registered.load_state_dict(ours.state_dict())
    swapped = copy.deepcopy(theirs)
    assert len(fpn_fast.accelerate(swapped).swapped) == 1
    compare(theirs, (ours, swapped, registered), lambda dtype: (inputs(sizes, dtype),))
    fpn_fast.restore(swapped)
    assert type(swapped) is type(theirs)


def test_weights_are_drawn_with_the_same_spread():
    cfg = {"in_channels": [512], "out_channels": 64, "num_outs": 1}
    for init in ({}, {"init_cfg": None}):
        torch.manual_seed(0)
        theirs, ours = MODELS.build({"type": "FPN", **cfg, **init}), mmdet.FPN(**cfg, **init)
        theirs.init_weights()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # 32768 numbers or more, or zeros.
            torch.testing.assert_close(a.std(), b.std(), rtol=0.02, atol=0, msg=name)


@pytest.mark.parametrize("factor", [None, 1.3])
@pytest.mark.parametrize(
    "cfg",
    [{"type": "SingleRoIExtractor"}, {"type": "SingleRoIExtractor", "finest_scale": 20},
     {"type": "GenericRoIExtractor"}, {"type": "GenericRoIExtractor", "aggregation": "concat"}],
    ids=str,
)  # fmt: skip
def test_extractors(cfg, factor):
    channels = 32 if cfg.get("aggregation") == "concat" else 8
    cfg = {**cfg, "roi_layer": LAYER, "out_channels": channels, "featmap_strides": STRIDES}
    theirs, ours = MODELS.build(copy.deepcopy(cfg)), mmdet.build_roi_extractor(cfg)
    swapped, registered = copy.deepcopy(theirs), MODELS.build({**copy.deepcopy(cfg), "type": f"Fast{cfg['type']}"})
    assert len(fpn_fast.accelerate(swapped).swapped) == 1

    if "finest_scale" in cfg:
        assert torch.equal(ours.map_roi_levels(rois(), 3), theirs.map_roi_levels(rois(), 3))

    def arguments(dtype):
        return [each.to(dtype).requires_grad_() for each in features()], rois().to(dtype), factor

    compare(theirs, (ours, swapped, registered), arguments)


@pytest.mark.parametrize("name", GENERATORS)
def test_anchors(name):
    ours, theirs = mmdet.AnchorGenerator(**GENERATORS[name]), AnchorGenerator(**GENERATORS[name])
    assert ours.num_base_priors == theirs.num_base_priors
    assert [tuple(stride) for stride in theirs.strides] == ours.strides
    for a, b in zip(ours.base_anchors, theirs.base_anchors, strict=True):
        assert torch.equal(a, b)
    assert ours.num_base_anchors == theirs.num_base_anchors
    chosen = torch.tensor([0, 5, 17, 6])
    calls = {
        "grid_priors": (ODD,), "grid_anchors": (ODD,), "valid_flags": (ODD, (61, 93, 3)),
        "single_level_grid_priors": (ODD[1], 1), "sparse_priors": (chosen, ODD[1], 1),
        "single_level_grid_anchors": (theirs.base_anchors[1], ODD[1], (8, 16)),
        "single_level_valid_flags": (ODD[1], (3, 4), 2),
    }  # fmt: skip
    for method, arguments in calls.items():
        found, expected = (getattr(each, method)(*arguments, device="cpu") for each in (ours, theirs))
        for a, b in zip(*([each] if torch.is_tensor(each) else each for each in (found, expected)), strict=True):
            assert a.dtype == b.dtype, method
            assert torch.equal(a, b), method
    assert {each for each in dir(AnchorGenerator) if not each.startswith("_")} <= set(dir(ours))


@pytest.mark.parametrize("options", CODERS, ids=["plain", "means_and_stds", "centre_clamp"])
def test_coder(options):
    ours, theirs = mmdet.DeltaXYWHBBoxCoder(**options), DeltaXYWHBBoxCoder(**options)
    assert ours.encode_size == theirs.encode_size
    for dtype in (torch.float32, torch.float64):
        boxes, others, codes = coded((40,), dtype)
        assert torch.equal(ours.encode(boxes, others), theirs.encode(boxes, others))
        wrapped = HorizontalBoxes(boxes)
        assert torch.equal(ours.encode(wrapped, HorizontalBoxes(others)), theirs.encode(wrapped, others))
        pairs = [torch.stack([each, each]) for each in (boxes, codes)]
        for arguments in (
            (boxes, codes), (wrapped, codes[:, :4]), (boxes, codes, (40, 50)), (boxes, codes, (40, 50, 3), 0.1),
            (boxes[:0], codes[:0]), pairs, (*pairs, [(40, 50), (30, 70)]), (*pairs, (40, 50)),
        ):  # fmt: skip
            found = []
            for coder in (ours, theirs):
                leaf = arguments[1].clone().requires_grad_()
                decoded = coder.decode(arguments[0], leaf, *arguments[2:])
                weights = torch.arange(1.0, decoded.numel() + 1, dtype=dtype).view_as(decoded)
                found += [decoded, torch.autograd.grad((decoded * weights).sum(), leaf)[0]]
            assert torch.equal(found[0], found[2])
            torch.testing.assert_close(found[1], found[3], rtol=8 * torch.finfo(dtype).eps, atol=0)


def faster_rcnn_config(channels, **changes):
    """mmdetection's own, with maps of so many channels; changes have two underscores for a dot."""
    config = Config(Config.fromfile(FASTER_RCNN).model)
    places = ("neck.out", "rpn_head.in", "rpn_head.feat", "roi_head.bbox_roi_extractor.out", "roi_head.bbox_head.in")
    config.merge_from_dict({f"{place}_channels": channels for place in places})
    config.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def head(name="rpn", coder=None, train_cfg=None, **config):
    cfg = faster_rcnn_config(8).rpn_head
    cfg.anchor_generator = {"type": "AnchorGenerator", **GENERATORS[name]}
    cfg.bbox_coder = {"type": "DeltaXYWHBBoxCoder", **(coder or {})}
    torch.manual_seed(0)
    made = MODELS.build(cfg, default_args={"train_cfg": train_cfg, "test_cfg": Config({**CONFIG, **config})})
    # Scores that are not near 1, where they tie and logits do not.
    for layer, deviation in ((made.rpn_conv, 0.3), (made.rpn_cls, 0.1), (made.rpn_reg, 0.1)):
        torch.nn.init.normal_(layer.weight, std=deviation)
    return made


def samples():
    padded = {"pad_shape": (100, 168), "scale_factor": (1.0, 1.0)}
    return [DetDataSample(metainfo={"img_shape": size, **padded}) for size in SIZES]


def features():
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(2, 8, *size, generator=generator) for size in ODD)


def check_proposals(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b) > 20
        torch.testing.assert_close(a.scores, b.scores, rtol=2**-22, atol=0)
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=2**-22, atol=2**-14)
        assert a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("coder", [{}, {"target_stds": (0.5, 0.5, 2.0, 2.0), "add_ctr_clamp": True, "ctr_clamp": 4}])
@pytest.mark.parametrize("config", [{}, {"min_bbox_size": 12, "nms_pre": -1}], ids=["usual", "all"])
@pytest.mark.parametrize("name", ["rpn", "retinanet", "offset"])
def test_proposals(name, config, coder):
    theirs = head(name, coder, **config)
    swapped = copy.deepcopy(theirs)
    assert [e.note for e in fpn_fast.accelerate(swapped).swapped] == ["now fpn_fast.RPNHead"]
    with torch.no_grad():
        expected = theirs.predict(features(), samples())
        check_proposals(swapped.predict(features(), samples()), expected)
        # The function by itself, with mmdetection's generator and coder or ours.
        maps = theirs(features())
        for generator, box_coder in (
            (theirs.prior_generator, theirs.bbox_coder),
            (mmdet.AnchorGenerator(**GENERATORS[name]), mmdet.DeltaXYWHBBoxCoder(**coder)),
        ):
            found = mmdet.predict_proposals(*maps, generator, box_coder, SIZES, theirs.test_cfg)
            lists = mmdet.proposals_of_images(*found)
            made = [InstanceData(bboxes=b, scores=s, labels=torch.zeros(len(s), dtype=torch.long)) for b, s in lists]
            check_proposals(made, expected)


@pytest.mark.parametrize("change", ["coder", "nms", "rescale"])
def test_unusual_proposals_take_mmdetections_steps(change):
    theirs = head(coder={"clip_border": False} if change == "coder" else {})
    if change == "nms":
        theirs.test_cfg["nms"] = {"type": "nms", "iou_threshold": 0.7, "class_agnostic": True}
    swapped = copy.deepcopy(theirs)
    fpn_fast.accelerate(swapped)
    with torch.no_grad():
        rescale = change == "rescale"
        found = swapped.predict(features(), samples(), rescale=rescale)
        for a, b in zip(found, theirs.predict(features(), samples(), rescale=rescale), strict=True):
            assert torch.equal(a.bboxes, b.bboxes)


@pytest.mark.parametrize(
    "path", ["_predict_by_feat_single", "_bbox_post_process", "prior_generator.grid_priors", "bbox_coder.decode"]
)
@pytest.mark.parametrize("is_class", [False, True], ids=["instance", "class"])
def test_a_replaced_step_is_called(path, is_class, monkeypatch):
    model, calls = head(), []
    fpn_fast.accelerate(model)
    *parts, name = path.split(".")
    owner = getattr(model, parts[0]) if parts else model
    if is_class:
        owner = next(kind for kind in type(owner).__mro__ if name in vars(kind))
    step = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **options: calls.append(path) or step(*given, **options))
    with torch.no_grad():
        model.predict(features(), samples())
    assert calls


def test_losses_are_mmdetections():
    trained = head(train_cfg=faster_rcnn_config(8, train_cfg__rpn__sampler={"type": "PseudoSampler"}).train_cfg.rpn)
    fast = copy.deepcopy(trained)
    fpn_fast.accelerate(fast)
    batch = samples()
    for sample in batch:
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[5.0, 6, 60, 50]]), labels=torch.tensor([0]))
    (losses, boxes), (fast_losses, fast_boxes) = (
        model.loss_and_predict(features(), copy.deepcopy(batch), proposal_cfg=trained.test_cfg)
        for model in (trained, fast)
    )
    assert losses.keys() == fast_losses.keys()
    for key in losses:
        assert all(torch.equal(a, b) for a, b in zip(losses[key], fast_losses[key], strict=True))
    check_proposals(fast_boxes, boxes)


def faster_rcnn():
    """mmdetection's, with a ResNet-18; boxes and scores that differ, as an untrained head's do not."""
    few = {"nms_pre": 60, "max_per_img": 40}
    cfg = faster_rcnn_config(
        32, backbone={"depth": 18, "frozen_stages": -1, "init_cfg": None}, neck__in_channels=[64, 128, 256, 512],
        roi_head__bbox_head={"fc_out_channels": 64, "num_classes": 3}, train_cfg__rpn_proposal=few, test_cfg__rpn=few,
        train_cfg__rpn__sampler__num=32, train_cfg__rcnn__sampler__num=32, test_cfg__rcnn__max_per_img=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    for layer, deviation in ((model.rpn_head.rpn_cls, 0.1), (model.rpn_head.rpn_reg, 0.02),
                             (model.roi_head.bbox_head.fc_cls, 0.2)):  # fmt: skip
        torch.nn.init.normal_(layer.weight, std=deviation)
    # Too little rounding to change a decision.
    return model.double()


def test_a_whole_detector_has_the_same_losses_gradients_and_detections():
    plain = faster_rcnn()
    fast = copy.deepcopy(plain)
    report = fpn_fast.accelerate(fast)
    kinds = ["mmdet.FPN", "mmdet.RPNHead", "mmdet.SingleRoIExtractor"]
    assert sorted(e.module for e in report.swapped) == ["mmdet.BasicBlock"] * 8 + kinds
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 96, 128, generator=generator, dtype=torch.float64)
    size = {"img_shape": (96, 128), "pad_shape": (96, 128), "ori_shape": (96, 128), "scale_factor": (1.0, 1.0)}
    batch = [DetDataSample(metainfo=dict(size)) for _ in range(2)]
    for sample in batch:
        boxes = torch.tensor([[5.0, 6, 60, 70], [40, 30, 120, 90]], dtype=torch.float64)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
    found = []
    for model in (plain, fast):
        torch.manual_seed(1)
        losses = model.train().loss(images, copy.deepcopy(batch))
        total = sum(each if isinstance(each, torch.Tensor) else sum(each) for each in losses.values())
        grads = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        with torch.no_grad():
            detections = model.eval().predict(images, copy.deepcopy(batch))
        found.append((losses, grads, [each.pred_instances for each in detections]))
    (expected, expected_grads, expected_boxes), (losses, grads, boxes) = found
    assert losses.keys() == expected.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], expected[key], rtol=1e-9, atol=1e-9)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for a, b in zip(boxes, expected_boxes, strict=True):
        assert len(a) == len(b) > 5
        assert a.labels.tolist() == b.labels.tolist()
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=1e-7, atol=1e-6)
    assert len(fpn_fast.restore(fast).swapped) == 11


BACKBONES = {
    "ResNet-18": {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8},
    "ResNet-50": {"type": "ResNet", "depth": 50, "base_channels": 8, "stem_channels": 8},
    "caffe, checkpointed": {
        "type": "ResNet", "depth": 50, "base_channels": 8, "style": "caffe", "with_cp": True,
        "norm_cfg": {"type": "BN", "requires_grad": False},
    },
    "dilated ResNet-D": {
        "type": "ResNetV1d", "depth": 50, "base_channels": 8, "dilations": (1, 1, 1, 2), "strides": (1, 2, 2, 1),
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    },
    "ResNeXt": {"type": "ResNeXt", "depth": 50, "groups": 4, "base_width": 8, "base_channels": 16, "stem_channels": 8},
    "RegNet": {"type": "RegNet", "arch": "regnetx_400mf"},
    "HRNet": {
        "type": "HRNet",
        "extra": {
            f"stage{i}": {
                "num_modules": 1, "num_branches": i, "block": "BASIC" if i > 1 else "BOTTLENECK",
                "num_blocks": (1,) * i, "num_channels": (8, 16, 24, 32)[:i],
            }
            for i in range(1, 5)
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    """Their residual blocks, in training with norm_eval, where one call of the op is a norm and what follows it."""
    torch.manual_seed(0)
    plain = MODELS.build({"norm_eval": True, **copy.deepcopy(BACKBONES[name])}).double()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 1.5)
    fast = copy.deepcopy(plain)
    blocks = fpn_fast.accelerate(fast).swapped
    assert {e.module for e in blocks} <= {"mmdet.BasicBlock", "mmdet.Bottleneck"}
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fast.train(), plain.train()
    with torch.no_grad():
        calls = counting.count(lambda: fast(images)).operators["fpn_fast::frozen_batch_norm"]
    assert calls == sum(2 if e.module == "mmdet.BasicBlock" else 3 for e in blocks) > 0
    found = []
    for model in (fast, plain):
        maps = model(images)
        sum(each.square().mean() for each in maps).backward()
        found.append([*maps, *(each.grad for each in model.parameters())])
    for own, other in zip(*found, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert len(fpn_fast.restore(fast).swapped) == len(blocks)
    assert all(torch.equal(a, b) for a, b in zip(fast(images), plain(images), strict=True))


def test_blocks_with_plugins_and_of_other_backbones_are_left():
    plugin = {"cfg": {"type": "ContextBlock", "ratio": 0.25}, "position": "after_conv2"}
    backbone = {"depth": 50, "base_channels": 8, "stem_channels": 8}
    left = fpn_fast.accelerate(MODELS.build({"type": "ResNet", "plugins": [plugin], **backbone})).left
    assert {e.note for e in left} == {"it has plugins, which have no fused implementation"}
    left = fpn_fast.accelerate(MODELS.build({"type": "Res2Net", "depth": 50, "scales": 4})).left
    assert {e.note for e in left} == {"a subclass of mmdet.Bottleneck, which may compute something else"}


def test_benchmarks_state_what_mmdetection_does():
    """Neck, extractor and proposals, the steps that ours are measured against."""

    def small(name):
        case = cases.tiny([c for c in cases.FAMILIES["mmdet"]("cpu") if c.op == name][-1])
        case = replace(case, rois=40, direction="forward", memory_format="channels_first")
        of_case = providers.op_of(case)
        return case, of_case.inputs(torch.device("cpu")), of_case.eager

    case, tensors, eager = small("mmdet_neck")
    theirs = MODELS.build(
        {"type": "FPN", "in_channels": [m.size(1) for m in tensors[:4]], "out_channels": case.channels, "num_outs": 5}
    )
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors[4:], strict=True)))
    for a, b in zip(eager(tensors), theirs(tensors[:4]), strict=True):
        assert torch.equal(a, b)

    case, maps, eager = small("mmdet_extractor")
    layer = {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}
    theirs = MODELS.build({"type": "SingleRoIExtractor", "roi_layer": layer, "out_channels": case.channels,
                           "featmap_strides": [4, 8, 16, 32]})  # fmt: skip
    boxes = random_rois(case.batch, case.rois, *cases.image_size(case), False)
    assert torch.equal(eager(maps), theirs(tuple(maps), boxes))

    case, maps, eager = small("mmdet_proposals")
    count, top_n = len(case.levels), case.pre_nms_top_n
    theirs = head()
    theirs.prior_generator = AnchorGenerator(strides=[4 << i for i in range(count)], ratios=[0.5, 1.0, 2.0], scales=[8])
    metas = [{"img_shape": cases.image_size(case)}] * case.batch
    config = Config({**CONFIG, "nms_pre": top_n, "max_per_img": top_n})
    expected = theirs.predict_by_feat(maps[:count], maps[count:], batch_img_metas=metas, cfg=config)
    found = eager(maps)
    assert all(len(each) > 5 for each in expected)
    for boxes, scores, each in zip(found[: case.batch], found[case.batch :], expected, strict=True):
        assert torch.equal(boxes, each.bboxes)
        assert torch.equal(scores, each.scores)


def test_what_has_no_fused_form_is_left_or_refused():
    cfg = {"in_channels": CHANNELS, "out_channels": 8, "num_outs": 4, "upsample_cfg": {"mode": "bicubic"}}
    left = fpn_fast.accelerate(MODELS.build({"type": "FPN", **cfg})).left
    assert [e.note for e in left] == ["upsample_cfg's mode must be 'nearest' or 'bilinear', got 'bicubic'"]
    with pytest.raises(ValueError, match="got 'bicubic'"):
        MODELS.build({"type": "FastFPN", **cfg})
    extractor = {"out_channels": 8, "featmap_strides": STRIDES}
    hooked = MODELS.build(
        {"type": "SingleRoIExtractor", **extractor, "roi_layer": {"type": "RoIAlign", "output_size": 3}}
    )
    hooked.roi_layers[0].register_forward_hook(lambda *_: None)
    assert "its layers have forward hooks" in fpn_fast.accelerate(hooked).left[0].note
    pooled = {"type": "SingleRoIExtractor", **extractor, "roi_layer": {"type": "RoIPool", "output_size": 3}}
    assert [e.note for e in fpn_fast.accelerate(MODELS.build(copy.deepcopy(pooled))).left] == [
        "its layers are RoIPool, which has no fused implementation"
    ]
    plugin = {"type": "ConvModule", "in_channels": 8, "out_channels": 8, "kernel_size": 1}
    generic = {"type": "GenericRoIExtractor", **extractor, "roi_layer": LAYER, "pre_cfg": plugin}
    assert "pre_module" in fpn_fast.accelerate(MODELS.build(copy.deepcopy(generic))).left[0].note
    with pytest.raises(ValueError, match="pre_module"):
        MODELS.build({**generic, "type": "FastGenericRoIExtractor"})


def test_register_names_them():
    names = ["FastFPN", "FastPAFPN", "FastSingleRoIExtractor", "FastGenericRoIExtractor", "FastRPNHead"]
    assert integration.register() == names == integration.register()
    assert all(MODELS.get(name) is getattr(integration, name.removeprefix("Fast")) for name in names)


def test_coder_settings():
    ours, theirs = mmdet.DeltaXYWHBBoxCoder(), DeltaXYWHBBoxCoder()
    assert vars(ours) == vars(theirs)


def test_a_head_with_our_generator_and_coder():
    theirs = head()
    swapped = copy.deepcopy(theirs)
    swapped.prior_generator, swapped.bbox_coder = mmdet.AnchorGenerator(**GENERATORS["rpn"]), mmdet.DeltaXYWHBBoxCoder()
    with torch.no_grad():
        expected = theirs.predict(features(), samples())
        # By mmdetection's steps, then by ours.
        check_proposals(swapped.predict(features(), samples()), expected)
        fpn_fast.accelerate(swapped)
        assert swapped._knows_anchors(swapped.test_cfg)
        check_proposals(swapped.predict(features(), samples()), expected)


@pytest.fixture(autouse=True)
def _registered():
    integration.register()
