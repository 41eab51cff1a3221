# SPDX-License-Identifier: Apache-2.0
"""Ground truths that are wrong, in every detector: an error, or losses that say so, as in torchvision."""

import copy

import pytest
import torch
from helpers import small_detectors
from helpers.small_detectors import KINDS

import fpn_fast
from fpn_fast.nn import static_sampling
from fpn_fast.nn.static_sampling import use_static_sampling

NAN, INF = float("nan"), float("inf")
CLASSES = 3
STATIC = {"static_faster": "faster", "static_mask": "mask"}
of_all = pytest.mark.parametrize("name", [*KINDS, *STATIC])


def accelerated(name):
    """torchvision's model and ours, in training."""
    plain = small_detectors.detector(STATIC.get(name, name)).train()
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    if name in STATIC:
        use_static_sampling(fast)
    return plain, fast


def batch(**changes):
    """Two images of two objects; `changes` of the first image's target."""
    images, targets = small_detectors.training_batch()
    targets[0].update(changes)
    return images, targets


def losses_of(model, images, targets):
    torch.manual_seed(3)
    return model(images, copy.deepcopy(targets))


TABLES = [(name, "labels") for name in (*KINDS, *STATIC)]
TABLES += [("mask", "masks"), ("static_mask", "masks"), ("keypoint", "keypoints")]


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_every_box_needs_a_row_of_every_table(name, table):
    _, fast = accelerated(name)
    rows = batch()[1][0][table]
    for wrong in (rows[:1], rows[:0], torch.cat([rows, rows[:1]])):
        with pytest.raises(ValueError, match=f"as many {table} as boxes, got {len(wrong)} and 2 for image 0"):
            losses_of(fast, *batch(**{table: wrong}))


@pytest.mark.parametrize("name", [name for name in (*KINDS, *STATIC) if name != "fcos"])
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
    for label in (CLASSES, 99):
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
    with pytest.raises(RuntimeError, match="labels must be classes, 0 to 2; a ground truth has another one"):
        losses_of(fast, *given)


@of_all
@pytest.mark.parametrize(("row", "corner"), [(0, 0), (1, 3)])
def test_a_nan_among_the_ground_truths_is_passed_on(name, row, corner):
    plain, fast = accelerated(name)
    images, targets = batch()
    targets[0]["boxes"] = targets[0]["boxes"].clone()
    targets[0]["boxes"][row, corner] = NAN
    expected, found = (losses_of(model, images, targets) for model in (plain, fast))
    spoilt = {key for key, loss in expected.items() if loss.isnan()}
    assert spoilt
    assert {key for key, loss in found.items() if loss.isnan()} == spoilt


@of_all
@pytest.mark.parametrize(("row", "corner", "bad"), [(0, 2, INF), (1, 3, INF), (1, 0, -INF)])
def test_an_infinite_ground_truth_is_passed_on(name, row, corner, bad):
    """torchvision's RoI heads may crash. Its RetinaNet may train the wrong object, with a finite loss."""
    _, fast = accelerated(name)
    images, targets = batch()
    targets[0]["boxes"] = targets[0]["boxes"].clone()
    targets[0]["boxes"][row, corner] = bad
    found = losses_of(fast, images, targets)
    wrong = {key for key, loss in found.items() if not loss.isfinite()}
    # Of each stage with boxes.
    assert wrong >= {key for key in found if "box_reg" in key or key == "bbox_regression"}


def test_masks_are_not_pooled_from_infinite_boxes(monkeypatch):
    """With few proposals the ground truth is sampled, as background. torchvision's RoIAlign may not end on it."""
    model = small_detectors.detector("mask", rpn_post_nms_top_n_train=1).train()
    fpn_fast.accelerate(model)
    use_static_sampling(model)
    images, targets = batch(boxes=torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, INF, 50.0]], dtype=torch.float64))
    pooled, pool = [], static_sampling.roi_align
    monkeypatch.setattr(static_sampling, "roi_align", lambda *a: pooled.append(a[1]) or pool(*a))
    losses_of(model, images, targets)
    assert len(pooled) == 2
    assert all(rois.isfinite().all() for rois in pooled)
