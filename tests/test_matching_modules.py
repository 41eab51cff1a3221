# SPDX-License-Identifier: Apache-2.0
"""torchvision's matching and mask pasting inside its modules and models, against ours."""

import copy
import sys

import pytest
import torch
from helpers import small_detectors
from torch import nn
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou, generalized_box_iou

import fpn_fast
from fpn_fast import ops
from fpn_fast.nn import _matching


def boxes_of(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 90
    return torch.cat((low, low + 1 + torch.rand(count, 2, generator=generator) * 60), 1).to(dtype)


def rpn():
    return RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, {"training": 9, "testing": 9}, None, 0.7)


def roi_heads():
    return RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)


def fails_to_match(*arguments, **others):
    raise AssertionError("matched by the op")


TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("gt_type", "type"), TYPES)
def test_anchors_get_torchvisions_targets(gt_type, type):
    anchors = [boxes_of(900, seed).to(type) for seed in (1, 2, 3)]
    targets = [{"boxes": boxes_of(n, n).to(gt_type)} for n in (12, 1)] + [{"boxes": torch.zeros(0, 4)}]
    module = rpn()
    expected = module.assign_targets_to_anchors(anchors, targets)
    module.__class__ = fpn_fast.nn.RegionProposalNetwork
    actual = module.assign_targets_to_anchors(anchors, targets)
    for theirs, ours in zip(expected, actual, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert {-1.0, 0.0, 1.0} == set(torch.cat(actual[0]).tolist())


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.2, 0.6)])
@pytest.mark.parametrize(("gt_type", "type"), TYPES)
def test_proposals_get_torchvisions_targets(gt_type, type, low, high):
    proposals = [boxes_of(700, seed).to(type) for seed in (1, 2, 3)]
    gts = [boxes_of(n, n).to(gt_type) for n in (12, 1)] + [torch.zeros(0, 4)]
    labels = [torch.arange(1, 13, dtype=torch.int32), torch.tensor([3]), torch.zeros(0, dtype=torch.int64)]
    module = roi_heads()
    module.proposal_matcher = Matcher(high, low, allow_low_quality_matches=False)
    expected = module.assign_targets_to_proposals(proposals, gts, labels)
    module.__class__ = fpn_fast.nn.RoIHeads
    for theirs, ours in zip(expected, module.assign_targets_to_proposals(proposals, gts, labels), strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_other_matchers_and_similarities_stay_themselves(monkeypatch):
    monkeypatch.setattr(ops, "match_anchors", fails_to_match)
    gts, boxes = boxes_of(5, 1), boxes_of(200, 2)
    usual = Matcher(0.7, 0.3, True)
    for matcher, similarity in ((SSDMatcher(0.5), box_iou), (usual, generalized_box_iou)):
        actual = _matching.match_boxes(matcher, similarity, gts, boxes)
        assert torch.equal(actual, matcher(similarity(gts, boxes)))
    with pytest.raises(AssertionError, match="matched by the op"):
        _matching.match_boxes(usual, box_iou, gts, boxes)
    with pytest.raises(ValueError, match="No proposal boxes available"):
        _matching.match_boxes(usual, box_iou, gts, boxes[:0])


@pytest.mark.parametrize("gt_types", [(torch.float32,), (torch.float16,), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("type", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(12, 0, 1), (3, 5), (0, 0)], ids=str)
def test_all_images_get_torchvisions_matches_in_one_call(counts, type, gt_types):
    gts = [boxes_of(n, n).to(gt_types[i % len(gt_types)]) if n else torch.zeros(0) for i, n in enumerate(counts)]
    anchors, module = boxes_of(900, 1).to(type), rpn()
    matches, padded = _matching.match_images(module.proposal_matcher, module.box_similarity, gts, anchors)
    labels, matched = module.assign_targets_to_anchors([anchors] * len(gts), [{"boxes": each} for each in gts])
    assert torch.equal(_matching.labels_of(matches), torch.stack(labels))
    # Of torchvision's targets, all images' in one tensor.
    assert padded.dtype == torch.cat(matched).dtype
    for row, boxes, theirs in zip(matches, padded, matched, strict=True):
        positive = row >= 0
        assert torch.equal(boxes[row[positive]], theirs[positive].to(padded.dtype))


def heads_of(channels=8):
    torch.manual_seed(0)
    generator = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    numbers = {"training": 50, "testing": 50}
    # More anchors are sampled than are positive for one image, and fewer for another.
    plain = RegionProposalNetwork(generator, RPNHead(channels, 3), 0.7, 0.3, 24, 0.5, numbers, dict(numbers), 0.7)
    nn.init.normal_(plain.head.conv[0][0].weight, std=0.2)
    nn.init.normal_(plain.head.bbox_pred.weight, std=0.1)
    fast = copy.deepcopy(plain)
    fast.__class__ = fpn_fast.nn.RegionProposalNetwork
    return plain, fast


def inputs_of(counts, type=torch.float32, gt_type=torch.float32, channels=8):
    generator = torch.Generator().manual_seed(3)
    shape = (len(counts), channels)
    maps = {str(s): torch.randn(*shape, s, s + 3, generator=generator).to(type) for s in (16, 8)}
    images = ImageList(
        torch.zeros(len(counts), 3, 128, 152, dtype=type), [(128, 152 - 3 * i) for i, _ in enumerate(counts)]
    )
    return images, maps, [{"boxes": boxes_of(n, n, gt_type) if n else torch.zeros(0, 4)} for n in counts]


def trained(module, arguments):
    torch.manual_seed(7)
    _, losses = module.train()(*arguments)
    sum(losses.values()).backward()
    return losses, [p.grad for p in module.parameters()], torch.rand(5)


@pytest.mark.parametrize("gt_type", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("type", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(20, 0, 1), (2, 3), (0,), (0, 0)], ids=str)
def test_losses_and_gradients_are_torchvisions_bit_for_bit(counts, type, gt_type):
    """Of an RPN; with its random numbers, whose stream goes on as after torchvision's."""
    plain, fast = heads_of()
    (losses, grads, after), (fast_losses, fast_grads, fast_after) = (
        trained(module.to(type), inputs_of(counts, type, gt_type)) for module in (plain, fast)
    )
    assert losses.keys() == fast_losses.keys()
    assert all(torch.equal(losses[name], fast_losses[name]) for name in losses)
    assert all(torch.equal(a, b) for a, b in zip(grads, fast_grads, strict=True))
    assert torch.equal(after, fast_after)
    assert any(counts) == (losses["loss_rpn_box_reg"] > 0)


def test_boxes_are_encoded_for_the_sampled_positives_alone():
    rows, anchors = [], []

    def watch(frame, event, result):
        """Replaces nothing: torchvision's code would run for what is replaced."""
        if event == "return" and frame.f_code is BoxCoder.encode_single.__code__:
            rows.append(len(frame.f_locals["proposals"]))
        elif event == "return" and frame.f_code is AnchorGenerator.forward.__code__:
            anchors.append(result)

    _, fast = heads_of()
    sys.setprofile(watch)
    try:
        trained(fast, inputs_of((20, 0, 1)))
    finally:
        sys.setprofile(None)
    # 12 of an image are sampled as positives at most; no other anchors are made.
    assert anchors == []
    assert len(rows) == 1
    assert 0 < rows[0] <= 3 * 12


@pytest.mark.parametrize("name", ["compute_loss", "assign_targets_to_anchors"])
def test_a_step_of_your_own_is_taken(name):
    called = []

    def own(self, *arguments):
        called.append(name)
        return getattr(super(changed, self), name)(*arguments)

    changed = type("Changed", (fpn_fast.nn.RegionProposalNetwork,), {name: own})
    plain, fast = heads_of()
    fast.__class__ = changed
    losses = [trained(module, inputs_of((20, 2)))[0] for module in (plain, fast)]
    assert called == [name]
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])


