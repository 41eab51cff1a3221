# SPDX-License-Identifier: Apache-2.0
"""torchvision's one-stage detectors with post-processing in one call. Needs torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos, retinanet, ssd
from torchvision.models.detection._utils import BoxLinearCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast import backends, ops
from fpn_fast._torch_private import assert_async
from fpn_fast.nn import _matching
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn._shared import sizes_beside
from fpn_fast.nn.region_proposal import ANCHORS, BOX_CODER, cell_numbers

__all__ = ["FCOS", "SSD", "RetinaNet"]

Padded = tuple[Tensor, Tensor, Tensor, Tensor]

LINEAR_CODER = Part(BoxLinearCoder)
_RETINANET_LOSS = Steps(retinanet.RetinaNet, replaced="compute_loss")
_HEAD_LOSS = Steps(retinanet.RetinaNetHead, "compute_loss")
_CLASSIFICATION_LOSS = Steps(retinanet.RetinaNetClassificationHead, "compute_loss")
_FCOS_LOSS = Steps(fcos.FCOS, replaced="compute_loss")
_FCOS_HEAD_LOSS = Steps(fcos.FCOSHead, "compute_loss")
_SSD_LOSS = Steps(ssd.SSD, replaced="compute_loss")
_SSD_DETECTIONS = Steps(ssd.SSD, replaced="postprocess_detections")


def named(padded: Padded) -> dict[str, Tensor]:
    return dict(zip(("boxes", "scores", "labels", "counts"), padded, strict=True))


def lists_of(detections: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Padded detections by name -> torchvision's dict per image. Synchronises with the host once."""
    counts = detections["counts"].tolist()
    names = [name for name in detections if name != "counts"]
    # A view would hold the memory of the whole padded batch.
    return [{name: detections[name][n, :count].clone() for name in names} for n, count in enumerate(counts)]


def _as_maps(tables: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """[N, anchors of all levels, K] -> one map [N, A * K, H_l, W_l] per level, without a copy."""
    places = [each.shape[2] * each.shape[3] for each in features]
    per_place = tables.size(1) // sum(places)
    levels = tables.split([per_place * count for count in places], 1)
    return [
        level.reshape(len(level), *each.shape[2:], -1).permute(0, 3, 1, 2)
        for level, each in zip(levels, features, strict=True)
    ]


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises RuntimeError unless labels are 0 to `classes` - 1; on a GPU it is an assertion of the device."""
    known = (labels == labels.clamp(0, classes - 1)).all()
    assert_async(known, f"labels must be classes, 0 to {classes - 1}; a ground truth has another one")


def classification_loss(logits: Tensor, matches: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The focal loss of all anchors, divided by each image's number of matched anchors and averaged over images.

    It is sync-free, and has one temporary of the logits' size instead of torchvision's twelve.

    Args:
        logits: [N, M, classes], float32 or float64.
        matches: per image [M] int64: the index of each anchor's ground truth, -1 for background, -2 for an ignored
            anchor.
        labels: per image [G_n] int64: the class of each ground truth.

    Returns:
        A scalar. It equals torchvision's ``RetinaNetClassificationHead.compute_loss`` up to rounding. It has no second
        derivative.

    Raises:
        IndexError: an anchor's ground truth has no label; on a GPU an assertion of the device.
        RuntimeError: a label is no class, also where torchvision counts a negative one from the end; on a GPU an
            assertion of the device.
    """
    matched = torch.stack(list(matches))
    positive = matched >= 0
    check_labels(torch.cat(list(labels)), logits.shape[-1])
    share = (positive.sum(1, keepdim=True).clamp(min=1) * len(matches)).to(logits.dtype).reciprocal()
    weights = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, 0, share)
    # Indexing needs a row also where an image has no ground truth.
    rows = [own if len(own) else own.new_zeros(1) for own in labels]
    classes = [own[match.clamp(min=0)] for own, match in zip(rows, matches, strict=True)]
    own_class = torch.where(positive, torch.stack(classes), -1)
    return ops.sigmoid_focal_loss(logits.flatten(0, 1), own_class.flatten(), weights.flatten())


