// SPDX-License-Identifier: Apache-2.0
// `generate_proposals` on every device: checks, arguments and outputs.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/proposal_arguments.h"
#include "heads.h"

namespace fpn_fast {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> generate_proposals(
    std::vector<Tensor> objectness, std::vector<Tensor> deltas, std::vector<double> cell_anchors,
    std::vector<int64_t> strides, Tensor image_sizes, int64_t pre_nms_top_n, int64_t post_nms_top_n, double nms_thresh,
    double score_thresh, double min_size, std::vector<double> weights, std::vector<double> means,
    std::vector<double> stds, double scale_clamp, bool symmetric_clamp, bool mean_center, double center_offset,
    double center_clamp, bool strict_size, bool logits_out, int64_t convention) {
  constexpr const char* kOp = "generate_proposals";
  check_head(objectness, strides, image_sizes, {pre_nms_top_n, post_nms_top_n}, kOp);
  const int64_t batch = objectness[0].size(0), anchors = objectness[0].size(1);
  check_like(deltas, 4 * anchors, "deltas", objectness, kOp);
  STD_TORCH_CHECK(cell_anchors.size() == objectness.size() * 4 * anchors, kOp,
                  " takes A cell anchors (x1, y1, x2, y2) for each level, A is ", anchors, ", got ",
                  cell_anchors.size() / 4, " for ", objectness.size(), " levels");
  STD_TORCH_CHECK(convention == 0 || convention == 1, kOp, " does not know convention ", convention,
                  "; 0 divides, 1 multiplies");
  STD_TORCH_CHECK(weights.size() == 4 && means.size() == 4 && stds.size() == 4, kOp,
                  " takes four weights, means and stds, got ", weights.size(), ", ", means.size(), " and ",
                  stds.size());
  STD_TORCH_CHECK(center_clamp >= 0, kOp, " takes a center_clamp of 0 or more, got ", center_clamp);
  const Tensor boxes = empty_like(image_sizes, {batch, post_nms_top_n, 4}, image_sizes.scalar_type());
  const Tensor scores = empty_like(image_sizes, {batch, post_nms_top_n}, image_sizes.scalar_type());
  const Tensor counts = empty_like(image_sizes, {batch}, ScalarType::Long);
  dispatch_floating(objectness[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    BoxCoding<acc_t> coding{};
    for (int i = 0; i < 4; ++i) {
      coding.weight[i] = static_cast<acc_t>(weights[i]);
      coding.mean[i] = static_cast<acc_t>(means[i]), coding.std[i] = static_cast<acc_t>(stds[i]);
    }
    coding.scale_clamp = static_cast<acc_t>(scale_clamp), coding.symmetric_clamp = symmetric_clamp;
    coding.mean_center = mean_center, coding.center_offset = static_cast<acc_t>(center_offset);
    coding.center_clamp = static_cast<acc_t>(center_clamp);
    ProposalArguments<T> arguments{};
    arguments.objectness = to_feature_maps<const T>(objectness), arguments.cells = cell_boxes<acc_t>(cell_anchors);
    arguments.head = head_decoding<T>(deltas, strides, image_sizes, coding);
    arguments.pre_nms_top_n = pre_nms_top_n, arguments.post_nms_top_n = post_nms_top_n;
    arguments.score_thresh = static_cast<acc_t>(score_thresh), arguments.min_size = static_cast<acc_t>(min_size);
    arguments.strict_size = strict_size, arguments.logits_out = logits_out;
    arguments.rule = make_overlap_rule<acc_t>(nms_thresh, static_cast<NmsConvention>(convention));
    Device::run(arguments, data<Box<acc_t>>(boxes), data<acc_t>(scores), data<int64_t>(counts), image_sizes);
  });
  return {boxes, scores, counts};
}

}  // namespace fpn_fast
