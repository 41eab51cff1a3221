# SPDX-License-Identifier: Apache-2.0
"""The losses of fixed shapes against torchvision's, which select the foreground of each image."""

import functools
from unittest import mock

import pytest
import torch
from helpers import small_detectors
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast.nn.static_losses import fcos_losses, retinanet_losses, ssd_losses
from fpn_fast.nn.static_targets import StaticTargets
from fpn_fast.ops._schemas import FOCAL_TILE
from fpn_fast.testing.tolerances import assert_linear, assert_not_worse

KINDS = ["retinanet", "fcos", "ssd"]
CANVAS, ROOM = (96, 128), 6
#: Ground truths per image: some and none, all that there is room for and one, and no foreground at all.
COUNTS = [(3, 0), (ROOM, 1), (0, 0)]


@functools.cache
def setting(kind):
    """A model of torchvision, its anchors [M, 4] for the canvas, and how many each level has."""
    model = small_detectors.detector(kind).float().train()
    batch = torch.zeros(1, 3, *CANVAS)
    maps = list(model.backbone(batch).values())
    (anchors,) = model.anchor_generator(ImageList(batch, [CANVAS]), maps)
    return model, anchors, [each.shape[2] * each.shape[3] for each in maps]


def drawn(kind, counts, seed=0, dtype=torch.float64):
    """Outputs of the head, torchvision's targets, and the same padded with boxes that do not count."""
    anchors = setting(kind)[1]
    generator = torch.Generator().manual_seed(seed)
    rand = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    shape = len(counts), len(anchors)
    outputs = {"cls_logits": rand(*shape, 3) * 8 - 4, "bbox_regression": rand(*shape, 4) * 2 - 1}
    if kind == "fcos":
        outputs |= {"bbox_regression": rand(*shape, 4) * 3, "bbox_ctrness": rand(*shape, 1) * 4 - 2}
    corners = rand(len(counts), ROOM, 2) * torch.tensor(CANVAS[::-1]) * 0.6
    boxes = torch.cat([corners, corners + 6 + rand(len(counts), ROOM, 2) * 40], 2).float()
    labels = torch.randint(1, 3, (len(counts), ROOM), generator=generator)
    packed = StaticTargets(boxes, labels, torch.tensor(counts))
    return {name: each.to(dtype).requires_grad_() for name, each in outputs.items()}, lists(packed), packed


def lists(packed):
    rows = zip(packed.boxes, packed.labels, packed.counts.tolist(), strict=True)
    return [{"boxes": boxes[:count], "labels": labels[:count]} for boxes, labels, count in rows]


def ours(kind, outputs, packed):
    return static_losses(kind, *setting(kind), outputs, packed)


def static_losses(kind, model, anchors, places, outputs, packed):
    if kind == "fcos":
        return fcos_losses(outputs, anchors, packed, model, places)
    return (retinanet_losses if kind == "retinanet" else ssd_losses)(outputs, anchors, packed, model)


def theirs(kind, outputs, targets, dtype=torch.float32):
    """torchvision's losses, computed in `dtype`, with its matches of float32 boxes."""
    model, anchors, places = setting(kind)
    every = [anchors] * len(targets)
    if kind == "ssd":
        none, match = torch.full((len(anchors),), -1), model.proposal_matcher
        matches = [match(box_iou(own["boxes"], anchors)) if len(own["boxes"]) else none for own in targets]
    else:
        with mock.patch.object(model.head, "compute_loss", lambda *arguments: arguments[3]):
            matches = model.compute_loss(targets, {}, every, *([places] if kind == "fcos" else []))
    wide = [own | {"boxes": own["boxes"].to(dtype)} for own in targets]
    judge = model if kind == "ssd" else model.head
    return judge.compute_loss(wide, outputs, [each.to(dtype) for each in every], matches)