class _DenseDetector(nn.Module):
    """A detector that computes anchors inside the kernel in evaluation, and synchronises with the host once a batch."""

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
    # Of a subclass: the steps that evaluation leaves out, whether the op supports its box coder, and the op's options
    # for it.
    _evaluation: Steps
    _knows_coder: Callable[[], bool]
    _coding: Callable[[dict[str, list[Tensor]]], dict[str, Any]]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Images [C, H, W], as a list or one tensor -> losses by name in training, otherwise per image a dict of
        "boxes", "scores" and "labels"."""
        theirs = self.training or targets is not None or len(images) == 0
        if theirs or backends.falls_back(self, images[0], "select_detections", known=self._knows_anchors()):
            return super().forward(images, targets)
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, _ = self.transform(images)
        found = lists_of(named(self.detections(batch)))
        return self.transform.postprocess(found, batch.image_sizes, original_sizes)

    def detections(self, images: ImageList, *, max_detections: int | None = None) -> Padded:
        """The detections of transformed images as padded tensors, without synchronising.

        Args:
            images: the padded images and their sizes, a list or a tensor [N, 2] of (height, width).
            max_detections: per image. Default: ``detections_per_img``.

        Returns:
            (boxes [N, D, 4] in pixels of the transformed images, scores [N, D], labels [N, D], counts [N]), with D =
            max_detections. Entries after an image's last detection are zero.
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
        """:meth:`detections` from the head's `outputs` for `features`: by name [N, anchors of all levels, K]."""
        height, width = images.tensors.shape[-2:]
        maps = {name: _as_maps(table, features) for name, table in outputs.items()}
        return ops.select_detections(
            maps["cls_logits"],
            maps["bbox_regression"],
            cell_numbers(self.anchor_generator),
            # torchvision's strides are quotients of the padded size.
            [(height // each.shape[2], width // each.shape[3]) for each in features],
            sizes_beside(features, images.image_sizes),
            score_thresh=self.score_thresh,
            pre_nms_top_n=self.topk_candidates,
            nms_thresh=self.nms_thresh,
            max_detections=self.detections_per_img if max_detections is None else max_detections,
            **self._coding(maps),
        )

    def _knows_anchors(self) -> bool:
        return self._evaluation.are_own(self) and ANCHORS.are_own(self.anchor_generator) and self._knows_coder()


class RetinaNet(_DenseDetector, retinanet.RetinaNet):
    """RetinaNet (Lin et al., 2017) with post-processing in one call: drop-in for torchvision's.

    Constructor, ``state_dict`` keys, losses and detections are torchvision's. In evaluation one call of
    :func:`fpn_fast.ops.select_detections` replaces everything after the head. In training
    :func:`fpn_fast.ops.match_anchors` needs no IoU matrix, and :func:`fpn_fast.ops.sigmoid_focal_loss` keeps one
    temporary of the logits' size instead of twelve.

    Note:
        Boxes and scores are float32 also for a half-precision head. Detections with equal scores may come in another
        order, as may scores that differ only by rounding. The loss has no second derivative. In evaluation boxes and
        scores have torchvision's gradients. Where these are recorded, torch's operators select the candidates, which
        takes several times as long as the kernel: without need of them, evaluate under ``torch.no_grad()``. With your
        own anchor generator, box coder or step, and on a device without a kernel, torchvision's code runs.

    Source: torchvision/models/detection/retinanet.py.
    """

    _evaluation = Steps(retinanet.RetinaNet, "postprocess_detections", "eager_outputs", replaced="forward")

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """The losses of the head's outputs [N, M, K], given anchors [M, 4] and ground truths per image.

        Raises ValueError unless an image has as many labels as boxes. Others: see :func:`classification_loss`.
        """
        if not _RETINANET_LOSS.are_own(self):
            return super().compute_loss(targets, head_outputs, anchors)
        matches = [
            _matching.match_boxes(self.proposal_matcher, box_iou, target["boxes"], own)
            for own, target in zip(anchors, targets, strict=False)
        ]
        logits = head_outputs["cls_logits"]
        known = type(self.head) is retinanet.RetinaNetHead and _HEAD_LOSS.are_own(self.head)
        known = known and type(self.head.classification_head) is retinanet.RetinaNetClassificationHead
        known = known and _CLASSIFICATION_LOSS.are_own(self.head.classification_head)
        if known:
            _matching.check_targets(targets, len(logits), "labels")
        known = known and logits.dtype in (torch.float32, torch.float64) and len(matches) == len(logits)
        if backends.falls_back(self, logits, "sigmoid_focal_loss", known=known):
            return self.head.compute_loss(targets, head_outputs, anchors, matches)
        labels = [target["labels"] for target in targets]
        return {
            "classification": classification_loss(logits, matches, labels),
            "bbox_regression": self.head.regression_head.compute_loss(targets, head_outputs, anchors, matches),
        }

    def _knows_coder(self) -> bool:
        return BOX_CODER.are_own(self.box_coder)

    def _coding(self, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
        return {"weights": self.box_coder.weights, "scale_clamp": self.box_coder.bbox_xform_clip}


class FCOS(_DenseDetector, fcos.FCOS):
    """FCOS (Tian et al., 2019) with post-processing in one call: drop-in for torchvision's. See :class:`RetinaNet`.

    Source: torchvision/models/detection/fcos.py.
    """

    _evaluation = Steps(fcos.FCOS, "postprocess_detections", "eager_outputs", replaced="forward")

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """torchvision's losses. Raises ValueError unless an image has as many labels as boxes."""
        if _FCOS_LOSS.are_own(self) and type(self.head) is fcos.FCOSHead and _FCOS_HEAD_LOSS.are_own(self.head):
            _matching.check_targets(targets, len(anchors), "labels")
        return super().compute_loss(targets, head_outputs, anchors, num_anchors_per_level)

    def _knows_coder(self) -> bool:
        return LINEAR_CODER.are_own(self.box_coder) and self.box_coder.normalize_by_size

    def _coding(self, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
        return {"coder": "distances", "centerness": maps["bbox_ctrness"]}


class SSD(ssd.SSD):
    """SSD (Liu et al., 2016) with post-processing in one call: drop-in for torchvision's.

    Constructor, ``state_dict`` keys, losses and detections are torchvision's. One call of
    :func:`fpn_fast.ops.select_box_detections` replaces everything after the head. With your own box coder or step, and
    on a device without a kernel, torchvision's code runs.

    Source: torchvision/models/detection/ssd.py.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """torchvision's losses. Raises ValueError unless an image has as many labels as boxes."""
        if _SSD_LOSS.are_own(self):
            _matching.check_targets(targets, len(anchors), "labels")
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """ "cls_logits" [N, M, classes] and "bbox_regression" [N, M, 4] -> torchvision's dict per image."""
        logits = head_outputs["cls_logits"]
        known = _SSD_DETECTIONS.are_own(self) and BOX_CODER.are_own(self.box_coder)
        if backends.falls_back(self, logits, "select_box_detections", known=known):
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
        sizes = sizes_beside([logits], image_shapes)
        return lists_of(named(self.detections_of_head(head_outputs, torch.stack(image_anchors), sizes)))

    def detections_of_head(
        self,
        head_outputs: dict[str, Tensor],
        default_boxes: Tensor,
        image_sizes: Tensor,
        *,
        max_detections: int | None = None,
    ) -> Padded:
        """:meth:`postprocess_detections` as padded tensors, without synchronising.

        Args:
            default_boxes: [N, M, 4] in pixels.
            image_sizes: [N, 2], (height, width) in pixels.
            max_detections: per image. Default: ``detections_per_img``.

        Returns:
            (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]), with D = max_detections. Entries after an
            image's last detection are zero.
        """
        return ops.select_box_detections(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            default_boxes,
            None,
            image_sizes,
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            max_detections=self.detections_per_img if max_detections is None else max_detections,
            class_top_n=self.topk_candidates,
            # torchvision keeps small boxes here.
            min_size=0.0,
            weights=self.box_coder.weights,
            scale_clamp=self.box_coder.bbox_xform_clip,
        )
