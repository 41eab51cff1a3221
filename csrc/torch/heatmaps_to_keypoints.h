// SPDX-License-Identifier: Apache-2.0
// `heatmaps_to_keypoints` on every device: checks and outputs.
#pragma once

#include <cstdint>
#include <tuple>

#include "checks.h"

namespace fpn_fast {

// `Device::run<T>` writes keypoints [R, K, 3] and scores [R, K].
template <class Device>
std::tuple<Tensor, Tensor> heatmaps_to_keypoints(Tensor heatmaps, Tensor boxes) {
  constexpr const char* kOp = "heatmaps_to_keypoints";
  const auto side = [&](int dimension) { return heatmaps.size(dimension) > 0 && heatmaps.size(dimension) <= 4096; };
  STD_TORCH_CHECK(heatmaps.dim() == 4 && side(2) && side(3) && heatmaps.is_contiguous(), kOp,
                  " takes contiguous heatmaps [R, K, h, w], h and w from 1 to 4096, got ", shape_of(heatmaps));
  STD_TORCH_CHECK(
      is_box_type(boxes.scalar_type()) && matches(boxes, {heatmaps.size(0), 4}, boxes.scalar_type(), heatmaps), kOp,
      " takes contiguous boxes [R, 4] of float32 or float64 on the heatmaps' device, R is ", heatmaps.size(0), ", got ",
      shape_of(boxes));
  const Tensor keypoints = empty_like(heatmaps, {heatmaps.size(0), heatmaps.size(1), 3}, ScalarType::Float);
  const Tensor scores = empty_like(heatmaps, {heatmaps.size(0), heatmaps.size(1)}, ScalarType::Float);
  if (scores.numel() == 0) return {keypoints, scores};
  dispatch_floating(heatmaps.scalar_type(), kOp, [&](auto tag) {
    Device::template run<typename decltype(tag)::type>(heatmaps, boxes, data<float>(keypoints), data<float>(scores));
  });
  return {keypoints, scores};
}

}  // namespace fpn_fast
