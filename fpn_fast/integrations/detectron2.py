# SPDX-License-Identifier: Apache-2.0
"""The classes that accelerate() swaps in a detectron2 model, and names for its configurations. Imports detectron2.

They are subclasses of detectron2's own. :mod:`fpn_fast.nn.detectron2` has the modules that do not need detectron2.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from types import SimpleNamespace
from typing import Any

from detectron2 import layers
from detectron2.layers import ROIAlign
from detectron2.modeling import poolers
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BACKBONE_REGISTRY, fpn, resnet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, rpn
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional

from fpn_fast import backends
from fpn_fast._torch_private import has_forward_hooks
from fpn_fast.integrations import replacing
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn._shared import values_of
from fpn_fast.nn.detectron2 import DefaultAnchorGenerator as OwnAnchorGenerator
from fpn_fast.nn.detectron2 import find_top_rpn_proposals, proposals_of_images
from fpn_fast.nn.detectron2.fpn import FPNForward
from fpn_fast.nn.detectron2.poolers import PoolerForward
from fpn_fast.nn.frozen_batch_norm import fused_norm
from fpn_fast.nn.resnet import NORMS, FusedBlock, Parts, change, know, know_norm, may_fuse, run_block

_PROPOSALS = Steps(rpn.RPN, "predict_proposals", "_decode_proposals", replaced="forward")
_ANCHORS = Part(DefaultAnchorGenerator, fused=OwnAnchorGenerator)
_TRANSFORM = Part(Box2BoxTransform)
_NORM = Steps(layers.FrozenBatchNorm2d, replaced="forward")


class FPN(FPNForward, fpn.FPN):
    """detectron2's FPN with the merge by :func:`fpn_fast.ops.top_down`."""


class ROIPooler(PoolerForward, poolers.ROIPooler):
    """detectron2's ROIPooler by :func:`fpn_fast.ops.multiscale_roi_align`. Boxes stay float32."""

    strict = False
    level_poolers: nn.ModuleList

    @staticmethod
    def problem(module: Any) -> str | None:
        """Why `module`, of the class that this one replaces, has to stay unchanged; None where it can be swapped."""
        if any(type(pooler) is not ROIAlign for pooler in module.level_poolers):
            return f"its layers are {type(module.level_poolers[0]).__name__}, which has no fused implementation"
        if any(map(has_forward_hooks, module.level_poolers)):
            return "its layers have forward hooks, which the fused pooler would not call"
        if len(module.level_poolers) > 1 and module.output_size[0] != module.output_size[1]:
            return f"detectron2 makes its output_size {tuple(module.output_size)} square, the fused pooler does not"
        return None

    def _sampling(self) -> tuple[Sequence[float], int, bool]:
        first: Any = self.level_poolers[0]
        scales = [float(pooler.spatial_scale) for pooler in self.level_poolers]  # type: ignore[arg-type]
        return scales, first.sampling_ratio, first.aligned


class RPN(rpn.RPN):
    """detectron2's RPN with proposals by :func:`fpn_fast.ops.generate_proposals`. Only losses need anchors in memory.

    It runs detectron2's own code with an anchor generator, box transform or step of your own, and on a device without a
    kernel. detectron2 raises where a prediction is not finite; here training goes on without that prediction.
    """

    # (cell anchors, their values)
    _numbers: tuple[tuple[Tensor, ...], list[Any]] | None = None

    def forward(
        self, images: Any, features: dict[str, Tensor], gt_instances: list[Any] | None = None
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Images with image_sizes, maps by name and targets -> Instances per image and losses, like detectron2's."""
        maps = [features[name] for name in self.in_features]
        if backends.falls_back(self, maps[0], "generate_proposals", known=self._knows_anchors()):
            return super().forward(images, features, gt_instances)
        logits, deltas = self.rpn_head(maps)
        generator = self.anchor_generator
        padded = find_top_rpn_proposals(
            logits,
            deltas,
            SimpleNamespace(cell_anchors=self._cell_values(), strides=generator.strides, offset=generator.offset),
            images.image_sizes,
            pre_nms_topk=self.pre_nms_topk[self.training],
            post_nms_topk=self.post_nms_topk[self.training],
            nms_thresh=self.nms_thresh,
            min_box_size=self.min_box_size,
            box2box_weights=self.box2box_transform.weights,
            scale_clamp=self.box2box_transform.scale_clamp,
        )
        losses = self._losses(maps, logits, deltas, gt_instances) if self.training else {}
        # The last step synchronises, so the GPU computes the losses meanwhile.
        found = zip(images.image_sizes, proposals_of_images(*padded), strict=True)
        return [
            Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=scores) for size, (boxes, scores) in found
        ], losses

    def _losses(
        self, maps: list[Tensor], logits: list[Tensor], deltas: list[Tensor], gt_instances: list[Any] | None
    ) -> dict[str, Tensor]:
        if gt_instances is None:
            raise ValueError("gt_instances must have the boxes of each image in training, got None")
        anchors = self.anchor_generator(maps)
        labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
        # [N, H * W * A] and [N, H * W * A, 4]
        flat_logits = [map.permute(0, 2, 3, 1).flatten(1) for map in logits]
        flat_deltas = [map.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for map in deltas]
        return self.losses(anchors, flat_logits, labels, flat_deltas, boxes)

    def _cell_values(self) -> list[Any]:
        return values_of(self, list(self.anchor_generator.cell_anchors))

    def _knows_anchors(self) -> bool:
        own_parts = _ANCHORS.are_own(self.anchor_generator) and _TRANSFORM.are_own(self.box2box_transform)
        if not own_parts or not _PROPOSALS.are_own(self):
            return False
        return len({len(table) for table in self.anchor_generator.cell_anchors}) == 1


