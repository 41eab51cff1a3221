// SPDX-License-Identifier: Apache-2.0
// The top-down merge and its gradient on every device: checks and outputs.
#pragma once

#include <vector>

#include "../common/resample.h"
#include "tensors.h"

namespace fpn_fast {

inline Resample resample_mode(int64_t mode, const char* op) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, op, ": unknown mode ", mode,
                  "; 0 is nearest, 1 bilinear, 2 bilinear with align_corners");
  return static_cast<Resample>(mode);
}

// `Device::merge<T>` computes the merged maps, each in the memory format of its lateral. The coarsest lateral is its
// own merged map and is not among them.
template <class Device>
std::vector<Tensor> top_down(std::vector<Tensor> laterals, int64_t mode, bool average) {
  constexpr const char* kOp = "top_down";
  check_maps(laterals, kOp);
  const Resample resample = resample_mode(mode, kOp);
  std::vector<Tensor> merged;
  for (size_t level = 0; level + 1 < laterals.size(); ++level) {
    const Tensor& lateral = laterals[level];
    merged.push_back(empty_maps(lateral, lateral.size(0), lateral.size(2), lateral.size(3), is_channels_last(lateral)));
  }
  if (merged.empty() || laterals[0].numel() == 0) return merged;
  dispatch_floating(laterals[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Device::template merge<T>(to_feature_maps<const T>(laterals), to_feature_maps<T>(merged), resample, average,
                              laterals[0]);
  });
  return merged;
}

// `Device::gather<T>` computes the gradients of all laterals except the finest, whose gradient equals its merged map's.
// The coarsest gradient takes the memory format of the next finer level.
template <class Device>
std::vector<Tensor> top_down_backward(std::vector<Tensor> grads, int64_t coarse_height, int64_t coarse_width,
                                      int64_t mode, bool average) {
  constexpr const char* kOp = "top_down_backward";
  check_maps(grads, kOp);
  const Resample resample = resample_mode(mode, kOp);
  STD_TORCH_CHECK(coarse_height > 0 && coarse_width > 0 && coarse_height <= INT32_MAX && coarse_width <= INT32_MAX, kOp,
                  " takes a coarsest map of at least 1 x 1 pixel, got ", coarse_height, " x ", coarse_width);
  std::vector<Tensor> sums;
  for (size_t level = 1; level < grads.size(); ++level) {
    const Tensor& grad = grads[level];
    sums.push_back(empty_maps(grad, grad.size(0), grad.size(2), grad.size(3), is_channels_last(grad)));
  }
  const Tensor& last = grads.back();
  sums.push_back(empty_maps(last, last.size(0), coarse_height, coarse_width, is_channels_last(last)));
  if (grads[0].numel() == 0) return sums;
  dispatch_floating(grads[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Device::template gather<T>(to_feature_maps<const T>(grads), to_feature_maps<T>(sums), resample, average, grads[0]);
  });
  return sums;
}

}  // namespace fpn_fast
