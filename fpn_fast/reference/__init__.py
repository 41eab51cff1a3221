# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every op in plain PyTorch."""

from fpn_fast.reference.frozen_batch_norm import (
    frozen_batch_norm,
    frozen_batch_norm_backward,
    frozen_batch_norm_sums,
)
from fpn_fast.reference.fuse_maps import FAST_EPS, fuse_maps
from fpn_fast.reference.generate_proposals import generate_proposals
from fpn_fast.reference.heatmaps_to_keypoints import heatmaps_to_keypoints
from fpn_fast.reference.match_anchors import grid_anchors, match_anchors
from fpn_fast.reference.multiscale_roi_align import assign_levels, multiscale_roi_align, multiscale_roi_align_backward
from fpn_fast.reference.multiscale_roi_align_max import multiscale_roi_align_max, multiscale_roi_align_max_backward
from fpn_fast.reference.nms import nms, segmented_nms
from fpn_fast.reference.paste_masks import paste_masks
from fpn_fast.reference.resize_cat import resize_cat
from fpn_fast.reference.select_detections import select_box_detections, select_detections
from fpn_fast.reference.sigmoid_focal_loss import sigmoid_focal_loss
from fpn_fast.reference.top_down import top_down, upsample_add

__all__ = [
    "FAST_EPS",
    "assign_levels",
    "frozen_batch_norm",
    "frozen_batch_norm_backward",
    "frozen_batch_norm_sums",
    "fuse_maps",
    "generate_proposals",
    "grid_anchors",
    "heatmaps_to_keypoints",
    "match_anchors",
    "multiscale_roi_align",
    "multiscale_roi_align_backward",
    "multiscale_roi_align_max",
    "multiscale_roi_align_max_backward",
    "nms",
    "paste_masks",
    "resize_cat",
    "segmented_nms",
    "select_box_detections",
    "select_detections",
    "sigmoid_focal_loss",
    "top_down",
    "upsample_add",
]