def test_masks_and_keypoints_of_each_image():
    plain = GeneralizedRCNNTransform(64, 96, [0.5] * 3, [0.2] * 3).eval()
    fast = copy.deepcopy(plain)
    assert fpn_fast.accelerate(fast).swapped[0].note == "now fpn_fast.GeneralizedRCNNTransform"
    results = [
        {"boxes": boxes_of(n, n), "masks": torch.rand(n, 1, 28, 28), "keypoints": torch.rand(n, 5, 3) * 60}
        for n in (7, 0, 1)
    ]
    sizes = [(100, 160), (120, 90), (150, 150)], [(77, 120), (240, 181), (150, 150)]
    expected = plain.postprocess([dict(r) for r in results], *sizes)
    actual = fast.postprocess([dict(r) for r in results], *sizes)
    for theirs, ours in zip(expected, actual, strict=True):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert theirs[key].shape == ours[key].shape
            # Coordinates on the mask, up to 240 of 30 pixels, round; values are 0 to 1.
            torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-5 if key == "masks" else 0)
    in_training = [{"masks": results[0]["masks"]}]
    assert fast.train().postprocess(in_training, *sizes)[0]["masks"] is results[0]["masks"]
    assert repr(fast) == repr(plain)


@pytest.mark.parametrize("exact", [True, False], ids=["matching_and_pasting", "everything"])
def test_mask_rcnn_trains_and_detects_the_same(exact):
    """With an image that has no object; where only the matching and the pasting are ours, bit for bit."""
    plain = small_detectors.detector("mask")
    # A low threshold, so that random weights detect something.
    plain.roi_heads.score_thresh = 0.01
    fast = copy.deepcopy(plain)
    if exact:
        for module in (fast.transform, fast.roi_heads):
            module.__class__ = getattr(fpn_fast.nn, type(module).__name__)
    else:
        assert {"transform", "roi_heads"} <= {entry.name for entry in fpn_fast.accelerate(fast).swapped}
    images, targets = small_detectors.training_batch()
    targets[1] = {key: value[:0] for key, value in targets[1].items()}
    small_detectors.check_same(fast, plain, (images, targets), exact=exact)


