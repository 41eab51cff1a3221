# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors of few RoIs and narrow heads, for machines with few cores, and two of them compared."""

import copy

import torch
import torchvision
from torch import nn
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

NAMES = ["0", "1", "2", "3"]
KINDS = {
    "faster": detection.FasterRCNN,
    "mask": detection.MaskRCNN,
    "keypoint": detection.KeypointRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
    "ssd": SSD,
}


def backbone():
    widths, strides = (3, 8, 8, 8, 8), (4, 2, 2, 2)
    layers = [nn.Sequential(nn.Conv2d(widths[i], widths[i + 1], 3, strides[i], padding=1), nn.ReLU()) for i in range(4)]
    return BackboneWithFPN(nn.Sequential(*layers), dict(zip(NAMES, NAMES, strict=True)), [8] * 4, 16)


def residual_backbone():
    """A ResNet of one block a stage, whose frozen norms have statistics of their own."""
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for vector in module.buffers():
                vector.uniform_(0.5, 1.5)
    return BackboneWithFPN(body, {f"layer{i + 1}": name for i, name in enumerate(NAMES)}, [64, 128, 256, 512], 16)


class TwoMaps(nn.Module):
    """A backbone of two maps without a pyramid."""

    out_channels = (8, 8)

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x).relu()
        return {"0": fine, "1": self.coarse(fine)}


def detector(kind, body=None, **others):
    """In float64: rounding, some 1e-13 of the pooled features, cannot change a decision, and hides nothing else."""
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 96}
    if kind == "ssd":
        generator = DefaultBoxGenerator([[2], [2]])
        head = SSDHead(TwoMaps.out_channels, generator.num_anchors_per_location(), 3)
        options = {"anchor_generator": generator, "size": (96, 96), "num_classes": 3, "head": head}
    elif kind in ("retinanet", "fcos"):
        ratios = (1.0,) if kind == "fcos" else (0.5, 1.0, 2.0)
        generator = AnchorGenerator(((8,), (16,), (24,), (32,), (48,)), (ratios,) * 5)
        options |= {"anchor_generator": generator, "num_classes": 3}
        if kind == "fcos":
            options["head"] = FCOSHead(16, 1, 3, num_convs=0)
    else:
        options |= {
            "rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40,
            "box_batch_size_per_image": 16, "box_detections_per_img": 10,
            # Boxes of images this small are of several levels.
            "box_roi_pool": torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=40),
            "box_head": TwoMLPHead(16 * 7 * 7, 32), "box_predictor": FastRCNNPredictor(32, 3),
        }  # fmt: skip
    if "box_head" not in options:
        options |= {"detections_per_img": 10, "topk_candidates": 40, "score_thresh": 0.0}
    if kind == "mask":
        options |= {"mask_head": MaskRCNNHeads(16, (16,), 1), "mask_predictor": MaskRCNNPredictor(16, 16, 3)}
    if kind == "keypoint":
        options |= {"keypoint_roi_pool": MultiScaleRoIAlign(NAMES, 7, 2), "keypoint_head": KeypointRCNNHeads(16, (16,)),
                    "keypoint_predictor": KeypointRCNNPredictor(16, 4)}  # fmt: skip
    body = body or (TwoMaps if kind == "ssd" else backbone)
    return KINDS[kind](body(), **(options | others)).double()


LAST_LAYERS = (
    *("cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score"),
    *("mask_fcn_logits", "kps_score_lowres", "module_list"),
)


def calibrate(model):
    """Features and outputs of a trained network's size: with random weights alone, all scores are nearly equal."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    scaled, hooks = set(), []

    def rescale(layer, _, output):
        if layer in scaled:
            return output
        scaled.add(layer)
        scale = 0.5 / output.std()
        layer.weight.mul_(scale)
        layer.bias.sub_(output.mean()).mul_(scale)
        return (output - output.mean()) * scale

    for name, layer in model.named_modules():
        if getattr(layer, "bias", None) is not None and any(part in name for part in LAST_LAYERS):
            hooks.append(layer.register_forward_hook(rescale))
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        if norms:
            model.backbone.train()(torch.rand(4, 3, 160, 160, dtype=dtype))
        model.eval()([torch.rand(3, 80, 80, dtype=dtype)] * 2)
    for hook in hooks:
        hook.remove()


def training_batch(dtype=torch.float64):
    """Two images of other sizes, each with two objects."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(60, 90), (64, 70)]
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, 60.0, 50.0]], dtype=dtype)
    points = torch.tensor([[[10.0, 10, 1], [20, 20, 1], [30, 30, 1], [15, 35, 0]]] * 2)
    targets = []
    for size in sizes:
        masks = torch.zeros(2, *size, dtype=torch.uint8)
        masks[0, 5:45, 5:40] = masks[1, 10:50, 20:60] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": points})
    return images, targets


def losses_and_gradients(model, images, targets):
    model.zero_grad()
    torch.manual_seed(5)
    losses = model(images, copy.deepcopy(targets))
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(fast, plain, batch, *, exact=False):
    """Losses, gradients, random numbers and detections; what comes after the poolers may enlarge an error a
    thousandfold, hardly more.

    exact: losses are the same bit for bit.
    """
    expected, expected_grads = losses_and_gradients(plain.train(), *batch)
    drawn = torch.rand(3)
    losses, grads = losses_and_gradients(fast.train(), *batch)
    assert torch.equal(torch.rand(3), drawn)
    assert losses.keys() == expected.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], expected[key], rtol=0 if exact else 1e-10, atol=0)
    assert grads.keys() == expected_grads.keys()
    # The bias of a softmax over a map has no gradient but rounding: one scale for all.
    scale = max(each.abs().max().item() for each in expected_grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=0, atol=1e-10 * scale, msg=key)
    with torch.no_grad():
        check_detections(fast.eval()(batch[0]), plain.eval()(batch[0]))


def check_detections(ours, theirs):
    """To rounding; what is float32 among the results of float64, as keypoints are, may differ in its last bits."""
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        assert len(other["boxes"]) > 3
        for key in other:
            close = 0.0
            if other[key].numel() and other[key].is_floating_point():
                # The pooler sums in another order, which what comes after it enlarges; a box moves by a part of a side.
                unit = 1e-10 if other[key].dtype == torch.float64 else 1e-5
                close = unit * max(1.0, other[key].abs().max().item())
            torch.testing.assert_close(own[key], other[key], rtol=0, atol=close, msg=key)
