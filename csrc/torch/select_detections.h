// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of `select_detections` and `select_box_detections`, the same on every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../common/box_heads.h"
#include "../common/dense_heads.h"
#include "../common/detection_scores.h"
#include "../common/detections.h"
#include "../common/proposal_arguments.h"
#include "tensors.h"

namespace fpn_fast {

// Padded detections of a batch; what lies beyond the counts is for the kernel to zero.
struct Detections {
  Tensor boxes, scores, labels, counts;
};

inline Detections empty_detections(const Tensor& image_sizes, int64_t max_detections) {
  const ScalarType type = image_sizes.scalar_type();
  const int64_t batch = image_sizes.size(0);
  return {empty_like(image_sizes, {batch, max_detections, 4}, type),
          empty_like(image_sizes, {batch, max_detections}, type),
          empty_like(image_sizes, {batch, max_detections}, ScalarType::Long),
          empty_like(image_sizes, {batch}, ScalarType::Long)};
}

inline void check_dense_heads(const std::vector<Tensor>& logits, const std::vector<Tensor>& deltas,
                              const std::vector<Tensor>& centerness, const std::vector<double>& cell_anchors,
                              const std::vector<int64_t>& strides, const Tensor& image_sizes, int64_t pre_nms_top_n,
                              int64_t max_detections, const std::vector<double>& weights) {
  constexpr const char* kOp = "select_detections";
  check_maps(logits, kOp);
  check_maps(deltas, kOp);
  const Tensor& first = logits[0];
  const size_t levels = logits.size();
  STD_TORCH_CHECK(levels <= kMaxProposalLevels && deltas.size() == levels, kOp, " takes 1 to ", kMaxProposalLevels,
                  " maps of logits and as many of deltas");
  const int64_t anchors = static_cast<int64_t>(cell_anchors.size() / 4 / levels);
  STD_TORCH_CHECK(anchors > 0 && cell_anchors.size() == levels * 4 * anchors && first.size(1) % anchors == 0, kOp,
                  " takes logits [N, A * classes, H, W] and A cell anchors for each level");
  const auto check_like = [&](const std::vector<Tensor>& maps, int64_t channels, const char* name) {
    STD_TORCH_CHECK(
        maps.size() == levels && maps[0].scalar_type() == first.scalar_type() && on_device_of(maps[0], first), kOp,
        " takes ", name, " for each level, of the logits' type and device");
    for (size_t i = 0; i < levels; ++i) {
      STD_TORCH_CHECK(maps[i].size(0) == first.size(0) && maps[i].size(1) == channels &&
                          maps[i].size(2) == logits[i].size(2) && maps[i].size(3) == logits[i].size(3),
                      kOp, " takes ", name, " of ", channels, " channels and the logits' sizes");
    }
  };
  check_like(deltas, 4 * anchors, "deltas");
  if (!centerness.empty()) {
    check_maps(centerness, kOp);
    check_like(centerness, anchors, "centerness");
  }
  for (const Tensor& map : logits) {
    STD_TORCH_CHECK(map.size(1) * map.size(2) * map.size(3) <= INT32_MAX, kOp,
                    " takes at most 2^31 - 1 pairs of an anchor and a class of a level");
  }
  STD_TORCH_CHECK(strides.size() == 2 * levels, kOp, " takes strides along y and x for each level");
  const ScalarType type = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(image_sizes.dim() == 2 && image_sizes.size(0) == first.size(0) && image_sizes.size(1) == 2 &&
                      image_sizes.is_contiguous() && image_sizes.scalar_type() == type &&
                      on_device_of(image_sizes, first),
                  kOp, " takes contiguous image_sizes [N, 2], float64 for float64 maps and float32 otherwise");
  STD_TORCH_CHECK(pre_nms_top_n >= 0 && max_detections >= 0, kOp, " takes numbers of boxes of 0 or more");
  STD_TORCH_CHECK(weights.size() == 4, kOp, " takes four weights");
}

inline void check_box_heads(const Tensor& logits, const Tensor& deltas, const Tensor& boxes,
                            const std::optional<Tensor>& counts, const Tensor& image_sizes,
                            std::optional<int64_t> class_top_n, int64_t max_detections,
                            const std::vector<double>& weights) {
  constexpr const char* kOp = "select_box_detections";
  const ScalarType type = boxes.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp, " takes float32 or float64 boxes");
  const auto fits = [&](const Tensor& tensor) {
    return tensor.dim() == 3 && tensor.size(0) == boxes.size(0) && tensor.size(1) == boxes.size(1) &&
           tensor.is_contiguous() && tensor.scalar_type() == type && on_device_of(tensor, boxes);
  };
  STD_TORCH_CHECK(fits(boxes) && boxes.size(2) == 4, kOp, " takes contiguous boxes [N, R, 4]");
  STD_TORCH_CHECK(fits(logits) && logits.size(2) > 0, kOp, " takes contiguous logits [N, R, classes] as the boxes are");
  const int64_t classes = logits.size(2);
  STD_TORCH_CHECK(fits(deltas) && (deltas.size(2) == 4 || deltas.size(2) == 4 * classes), kOp,
                  " takes contiguous deltas [N, R, 4] or [N, R, 4 * classes] as the boxes are");
  STD_TORCH_CHECK(
      !counts.has_value() || (counts->dim() == 1 && counts->size(0) == boxes.size(0) && counts->is_contiguous() &&
                              counts->scalar_type() == ScalarType::Long && on_device_of(*counts, boxes)),
      kOp, " takes contiguous int64 counts [N] on the boxes' device");
  STD_TORCH_CHECK(boxes.size(1) * classes <= INT32_MAX, kOp, " takes at most 2^31 - 1 pairs of a box and a class");
  STD_TORCH_CHECK(image_sizes.dim() == 2 && image_sizes.size(0) == boxes.size(0) && image_sizes.size(1) == 2 &&
                      image_sizes.is_contiguous() && image_sizes.scalar_type() == type &&
                      on_device_of(image_sizes, boxes),
                  kOp, " takes contiguous image_sizes [N, 2] of the boxes' type and device");
  STD_TORCH_CHECK(class_top_n.value_or(0) >= 0 && max_detections >= 0, kOp, " takes numbers of boxes of 0 or more");
  STD_TORCH_CHECK(weights.size() == 4, kOp, " takes four weights");
}

