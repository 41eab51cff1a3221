// SPDX-License-Identifier: Apache-2.0
// Segmented NMS on every device: checks and outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/nms_input.h"
#include "checks.h"

namespace fpn_fast {

// `Device::run<acc_t>` writes the indices of the kept boxes and their number per image.
template <class Device>
std::tuple<Tensor, Tensor> segmented_nms(Tensor boxes, Tensor scores, std::optional<Tensor> groups,
                                         std::optional<Tensor> counts, double iou_threshold, int64_t max_output,
                                         int64_t convention) {
  constexpr const char* kOp = "segmented_nms";
  const ScalarType type = boxes.scalar_type();
  STD_TORCH_CHECK(is_box_type(type), kOp, " takes float32 or float64 boxes");
  STD_TORCH_CHECK(matches(boxes, {-1, -1, 4}, type, boxes), kOp, " takes contiguous boxes [N, B, 4], got ",
                  shape_of(boxes));
  const int64_t batch = boxes.size(0), room = boxes.size(1);
  STD_TORCH_CHECK(room <= UINT32_MAX, kOp, " takes at most 2^32 - 1 boxes per image, got ", room);
  STD_TORCH_CHECK(matches(scores, {batch, room}, type, boxes), kOp,
                  " takes contiguous scores [N, B] of the boxes' type and device, got ", shape_of(scores),
                  " for boxes ", shape_of(boxes));
  STD_TORCH_CHECK(!groups.has_value() || matches(*groups, {batch, room}, ScalarType::Long, boxes), kOp,
                  " takes contiguous int64 groups [N, B] on the boxes' device, got ", shape_of(*groups), " for boxes ",
                  shape_of(boxes));
  check_counts(counts, "counts", boxes, kOp);
  STD_TORCH_CHECK(max_output >= 0, kOp, " takes a max_output of 0 or more, got ", max_output);
  STD_TORCH_CHECK(convention >= 0 && convention <= 2, kOp, " does not know convention ", convention,
                  "; 0 divides, 1 multiplies, 2 moves the boxes of each group");
  const auto rule = static_cast<NmsConvention>(convention);
  const Tensor keep = empty_like(boxes, {batch, max_output}, ScalarType::Long);
  const Tensor kept = empty_like(boxes, {batch}, ScalarType::Long);
  dispatch_boxes(type, [&](auto tag) {
    using acc_t = typename decltype(tag)::type;
    const NmsInput<acc_t> input{data<const Box<acc_t>>(boxes),
                                data<const acc_t>(scores),
                                optional_data<int64_t>(groups),
                                optional_data<int64_t>(counts),
                                batch,
                                room,
                                rule == NmsConvention::kOffset};
    Device::run(input, make_overlap_rule<acc_t>(iou_threshold, rule), max_output, data<int64_t>(keep),
                data<int64_t>(kept), boxes);
  });
  return {keep, kept};
}

}  // namespace fpn_fast
