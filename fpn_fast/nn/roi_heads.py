# SPDX-License-Identifier: Apache-2.0
"""What torchvision's second stage does beside its networks: matching of proposals, and pasting of masks."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection import roi_heads, transform

from fpn_fast import backends, ops
from fpn_fast.nn import _matching

__all__ = ["GeneralizedRCNNTransform", "RoIHeads"]


class RoIHeads(roi_heads.RoIHeads):
    """Drop-in for torchvision's RoIHeads: proposals are matched without the matrix of all pairs.

    Same constructor, results and random numbers; by :func:`fpn_fast.ops.match_anchors`. A ground truth with a NaN,
    which torchvision matches to everything, is matched to nothing.

    Source: torchvision/models/detection/roi_heads.py.
    """

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """[M, 4], [G, 4] and [G] of each image -> each proposal's ground truth and label, [M] int64 of each image."""
        return _matching.assign_targets_to_proposals(self.proposal_matcher, proposals, gt_boxes, gt_labels)


class GeneralizedRCNNTransform(transform.GeneralizedRCNNTransform):
    """Drop-in for torchvision's GeneralizedRCNNTransform: all masks of an image are pasted in one call.

    Same constructor and results, masks to rounding; by :func:`fpn_fast.ops.paste_masks`, which never waits for a GPU
    where torchvision does about 14 times a mask. Masks get no gradient here.

    Source: torchvision/models/detection/transform.py.
    """

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
        if not result or not backends.beats_torchvision(result[0]["boxes"], "paste_masks"):
            return super().postprocess(result, image_shapes, original_image_sizes)
        small = [prediction.pop("masks", None) for prediction in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for prediction, masks, size in zip(result, small, original_image_sizes, strict=False):
            if masks is not None:
                prediction["masks"] = ops.paste_masks(masks, prediction["boxes"], (int(size[0]), int(size[1])))
        return result
