# SPDX-License-Identifier: Apache-2.0
"""As much of detectron2 as its integration touches, stated plainly: there is no package of it to install.

Names, attributes and steps are detectron2's; its backbone is any, its losses only depend on the same numbers.
"""

import math
import sys
from abc import ABCMeta, abstractmethod
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from helpers import plain_proposals

ShapeSpec = namedtuple("ShapeSpec", ["channels", "stride", "height", "width"], defaults=[None, None])


class Registry(dict):
    def register(self, thing):
        assert thing.__name__ not in self
        self[thing.__name__] = thing


ANCHOR_GENERATOR_REGISTRY, BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY = Registry(), Registry(), Registry()


class Backbone(nn.Module, metaclass=ABCMeta):
    @abstractmethod
    def forward(self):
        pass


def build_backbone(cfg, input_shape=None):
    backbone = BACKBONE_REGISTRY[cfg.MODEL.BACKBONE.NAME](cfg, input_shape)
    assert isinstance(backbone, Backbone)
    return backbone


def build_anchor_generator(cfg, input_shape):
    return ANCHOR_GENERATOR_REGISTRY[cfg.MODEL.ANCHOR_GENERATOR.NAME](cfg, input_shape)


def pyramid(fpn, x):
    """detectron2's FPN.forward, with the layers and settings of `fpn`."""
    maps = fpn.bottom_up(x)
    merged = fpn.lateral_convs[0](maps[fpn.in_features[-1]])
    results = [fpn.output_convs[0](merged)]
    for i in range(1, len(fpn.in_features)):
        top = F.interpolate(merged, scale_factor=2.0, mode="nearest")
        merged = fpn.lateral_convs[i](maps[fpn.in_features[-1 - i]]) + top
        if fpn._fuse_type == "avg":
            merged = merged / 2
        results.insert(0, fpn.output_convs[i](merged))
    if fpn.top_block is not None:
        name = fpn.top_block.in_feature
        results += fpn.top_block(maps[name] if name in maps else results[fpn._out_features.index(name)])
    return dict(zip(fpn._out_features, results, strict=True))


def _filled(*convolutions):
    for convolution in convolutions:
        nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(convolution.bias)
    return convolutions


