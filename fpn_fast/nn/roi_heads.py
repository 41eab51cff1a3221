# SPDX-License-Identifier: Apache-2.0
"""torchvision's RoI heads and transform: matching of proposals, detections, keypoints and masks. Needs torchvision."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads, transform
from torchvision.ops import box_iou

from fpn_fast import backends, ops
from fpn_fast.nn import _matching
from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import sizes_beside
from fpn_fast.nn.dense_detectors import Padded, lists_of, named
from fpn_fast.nn.region_proposal import BOX_CODER

__all__ = ["GeneralizedRCNNTransform", "RoIHeads"]

_FORWARD = Steps(roi_heads.RoIHeads, replaced="forward")
_CHECKING = Steps(roi_heads.RoIHeads, replaced="check_targets")
_ASSIGNING = Steps(roi_heads.RoIHeads, replaced="assign_targets_to_proposals")
_DETECTIONS = Steps(roi_heads.RoIHeads, replaced="postprocess_detections")
_RESIZE = Steps(transform.GeneralizedRCNNTransform, replaced="resize")
_NORMALIZE = Steps(transform.GeneralizedRCNNTransform, replaced="normalize")
_POSTPROCESS = Steps(transform.GeneralizedRCNNTransform, replaced="postprocess")


class RoIHeads(roi_heads.RoIHeads):
    """Box, mask and keypoint heads: drop-in for torchvision's RoIHeads.

    Constructor, results and random numbers are torchvision's. One call of :func:`fpn_fast.ops.select_box_detections`
    selects the detections, one call of :func:`fpn_fast.ops.heatmaps_to_keypoints` finds the keypoints, and
    :func:`fpn_fast.ops.match_anchors` matches proposals without an IoU matrix. :meth:`forward` synchronises with the
    host once a batch, for the lengths of its lists. :meth:`detections` returns padded tensors and does not synchronise.

    Note:
        Boxes and scores are float32 also for a half-precision head. A ground truth that is not finite matches all
        finite proposals, so that the loss is not finite either. Where a gradient is recorded, detections have
        torchvision's; see :class:`fpn_fast.nn.RetinaNet`.

    Source: torchvision/models/detection/roi_heads.py.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Maps by name, boxes [R_n, 4] and (height, width) per image -> (detections, losses), like torchvision's."""
        theirs = self.training or targets is not None or not self.has_keypoint() or not _FORWARD.are_own(self)
        if theirs or backends.falls_back(self, features[next(iter(features))], "heatmaps_to_keypoints"):
            return super().forward(features, proposals, image_shapes, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        result = [
            {"boxes": each, "labels": label, "scores": score}
            for each, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if self.has_mask():
            mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            for prediction, masks in zip(result, roi_heads.maskrcnn_inference(mask_logits, labels), strict=True):
                prediction["masks"] = masks
        heatmaps = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes, image_shapes)))
        lengths = [len(each) for each in boxes]
        keypoints = [each.split(lengths) for each in ops.heatmaps_to_keypoints(heatmaps, torch.cat(boxes))]
        for prediction, points, heights in zip(result, *keypoints, strict=True):
            prediction["keypoints"], prediction["keypoints_scores"] = points, heights
        return result, {}

    def check_targets(self, targets: Any) -> None:
        """Raises ValueError unless targets have all tables that training needs, each with a row for each box."""
        super().check_targets(targets)
        if _CHECKING.are_own(self):
            names = ["labels", *["masks"] * self.has_mask(), *["keypoints"] * self.has_keypoint()]
            _matching.check_targets(targets, len(targets), *names)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image [M, 4], [G, 4] and [G] -> per image the ground truth and the label of each proposal, [M] int64.

        The ground truth is 0 for none. The label is 0 for background, -1 for proposals that the sampler ignores.
        """
        if not _ASSIGNING.are_own(self):
            return super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        indices, labels = [], []
        for boxes, gts, of_gts in zip(proposals, gt_boxes, gt_labels, strict=False):
            matches = _matching.match_boxes(self.proposal_matcher, box_iou, gts, boxes)
            indices.append(matches.clamp(min=0))
            # Without ground truths there is no label to look up.
            own = of_gts[indices[-1]].to(torch.int64) if gts.numel() else indices[-1]
            labels.append(torch.where(matches >= 0, own, matches + 1))
        return indices, labels

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """[R, classes], [R, 4 * classes] and proposals [R_n, 4] per image -> boxes, scores and labels per image."""
        known = _DETECTIONS.are_own(self) and BOX_CODER.are_own(self.box_coder)
        known = known and box_regression.shape[-1] == 4 * class_logits.shape[-1]
        if backends.falls_back(self, class_logits, "select_box_detections", known=known):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        lengths = [len(boxes) for boxes in proposals]
        logits, deltas = (pad_sequence(each.split(lengths), True) for each in (class_logits, box_regression))
        boxes, counts = ops.pad_boxes(proposals)
        lists = lists_of(named(self.detections(logits, deltas, boxes, counts, sizes_beside([boxes], image_shapes))))
        return [each["boxes"] for each in lists], [each["scores"] for each in lists], [each["labels"] for each in lists]

    def detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: Tensor,
        counts: Tensor,
        image_sizes: Tensor,
        *,
        max_detections: int | None = None,
    ) -> Padded:
        """The detections as padded tensors, without synchronising.

        Args:
            class_logits: [N, R, classes].
            box_regression: [N, R, 4 * classes].
            proposals: [N, R, 4] in pixels, padded.
            counts: [N] int64: proposals per image.
            image_sizes: [N, 2], (height, width) in pixels.
            max_detections: per image. Default: ``detections_per_img``.

        Returns:
            (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]), with D = max_detections. Entries after an
            image's last detection are zero.
        """
        return ops.select_box_detections(
            class_logits,
            box_regression,
            proposals,
            counts,
            image_sizes,
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            max_detections=self.detections_per_img if max_detections is None else max_detections,
            # A constant in torchvision too.
            min_size=1e-2,
            weights=self.box_coder.weights,
            scale_clamp=self.box_coder.bbox_xform_clip,
        )


class GeneralizedRCNNTransform(transform.GeneralizedRCNNTransform):
    """Normalisation, resizing and mask pasting: drop-in for torchvision's GeneralizedRCNNTransform.

    Constructor and results are torchvision's, masks up to rounding. One sync-free call of
    :func:`fpn_fast.ops.paste_masks` pastes all masks of an image; torchvision synchronises about 14 times a mask. Means
    and deviations go to the GPU without synchronising. Where a gradient is recorded, torch's operators paste the masks.

    Source: torchvision/models/detection/transform.py.
    """

    def normalize(self, image: Tensor) -> Tensor:
        """[C, H, W] with values in 0 to 1 -> (image - mean) / std. Raises TypeError for integers."""
        if not image.is_floating_point() or not _NORMALIZE.are_own(self):
            return super().normalize(image)  # which raises for integers
        # Made anew for each image: a kept tensor would be one of the mode, and the thread, of the call that made it.
        moments = torch.tensor([*self.image_mean, *self.image_std], dtype=image.dtype, device="cpu").view(-1, 1, 1)
        lengths = [len(self.image_mean), len(self.image_std)]
        mean, std = moments.to(image.device, non_blocking=True).split(lengths)
        return (image - mean) / std

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resizes an image [C, H, W], and changes the boxes, masks and keypoints of its target, without uploads."""
        if target is None or not _RESIZE.are_own(self) or backends.jit_traced():
            return super().resize(image, target)
        if self.training and self._skip_resize:
            return image, target
        side = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        resized, _ = transform._resize_image_and_masks(image, side, self.max_size, target, self.fixed_size)
        # torchvision uploads what it scales boxes and keypoints by.
        y, x = _scales(image.shape[-2:], resized.shape[-2:])
        target["boxes"] = torch.stack([each * (x, y)[i % 2] for i, each in enumerate(target["boxes"].unbind(1))], 1)
        if "keypoints" in target:
            columns, rows, visible = target["keypoints"].unbind(-1)
            target["keypoints"] = torch.stack([columns * x, rows * y, visible], -1)
        return resized, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scales detections, in place, from `image_shapes` to `original_image_sizes`, both (height, width) per image.

        "masks" [K, 1, M, M] become [K, 1, H, W].
        """
        if not _POSTPROCESS.are_own(self):
            return super().postprocess(result, image_shapes, original_image_sizes)
        if self.training:
            return result
        if backends.jit_traced():
            return super().postprocess(result, image_shapes, original_image_sizes)
        for prediction, size, original in zip(result, image_shapes, original_image_sizes, strict=False):
            y, x = _scales(size, original)
            boxes = torch.stack([each * (x, y)[i % 2] for i, each in enumerate(prediction["boxes"].unbind(1))], 1)
            prediction["boxes"] = boxes
            if "masks" in prediction:
                paste = ops.paste_masks
                if backends.falls_back(self, boxes, "paste_masks"):
                    paste = transform.paste_masks_in_image
                prediction["masks"] = paste(prediction["masks"], boxes, (int(original[0]), int(original[1])))
            if "keypoints" in prediction:
                columns, rows, visible = prediction["keypoints"].unbind(-1)
                prediction["keypoints"] = torch.stack([columns * x, rows * y, visible], -1)
        return result


def _scales(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[float, float]:
    """new / old of (height, width). torchvision divides in float32; for image sizes, rounding twice changes nothing."""
    y, x = (ctypes.c_float(b / a).value for a, b in zip(old, new, strict=True))
    return y, x
