# SPDX-License-Identifier: Apache-2.0
import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign

import fpn_fast

SIZE = {"min_size": 64, "max_size": 96}
TRANSFORM = ("transform", "torchvision.GeneralizedRCNNTransform")
FPN = ("backbone.fpn", "torchvision.FeaturePyramidNetwork")
RPN = ("rpn", "torchvision.RegionProposalNetwork")
ANCHORS = ("rpn.anchor_generator", "torchvision.AnchorGenerator")
HEADS = ("roi_heads", "torchvision.RoIHeads")
POOLER = ("roi_heads.box_roi_pool", "torchvision.MultiScaleRoIAlign")


def detector():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    return FasterRCNN(backbone, num_classes=4, **SIZE)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator, dtype=dtype) for size in ((60, 90), (64, 70))]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, 60.0, 50.0]], dtype=dtype)
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]


def losses_and_gradients(model, dtype):
    model.zero_grad()
    torch.manual_seed(5)
    losses = model(*batch(dtype))
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_same_detections_losses_and_gradients():
    """In float64, where the pooler's other order of sums changes no decision: to rounding. test_detectors.py has every
    detector in float32."""
    dtype = torch.float64
    plain = detector().to(dtype)
    fast = copy.deepcopy(plain)
    report = fpn_fast.accelerate(fast)
    assert [(e.name, e.module) for e in report.swapped] == [TRANSFORM, FPN, RPN, ANCHORS, HEADS, POOLER]
    expected, expected_grads = losses_and_gradients(plain, dtype)
    losses, grads = losses_and_gradients(fast, dtype)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-13, atol=1e-14)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-10, atol=1e-11 * scale, msg=name)
    images = batch(dtype)[0]
    for ours, theirs in zip(fast.eval()(images), plain.eval()(images), strict=True):
        assert ours.keys() == theirs.keys()
        assert len(theirs["boxes"]) > 3
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-11, atol=1e-11)


def test_keeps_everything_and_is_undone():
    model = detector()
    fpn, before = model.backbone.fpn, copy.deepcopy(model.state_dict())
    calls = []
    fpn.register_forward_hook(lambda *_: calls.append(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    fpn_fast.accelerate(model)
    assert model.backbone.fpn is fpn
    assert type(fpn) is fpn_fast.nn.FeaturePyramidNetwork
    assert not fpn._forward_pre_hooks
    assert len(fpn._forward_hooks) == 1
    assert all(p is q for p, q in zip(model.parameters(), optimiser.param_groups[0]["params"], strict=True))
    assert list(model.state_dict()) == list(before)
    model.eval()(batch()[0])
    assert calls == [1]

    again = fpn_fast.accelerate(model)
    assert again.swapped == []
    assert ("backbone.fpn", "fused already") in [(e.name, e.note) for e in again.left]

    undone = fpn_fast.restore(model)
    assert [e.name for e in undone.swapped] == [e[0] for e in (TRANSFORM, FPN, RPN, ANCHORS, HEADS, POOLER)]
    assert type(model.backbone.fpn) is FeaturePyramidNetwork
    assert type(model.roi_heads.box_roi_pool) is MultiScaleRoIAlign
    assert fpn_fast.restore(model).swapped == []


def test_checkpoints_go_both_ways_and_copies_stay_fused():
    plain, fast = detector(), detector()
    fpn_fast.accelerate(fast)
    fast.load_state_dict(plain.state_dict())
    plain.load_state_dict(fast.state_dict())
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert type(again.backbone.fpn) is fpn_fast.nn.FeaturePyramidNetwork
        assert type(again.roi_heads.box_roi_pool) is fpn_fast.nn.MultiScaleRoIAlign


def test_report_says_what_was_left_and_why():
    model = detector()
    model.rpn.anchor_generator.__class__ = type("Mine", (AnchorGenerator,), {})
    report = fpn_fast.accelerate(model)
    left = {e.name: e.note for e in report.left}
    assert left == {
        "rpn.anchor_generator": "a subclass of torchvision.AnchorGenerator, which may compute something else"
    }
    text = str(report)
    assert text.splitlines()[0] == "fpn_fast: 5 swapped, 1 left"
    assert "now fpn_fast.FeaturePyramidNetwork" in text
    assert report.as_dict()["swapped"][0]["name"] == "transform"


def test_subclasses_are_left():
    class Mine(FeaturePyramidNetwork):
        pass

    model = nn.Sequential(Mine([8], 4))
    report = fpn_fast.accelerate(model)
    assert type(model[0]) is Mine
    assert report.left[0].note == "a subclass of torchvision.FeaturePyramidNetwork, which may compute something else"


def test_modules_by_themselves_and_models_without_one():
    fpn = FeaturePyramidNetwork([8], 4)
    assert fpn_fast.accelerate(fpn).swapped[0].name == ""
    assert type(fpn) is fpn_fast.nn.FeaturePyramidNetwork
    assert str(fpn_fast.accelerate(nn.Linear(2, 2))) == "fpn_fast: nothing in this model has a fused form"
    generator = AnchorGenerator()
    assert fpn_fast.accelerate(generator).swapped[0].note == "now fpn_fast.AnchorGenerator"
    assert type(generator) is fpn_fast.nn.AnchorGenerator
    for pooler in (MultiScaleRoIAlign(["0"], 7, 2), RoIAlign(7, 0.25, 2)):
        kind = type(pooler).__name__
        assert fpn_fast.accelerate(pooler).swapped[0].note == f"now fpn_fast.{kind}"
        assert type(pooler) is getattr(fpn_fast.nn, kind)
    for function in (fpn_fast.accelerate, fpn_fast.restore):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
            function({})