class FrozenBatchNorm2d(layers.FrozenBatchNorm2d):
    """detectron2's FrozenBatchNorm2d by :func:`fpn_fast.ops.frozen_batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] in the dtype of x."""
        y = fused_norm(self, x, _NORM)
        return super().forward(x) if y is None else y


know_norm(layers.FrozenBatchNorm2d, _NORM)
know_norm(FrozenBatchNorm2d, _NORM)
know(layers.Conv2d)


def _is_plain(conv: Any) -> bool:
    """Whether `conv` is detectron2's, with no more than a norm behind it."""
    return change(conv, (layers.Conv2d,)) is None and conv.activation is None


def _without_norm(conv: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class _Block(FusedBlock):
    # Of the class of detectron2, and the names of its convolutions.
    _steps: Steps
    _convs: tuple[str, ...]
    shortcut: Any

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H / stride, W / stride]."""
        convs = [getattr(self, name) for name in self._convs]
        norms = [getattr(conv, "norm", None) for conv in convs]
        if not may_fuse(self, x, self._steps, norms) or not all(map(_is_plain, convs)):
            return super().forward(x)  # type: ignore[misc]
        down: Any = self.shortcut
        down_norm = None
        if down is not None and _is_plain(down) and down.norm is not None:
            down, down_norm = _without_norm(down), down.norm
        return run_block(functional.relu_, x, [*map(_without_norm, convs)], norms, down, down_norm)


class BasicBlock(_Block, resnet.BasicBlock):
    """detectron2's BasicBlock with its norms fused; with live batch norm it runs detectron2's code."""

    _steps, _convs = Steps(resnet.BasicBlock, replaced="forward"), ("conv1", "conv2")


class BottleneckBlock(_Block, resnet.BottleneckBlock):
    """detectron2's BottleneckBlock with its norms fused; with live batch norm it runs detectron2's code."""

    _steps, _convs = Steps(resnet.BottleneckBlock, replaced="forward"), ("conv1", "conv2", "conv3")


for _base, _fused in ((resnet.BasicBlock, BasicBlock), (resnet.BottleneckBlock, BottleneckBlock)):
    _parts: dict[str, Container[type]] = {}
    for _name in _fused._convs:
        _parts[_name], _parts[f"{_name}.norm"] = (layers.Conv2d,), NORMS
    Parts(_base, _parts)

FUSED = replacing(FPN, ROIPooler, RPN, FrozenBatchNorm2d, BasicBlock, BottleneckBlock)


def build_fast_resnet_fpn_backbone(cfg: Any, input_shape: Any) -> FPN:
    """detectron2's build_resnet_fpn_backbone with the fused FPN."""
    backbone = fpn.build_resnet_fpn_backbone(cfg, input_shape)
    backbone.__class__ = FPN
    return backbone


def build_fast_retinanet_resnet_fpn_backbone(cfg: Any, input_shape: Any) -> FPN:
    """detectron2's build_retinanet_resnet_fpn_backbone with the fused FPN."""
    backbone = fpn.build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    backbone.__class__ = FPN
    return backbone


def build_fast_rpn(cfg: Any, input_shape: Any) -> RPN:
    """The fused RPN of a detectron2 configuration."""
    return RPN(cfg, input_shape)


def register() -> list[str]:
    """Registers the modules in detectron2, for MODEL.BACKBONE.NAME and MODEL.PROPOSAL_GENERATOR.NAME.

    A second call changes nothing. detectron2 has no registry of poolers; :func:`fpn_fast.accelerate` swaps those.

    Returns:
        The registered names.
    """
    registries = {
        build_fast_resnet_fpn_backbone: BACKBONE_REGISTRY,
        build_fast_retinanet_resnet_fpn_backbone: BACKBONE_REGISTRY,
        build_fast_rpn: PROPOSAL_GENERATOR_REGISTRY,
    }
    for builder, registry in registries.items():
        if builder.__name__ not in registry:
            registry.register(builder)
    return [builder.__name__ for builder in registries]