def test_report_and_undoing():
    model = small_detectors.detector("mask")
    swapped = {entry.name: entry.module for entry in fpn_fast.accelerate(model).swapped}
    assert swapped["transform"] == "torchvision.GeneralizedRCNNTransform"
    assert swapped["roi_heads"] == "torchvision.RoIHeads"
    fpn_fast.restore(model)
    assert type(model.transform) is GeneralizedRCNNTransform
    assert type(model.roi_heads) is RoIHeads


class Given(nn.Module):
    """A pooler, head or predictor: what it was given, whatever it is asked."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *_):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def heads_with_keypoints(dtype, with_masks):
    """Of three images, with proposals in two, at which every class is a detection."""
    proposals = [boxes_of(n, n, torch.float64 if dtype == torch.float64 else torch.float32) for n in (5, 0, 3)]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 3, generator=generator, dtype=dtype) * 4
    outputs = Given(logits, torch.zeros(8, 12, dtype=dtype))
    module = RoIHeads(Given(None), Given(None), outputs, 0.5, 0.5, 512, 0.25, None, 0.0, 1.0, 100)
    maps = torch.nn.functional.avg_pool2d(torch.randn(16, 6, 56, 56, generator=generator, dtype=dtype), 5, 1, 2)
    module.keypoint_roi_pool, module.keypoint_head, module.keypoint_predictor = Given(None), Given(None), Given(maps)
    if with_masks:
        masks = torch.randn(16, 3, 28, 28, generator=generator, dtype=dtype)
        module.mask_roi_pool, module.mask_head, module.mask_predictor = Given(None), Given(None), Given(masks)
    return module.eval(), ({"0": maps}, proposals, [(200, 200)] * 3)


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keypoints_of_all_images_are_found_in_one_call(monkeypatch, dtype, with_masks):
    module, arguments = heads_with_keypoints(dtype, with_masks)
    expected, losses = module(*arguments)
    assert losses == {}
    module.__class__ = fpn_fast.nn.RoIHeads
    with_targets, _ = module(*arguments, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(),
                                           "keypoints": torch.zeros(0, 6, 3)}] * 3)  # fmt: skip
    calls = []
    found = ops.heatmaps_to_keypoints
    monkeypatch.setattr(ops, "heatmaps_to_keypoints", lambda *a: calls.append(len(a[1])) or found(*a))
    detections, losses = module(*arguments)
    assert losses == {}
    assert calls == [16]
    for theirs, ours, again in zip(expected, detections, with_targets, strict=True):
        assert list(theirs) == list(ours) == list(again)
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key])
    assert [len(each["keypoints"]) for each in detections] == [10, 0, 6]