def gradients_of(losses, outputs):
    found = torch.autograd.grad(sum(losses.values()), list(outputs.values()), materialize_grads=True)
    return dict(zip(outputs, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_torchvisions(kind, dtype):
    """Against float64 no further off than torchvision. One loss may be a lucky one, so nine batches are judged."""
    losses, gradients = ([], [], []), ([], [], [])
    for seed, counts in enumerate(COUNTS * 3):
        outputs, targets, packed = drawn(kind, counts, seed, dtype)
        wide = {name: each.detach().double().requires_grad_() for name, each in outputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            both = [ours(kind, outputs, packed), theirs(kind, outputs, targets)]
        sides = [(each, outputs) for each in both] + [(theirs(kind, wide, targets, torch.float64), wide)]
        for i, (found, inputs) in enumerate(sides):
            assert found.keys() == both[0].keys()
            losses[i].append(found)
            gradients[i].append(gradients_of(found, inputs))
    assert {each.dtype for found in losses[0] for each in found.values()} == {torch.float32}
    for table in (losses, gradients):
        for name in table[0][0]:
            actual, plain, truth = (torch.stack([each[name].detach() for each in side]) for side in table)
            assert truth.abs().max() > 1e-3
            if name in ("classification", "cls_logits") and kind != "ssd":
                # The focal loss sums tiles in one order and torchvision in another: see helpers/focal_losses.py. A
                # share of the image's foreground is rounded, multiplied, and the result too.
                tiles = 1 if name == "cls_logits" else FOCAL_TILE + outputs["cls_logits"].numel() // FOCAL_TILE
                assert_linear(actual, truth, truth.abs(), terms=30 + tiles, roundings=3)
            else:
                assert_not_worse(actual, plain, truth, size=max(CANVAS))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind):
    """More of it, with numbers that are none."""
    outputs, _, packed = drawn(kind, (3, 0))
    losses = ours(kind, outputs, packed)
    more, real = torch.zeros(2, 3, dtype=torch.int64), packed.real()
    boxes = torch.cat([packed.boxes.where(real[..., None], torch.nan), torch.zeros(2, 3, 4)], 1)
    padded = StaticTargets(boxes, torch.cat([packed.labels.where(real, 0), more], 1), packed.counts)
    again = ours(kind, outputs, padded)
    assert all(torch.equal(again[name], losses[name]) for name in losses)
    pairs = zip(gradients_of(losses, outputs).values(), gradients_of(again, outputs).values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_ssd_matches_small_boxes_and_mines_what_there_is():
    """The last of equal ground truths gets the default box. Where most are positive, they count as negatives too."""
    outputs, _, packed = drawn("ssd", (3, ROOM))
    packed.boxes[0] = torch.tensor([40.0, 40.0, 42.0, 42.0])
    packed.labels[0, :3] = torch.tensor([1, 2, 1])
    model = setting("ssd")[0]
    for ratio in (model.neg_to_pos_ratio, 1e4):
        with mock.patch.object(model, "neg_to_pos_ratio", ratio):
            found, expected = ours("ssd", outputs, packed), theirs("ssd", outputs, lists(packed), torch.float64)
        # Anchors and boxes are float32 in ours.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_retinanet_has_other_box_losses():
    outputs, targets, packed = drawn("retinanet", (3, 2), dtype=torch.float32)
    head = setting("retinanet")[0].head.regression_head
    with mock.patch.object(head, "_loss_type", "smooth_l1"):
        found, expected = ours("retinanet", outputs, packed), theirs("retinanet", outputs, targets)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    with mock.patch.object(head, "_loss_type", "giou"), pytest.raises(ValueError, match="l1 or smooth_l1, got giou"):
        ours("retinanet", outputs, packed)
    packed.labels[0, 0] = 3
    with pytest.raises(RuntimeError, match="labels must be classes, 0 to 2"):
        ours("retinanet", outputs, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_never_waits(kind):
    """On fake CUDA tensors, of which no value can be asked."""
    outputs, _, packed = drawn(kind, (3, 0), dtype=torch.float32)
    model, anchors, places = setting(kind)
    with FakeTensorMode():
        like = lambda each: torch.empty(each.shape, dtype=each.dtype, device="cuda")  # noqa: E731
        targets = StaticTargets(*(like(each) for each in packed.named().values()))
        outputs = {name: like(each).requires_grad_() for name, each in outputs.items()}
        losses = static_losses(kind, model, like(anchors), places, outputs, targets)
    assert {(each.device.type, tuple(each.shape)) for each in losses.values()} == {("cuda", ())}


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_each_way_serves_all_targets(kind):
    graphs = []
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graphs.append("forward") or make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: graphs.append("backward") or make_boxed_func(graph.forward),
    )
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(static_losses, kind, *setting(kind)), fullgraph=True, backend=backend)
    for seed, counts in enumerate(COUNTS):
        outputs, _, packed = drawn(kind, counts, seed, torch.float32)
        losses, expected = compiled(outputs, packed), ours(kind, outputs, packed)
        torch.testing.assert_close(losses, expected, rtol=0, atol=0)
        pairs = [gradients_of(each, outputs) for each in (losses, expected)]
        torch.testing.assert_close(*pairs, rtol=0, atol=0)
    assert graphs == ["forward", "backward"]
