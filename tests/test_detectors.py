# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors with every part swapped, against themselves without.

In float64, where rounding decides nothing, unless a test says otherwise.
"""

import copy
import functools

import pytest
import torch
import torchvision
from helpers import small_detectors
from helpers.small_detectors import KINDS, calibrate, check_detections
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import detection, efficientnet_b0, resnet, swin_t
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.feature_extraction import create_feature_extractor

import fpn_fast
from fpn_fast import backends
from fpn_fast.bench.counting import count

SMALL = {"min_size": 64, "max_size": 96}
FEW = {**SMALL, "num_classes": 5, "box_detections_per_img": 8, "rpn_post_nms_top_n_test": 40}
#: What makes each builder's detector small, and lets it find something.
BUILDERS = {
    "fasterrcnn_resnet50_fpn": FEW,
    "fasterrcnn_resnet50_fpn_v2": FEW,
    "fasterrcnn_mobilenet_v3_large_fpn": FEW,
    "fasterrcnn_mobilenet_v3_large_320_fpn": FEW,
    "maskrcnn_resnet50_fpn": FEW,
    "maskrcnn_resnet50_fpn_v2": FEW,
    "keypointrcnn_resnet50_fpn": {**FEW, "num_classes": 2, "num_keypoints": 4},
    "retinanet_resnet50_fpn": {"num_classes": 5, **SMALL},
    "retinanet_resnet50_fpn_v2": {"num_classes": 5, **SMALL},
    "fcos_resnet50_fpn": {"num_classes": 5, **SMALL},
    "ssd300_vgg16": {"num_classes": 5},
    "ssdlite320_mobilenet_v3_large": {"num_classes": 5},
}
#: The widths of the long heads of masks and keypoints between their first layer and their last.
NARROW_HEADS = {
    "maskrcnn_resnet50_fpn": lambda: {"mask_head": MaskRCNNHeads(256, (16, 256), 1)},
    "keypointrcnn_resnet50_fpn": lambda: {"keypoint_head": KeypointRCNNHeads(256, (16, 512))},
}
SWAPPED = {
    "fasterrcnn": {"transform", "backbone.fpn", "rpn", "rpn.anchor_generator", "roi_heads", "roi_heads.box_roi_pool"},
    "retinanet": {"", "transform", "backbone.fpn", "anchor_generator"},
    "fcos": {"", "transform", "backbone.fpn", "anchor_generator"},
    "ssd": {"", "transform"},
}
SWAPPED["maskrcnn"] = SWAPPED["fasterrcnn"] | {"roi_heads.mask_roi_pool"}
SWAPPED["keypointrcnn"] = SWAPPED["fasterrcnn"] | {"roi_heads.keypoint_roi_pool"}
of_all_kinds = pytest.mark.parametrize("kind", KINDS)


def residual(model):
    """The names of the blocks and the frozen norms of a ResNet."""
    kinds = (resnet.BasicBlock, resnet.Bottleneck, torchvision.ops.FrozenBatchNorm2d)
    return {name for name, module in model.named_modules() if type(module) in kinds}


def build(name, **changes):
    return getattr(detection, name)(weights=None, weights_backbone=None, **BUILDERS[name], **changes)


def images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in ((60, 90), (64, 70))]


def targets(dtype=torch.float32):
    """Two objects in one image, none in the other."""
    _, (one, other) = small_detectors.training_batch(dtype)
    return [one, {key: each[:0] for key, each in other.items()}]


def pair(plain):
    """The calibrated detector and a copy with every part swapped, in evaluation."""
    calibrate(plain)
    fast = copy.deepcopy(plain)
    plain.eval(), fast.eval()  # each: a copy of a feature extractor forgets which of its graphs it runs
    report = fpn_fast.accelerate(fast)
    assert report.left == []
    return plain, fast, {entry.name for entry in report.swapped}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_part_of_a_builders_detector_is_swapped(name):
    with torch.device("meta"):
        model = build(name)
    (kind,) = [kind for kind in SWAPPED if name.startswith(kind)]
    expected = SWAPPED[kind] | residual(model)
    report = fpn_fast.accelerate(model)
    assert {entry.name for entry in report.swapped} == expected
    assert report.left == []


# VGG's convolutions of 300 pixels take half a minute: see test_default_boxes_of_ssd300.
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "ssd300_vgg16"])
def test_a_builders_detector_finds_the_same(name):
    torch.manual_seed(0)
    plain, fast, _ = pair(build(name, **NARROW_HEADS.get(name, dict)()).double())
    with torch.no_grad():
        check_detections(fast(images(torch.float64)), plain(images(torch.float64)))


@of_all_kinds
def test_the_same_losses_gradients_random_numbers_and_detections(kind):
    plain, fast, _ = pair(small_detectors.detector(kind))
    given = targets(torch.float64)
    if kind == "keypoint":
        given = small_detectors.training_batch()[1]  # torchvision needs some in each image
    small_detectors.check_same(fast, plain, (images(torch.float64), given))


@of_all_kinds
def test_in_float32_the_same_detections_of_one_image_and_of_two(kind):
    plain, fast, _ = pair(small_detectors.detector(kind).float())
    with torch.no_grad():
        check_detections(fast(images()), plain(images()))
        check_detections(fast(images()[:1]), plain(images()[:1]))


def gradients_of_outputs(model):
    """Per output the gradients of the image and of all parameters, for weights of the outputs that are random."""
    given = [each.requires_grad_() for each in images(torch.float64)]
    leaves = {str(n): each for n, each in enumerate(given)} | dict(model.named_parameters())
    found, grads = model(given), {}
    for key in found[0].keys() - {"labels"}:
        generator = torch.Generator().manual_seed(2)
        weights = [torch.rand(each[key].shape, generator=generator, dtype=each[key].dtype) for each in found]
        values = [each[key] for each in found]
        own = torch.autograd.grad(values, leaves.values(), weights, retain_graph=True, allow_unused=True)
        grads[key] = {name: grad for name, grad in zip(leaves, own, strict=True) if grad is not None}
    return found, grads


@of_all_kinds
def test_gradients_in_evaluation(kind):
    """Of every output, with respect to the images and all parameters.

    torchvision computes keypoints in float32: each is some roundings of a gradient, and some dozens are summed.
    """
    plain, fast, _ = pair(small_detectors.detector(kind))
    found, grads = gradients_of_outputs(fast)
    expected, expected_grads = gradients_of_outputs(plain)
    check_detections(found, expected)
    assert grads.keys() == expected_grads.keys()
    for key, wanted in expected_grads.items():
        assert grads[key].keys() == wanted.keys()
        assert "0" in wanted
        part = 64 * torch.finfo(torch.float32).eps if key == "keypoints" else 1e-10
        close = part * max(each.abs().max().item() for each in wanted.values())
        for leaf, grad in wanted.items():
            torch.testing.assert_close(grads[key][leaf], grad, rtol=0, atol=close, msg=f"{key} to {leaf}")
    with torch.no_grad():
        unrecorded = fast(images(torch.float64))
    for own, other in zip(unrecorded, found, strict=True):
        assert own.keys() == other.keys()
        for key, each in own.items():
            assert not each.requires_grad
            assert other[key].requires_grad == (key != "labels")
            torch.testing.assert_close(each, other[key].detach(), rtol=1e-10, atol=1e-10)


class Swin(nn.Module):
    """Swin through create_feature_extractor: its maps are [N, H, W, C]."""

    def __init__(self):
        super().__init__()
        nodes = {"features.1": "0", "features.3": "1", "features.5": "2", "features.7": "3"}
        self.body = create_feature_extractor(swin_t(weights=None), nodes)
        self.fpn = detection.backbone_utils.FeaturePyramidNetwork([96, 192, 384, 768], 64)
        self.out_channels = 64

    def forward(self, x):
        return self.fpn({name: each.permute(0, 3, 1, 2) for name, each in self.body(x).items()})


def efficientnet():
    return BackboneWithFPN(efficientnet_b0(weights=None).features, {"3": "0", "5": "1", "8": "2"}, [40, 112, 1280], 64)


@pytest.mark.parametrize("backbone", [efficientnet, Swin, small_detectors.residual_backbone])
def test_other_backbones(backbone):
    torch.manual_seed(0)
    model = backbone().eval()
    with torch.no_grad():
        levels = len(model(torch.rand(1, 3, 64, 64)))
    generator = AnchorGenerator(tuple((16 * 2**i,) for i in range(levels)), ((0.5, 1.0, 2.0),) * levels)
    pooler = detection.faster_rcnn.MultiScaleRoIAlign([str(i) for i in range(min(levels, 4))], 7, 2)
    parts = {"rpn_anchor_generator": generator, "box_roi_pool": pooler, "rpn_post_nms_top_n_test": 40}
    plain = detection.FasterRCNN(model, num_classes=5, **parts, **SMALL).double()
    swapped = SWAPPED["fasterrcnn"] | residual(plain)
    plain, fast, found = pair(plain)
    assert found == swapped
    with torch.no_grad():
        check_detections(fast(images(torch.float64)), plain(images(torch.float64)))


def test_default_boxes_of_ssd300():
    """Six maps, whose steps are given and whose boxes are of other numbers of ratios, behind a narrow backbone."""
    sizes, channels = (38, 19, 10, 5, 3, 1), [4] * 6

    class Maps(nn.Module):
        def forward(self, x):
            return {str(n): nn.functional.adaptive_avg_pool2d(x, n).repeat(1, 2, 1, 1)[:, :4] for n in sizes}

    ratios, scales = [[2], [2, 3], [2, 3], [2, 3], [2], [2]], [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    generator = DefaultBoxGenerator(ratios, scales=scales, steps=[8, 16, 32, 64, 100, 300])
    head = SSDHead(channels, generator.num_anchors_per_location(), 5)
    plain, fast, _ = pair(SSD(Maps(), generator, (300, 300), 5, head=head).double())
    with torch.no_grad():
        check_detections(fast(images(torch.float64)), plain(images(torch.float64)))


DENSE = ["retinanet", "fcos"]


@functools.cache
def accelerated(kind):
    _, model, _ = pair(small_detectors.detector(kind).float())
    return model


@pytest.mark.parametrize(("kind", "waits"), [("retinanet", 1), ("fcos", 1), ("faster", 2)])
def test_waits_for_the_lengths_of_its_lists_alone(kind, waits):
    """torchvision waits 20 times and more."""
    model = accelerated(kind)
    assert count(lambda: model(images())).syncs == {"tolist": waits}


@pytest.mark.parametrize("kind", DENSE)
def test_padded_form_is_the_lists_and_needs_no_device(kind):
    model = accelerated(kind)
    with torch.no_grad():
        batch, _ = model.transform(images())
        boxes, scores, labels, counts = model.detections(batch)
        lists = model(images())
    assert counts.tolist() == [len(each["boxes"]) for each in lists]
    for n, each in enumerate(lists):
        assert torch.equal(scores[n, : len(each["scores"])], each["scores"])
        assert torch.equal(labels[n, : len(each["labels"])], each["labels"])
        assert not boxes[n, len(each["boxes"]) :].any()
    outputs = {"cls_logits": 3, "bbox_regression": 4} | ({"bbox_ctrness": 1} if kind == "fcos" else {})
    sizes = [(12, 8), (6, 4), (3, 2), (2, 1), (1, 1)]
    anchors = len(model.anchor_generator.cell_numbers()[0])
    with FakeTensorMode(), torch.device("cuda"):
        features = [torch.empty(2, 16, *size) for size in sizes]
        total = anchors * sum(height * width for height, width in sizes)
        tables = {key: torch.empty(2, total, numbers) for key, numbers in outputs.items()}
        found = model.detections_of_head(ImageList(torch.empty(2, 3, 96, 64), [(96, 64)] * 2), features, tables)
    assert {each.device.type for each in found} == {"cuda"}


def test_targets_in_evaluation_are_checked_as_torchvision_does():
    model = accelerated("retinanet")
    bad = [{"boxes": torch.tensor([[5.0, 5.0, 2.0, 9.0]]), "labels": torch.tensor([1])}] * 2
    with pytest.raises(AssertionError, match="positive height and width"):
        model(images(), bad)


@pytest.mark.parametrize("kind", [*DENSE, "ssd", "faster"])
def test_coders_of_your_own_are_served_by_torchvisions_steps(kind):
    plain, fast, _ = pair(small_detectors.detector(kind))
    for model in (plain, fast):
        owner = model if hasattr(model, "box_coder") else model.roi_heads
        coder = type(owner.box_coder)
        owner.box_coder.__class__ = type("Mine", (coder,), {"decode": twice(coder), "decode_single": twice(BoxCoder)})
    with torch.no_grad():
        check_detections(fast(images(torch.float64)), plain(images(torch.float64)))


def twice(kind):
    """A decoder that moves boxes twice as far."""
    name = "decode" if kind is not BoxCoder else None

    def decode(self, codes, boxes):
        return getattr(kind, name or ("decode_single" if torch.is_tensor(boxes) else "decode"))(self, 2 * codes, boxes)

    return decode


def test_no_images_and_a_backbone_of_one_map():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 8, 1), nn.ReLU())
    body.out_channels = 16
    generator = AnchorGenerator(((16, 32),), ((1.0,),))
    plain, fast, _ = pair(detection.RetinaNet(body, 3, anchor_generator=generator, **SMALL).double())
    with torch.no_grad():
        check_detections(fast(images(torch.float64)), plain(images(torch.float64)))
    for model in (plain, fast):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            model([])


def test_under_autocast_scores_and_boxes_are_float32():
    """The head's maps are half, what is made of them is not: scores are told apart that torchvision rounds to one."""
    model = accelerated("retinanet")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images())
    for each in found:
        assert each["scores"].dtype == each["boxes"].dtype == torch.float32
        assert len(each["scores"]) > 3


def test_roi_heads_padded_form():
    """[N, R, ...] with counts, as a detector without lists has them."""
    model = accelerated("faster")
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 9, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 20], 2)
    logits, deltas = torch.randn(2, 9, 3, generator=generator), torch.randn(2, 9, 12, generator=generator)
    sizes, counts = [(64, 96), (64, 70)], [9, 4]
    rows = [[each[n, :count] for n, count in enumerate(counts)] for each in (logits, deltas, boxes)]
    lists = model.roi_heads.postprocess_detections(torch.cat(rows[0]), torch.cat(rows[1]), rows[2], sizes)
    padded = model.roi_heads.detections(logits, deltas, boxes, torch.tensor(counts), torch.tensor(sizes))
    with backends.use("reference"):
        plain = model.roi_heads.detections(logits, deltas, boxes, torch.tensor(counts), torch.tensor(sizes))
    assert all(torch.equal(a, b) for a, b in zip(padded, plain, strict=True))
    for n in range(2):
        count = int(padded[3][n])
        assert count > 3
        for own, whole in zip(lists, padded, strict=False):
            assert torch.equal(own[n], whole[n, :count])