class LastLevelP6P7(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.num_levels, self.in_feature = 2, "res5"
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        _filled(self.p6, self.p7)

    def forward(self, c5):
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


class LastLevelMaxPool(nn.Module):
    num_levels, in_feature = 1, "p5"

    def forward(self, x):
        return [x[:, :, ::2, ::2]]


class FPN(Backbone):
    def __init__(self, bottom_up, in_features, out_channels, norm="", top_block=None, fuse_type="sum", square_pad=0):
        super().__init__()
        assert norm == ""
        shapes = bottom_up.output_shape()
        laterals, outputs = [], []
        for name in in_features:
            lateral, output = _filled(
                nn.Conv2d(shapes[name].channels, out_channels, 1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
            )
            stage = int(math.log2(shapes[name].stride))
            self.add_module(f"fpn_lateral{stage}", lateral)
            self.add_module(f"fpn_output{stage}", output)
            laterals.append(lateral)
            outputs.append(output)
        self.lateral_convs, self.output_convs = laterals[::-1], outputs[::-1]
        self.top_block, self.in_features, self.bottom_up = top_block, tuple(in_features), bottom_up
        extra = top_block.num_levels if top_block else 0
        first = stage - len(in_features) + 1
        self._out_feature_strides = {f"p{s}": 2**s for s in range(first, stage + 1 + extra)}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility, self._square_pad, self._fuse_type = 2**stage, square_pad, fuse_type

    padding_constraints = property(lambda self: {"square_size": self._square_pad})

    def output_shape(self):
        return {name: ShapeSpec(self._out_feature_channels[name], s) for name, s in self._out_feature_strides.items()}

    def forward(self, x):
        return pyramid(self, x)


class ROIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, x, rois):
        options = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        return torchvision.ops.roi_align(x, rois.to(x.dtype), *options)


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class Conv2d(nn.Conv2d):
    """A convolution with a norm and an activation after it."""

    def __init__(self, *arguments, norm=None, activation=None, **options):
        super().__init__(*arguments, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        for step in (super().forward, self.norm, self.activation):
            x = x if step is None else step(x)
        return x


class ResidualBlock(nn.Module):
    """What both blocks do: ReLU between convolutions, and after the residual is added."""

    def __init__(self, widths, sizes, stride, norm):
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], sizes, strict=True)
        for i, (before, after, size) in enumerate(pairs, start=1):
            conv = Conv2d(before, after, size, stride if size == 3 else 1, size // 2, bias=False, norm=norm(after))
            self.add_module(f"conv{i}", conv)
            stride = 1 if size == 3 else stride
        same = widths[0] == widths[-1]
        stride = self.conv1.stride[0] * self.conv2.stride[0]
        self.shortcut = None if same else Conv2d(widths[0], widths[-1], 1, stride, bias=False, norm=norm(widths[-1]))
        self.names = [f"conv{i}" for i in range(1, len(sizes) + 1)]

    def forward(self, x):
        out = x
        for name in self.names[:-1]:
            out = F.relu_(getattr(self, name)(out))
        out = getattr(self, self.names[-1])(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(ResidualBlock):
    def __init__(self, in_channels, out_channels, *, stride=1, norm=FrozenBatchNorm2d):
        super().__init__((in_channels, out_channels, out_channels), (3, 3), stride, norm)

    def forward(self, x):
        return super().forward(x)


class BottleneckBlock(ResidualBlock):
    def __init__(self, in_channels, out_channels, *, bottleneck_channels, stride=1, norm=FrozenBatchNorm2d):
        widths = (in_channels, bottleneck_channels, bottleneck_channels, out_channels)
        super().__init__(widths, (1, 3, 1), stride, norm)

    def forward(self, x):
        return super().forward(x)


class RoIPool(torchvision.ops.RoIPool):
    pass


class ROIPooler(nn.Module):
    def __init__(self, output_size, scales, sampling_ratio, pooler_type, canonical_box_size=224, canonical_level=4):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else output_size
        if pooler_type == "ROIPool":
            layers = [RoIPool(self.output_size, scale) for scale in scales]
        else:
            aligned = pooler_type == "ROIAlignV2"
            layers = [ROIAlign(self.output_size, scale, sampling_ratio, aligned) for scale in scales]
        self.level_poolers = nn.ModuleList(layers)
        self.min_level, self.max_level = int(-math.log2(scales[0])), int(-math.log2(scales[-1]))
        self.canonical_box_size, self.canonical_level = canonical_box_size, canonical_level

    def forward(self, x, box_lists):
        boxes = torch.cat([each.tensor for each in box_lists])
        image = torch.cat([torch.full((len(each.tensor), 1), float(i)) for i, each in enumerate(box_lists)])
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        levels = torch.floor(self.canonical_level + torch.log2(sides / self.canonical_box_size + 1e-8))
        levels = levels.clamp(self.min_level, self.max_level) - self.min_level
        pooled = x[0].new_zeros(len(boxes), x[0].size(1), self.output_size[0], self.output_size[0])
        for level, (map, layer) in enumerate(zip(x, self.level_poolers, strict=True)):
            chosen = (levels == level).nonzero().flatten()
            pooled = pooled.index_put((chosen,), layer(map, torch.cat([image, boxes], 1)[chosen]))
        return pooled


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def cat(cls, boxes_list):
        assert all(isinstance(box, Boxes) for box in boxes_list)
        return cls(torch.cat([box.tensor for box in boxes_list]))


class Instances:
    def __init__(self, image_size, **fields):
        self.image_size = image_size
        self.__dict__.update(fields)


class DefaultAnchorGenerator(nn.Module):
    def __init__(self, sizes, strides, offset=0.0):
        super().__init__()
        self.strides, self.offset = strides, offset
        self.cell_anchors = [
            torch.tensor([(-s / 2, -s * r / 2, s / 2, s * r / 2) for s in of_map for r in (0.5, 1.0, 2.0)])
            for of_map in sizes
        ]

    def forward(self, maps):
        pairs = zip(maps, self.cell_anchors, self.strides, strict=True)
        return [Boxes(plain_proposals.grid(t, map.shape[-2:], (s, s), self.offset)) for map, t, s in pairs]


class Box2BoxTransform:
    def __init__(self, weights=(1.0, 1.0, 1.0, 1.0)):
        self.weights, self.scale_clamp = weights, math.log(1000.0 / 16)

    def apply_deltas(self, deltas, anchors):
        sides = anchors[:, 2:] - anchors[:, :2]
        deltas = deltas / torch.tensor(self.weights)
        centres = deltas[:, :2] * sides + anchors[:, :2] + 0.5 * sides
        half = 0.5 * torch.exp(deltas[:, 2:].clamp(max=self.scale_clamp)) * sides
        return torch.cat([centres - half, centres + half], 1)


class RPNHead(nn.Module):
    def __init__(self, channels, anchors):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * anchors, 1)

    def forward(self, maps):
        hidden = [F.relu(self.conv(map)) for map in maps]
        return [self.objectness_logits(map) for map in hidden], [self.anchor_deltas(map) for map in hidden]


class RPN(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.in_features = ["p2", "p3", "p4", "p5"]
        self.rpn_head = RPNHead(cfg.channels, 6)
        self.anchor_generator = DefaultAnchorGenerator([[12 * 2**i, 20 * 2**i] for i in range(4)], [4, 8, 16, 32])
        self.box2box_transform = Box2BoxTransform()
        self.pre_nms_topk, self.post_nms_topk = {True: 150, False: 100}, {True: 120, False: 80}
        self.nms_thresh, self.min_box_size = 0.7, 0.0

    def label_and_sample_anchors(self, anchors, gt_instances):
        """Every anchor is its own ground truth's, which are enough to see that both get the same anchors."""
        boxes = Boxes.cat(anchors).tensor
        return [boxes[:, 0] > gt[:, 0].mean() for gt in gt_instances], [boxes for _ in gt_instances]

    def losses(self, anchors, logits, labels, deltas, boxes):
        logits, deltas = torch.cat(logits, 1), torch.cat(deltas, 1)
        decoded = [self.box2box_transform.apply_deltas(d, torch.cat([a.tensor for a in anchors])) for d in deltas]
        pairs = zip(decoded, boxes, strict=True)
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(logits, torch.stack(labels).to(logits.dtype)),
            "loss_rpn_loc": sum(F.smooth_l1_loss(found, wanted) for found, wanted in pairs),
        }

    def predict_proposals(self, anchors, logits, deltas, image_sizes):
        found = plain_proposals.propose(
            logits, deltas, [each.tensor for each in anchors], image_sizes,
            lambda priors, codes: self.box2box_transform.apply_deltas(codes, priors),
            pre=self.pre_nms_topk[self.training], post=self.post_nms_topk[self.training], thresh=self.nms_thresh,
            least=self.min_box_size, convention="torchvision",
        )  # fmt: skip
        return [
            Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=scores)
            for size, (boxes, scores) in zip(image_sizes, found, strict=True)
        ]

    def forward(self, images, features, gt_instances=None):
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        losses = {}
        if self.training:
            labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
            flat = [map.permute(0, 2, 3, 1).flatten(1) for map in logits]
            rows = [map.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for map in deltas]
            losses = self.losses(anchors, flat, labels, rows, boxes)
        with torch.no_grad():
            return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses


