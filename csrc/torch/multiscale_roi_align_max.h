// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign in max mode and its gradient on every device: checks, arguments and outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/roi_align_max.h"
#include "multiscale_roi_align.h"

namespace fpn_fast {

inline void check_map_size(int64_t size, const char* op) {
  STD_TORCH_CHECK(size <= kMaxWinnerSize, op, " takes maps of at most ", kMaxWinnerSize, " pixels along an axis, got ",
                  size);
}

template <class Device>
std::tuple<Tensor, Tensor> multiscale_roi_align_max(std::vector<Tensor> features, Tensor rois,
                                                    std::optional<Tensor> levels, int64_t pooled_height,
                                                    int64_t pooled_width, std::vector<double> scales,
                                                    std::vector<double> thresholds, int64_t sampling_ratio,
                                                    bool aligned) {
  constexpr const char* kOp = "multiscale_roi_align_max";
  const Tensor pooled =
      empty_pooled(features, rois, levels, pooled_height, pooled_width, scales, thresholds, sampling_ratio, kOp);
  for (const Tensor& map : features) check_map_size(map.size(2), kOp), check_map_size(map.size(3), kOp);
  const Tensor winners =
      empty_strided(pooled, 4, pooled.sizes().data(), pooled.strides().data(), aoti_torch_dtype_int32());
  if (pooled.numel() == 0) return {pooled, winners};
  dispatch_floating(features[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments =
        roi_align_arguments<acc_type<T>>(rois, levels, features[0].size(0), features[0].size(1), pooled_height,
                                         pooled_width, scales, thresholds, sampling_ratio, aligned);
    Device::template pool<T>(arguments, to_feature_maps<const T>(features), to_feature_map<T>(pooled),
                             to_feature_map<int>(winners), is_channels_last(pooled), pooled);
  });
  return {pooled, winners};
}

template <class Device>
std::vector<Tensor> multiscale_roi_align_max_backward(Tensor grad, Tensor winners, Tensor rois,
                                                      std::optional<Tensor> levels, int64_t batch,
                                                      std::vector<int64_t> sizes, std::vector<double> scales,
                                                      std::vector<double> thresholds, int64_t sampling_ratio,
                                                      bool aligned, bool channels_last) {
  constexpr const char* kOp = "multiscale_roi_align_max_backward";
  std::vector<Tensor> grads =
      empty_feature_grads(grad, rois, levels, batch, sizes, scales, thresholds, sampling_ratio, channels_last, kOp);
  STD_TORCH_CHECK(winners.dim() == 4 && winners.scalar_type() == ScalarType::Int && on_device_of(winners, grad), kOp,
                  " takes int32 winners [K, C, PH, PW] on the gradient's device, got ", shape_of(winners));
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(winners.size(axis) == grad.size(axis), kOp, " takes a winner for each bin of the gradient, got ",
                    shape_of(winners), " for ", shape_of(grad));
  }
  for (const int64_t size : sizes) check_map_size(size, kOp);
  if (grads[0].numel() == 0) return grads;
  dispatch_floating(grad.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments = roi_align_arguments<acc_type<T>>(rois, levels, batch, grad.size(1), grad.size(2),
                                                            grad.size(3), scales, thresholds, sampling_ratio, aligned);
    Device::template gather<T>(arguments, to_feature_map<const T>(grad), to_feature_map<const int>(winners),
                               to_feature_maps<T>(grads), channels_last, grad);
  });
  return grads;
}

}  // namespace fpn_fast
