// SPDX-License-Identifier: Apache-2.0
// The arguments of `generate_proposals` that do not depend on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "head_decoding.h"

namespace fpn_fast {

template <class T>
struct ProposalArguments {
  using acc_t = acc_type<T>;

  std::vector<FeatureMap<const T>> objectness;
  std::vector<Box<acc_t>> cells;  // [levels, head.anchors]
  HeadDecoding<T> head;           // its `cells` are set on the device
  int64_t pre_nms_top_n, post_nms_top_n;
  acc_t score_thresh, min_size;
  bool strict_size, logits_out;
  OverlapRule<acc_t> rule;
};

}  // namespace fpn_fast
