# SPDX-License-Identifier: Apache-2.0
"""torchvision's one-stage detectors, with everything after their heads in one call.

Needs torchvision: what goes in and out of these modules is torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos, retinanet, ssd
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast import backends, ops
from fpn_fast.nn import _matching
from fpn_fast.nn._focal_loss import classification_loss
from fpn_fast.nn._proposals import sizes_beside
from fpn_fast.nn.region_proposal import AnchorGenerator as FusedAnchorGenerator
from fpn_fast.nn.region_proposal import cell_numbers

__all__ = ["FCOS", "SSD", "RetinaNet"]

Padded = tuple[Tensor, Tensor, Tensor, Tensor]


def lists_of(padded: Padded) -> list[dict[str, Tensor]]:
    """Padded (boxes, scores, labels, counts) -> torchvision's dict for each image. Waits for a GPU once."""
    boxes, scores, labels, counts = padded
    return [
        {"boxes": boxes[n, :count], "scores": scores[n, :count], "labels": labels[n, :count]}
        for n, count in enumerate(counts.tolist())
    ]


def _as_maps(tables: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """[N, anchors of all levels, numbers] -> maps [N, anchors of a place * numbers, H_l, W_l], without a copy."""
    places = [each.shape[2] * each.shape[3] for each in features]
    per_place = tables.size(1) // sum(places)
    levels = tables.split([per_place * count for count in places], 1)
    return [
        level.reshape(len(level), *each.shape[2:], -1).permute(0, 3, 1, 2)
        for level, each in zip(levels, features, strict=True)
    ]


class _DenseDetector(nn.Module):
    """In evaluation, a detector without anchors in memory and with one wait for a GPU, whatever the batch."""

    # Attributes of both torchvision classes that this is mixed into.
    transform: Any
    backbone: Any
    anchor_generator: Any
    head: Any
    box_coder: Any
    score_thresh: float
    topk_candidates: int
    nms_thresh: float
    detections_per_img: int

    def _knows_coder(self) -> bool:
        raise NotImplementedError

    def _coding(self, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
        raise NotImplementedError

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """In training the dict of losses, otherwise for each image a dict of "boxes", "scores" and "labels"."""
        if self.training or targets is not None or not images or not self._is_usual(images[0]):
            return super().forward(images, targets)
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(images)
        found = lists_of(self.detections(batch))
        return self.transform.postprocess(found, batch.image_sizes, original_sizes)

    def detections(self, images: ImageList, *, max_detections: int | None = None) -> Padded:
        """The detections of transformed images with outputs of a fixed size, without a wait.

        Args:
            images: the padded images and their sizes, which may be a tensor [N, 2] (height, width).
            max_detections: of each image; None: ``detections_per_img``.

        Returns: (boxes [N, D, 4] in pixels of the transformed images, scores [N, D], labels [N, D], counts [N]), D =
            max_detections; zero after the last.
        """
        features = self.backbone(images.tensors)
        features = OrderedDict([("0", features)]) if isinstance(features, Tensor) else features
        maps = list(features.values())
        return self.detections_of_head(images, maps, self.head(maps), max_detections=max_detections)

    def detections_of_head(
        self,
        images: ImageList,
        features: Sequence[Tensor],
        outputs: dict[str, Tensor],
        *,
        max_detections: int | None = None,
    ) -> Padded:
        """:meth:`detections` of what the head gave for `features`: [N, H * W * A of all levels, numbers] by name."""
        height, width = images.tensors.shape[-2:]
        maps = {name: _as_maps(table, features) for name, table in outputs.items()}
        return ops.select_detections(
            maps["cls_logits"],
            maps["bbox_regression"],
            cell_numbers(self.anchor_generator),
            # torchvision's strides: quotients of the padded size.
            [(height // each.shape[2], width // each.shape[3]) for each in features],
            sizes_beside(features, images.image_sizes),
            score_thresh=self.score_thresh,
            pre_nms_top_n=self.topk_candidates,
            nms_thresh=self.nms_thresh,
            max_detections=self.detections_per_img if max_detections is None else max_detections,
            **self._coding(maps),
        )

    def _is_usual(self, image: Tensor) -> bool:
        """Whether anchors and their coding are the ones that the op knows, and it has a kernel for them."""
        return (
            type(self.anchor_generator) in (AnchorGenerator, FusedAnchorGenerator)
            and self._knows_coder()
            and backends.beats_torchvision(image, "select_detections")
        )


class RetinaNet(_DenseDetector, retinanet.RetinaNet):
    """Drop-in for torchvision's RetinaNet (Lin et al., 2017): everything after its head in one call.

    Same constructor, keys, losses and detections, by :func:`fpn_fast.ops.select_detections`; in training, anchors are
    matched without the matrix of all pairs, and the focal loss of float32 logits keeps one table instead of a dozen.
    Boxes and scores are float32 where the head is half precision. Scores that differ in rounding alone may be in
    another order, as may equal ones. The loss is not differentiable twice.

    An anchor generator or box coder of a class of your own may compute something else: detections are then
    torchvision's. So they are on a device that the op has no kernel for.

    Source: torchvision/models/detection/retinanet.py.
    """

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """The losses of the head's outputs [N, M, numbers] for anchors [M, 4] and ground truths of each image."""
        matches = []
        for own_anchors, target in zip(anchors, targets, strict=False):
            if target["boxes"].numel() == 0:
                matches.append(torch.full((len(own_anchors),), -1, dtype=torch.int64, device=own_anchors.device))
            else:
                matches.append(_matching.match_boxes(self.proposal_matcher, box_iou, target["boxes"], own_anchors))
        logits = head_outputs["cls_logits"]
        usual = self._knows_head() and backends.beats_torchvision(logits, "sigmoid_focal_loss")
        if not usual or logits.dtype not in (torch.float32, torch.float64) or len(matches) != len(logits):
            return self.head.compute_loss(targets, head_outputs, anchors, matches)
        labels = [target["labels"] for target in targets]
        return {
            "classification": classification_loss(logits, matches, labels),
            "bbox_regression": self.head.regression_head.compute_loss(targets, head_outputs, anchors, matches),
        }

    def _knows_head(self) -> bool:
        """Whether its losses are torchvision's."""
        return (
            type(self.head) is retinanet.RetinaNetHead
            and type(self.head.classification_head) is retinanet.RetinaNetClassificationHead
        )

    def _knows_coder(self) -> bool:
        return type(self.box_coder) is BoxCoder

    def _coding(self, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
        return {"weights": self.box_coder.weights, "scale_clamp": self.box_coder.bbox_xform_clip}


class FCOS(_DenseDetector, fcos.FCOS):
    """Drop-in for torchvision's FCOS (Tian et al., 2019): everything after its head in one call; see RetinaNet.

    Source: torchvision/models/detection/fcos.py.
    """

    def _knows_coder(self) -> bool:
        return type(self.box_coder) is BoxLinearCoder and self.box_coder.normalize_by_size

    def _coding(self, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
        return {"coder": "distances", "centerness": maps["bbox_ctrness"]}


class SSD(ssd.SSD):
    """Drop-in for torchvision's SSD (Liu et al., 2016): everything after its head in one call.

    Same constructor, keys, losses and detections, by :func:`fpn_fast.ops.select_box_detections`. A box coder of a class
    of your own may compute something else: detections are then torchvision's.

    Source: torchvision/models/detection/ssd.py.
    """

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """ "cls_logits" [N, M, classes] and "bbox_regression" [N, M, 4] -> torchvision's dict for each image."""
        logits = head_outputs["cls_logits"]
        if type(self.box_coder) is not BoxCoder or not backends.beats_torchvision(logits, "select_box_detections"):
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
        return lists_of(
            ops.select_box_detections(
                logits,
                head_outputs["bbox_regression"],
                torch.stack(image_anchors),
                None,
                sizes_beside([logits], image_shapes),
                score_thresh=self.score_thresh,
                nms_thresh=self.nms_thresh,
                max_detections=self.detections_per_img,
                class_top_n=self.topk_candidates,
                # torchvision filters no small boxes here.
                min_size=0.0,
                weights=self.box_coder.weights,
                scale_clamp=self.box_coder.bbox_xform_clip,
            )
        )
