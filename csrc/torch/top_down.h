// SPDX-License-Identifier: Apache-2.0
// The top-down ops on every device: checks and outputs.
#pragma once

#include <vector>

#include "tensors.h"

namespace fpn_fast {

inline void check_mode(int64_t mode, const char* op) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, op, ": unknown mode ", mode,
                  "; 0 is nearest, 1 bilinear, 2 bilinear with align_corners");
}

// The merged maps, uninitialised, each in the memory format of its lateral. The coarsest lateral is its own merged map
// and is not among them.
inline std::vector<Tensor> empty_merged(const std::vector<Tensor>& laterals, int64_t mode) {
  check_maps(laterals, "top_down");
  check_mode(mode, "top_down");
  std::vector<Tensor> merged;
  for (size_t level = 0; level + 1 < laterals.size(); ++level) {
    const Tensor& lateral = laterals[level];
    merged.push_back(empty_maps(lateral, lateral.size(0), lateral.size(2), lateral.size(3), is_channels_last(lateral)));
  }
  return merged;
}

// The gradients of all laterals except the finest, uninitialised. The finest lateral's gradient equals its merged
// map's. The coarsest gradient takes the memory format of the next finer level.
inline std::vector<Tensor> empty_lateral_grads(const std::vector<Tensor>& grads, int64_t coarse_height,
                                               int64_t coarse_width, int64_t mode) {
  check_maps(grads, "top_down_backward");
  check_mode(mode, "top_down_backward");
  STD_TORCH_CHECK(coarse_height > 0 && coarse_width > 0 && coarse_height <= INT32_MAX && coarse_width <= INT32_MAX,
                  "top_down_backward takes a coarsest map of at least 1 x 1 pixel, got ", coarse_height, " x ",
                  coarse_width);
  std::vector<Tensor> sums;
  for (size_t level = 1; level < grads.size(); ++level) {
    const Tensor& grad = grads[level];
    sums.push_back(empty_maps(grad, grad.size(0), grad.size(2), grad.size(3), is_channels_last(grad)));
  }
  const Tensor& last = grads.back();
  sums.push_back(empty_maps(last, last.size(0), coarse_height, coarse_width, is_channels_last(last)));
  return sums;
}

}  // namespace fpn_fast