class Config:
    """A cfg, as far as the builders here look at it."""

    channels = 32


class Detector(nn.Module):
    """Backbone, proposals and pooled features: -> (Instances, pooled, losses)."""

    def __init__(self, backbone, output_size=5, pooler_type="ROIAlignV2"):
        super().__init__()
        self.backbone = FPN(backbone, ["res2", "res3", "res4", "res5"], Config.channels)
        self.proposal_generator = RPN(Config(), None)
        self.pooler = ROIPooler(output_size, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, pooler_type)
        for layer in (
            self.proposal_generator.rpn_head.objectness_logits,
            self.proposal_generator.rpn_head.anchor_deltas,
        ):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, x, image_sizes, gt_instances=None):
        features = self.backbone(x)
        found, losses = self.proposal_generator(SimpleNamespace(image_sizes=image_sizes), features, gt_instances)
        return found, self.pooler(list(features.values()), [each.proposal_boxes for each in found]), losses


#: Makes the backbone below a pyramid.
bottom_up_of = None


def build_resnet_fpn_backbone(cfg, input_shape):
    return FPN(bottom_up_of(), ["res2", "res3", "res4", "res5"], cfg.channels, top_block=LastLevelMaxPool())


def build_retinanet_resnet_fpn_backbone(cfg, input_shape):
    bottom_up = bottom_up_of()
    channels = bottom_up.output_shape()["res5"].channels
    names = ["res2", "res3", "res4", "res5"]
    return FPN(bottom_up, names, cfg.channels, top_block=LastLevelP6P7(channels, cfg.channels))


#: Where each name is in detectron2.
_PLACES = {
    "detectron2": [],
    "detectron2.layers": [Conv2d, FrozenBatchNorm2d, ROIAlign],
    "detectron2.modeling": [],
    "detectron2.modeling.anchor_generator": [DefaultAnchorGenerator, build_anchor_generator],
    "detectron2.modeling.backbone": [Backbone, build_backbone],
    "detectron2.modeling.backbone.fpn": [FPN, build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone],
    "detectron2.modeling.backbone.resnet": [BasicBlock, BottleneckBlock],
    "detectron2.modeling.box_regression": [Box2BoxTransform],
    "detectron2.modeling.poolers": [ROIPooler],
    "detectron2.modeling.proposal_generator": [],
    "detectron2.modeling.proposal_generator.rpn": [RPN],
    "detectron2.structures": [Boxes, Instances],
}


def install(monkeypatch):
    """Makes `import detectron2` find all this until the test is over."""
    ANCHOR_GENERATOR_REGISTRY.clear()
    BACKBONE_REGISTRY.clear()
    PROPOSAL_GENERATOR_REGISTRY.clear()
    for place, things in _PLACES.items():
        module = ModuleType(place)
        for thing in things:
            setattr(module, thing.__name__, thing)
            if isinstance(thing, type):
                monkeypatch.setattr(thing, "__module__", place)
        monkeypatch.setitem(sys.modules, place, module)
        parent, _, name = place.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
    sys.modules["detectron2.modeling.anchor_generator"].ANCHOR_GENERATOR_REGISTRY = ANCHOR_GENERATOR_REGISTRY
    sys.modules["detectron2.modeling.backbone"].BACKBONE_REGISTRY = BACKBONE_REGISTRY
    sys.modules["detectron2.modeling.proposal_generator"].PROPOSAL_GENERATOR_REGISTRY = PROPOSAL_GENERATOR_REGISTRY
