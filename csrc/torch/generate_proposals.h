// SPDX-License-Identifier: Apache-2.0
// Checks and arguments of `generate_proposals`, the same on every device.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/proposal_arguments.h"
#include "tensors.h"

namespace fpn_fast {

inline void check_proposals(const std::vector<Tensor>& objectness, const std::vector<Tensor>& deltas,
                            const std::vector<double>& cell_anchors, const std::vector<int64_t>& strides,
                            const Tensor& image_sizes, int64_t pre_nms_top_n, int64_t post_nms_top_n,
                            int64_t convention) {
  constexpr const char* kOp = "generate_proposals";
  check_maps(objectness, kOp);
  check_maps(deltas, kOp);
  const Tensor& first = objectness[0];
  const size_t levels = objectness.size();
  STD_TORCH_CHECK(levels <= kMaxProposalLevels && deltas.size() == levels, kOp, " takes 1 to ", kMaxProposalLevels,
                  " maps of objectness and as many of deltas");
  STD_TORCH_CHECK(deltas[0].scalar_type() == first.scalar_type() && on_device_of(deltas[0], first), kOp,
                  " takes deltas of the objectness' type and device");
  for (size_t i = 0; i < levels; ++i) {
    STD_TORCH_CHECK(deltas[i].size(0) == first.size(0) && deltas[i].size(1) == 4 * first.size(1) &&
                        deltas[i].size(2) == objectness[i].size(2) && deltas[i].size(3) == objectness[i].size(3),
                    kOp, " takes deltas [N, 4A, H, W] for objectness [N, A, H, W]");
    const int64_t anchors = objectness[i].size(1) * objectness[i].size(2) * objectness[i].size(3);
    STD_TORCH_CHECK(anchors <= INT32_MAX, kOp, " takes at most 2^31 - 1 anchors of a level");
  }
  STD_TORCH_CHECK(cell_anchors.size() == levels * 4 * first.size(1), kOp, " takes A cell anchors for each level");
  STD_TORCH_CHECK(strides.size() == 2 * levels, kOp, " takes strides along y and x for each level");
  const ScalarType type = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(image_sizes.dim() == 2 && image_sizes.size(0) == first.size(0) && image_sizes.size(1) == 2 &&
                      image_sizes.is_contiguous() && image_sizes.scalar_type() == type &&
                      on_device_of(image_sizes, first),
                  kOp, " takes contiguous image_sizes [N, 2], float64 for float64 maps and float32 otherwise");
  STD_TORCH_CHECK(convention == 0 || convention == 1, kOp, " does not know convention ", convention);
  STD_TORCH_CHECK(pre_nms_top_n >= 0 && post_nms_top_n >= 0, kOp, " takes numbers of boxes of 0 or more");
}

template <class acc_t>
BoxCoding<acc_t> box_coding(const std::vector<double>& weights, const std::vector<double>& means,
                            const std::vector<double>& stds, double scale_clamp, bool symmetric_clamp, bool mean_center,
                            double center_offset, double center_clamp) {
  STD_TORCH_CHECK(weights.size() == 4 && means.size() == 4 && stds.size() == 4,
                  "generate_proposals takes four weights, means and stds");
  STD_TORCH_CHECK(center_clamp >= 0, "generate_proposals takes a center_clamp of 0 or more");
  BoxCoding<acc_t> coding{};
  for (int i = 0; i < 4; ++i) {
    coding.weight[i] = static_cast<acc_t>(weights[i]);
    coding.mean[i] = static_cast<acc_t>(means[i]), coding.std[i] = static_cast<acc_t>(stds[i]);
  }
  coding.scale_clamp = static_cast<acc_t>(scale_clamp), coding.symmetric_clamp = symmetric_clamp;
  coding.mean_center = mean_center, coding.center_offset = static_cast<acc_t>(center_offset);
  coding.center_clamp = static_cast<acc_t>(center_clamp);
  return coding;
}

template <class acc_t>
ProposalArguments<acc_t> proposal_arguments(const std::vector<int64_t>& strides, int64_t pre_nms_top_n,
                                            int64_t post_nms_top_n, double nms_thresh, double score_thresh,
                                            double min_size, const BoxCoding<acc_t>& coding, bool strict_size,
                                            bool logits_out, int64_t convention) {
  ProposalArguments<acc_t> arguments{};
  arguments.pre_nms_top_n = pre_nms_top_n, arguments.post_nms_top_n = post_nms_top_n;
  arguments.score_thresh = static_cast<acc_t>(score_thresh), arguments.min_size = static_cast<acc_t>(min_size);
  arguments.strict_size = strict_size, arguments.logits_out = logits_out;
  arguments.rule = make_overlap_rule<acc_t>(nms_thresh, static_cast<NmsConvention>(convention));
  arguments.coding = coding;
  for (size_t level = 0; level < strides.size() / 2; ++level) {
    arguments.stride_y[level] = static_cast<acc_t>(strides[2 * level]);
    arguments.stride_x[level] = static_cast<acc_t>(strides[2 * level + 1]);
  }
  return arguments;
}

// The cell anchors of all levels.
template <class acc_t>
std::vector<Box<acc_t>> cell_boxes(const std::vector<double>& corners) {
  std::vector<Box<acc_t>> cells;
  for (size_t i = 0; i < corners.size(); i += 4) {
    cells.push_back({static_cast<acc_t>(corners[i]), static_cast<acc_t>(corners[i + 1]),
                     static_cast<acc_t>(corners[i + 2]), static_cast<acc_t>(corners[i + 3])});
  }
  return cells;
}

}  // namespace fpn_fast
