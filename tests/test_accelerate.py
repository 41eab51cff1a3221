# SPDX-License-Identifier: Apache-2.0
import copy
import io
import json
import pickle

import pytest
import torch
import torchvision
from helpers.small_detectors import calibrate, check_detections, losses_and_gradients, training_batch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
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
    return two_stages(True)


def test_same_detections_losses_and_gradients():
    """In float64, where the pooler's other order of sums changes no decision: to rounding. test_detectors.py has every
    kind in float32."""
    dtype = torch.float64
    plain = detector().to(dtype)
    fast = copy.deepcopy(plain)
    report = fpn_fast.accelerate(fast)
    assert [(e.name, e.module) for e in report.swapped] == [TRANSFORM, FPN, RPN, ANCHORS, HEADS, POOLER]
    expected, expected_grads = losses_and_gradients(plain, *training_batch())
    losses, grads = losses_and_gradients(fast, *training_batch())
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-13, atol=1e-14)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-10, atol=1e-11 * scale, msg=name)
    images = training_batch(dtype)[0]
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
    model.eval()(training_batch(torch.float32)[0])
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
    assert text.splitlines()[-1] == report.limits[0]
    plain = report.as_dict()
    assert plain["swapped"][0] == {
        "name": TRANSFORM[0],
        "module": TRANSFORM[1],
        "note": f"now fpn_fast.{TRANSFORM[1][12:]}",
    }
    assert plain["left"][0]["name"] == "rpn.anchor_generator"
    assert json.loads(json.dumps(plain)) == plain


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
    other = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))
    before = {name: (type(module), dict(vars(module))) for name, module in other.named_modules()}
    report = fpn_fast.accelerate(other)
    assert str(report) == "fpn_fast: this model has no module with a fused implementation"
    assert report.as_dict() == {"swapped": [], "left": [], "limits": [], "advice": []}
    assert {name: (type(module), dict(vars(module))) for name, module in other.named_modules()} == before
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


# Small detectors of both kinds, without a backbone to speak of: what happens to the parts that are swapped is the same.

#: So many that nothing is left out for being too many.
ALL = 10_000


def pyramid(width=16):
    """Maps of strides 8, 16, 32 and 64."""
    body = nn.Sequential()
    for name, channels, stride in (("stem", 3, 4), ("fine", 16, 2), ("middle", 16, 2), ("coarse", 16, 2)):
        convolution = nn.Conv2d(channels, 16, 3, stride, 1, bias=False)
        body.add_module(name, nn.Sequential(convolution, nn.BatchNorm2d(16), nn.ReLU()))
    return BackboneWithFPN(body, {"fine": "0", "middle": "1", "coarse": "2"}, [16, 16, 16], width)


