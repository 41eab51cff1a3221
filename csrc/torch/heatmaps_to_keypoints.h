// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of heatmaps_to_keypoints, the same on every device.
#pragma once

#include <cstdint>
#include <utility>

#include "tensors.h"

namespace fpn_fast {

// Keypoints [R, K, 3] and scores [R, K], unwritten.
inline std::pair<Tensor, Tensor> empty_keypoints(const Tensor& heatmaps, const Tensor& boxes) {
  constexpr const char* kOp = "heatmaps_to_keypoints";
  const ScalarType box_type = boxes.scalar_type();
  const auto side = [&](int dimension) { return heatmaps.size(dimension) > 0 && heatmaps.size(dimension) <= 4096; };
  STD_TORCH_CHECK(heatmaps.dim() == 4 && side(2) && side(3) && heatmaps.is_contiguous(), kOp,
                  " takes contiguous heatmaps [R, K, h, w], h and w from 1 to 4096");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == heatmaps.size(0) && boxes.size(1) == 4 &&
                      boxes.is_contiguous() && (box_type == ScalarType::Float || box_type == ScalarType::Double) &&
                      on_device_of(boxes, heatmaps),
                  kOp, " takes contiguous boxes [R, 4] of float32 or float64 on the heatmaps' device");
  return {empty_like(heatmaps, {heatmaps.size(0), heatmaps.size(1), 3}, ScalarType::Float),
          empty_like(heatmaps, {heatmaps.size(0), heatmaps.size(1)}, ScalarType::Float)};
}

}  // namespace fpn_fast
