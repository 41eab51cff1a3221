# SPDX-License-Identifier: Apache-2.0
"""Ground truths that are wrong, in every detector: an error, or losses that say so, as in torchvision."""

import copy

import pytest
import torch
from helpers import small_detectors
from torchvision.models.detection import FCOS, KeypointRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import MultiScaleRoIAlign

import fpn_fast
from fpn_fast.nn.static_sampling import use_static_sampling

CLASSES = 4
SMALL = {"min_size": 64, "max_size": 96}


def dense(kind):
    ratios = (1.0,) if kind is FCOS else (0.5, 1.0, 2.0)
    options = {"anchor_generator": AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), (ratios,) * 5), **SMALL}
    if kind is FCOS:
        options["head"] = FCOSHead(16, 1, CLASSES, num_convs=0)
    return kind(small_detectors.backbone(), CLASSES, **options)


def ssd():
    anchors = DefaultBoxGenerator([[2]] * 5, steps=[4, 8, 16, 32, 64])
    head = SSDHead([16] * 5, anchors.num_anchors_per_location(), CLASSES)
    return SSD(small_detectors.backbone(), anchors, (64, 64), CLASSES, head=head)


def keypoints():
    heads = {"keypoint_head": KeypointRCNNHeads(16, (16,)), "keypoint_predictor": KeypointRCNNPredictor(16, 4)}
    pooler = MultiScaleRoIAlign(small_detectors.NAMES, 7, 2, canonical_scale=40)
    return KeypointRCNN(
        small_detectors.backbone(), 3, **SMALL, box_batch_size_per_image=16, box_roi_pool=pooler, **heads
    )


MODELS = {
    "faster": lambda: small_detectors.detector("faster"),
    "mask": lambda: small_detectors.detector("mask"),
    "keypoint": keypoints,
    "retinanet": lambda: dense(RetinaNet),
    "fcos": lambda: dense(FCOS),
    "ssd": ssd,
}
STATIC = {"static_faster": "faster", "static_mask": "mask"}
of_all = pytest.mark.parametrize("name", [*MODELS, *STATIC])


def accelerated(name):
    """torchvision's model and ours, in training."""
    torch.manual_seed(0)
    plain = MODELS[STATIC.get(name, name)]().double().train()
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    if name in STATIC:
        use_static_sampling(fast)
    return plain, fast


def batch(**changes):
    """Two images of two objects; `changes` of the first image's target."""
    images, targets = small_detectors.training_batch()
    for target in targets:
        target["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 4] * 2)
    targets[0].update(changes)
    return images, targets


def losses_of(model, images, targets):
    torch.manual_seed(3)
    return model(images, copy.deepcopy(targets))


TABLES = [(name, "labels") for name in (*MODELS, *STATIC)]
TABLES += [("mask", "masks"), ("static_mask", "masks"), ("keypoint", "keypoints")]


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_every_box_needs_a_row_of_every_table(name, table):
    _, fast = accelerated(name)
    rows = batch()[1][0][table]
    for wrong in (rows[:1], rows[:0], torch.cat([rows, rows[:1]])):
        with pytest.raises(ValueError, match=f"as many {table} as boxes, got {len(wrong)} and 2 for image 0"):
            losses_of(fast, *batch(**{table: wrong}))


@pytest.mark.parametrize("name", [name for name in (*MODELS, *STATIC) if name != "fcos"])
def test_an_image_without_boxes_may_have_a_label(name):
    """Nothing looks it up; torchvision's FCOS raises an error."""
    plain, fast = accelerated(name)
    given = batch(**{key: each[:0] for key, each in batch()[1][0].items()} | {"labels": torch.tensor([0])})
    for model in (plain, fast):
        assert all(loss.isfinite() for loss in losses_of(model, *given).values())


@of_all
def test_every_image_needs_a_target(name):
    _, fast = accelerated(name)
    images, targets = batch()
    with pytest.raises(ValueError, match="targets must be one for each of the 2 images, got 3"):
        losses_of(fast, images, [*targets, targets[0]])


@of_all
def test_labels_are_classes(name):
    """Of RetinaNet, whose kernel takes any other number for background; the others have torchvision's loss."""
    plain, fast = accelerated(name)
    classes = CLASSES if name in ("retinanet", "fcos", "ssd") else 3
    for label in (classes, 99):
        given = batch(labels=torch.tensor([1, label]))
        with pytest.raises(IndexError):
            losses_of(plain, *given)
        with pytest.raises(RuntimeError if name == "retinanet" else IndexError):
            losses_of(fast, *given)


def test_a_negative_label_is_no_class_of_a_retinanet():
    """torchvision counts it from the end: it trains another class."""
    plain, fast = accelerated("retinanet")
    given = batch(labels=torch.tensor([1, -1]))
    last = losses_of(plain, *batch(labels=torch.tensor([1, CLASSES - 1])))
    assert torch.equal(losses_of(plain, *given)["classification"], last["classification"])
    with pytest.raises(RuntimeError, match="labels must be classes, 0 to 3; a ground truth has another one"):
        losses_of(fast, *given)
