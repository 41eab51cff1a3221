# SPDX-License-Identifier: Apache-2.0
"""The ops. Each file holds one op's contract; the chosen backend computes it."""

from fpn_fast.ops.frozen_batch_norm import frozen_batch_norm
from fpn_fast.ops.fuse_maps import fuse_maps
from fpn_fast.ops.generate_proposals import generate_proposals
from fpn_fast.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from fpn_fast.ops.levels import assign_levels
from fpn_fast.ops.match_anchors import AnchorGrid, match_anchors, pad_boxes
from fpn_fast.ops.multiscale_roi_align import multiscale_roi_align, roi_align
from fpn_fast.ops.nms import batched_nms, nms, segmented_nms
from fpn_fast.ops.paste_masks import paste_masks
from fpn_fast.ops.resize_cat import resize_cat
from fpn_fast.ops.select_box_detections import select_box_detections
from fpn_fast.ops.select_detections import select_detections
from fpn_fast.ops.sigmoid_focal_loss import sigmoid_focal_loss
from fpn_fast.ops.top_down import top_down, upsample_add

__all__ = [
    "AnchorGrid",
    "assign_levels",
    "batched_nms",
    "frozen_batch_norm",
    "fuse_maps",
    "generate_proposals",
    "heatmaps_to_keypoints",
    "match_anchors",
    "multiscale_roi_align",
    "nms",
    "pad_boxes",
    "paste_masks",
    "resize_cat",
    "roi_align",
    "segmented_nms",
    "select_box_detections",
    "select_detections",
    "sigmoid_focal_loss",
    "top_down",
    "upsample_add",
]
