// SPDX-License-Identifier: Apache-2.0
// What kernels know of a call of `generate_proposals` beside its maps.
#pragma once

#include <cstdint>

#include "anchors.h"
#include "boxes.h"

namespace fpn_fast {

// P2 to P9.
constexpr int kMaxProposalLevels = 8;

template <class acc_t>
struct ProposalArguments {
  int64_t pre_nms_top_n, post_nms_top_n;
  acc_t score_thresh, min_size;
  bool strict_size, logits_out;
  OverlapRule<acc_t> rule;
  BoxCoding<acc_t> coding;
  acc_t stride_y[kMaxProposalLevels], stride_x[kMaxProposalLevels];
};

}  // namespace fpn_fast
