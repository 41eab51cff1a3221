// SPDX-License-Identifier: Apache-2.0
// `select_detections` and `select_box_detections` on every device: checks, arguments and outputs.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/box_heads.h"
#include "../common/dense_heads.h"
#include "../common/detection_scores.h"
#include "../common/detections.h"
#include "heads.h"

namespace fpn_fast {

struct Detections {
  Tensor boxes, scores, labels, counts;

  Detections(const Tensor& sizes, int64_t room)
      : boxes(empty_like(sizes, {sizes.size(0), room, 4}, sizes.scalar_type())),
        scores(empty_like(sizes, {sizes.size(0), room}, sizes.scalar_type())),
        labels(empty_like(sizes, {sizes.size(0), room}, ScalarType::Long)),
        counts(empty_like(sizes, {sizes.size(0)}, ScalarType::Long)) {}

  template <class acc_t>
  DetectionTables<acc_t> tables() const {
    return {data<Box<acc_t>>(boxes), data<acc_t>(scores), data<int64_t>(labels), data<int64_t>(counts), scores.size(1)};
  }
};

inline void check_weights(const std::vector<double>& weights, const char* op) {
  STD_TORCH_CHECK(weights.size() == 4, op, " takes four weights, got ", weights.size());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> select_detections(
    std::vector<Tensor> logits, std::vector<Tensor> deltas, std::optional<std::vector<Tensor>> centerness,
    std::vector<double> cell_anchors, std::vector<int64_t> strides, Tensor image_sizes, double score_thresh,
    int64_t pre_nms_top_n, double nms_thresh, int64_t max_detections, std::vector<double> weights, double scale_clamp,
    bool distances) {
  constexpr const char* kOp = "select_detections";
  check_head(logits, strides, image_sizes, {pre_nms_top_n, max_detections}, kOp);
  const size_t levels = logits.size();
  const int64_t anchors = static_cast<int64_t>(cell_anchors.size() / 4 / levels), channels = logits[0].size(1);
  STD_TORCH_CHECK(anchors > 0 && cell_anchors.size() == levels * 4 * anchors && channels % anchors == 0, kOp,
                  " takes logits [N, A * classes, H, W] and A cell anchors for each level, got ", channels,
                  " channels and ", cell_anchors.size() / 4, " cell anchors for ", levels, " levels");
  check_like(deltas, 4 * anchors, "deltas", logits, kOp);
  // None, and no empty list, which AOTInductor could not hand over.
  if (centerness) check_like(*centerness, anchors, "centerness", logits, kOp);
  check_weights(weights, kOp);
  const Detections detections(image_sizes, max_detections);
  dispatch_floating(logits[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    DenseHeads<T> heads{};
    heads.logits = to_feature_maps<const T>(logits);
    if (centerness) heads.centerness = to_feature_maps<const T>(*centerness);
    heads.cells = cell_boxes<acc_t>(cell_anchors);
    heads.head = head_decoding<T>(deltas, strides, image_sizes, plain_box_coding<acc_t>(weights, scale_clamp));
    heads.head.distances = distances;
    heads.classes = channels / anchors, heads.pre_nms_top_n = pre_nms_top_n;
    heads.max_detections = max_detections, heads.nms_thresh = nms_thresh;
    const acc_t threshold = static_cast<acc_t>(score_thresh);
    heads.lowest = centerness ? std::nextafter(threshold, std::numeric_limits<acc_t>::infinity())
                              : lowest_passing_logit(threshold);
    Device::run(heads, detections);
  });
  return {detections.boxes, detections.scores, detections.labels, detections.counts};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> select_box_detections(Tensor logits, Tensor deltas, Tensor boxes,
                                                                 std::optional<Tensor> counts, Tensor image_sizes,
                                                                 double score_thresh, double min_size,
                                                                 std::optional<int64_t> class_top_n, double nms_thresh,
                                                                 int64_t max_detections, std::vector<double> weights,
                                                                 double scale_clamp) {
  constexpr const char* kOp = "select_box_detections";
  const ScalarType type = boxes.scalar_type();
  STD_TORCH_CHECK(is_box_type(type), kOp, " takes float32 or float64 boxes");
  STD_TORCH_CHECK(matches(boxes, {-1, -1, 4}, type, boxes), kOp, " takes contiguous boxes [N, R, 4], got ",
                  shape_of(boxes));
  const int64_t batch = boxes.size(0), room = boxes.size(1);
  STD_TORCH_CHECK(matches(logits, {batch, room, -1}, type, boxes) && logits.size(2) > 0, kOp,
                  " takes contiguous logits [N, R, classes] of the boxes' type and device, got ", shape_of(logits),
                  " for boxes ", shape_of(boxes));
  const int64_t classes = logits.size(2);
  STD_TORCH_CHECK(
      matches(deltas, {batch, room, 4}, type, boxes) || matches(deltas, {batch, room, 4 * classes}, type, boxes), kOp,
      " takes contiguous deltas [N, R, 4] or [N, R, 4 * classes] of the boxes' type and device, got ", shape_of(deltas),
      " for logits ", shape_of(logits));
  check_counts(counts, "counts", boxes, kOp);
  STD_TORCH_CHECK(room * classes <= INT32_MAX, kOp,
                  " takes at most 2^31 - 1 pairs of a box and a class per image, got ", room * classes);
  check_image_sizes(image_sizes, boxes, kOp);
  STD_TORCH_CHECK(class_top_n.value_or(0) >= 0 && max_detections >= 0, kOp,
                  " takes numbers of boxes of 0 or more, got ", class_top_n.value_or(0), " and ", max_detections);
  check_weights(weights, kOp);
  const Detections detections(image_sizes, max_detections);
  dispatch_boxes(type, [&](auto tag) {
    using acc_t = typename decltype(tag)::type;
    BoxHeads<acc_t> heads{};
    heads.logits = data<const acc_t>(logits), heads.deltas = data<const acc_t>(deltas);
    heads.boxes = data<const Box<acc_t>>(boxes), heads.counts = optional_data<int64_t>(counts);
    heads.image_sizes = data<const acc_t>(image_sizes);
    heads.batch = batch, heads.room = room, heads.classes = classes, heads.own_deltas = deltas.size(2) != 4;
    heads.min_size = static_cast<acc_t>(min_size), heads.coding = plain_box_coding<acc_t>(weights, scale_clamp);
    Device::run(heads, static_cast<acc_t>(score_thresh), class_top_n, nms_thresh, detections);
  });
  return {detections.boxes, detections.scores, detections.labels, detections.counts};
}

}  // namespace fpn_fast