template <class acc_t>
DetectionTables<acc_t> detection_tables(const Detections& detections) {
  return {static_cast<Box<acc_t>*>(detections.boxes.data_ptr()), static_cast<acc_t*>(detections.scores.data_ptr()),
          static_cast<int64_t*>(detections.labels.data_ptr()), static_cast<int64_t*>(detections.counts.data_ptr()),
          detections.scores.size(1)};
}

// torchvision's BoxCoder.
template <class acc_t>
BoxCoding<acc_t> plain_box_coding(const std::vector<double>& weights, double scale_clamp) {
  BoxCoding<acc_t> coding{};
  for (int i = 0; i < 4; ++i) coding.weight[i] = static_cast<acc_t>(weights[i]), coding.std[i] = 1;
  coding.scale_clamp = static_cast<acc_t>(scale_clamp);
  coding.center_clamp = std::numeric_limits<acc_t>::infinity();
  return coding;
}

// The call that has been checked.
template <class T, class acc_t = acc_type<T>>
DenseHeads<T> dense_heads(const std::vector<Tensor>& logits, const std::vector<Tensor>& deltas,
                          const std::vector<Tensor>& centerness, const std::vector<double>& cell_anchors,
                          const std::vector<int64_t>& strides, const Tensor& image_sizes, double score_thresh,
                          int64_t pre_nms_top_n, double nms_thresh, int64_t max_detections,
                          const std::vector<double>& weights, double scale_clamp, bool distances) {
  DenseHeads<T> heads{};
  heads.logits = to_feature_maps<const T>(logits), heads.deltas = to_feature_maps<const T>(deltas);
  heads.centerness = to_feature_maps<const T>(centerness);
  heads.image_sizes = static_cast<const acc_t*>(image_sizes.data_ptr());
  heads.anchors = static_cast<int64_t>(cell_anchors.size() / 4 / logits.size());
  heads.classes = logits[0].size(1) / heads.anchors;
  heads.pre_nms_top_n = pre_nms_top_n, heads.max_detections = max_detections, heads.nms_thresh = nms_thresh;
  const acc_t threshold = static_cast<acc_t>(score_thresh);
  heads.lowest = centerness.empty() ? lowest_passing_logit(threshold)
                                    : std::nextafter(threshold, std::numeric_limits<acc_t>::infinity());
  heads.coding = plain_box_coding<acc_t>(weights, scale_clamp), heads.distances = distances;
  for (size_t i = 0; i < cell_anchors.size(); i += 4) {
    heads.cells.push_back({static_cast<acc_t>(cell_anchors[i]), static_cast<acc_t>(cell_anchors[i + 1]),
                           static_cast<acc_t>(cell_anchors[i + 2]), static_cast<acc_t>(cell_anchors[i + 3])});
  }
  for (size_t i = 0; i < strides.size(); i += 2) {
    heads.stride_y.push_back(static_cast<acc_t>(strides[i]));
    heads.stride_x.push_back(static_cast<acc_t>(strides[i + 1]));
  }
  return heads;
}

// The same of `select_box_detections`.
template <class acc_t>
BoxHeads<acc_t> box_heads(const Tensor& logits, const Tensor& deltas, const Tensor& boxes,
                          const std::optional<Tensor>& counts, const Tensor& image_sizes, double min_size,
                          const std::vector<double>& weights, double scale_clamp) {
  BoxHeads<acc_t> heads{};
  heads.logits = static_cast<const acc_t*>(logits.data_ptr());
  heads.deltas = static_cast<const acc_t*>(deltas.data_ptr());
  heads.boxes = static_cast<const Box<acc_t>*>(boxes.data_ptr());
  heads.counts = optional_data<int64_t>(counts);
  heads.image_sizes = static_cast<const acc_t*>(image_sizes.data_ptr());
  heads.batch = boxes.size(0), heads.room = boxes.size(1), heads.classes = logits.size(2);
  heads.own_deltas = deltas.size(2) != 4;
  heads.min_size = static_cast<acc_t>(min_size), heads.coding = plain_box_coding<acc_t>(weights, scale_clamp);
  return heads;
}

}  // namespace fpn_fast
