# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors of few RoIs and narrow heads, for machines with few cores, and two of them compared."""

import copy

import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

NAMES = ["0", "1", "2", "3"]
KINDS = {"faster": FasterRCNN, "mask": MaskRCNN}


def backbone():
    widths, strides = (3, 8, 8, 8, 8), (4, 2, 2, 2)
    layers = [nn.Sequential(nn.Conv2d(widths[i], widths[i + 1], 3, strides[i], padding=1), nn.ReLU()) for i in range(4)]
    return BackboneWithFPN(nn.Sequential(*layers), dict(zip(NAMES, NAMES, strict=True)), [8] * 4, 16)


def detector(kind, **others):
    """In float64: rounding, some 1e-13 of the pooled features, cannot change a decision, and hides nothing else."""
    torch.manual_seed(0)
    options = {
        "min_size": 64, "max_size": 96, "rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40,
        "box_batch_size_per_image": 16, "box_detections_per_img": 10,
        # Boxes of images this small are of several levels.
        "box_roi_pool": torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=40),
        "box_head": TwoMLPHead(16 * 7 * 7, 32), "box_predictor": FastRCNNPredictor(32, 3),
    }  # fmt: skip
    if kind == "mask":
        options |= {"mask_head": MaskRCNNHeads(16, (16,), 1), "mask_predictor": MaskRCNNPredictor(16, 16, 3)}
    return KINDS[kind](backbone(), **(options | others)).double()


def training_batch(dtype=torch.float64):
    """Two images of other sizes, each with two objects."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(60, 90), (64, 70)]
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, 60.0, 50.0]], dtype=dtype)
    targets = []
    for size in sizes:
        masks = torch.zeros(2, *size, dtype=torch.uint8)
        masks[0, 5:45, 5:40] = masks[1, 10:50, 20:60] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    return images, targets


def losses_and_gradients(model, images, targets):
    model.zero_grad()
    torch.manual_seed(5)
    losses = model(images, copy.deepcopy(targets))
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(fast, plain, batch, *, exact=False):
    """Losses, gradients and detections; what comes after the poolers may enlarge an error a thousandfold, hardly more.

    exact: losses are the same bit for bit.
    """
    (losses, grads), (expected, expected_grads) = (losses_and_gradients(m.train(), *batch) for m in (fast, plain))
    assert losses.keys() == expected.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], expected[key], rtol=0 if exact else 1e-10, atol=0)
    assert grads.keys() == expected_grads.keys()
    # The bias of a softmax over a map has no gradient but rounding: one scale for all.
    scale = max(each.abs().max().item() for each in expected_grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=0, atol=1e-10 * scale, msg=key)
    with torch.no_grad():
        found, wanted = (model.eval()(batch[0]) for model in (fast, plain))
    assert sum(len(each["boxes"]) for each in wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            scale = b[key].abs().max().item() if b[key].is_floating_point() and b[key].numel() else 0
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-10 * scale, msg=key)
