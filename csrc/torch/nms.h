// SPDX-License-Identifier: Apache-2.0
// Checks of segmented NMS, the same on every device.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/boxes.h"
#include "tensors.h"

namespace fpn_fast {

inline NmsConvention check_nms(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
                               const std::optional<Tensor>& counts, int64_t max_output, int64_t convention) {
  constexpr const char* kOp = "segmented_nms";
  const ScalarType type = boxes.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp, " takes float32 or float64 boxes");
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous(), kOp,
                  " takes contiguous boxes [N, B, 4]");
  STD_TORCH_CHECK(boxes.size(1) <= UINT32_MAX, kOp, " takes at most 2^32 - 1 boxes of an image");
  const auto fits = [&](const Tensor& tensor, ScalarType expected) {
    return tensor.dim() == 2 && tensor.size(0) == boxes.size(0) && tensor.size(1) == boxes.size(1) &&
           tensor.is_contiguous() && tensor.scalar_type() == expected && on_device_of(tensor, boxes);
  };
  STD_TORCH_CHECK(fits(scores, type), kOp, " takes contiguous scores [N, B] of the boxes' type and device");
  STD_TORCH_CHECK(!groups.has_value() || fits(*groups, ScalarType::Long), kOp,
                  " takes contiguous int64 groups [N, B] on the boxes' device");
  STD_TORCH_CHECK(
      !counts.has_value() || (counts->dim() == 1 && counts->size(0) == boxes.size(0) && counts->is_contiguous() &&
                              counts->scalar_type() == ScalarType::Long && on_device_of(*counts, boxes)),
      kOp, " takes contiguous int64 counts [N] on the boxes' device");
  STD_TORCH_CHECK(max_output >= 0, kOp, " takes max_output of 0 or more");
  STD_TORCH_CHECK(convention >= 0 && convention <= 2, kOp, " does not know convention ", convention);
  return static_cast<NmsConvention>(convention);
}

}  // namespace fpn_fast
