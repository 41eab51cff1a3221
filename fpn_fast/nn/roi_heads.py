# SPDX-License-Identifier: Apache-2.0
"""What torchvision's second stage does beside its networks: matching of proposals, the choice of detections, and
pasting of masks."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads, transform
from torchvision.models.detection._utils import BoxCoder

from fpn_fast import backends, ops
from fpn_fast.nn import _matching
from fpn_fast.nn._proposals import sizes_beside
from fpn_fast.nn.dense_detectors import Padded, lists_of

__all__ = ["GeneralizedRCNNTransform", "RoIHeads"]


class RoIHeads(roi_heads.RoIHeads):
    """Drop-in for torchvision's RoIHeads: its last step is one call, keypoints are found in one more, and proposals are
    matched without the matrix of all pairs.

    Same constructor, results and random numbers; by :func:`fpn_fast.ops.select_box_detections`,
    :func:`fpn_fast.ops.heatmaps_to_keypoints` and :func:`fpn_fast.ops.match_anchors`. There is one wait for a GPU, for
    the lengths of the lists; :meth:`detections` has none. Boxes and scores are float32 where the head is half
    precision. A ground truth with a NaN, which torchvision matches to everything, is matched to nothing. Keypoints get
    no gradient here.

    Source: torchvision/models/detection/roi_heads.py.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Maps by name and boxes [R_n, 4] of each image, of size (H, W) -> its detections, or the losses in training.

        torchvision's own forward, but for detections with keypoints.
        """
        theirs = self.training or targets is not None or not self.has_keypoint()
        if theirs or not backends.beats_torchvision(features[next(iter(features))], "heatmaps_to_keypoints"):
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

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """[M, 4], [G, 4] and [G] of each image -> each proposal's ground truth and label, [M] int64 of each image."""
        return _matching.assign_targets_to_proposals(self.proposal_matcher, proposals, gt_boxes, gt_labels)

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """[R, classes], [R, 4 * classes] and proposals [R_n, 4] of each image -> its boxes, scores and labels."""
        usual = type(self.box_coder) is BoxCoder and box_regression.shape[-1] == 4 * class_logits.shape[-1]
        if not usual or not backends.beats_torchvision(class_logits, "select_box_detections"):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        lengths = [len(boxes) for boxes in proposals]
        logits, deltas = (pad_sequence(each.split(lengths), True) for each in (class_logits, box_regression))
        boxes, counts = ops.pad_boxes(proposals)
        found = self.detections(logits, deltas, boxes, counts, sizes_beside([boxes], image_shapes))
        lists = lists_of(found)
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
        """The detections with outputs of a fixed size, without a wait.

        Args:
            class_logits: [N, R, classes].
            box_regression: [N, R, 4 * classes].
            proposals: [N, R, 4], of which an image has its first counts[n].
            counts: [N] int64.
            image_sizes: [N, 2], (height, width).
            max_detections: of each image; None: ``detections_per_img``.

        Returns: (boxes [N, D, 4], scores [N, D], labels [N, D], counts [N]), D = max_detections; zero after the last.
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
            # torchvision's, a constant there too.
            min_size=1e-2,
            weights=self.box_coder.weights,
            scale_clamp=self.box_coder.bbox_xform_clip,
        )


class GeneralizedRCNNTransform(transform.GeneralizedRCNNTransform):
    """Drop-in for torchvision's GeneralizedRCNNTransform, which never waits for a GPU: all masks of an image are pasted
    in one call, and numbers are copied to the GPU once for all.

    Same constructor and results, masks to rounding; by :func:`fpn_fast.ops.paste_masks`, where torchvision waits about
    14 times a mask, beside six times an image for its numbers. Masks get no gradient here.

    Source: torchvision/models/detection/transform.py.
    """

    # (what they are made of, mean, std); absent in a module that was swapped in.
    _moments: tuple[Any, Tensor, Tensor] | None = None

    def normalize(self, image: Tensor) -> Tensor:
        """[C, H, W], of values in 0 to 1, -> the same less the mean, over the deviation; TypeError for integers."""
        if not image.is_floating_point():
            return super().normalize(image)  # which raises
        key = (tuple(self.image_mean), tuple(self.image_std), image.dtype, image.device)
        if self._moments is None or self._moments[0] != key:
            mean, std = (torch.tensor(each, dtype=image.dtype).to(image.device)[:, None, None] for each in key[:2])
            self._moments = (key, mean, std)
        return (image - self._moments[1]) / self._moments[2]

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, of size `image_shapes` (H, W), moved to that of `original_image_sizes`, in place.

        "masks" [K, 1, M, M] become [K, 1, H, W].
        """
        if self.training:
            return result
        for prediction, size, original in zip(result, image_shapes, original_image_sizes, strict=False):
            y, x = (_float32_quotient(new, old) for new, old in zip(original, size, strict=True))
            boxes = torch.stack([each * (x, y)[i % 2] for i, each in enumerate(prediction["boxes"].unbind(1))], 1)
            prediction["boxes"] = boxes
            if "masks" in prediction:
                prediction["masks"] = self._pasted(prediction["masks"], boxes, (int(original[0]), int(original[1])))
            if "keypoints" in prediction:
                columns, rows, visible = prediction["keypoints"].unbind(-1)
                prediction["keypoints"] = torch.stack([columns * x, rows * y, visible], -1)
        return result

    def _pasted(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        if backends.beats_torchvision(boxes, "paste_masks"):
            return ops.paste_masks(masks, boxes, size)
        return transform.paste_masks_in_image(masks, boxes, size)


def _float32_quotient(a: int, b: int) -> float:
    """As torchvision's tensors have it: of sizes, a float64 quotient has bits enough to be rounded again."""
    return ctypes.c_float(a / b).value
