// SPDX-License-Identifier: Apache-2.0
// The arguments of `select_detections` that do not depend on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "head_decoding.h"

namespace fpn_fast {

template <class T>
struct DenseHeads {
  using acc_t = acc_type<T>;

  std::vector<FeatureMap<const T>> logits, centerness;
  std::vector<Box<acc_t>> cells;  // [levels, head.anchors]
  HeadDecoding<T> head;           // its `cells` are set on the device
  int64_t classes, pre_nms_top_n, max_detections;
  acc_t lowest;  // lowest logit that passes the threshold; with centerness the lowest score
  double nms_thresh;

  int64_t levels() const { return static_cast<int64_t>(logits.size()); }
  int64_t batch() const { return logits[0].batch; }
  // An upper bound of the candidates per image and level.
  int64_t most(int64_t level) const {
    const auto& map = logits[level];
    const int64_t all = map.channels * map.height * map.width;
    return pre_nms_top_n < all ? pre_nms_top_n : all;
  }
};

}  // namespace fpn_fast
