// SPDX-License-Identifier: Apache-2.0
// A call of `select_detections`.
#pragma once

#include <cstdint>
#include <vector>

#include "anchors.h"
#include "boxes.h"
#include "feature_map.h"
#include "scalar.h"

namespace fpn_fast {

template <class T>
struct DenseHeads {
  using acc_t = acc_type<T>;

  std::vector<FeatureMap<const T>> logits, deltas, centerness;
  std::vector<Box<acc_t>> cells;  // of each level, `anchors` of them
  std::vector<acc_t> stride_y, stride_x;
  const acc_t* image_sizes;  // [N, 2], height and width
  int64_t anchors, classes;
  int64_t pre_nms_top_n, max_detections;
  acc_t lowest;  // logit, or with centerness score, that passes the threshold
  BoxCoding<acc_t> coding;
  bool distances;  // not deltas
  double nms_thresh;

  int64_t levels() const { return static_cast<int64_t>(logits.size()); }
  int64_t batch() const { return logits[0].batch; }
  // The most candidates that an image's level can have.
  int64_t most(int64_t level) const {
    const auto& map = logits[level];
    const int64_t all = map.channels * map.height * map.width;
    return pre_nms_top_n < all ? pre_nms_top_n : all;
  }
};

}  // namespace fpn_fast