def anchors():
    return AnchorGenerator(((16,), (24,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4)


def two_stages(decides):
    everything = {
        "rpn_nms_thresh": 1.0, "box_nms_thresh": 1.0, "box_score_thresh": 0.0, "box_detections_per_img": ALL,
        "rpn_batch_size_per_image": ALL, "box_batch_size_per_image": ALL,
    }  # fmt: skip
    return FasterRCNN(
        pyramid(), rpn_anchor_generator=anchors(), box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(16 * 7**2, 32), box_predictor=FastRCNNPredictor(32, 5),
        **({} if decides else everything), **SIZE,
    )  # fmt: skip


def one_stage(decides):
    everything = {"nms_thresh": 1.0, "score_thresh": 0.0, "detections_per_img": ALL}
    return RetinaNet(
        pyramid(), 5, anchor_generator=anchors(), topk_candidates=ALL, **({} if decides else everything), **SIZE
    )


KINDS = pytest.mark.parametrize("kind", [two_stages, one_stage])


def pair(kind, decides=True):
    """The detector, and a copy that is accelerated. One that decides nothing gives everything it is asked about."""
    torch.manual_seed(0)
    plain = kind(decides)
    calibrate(plain)
    if not decides:
        # Boxes that stay where they are, about: none leaves its image, and is left out for having no area.
        for name, layer in plain.named_modules():
            if name.endswith(("bbox_pred", "bbox_reg")):
                layer.weight.data.mul_(0.1)
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    return plain.eval(), fast.eval()


def detect(model, dtype=torch.float32):
    with torch.no_grad():
        return model.eval()(training_batch(dtype)[0])


def learn(model, dtype):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return losses_and_gradients(model, *training_batch(dtype))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
@KINDS
def test_copies_do_the_same(kind, again):
    """Of a detector that ran before, and so keeps scales and anchors, too."""
    plain, fast = pair(kind)
    for ours, theirs in zip(detect(again(fast)), detect(fast), strict=True):
        assert len(theirs["boxes"]) > 3
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    copied = again(fast)
    assert [type(m) for m in copied.modules()] == [type(m) for m in fast.modules()]
    check_detections(detect(copied), detect(plain))
    assert len(fpn_fast.restore(copied).swapped) == len(fpn_fast.restore(fast).swapped) > 3
    check_detections(detect(copied), detect(plain))


@KINDS
def test_moving_to_a_type_and_a_memory_format(kind):
    """There and back, before and after calls, and accelerated before or after."""
    plain, fast = pair(kind)
    detect(fast)
    for change, dtype in (({"dtype": torch.float64}, torch.float64), ({"dtype": torch.float32}, torch.float32),
                          ({"memory_format": torch.channels_last}, torch.float32)):  # fmt: skip
        plain, fast = plain.to(**change), fast.to(**change)
        late = copy.deepcopy(plain)
        fpn_fast.accelerate(late)
        expected = detect(plain, dtype)
        for model in (fast, late):
            found = detect(model, dtype)
            assert {each["boxes"].dtype for each in found} == {dtype}
            check_detections(found, expected)
    assert fast.backbone.fpn.layer_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def of_labels(found):
    """Of each image and label a table [K, 5] of scores and coordinates, each column in its own order.

    Sorting moves no two lists of numbers further apart than they were: of the same detections in another order this
    shows how far scores and coordinates are apart.
    """
    tables = [(torch.cat([each["scores"][:, None], each["boxes"]], 1).double(), each["labels"]) for each in found]
    return [table[labels == label].sort(0).values for table, labels in tables for label in labels.unique().tolist()]


def check_no_decisions(ours, plain, exact):
    """As many detections as torchvision's, scores and coordinates no further from float64's than twice its own."""
    tables = [of_labels(found) for found in (ours, plain, exact)]
    assert [len(each) for each in tables[0]] == [len(each) for each in tables[1]] == [len(each) for each in tables[2]]
    assert len(torch.cat(tables[0])) > 2000
    for columns in (slice(0, 1), slice(1, 5)):
        own, theirs, right = (torch.cat([each[:, columns] for each in table]) for table in tables)
        assert (own - right).abs().max() <= 2 * (theirs - right).abs().max()


@KINDS
def test_under_autocast_losses_gradients_and_detections(kind):
    """Against torchvision under the same autocast, by how far both are from float64; losses of heads are its own bits.

    Where nothing is decided: decisions on numbers of eight bits differ, and torchvision rounds boxes to these too.
    """
    plain, fast = pair(kind, decides=False)
    wide = copy.deepcopy(plain).double()
    exact, exact_grads = learn(wide, torch.float64)
    found = []
    for model in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16):
            found.append((*learn(model, torch.float32), detect(model)))
    (losses, grads, own), (expected, expected_grads, theirs) = found
    assert losses.keys() == expected.keys()
    unit = torch.finfo(torch.bfloat16).eps
    for key in losses:
        if key not in ("loss_classifier", "loss_box_reg"):
            assert torch.equal(losses[key], expected[key]), key
        allowed = 2 * (expected[key] - exact[key]).abs() + unit * exact[key].abs()
        assert (losses[key] - exact[key]).abs() <= allowed, key
    assert grads.keys() == expected_grads.keys()
    for key, right in exact_grads.items():
        assert (grads[key] - right).norm() <= 2 * (expected_grads[key] - right).norm() + unit * right.norm(), key
    check_no_decisions(own, theirs, detect(wide, torch.float64))


def apart(logits, first=0, step=1):
    """[N, ...] -> the same order in numbers of bfloat16 that are all different in an image; every step-th of them."""
    # Bits of 2**-12 to 4: as many differences as float32's sigmoid still tells apart.
    magnitudes = torch.arange((127 - 12) << 7, (127 + 2) << 7, dtype=torch.int16).view(torch.bfloat16)
    numbers = torch.cat([-magnitudes.flip(0), magnitudes])
    ranks = logits.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return numbers[first + step * ranks].view_as(logits)


def test_under_autocast_decisions_are_those_that_torchvision_takes_in_float32():
    """Of the same heads' maps, made float32 for it; without ties, which either may break."""
    plain, fast = pair(one_stage)
    for model, dtype in ((plain, torch.float32), (fast, torch.bfloat16)):
        model.head.register_forward_hook(
            lambda layer, given, output, dtype=dtype: {
                "cls_logits": apart(output["cls_logits"]).to(dtype),
                "bbox_regression": output["bbox_regression"].to(dtype),
            }
        )
    with torch.autocast("cpu", torch.bfloat16):
        check_detections(detect(fast), detect(plain))
    plain, fast = pair(two_stages)
    for model, dtype in ((plain, torch.float32), (fast, torch.bfloat16)):
        model.rpn.head.register_forward_hook(
            lambda layer, given, output, dtype=dtype: (
                [apart(each, i, len(output[0])).to(dtype) for i, each in enumerate(output[0])],
                [each.to(dtype) for each in output[1]],
            )
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images, _ = plain.transform(training_batch(torch.float32)[0])
        maps = plain.backbone(images.tensors)
        assert all(torch.equal(each, maps[name]) for name, each in fast.backbone(images.tensors).items())
        for ours, theirs in zip(fast.rpn(images, maps)[0], plain.rpn(images, maps)[0], strict=True):
            assert len(theirs) > 20
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@KINDS
def test_half(kind, monkeypatch):
    """torchvision's NMS has no half on a CPU: here its own steps go on with a wider one."""
    plain, fast = pair(kind, decides=False)
    right = detect(copy.deepcopy(plain).double(), torch.float64)
    own = detect(fast.half(), torch.half)
    nms = torchvision.ops.boxes.nms
    monkeypatch.setattr(
        torchvision.ops.boxes, "nms", lambda boxes, scores, iou: nms(boxes.float(), scores.float(), iou)
    )
    assert {each["boxes"].dtype for each in own} == {torch.float32}
    check_no_decisions(own, detect(plain.half(), torch.half), right)


@KINDS
def test_bfloat16(kind):
    """torchvision pools none: as near to float64 as it comes in this type under autocast, weights' rounding and all."""
    plain, fast = pair(kind, decides=False)
    right = detect(copy.deepcopy(plain).double(), torch.float64)
    own = detect(fast.to(torch.bfloat16), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        check_no_decisions(own, detect(plain.to(torch.bfloat16).float()), right)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*in scripting:UserWarning")
@KINDS
def test_torchscript_is_for_what_is_not_swapped_and_the_report_says_so(kind):
    plain, fast = pair(kind)
    scripted = torch.jit.script(plain)
    assert str(fpn_fast.accelerate(scripted)) == "fpn_fast: this model has no module with a fused implementation"
    _, expected = scripted(training_batch(torch.float32)[0])
    check_detections(detect(fast), expected)
    (limit,) = fpn_fast.accelerate(fast).limits
    assert "torch.jit.script" in limit
    assert "torch.onnx.export(dynamo=True)" in limit
    assert "after restore()" in limit
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(fast)
    assert fpn_fast.restore(fast).limits == []
    for ours, theirs in zip(torch.jit.script(fast)(training_batch(torch.float32)[0])[1], expected, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
