// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of the top-down ops, the same on every device.
#pragma once

#include <vector>

#include "tensors.h"

namespace fpn_fast {

inline void check_mode(int64_t mode, const char* op) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, op, ": unknown mode ", mode);
}

// The merged maps, unwritten: all but the coarsest, which is its lateral. Each in the memory format of its lateral.
inline std::vector<Tensor> empty_merged(const std::vector<Tensor>& laterals, int64_t mode) {
  check_maps(laterals, "top_down");
  check_mode(mode, "top_down");
  std::vector<Tensor> merged;
  for (size_t level = 0; level + 1 < laterals.size(); ++level) {
    const Tensor& lateral = laterals[level];
    merged.push_back(empty_map(lateral, lateral.size(2), lateral.size(3), is_channels_last(lateral)));
  }
  return merged;
}

// The gradients of all laterals but the finest, whose gradient is its merged map's own, unwritten. The coarsest takes
// the memory format of the level below it.
inline std::vector<Tensor> empty_lateral_grads(const std::vector<Tensor>& grads, int64_t coarse_height,
                                               int64_t coarse_width, int64_t mode) {
  check_maps(grads, "top_down_backward");
  check_mode(mode, "top_down_backward");
  STD_TORCH_CHECK(coarse_height > 0 && coarse_width > 0 && coarse_height <= INT32_MAX && coarse_width <= INT32_MAX,
                  "top_down_backward takes a coarsest map of at least 1 x 1 pixel");
  std::vector<Tensor> sums;
  for (size_t level = 1; level < grads.size(); ++level) {
    const Tensor& grad = grads[level];
    sums.push_back(empty_map(grad, grad.size(2), grad.size(3), is_channels_last(grad)));
  }
  sums.push_back(empty_map(grads.back(), coarse_height, coarse_width, is_channels_last(grads.back())));
  return sums;
}

}  // namespace fpn_fast
