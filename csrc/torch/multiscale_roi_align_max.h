// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of multi-level RoIAlign in max mode, beside those of csrc/torch/multiscale_roi_align.h.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../common/roi_align_max.h"
#include "multiscale_roi_align.h"

namespace fpn_fast {

// The pooled RoIs, and the winners of their bins in the same memory format, unwritten.
inline std::pair<Tensor, Tensor> empty_pooled_max(const std::vector<Tensor>& features, const Tensor& rois,
                                                  const std::optional<Tensor>& levels, int64_t pooled_height,
                                                  int64_t pooled_width, const std::vector<double>& scales,
                                                  const std::vector<double>& thresholds, int64_t sampling_ratio) {
  Tensor pooled = empty_pooled(features, rois, levels, pooled_height, pooled_width, scales, thresholds, sampling_ratio);
  for (const Tensor& map : features) {
    STD_TORCH_CHECK(map.size(2) <= kMaxWinnerSize && map.size(3) <= kMaxWinnerSize,
                    "multiscale_roi_align_max takes maps of at most ", kMaxWinnerSize, " pixels along an axis");
  }
  return {pooled, empty_strided(pooled, 4, pooled.sizes().data(), pooled.strides().data(), aoti_torch_dtype_int32())};
}

inline void check_winners(const Tensor& winners, const Tensor& grad, const std::vector<int64_t>& sizes) {
  constexpr const char* kOp = "multiscale_roi_align_max_backward";
  STD_TORCH_CHECK(winners.dim() == 4 && winners.scalar_type() == ScalarType::Int && on_device_of(winners, grad), kOp,
                  " takes int32 winners [K, C, PH, PW] on the gradient's device");
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(winners.size(axis) == grad.size(axis), kOp, " takes a winner for each bin of the gradient");
  }
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size <= kMaxWinnerSize, kOp, " takes maps of at most ", kMaxWinnerSize, " pixels along an axis");
  }
}

}  // namespace fpn_fast
