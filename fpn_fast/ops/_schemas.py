# SPDX-License-Identifier: Apache-2.0
"""Schemas of the ops in the namespaces that Python defines; csrc/ops.cpp has the same for the compiled library."""

#: Losses per partial sum of sigmoid_focal_loss; csrc/common/sigmoid_focal_loss.h.
FOCAL_TILE = 4096
#: Positions per partial sum of frozen_batch_norm_sums; csrc/common/frozen_batch_norm.h.
NORM_PART = 2048
#: Rows per partial sum of resample_sums; csrc/common/fuse_maps.h.
SUM_ROWS = 16
#: The rules of frozen_batch_norm, in the order of csrc/common/frozen_batch_norm.h: NormRule.
NORM_RULES = ("torchvision", "detectron2", "batch_norm")

SCHEMAS = {
    "top_down": "(Tensor[] laterals, int mode, bool average) -> Tensor[]",
    "top_down_backward": (
        "(Tensor[] grads, SymInt coarse_height, SymInt coarse_width, int mode, bool average) -> Tensor[]"
    ),
    "multiscale_roi_align": (
        "(Tensor[] features, Tensor rois, Tensor? levels, SymInt pooled_height, SymInt pooled_width, float[] scales, "
        "float[] thresholds, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "multiscale_roi_align_backward": (
        "(Tensor grad, Tensor rois, Tensor? levels, SymInt batch, SymInt[] sizes, float[] scales, float[] thresholds, "
        "int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]"
    ),
    "multiscale_roi_align_max": (
        "(Tensor[] features, Tensor rois, Tensor? levels, SymInt pooled_height, SymInt pooled_width, float[] scales, "
        "float[] thresholds, int sampling_ratio, bool aligned) -> (Tensor, Tensor)"
    ),
    "multiscale_roi_align_max_backward": (
        "(Tensor grad, Tensor winners, Tensor rois, Tensor? levels, SymInt batch, SymInt[] sizes, float[] scales, "
        "float[] thresholds, int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]"
    ),
    "segmented_nms": (
        "(Tensor boxes, Tensor scores, Tensor? groups, Tensor? counts, float iou_threshold, SymInt max_output, "
        "int convention) -> (Tensor, Tensor)"
    ),
    "generate_proposals": (
        "(Tensor[] objectness, Tensor[] deltas, float[] cell_anchors, SymInt[] strides, Tensor image_sizes, "
        "SymInt pre_nms_top_n, SymInt post_nms_top_n, float nms_thresh, float score_thresh, float min_size, "
        "float[] weights, float[] means, float[] stds, float scale_clamp, bool symmetric_clamp, bool mean_center, "
        "float center_offset, float center_clamp, bool strict_size, bool logits_out, int convention) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "match_anchors": (
        "(Tensor gt_boxes, Tensor gt_counts, Tensor? anchors, Tensor? anchor_counts, float[] cell_anchors, "
        "int[] cells, SymInt[] sizes, SymInt[] strides, float offset, float high_threshold, float low_threshold, "
        "bool allow_low_quality_matches) -> (Tensor, Tensor)"
    ),
    "paste_masks": (
        "(Tensor masks, Tensor boxes, SymInt height, SymInt width, int padding, float? threshold) -> Tensor"
    ),
    "heatmaps_to_keypoints": "(Tensor heatmaps, Tensor boxes) -> (Tensor, Tensor)",
    "select_detections": (
        "(Tensor[] logits, Tensor[] deltas, Tensor[]? centerness, float[] cell_anchors, SymInt[] strides, "
        "Tensor image_sizes, float score_thresh, SymInt pre_nms_top_n, float nms_thresh, SymInt max_detections, "
        "float[] weights, float scale_clamp, bool distances) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "select_box_detections": (
        "(Tensor logits, Tensor deltas, Tensor boxes, Tensor? counts, Tensor image_sizes, float score_thresh, "
        "float min_size, SymInt? class_top_n, float nms_thresh, SymInt max_detections, float[] weights, "
        "float scale_clamp) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "sigmoid_focal_loss": (
        "(Tensor logits, Tensor labels, Tensor weights, float alpha, bool with_gradient) -> (Tensor, Tensor)"
    ),
    "frozen_batch_norm": (
        "(Tensor x, Tensor[] norm, float eps, Tensor? residual, Tensor[] residual_norm, bool relu, int rule, "
        "bool widen) -> Tensor"
    ),
    "frozen_batch_norm_backward": (
        "(Tensor grad, Tensor? y, Tensor[] norm, float eps, Tensor[] residual_norm, int rule, int x_type, "
        "int residual_type) -> (Tensor, Tensor)"
    ),
    "fuse_maps": (
        "(Tensor[] maps, SymInt height, SymInt width, int[] forms, Tensor? weights, bool fast, Tensor? gate, "
        "bool sequential, int divide, int activation) -> Tensor"
    ),
    "resize_cat": "(Tensor[] maps, SymInt height, SymInt width, int[] forms) -> Tensor",
    "resample_backward": (
        "(Tensor grad, SymInt[] channels, SymInt[] sizes, int[] forms, Tensor[] pooled, Tensor? coefficients, "
        "Tensor? gate) -> Tensor[]"
    ),
    "resample_sums": "(Tensor grad, Tensor[] maps, int[] forms) -> Tensor",
    "frozen_batch_norm_sums": "(Tensor grad, Tensor? y, Tensor x, Tensor mean) -> Tensor",
}
