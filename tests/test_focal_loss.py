# SPDX-License-Identifier: Apache-2.0
"""RetinaNet's classification loss against its head's in torchvision."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetClassificationHead
from torchvision.models.resnet import resnet18

from fpn_fast.nn import RetinaNet as FusedRetinaNet
from fpn_fast.nn.dense_detectors import classification_loss

CLASSES = 7


def inputs(counts, anchors=300, spread=4.0):
    """Logits of `anchors` for images of `counts` ground truths, matches of every kind, and classes."""
    logits = torch.randn(len(counts), anchors, CLASSES, dtype=torch.float64) * spread - 3
    labels = [torch.randint(CLASSES, (count,)) for count in counts]
    matches = [torch.randint(-2, count, (anchors,)) if count else torch.full((anchors,), -1) for count in counts]
    return logits, matches, labels


def of_torchvision(logits, matches, labels):
    head = RetinaNetClassificationHead(4, 1, CLASSES)
    return head.compute_loss([{"labels": each} for each in labels], {"cls_logits": logits}, matches)


@pytest.mark.parametrize("counts", [(5,), (3, 0, 9), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("anchors", [300, 2500, 0])
def test_is_torchvisions(counts, anchors):
    logits, matches, labels = inputs(counts, anchors)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        leaves = [logits.to(dtype).requires_grad_() for _ in range(2)]
        losses = [classification_loss(leaves[0], matches, labels), of_torchvision(leaves[1], matches, labels)]
        ours, theirs = (torch.autograd.grad(loss * 3, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True))
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)
        with torch.no_grad():
            assert torch.equal(classification_loss(leaves[0], matches, labels), losses[0])


def test_derivative():
    logits, matches, labels = inputs((2, 1), 6, 1.0)
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, matches, labels), logits.requires_grad_())
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(classification_loss(logits, matches, labels), logits, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_any_size(dtype):
    """Also where a sigmoid, or one minus it, is nothing."""
    _, matches, labels = inputs((4, 2), 400)
    logits = torch.linspace(-200, 200, 2 * 400 * CLASSES, dtype=torch.float64).view(2, 400, CLASSES)
    leaves = [each.requires_grad_() for each in (logits.to(dtype), logits.clone())]
    losses = [classification_loss(leaves[0], matches, labels), of_torchvision(leaves[1], matches, labels)]
    ours, theirs = (torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * 1e-4)


def test_waits_for_nothing():
    with FakeTensorMode():
        logits = torch.randn(2, 30, CLASSES, device="cuda", requires_grad=True)
        matches = [torch.zeros(30, dtype=torch.int64, device="cuda") for _ in range(2)]
        labels = [torch.zeros(count, dtype=torch.int64, device="cuda") for count in (3, 0)]
        assert classification_loss(logits, matches, labels).shape == ()


def retinanet() -> RetinaNet:
    backbone = torch.nn.Sequential(*list(resnet18(weights=None).children())[:-3])
    backbone.out_channels = 256
    anchors = AnchorGenerator(((24, 48),), ((0.5, 1.0),))
    return RetinaNet(backbone, CLASSES, min_size=96, max_size=128, anchor_generator=anchors).double()


class Halved(RetinaNetClassificationHead):
    def compute_loss(self, *arguments):
        return super().compute_loss(*arguments) / 2


@pytest.mark.parametrize("of_your_own", [False, True])
def test_a_model_trains_the_same(of_your_own):
    """Also with a head whose loss is another."""
    model = retinanet()
    if of_your_own:
        model.head.classification_head.__class__ = Halved
    fused = copy.deepcopy(model)
    fused.__class__ = FusedRetinaNet
    images = [torch.rand(3, 96, 128, dtype=torch.float64), torch.rand(3, 90, 100, dtype=torch.float64)]
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [30.0, 5.0, 90.0, 80.0]], dtype=torch.float64)
    targets = [
        {"boxes": boxes, "labels": torch.tensor([3, 1])},
        {"boxes": boxes[:0], "labels": torch.tensor([]).long()},
    ]
    losses = [each.train()(images, copy.deepcopy(targets)) for each in (model, fused)]
    for each in losses:
        sum(each.values()).backward()
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=1e-10, atol=0)
    theirs, ours = ([p.grad for p in each.parameters() if p.grad is not None] for each in (model, fused))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
