// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign and its gradient on every device: checks, arguments and outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/roi_align_arguments.h"
#include "checks.h"

namespace fpn_fast {

// `maps` is the number of maps. `like` is a map or the gradient of the pooled RoIs.
inline void check_rois(const Tensor& rois, const std::optional<Tensor>& levels, const Tensor& like, size_t maps,
                       int64_t pooled_height, int64_t pooled_width, const std::vector<double>& scales,
                       const std::vector<double>& thresholds, int64_t sampling_ratio, const char* op) {
  STD_TORCH_CHECK(matches(rois, {-1, 5}, accumulate_type(like.scalar_type()), like), op,
                  " takes contiguous rois [K, 5] on the maps' device, float64 for float64 maps and float32 otherwise, "
                  "got ",
                  shape_of(rois));
  STD_TORCH_CHECK(!levels.has_value() || matches(*levels, {rois.size(0)}, ScalarType::Long, like), op,
                  " takes contiguous int64 levels [K] on the maps' device, K is ", rois.size(0), ", got ",
                  shape_of(*levels));
  STD_TORCH_CHECK(maps >= 1 && maps <= kMaxRoiLevels, op, " takes 1 to ", kMaxRoiLevels, " maps, got ", maps);
  STD_TORCH_CHECK(scales.size() == maps, op, " takes a scale for each map, got ", scales.size(), " for ", maps);
  STD_TORCH_CHECK(thresholds.size() <= maps, op, " takes at most one threshold for each map, got ", thresholds.size(),
                  " for ", maps);
  STD_TORCH_CHECK(pooled_height > 0 && pooled_width > 0 && pooled_height <= 1024 && pooled_width <= 1024, op,
                  " pools to 1 x 1 to 1024 x 1024 bins, got ", pooled_height, " x ", pooled_width);
  STD_TORCH_CHECK(sampling_ratio <= 1024, op, " takes at most 1024 samples along an axis of a bin, got ",
                  sampling_ratio);
}

template <class acc_t>
RoiAlignArguments<acc_t> roi_align_arguments(const Tensor& rois, const std::optional<Tensor>& levels, int64_t batch,
                                             int64_t channels, int64_t pooled_height, int64_t pooled_width,
                                             const std::vector<double>& scales, const std::vector<double>& thresholds,
                                             int64_t sampling_ratio, bool aligned) {
  RoiAlignArguments<acc_t> arguments{};
  arguments.rois = data<const acc_t>(rois), arguments.levels = optional_data<int64_t>(levels);
  arguments.count = rois.size(0), arguments.batch = batch, arguments.channels = channels;
  arguments.pooled_height = static_cast<int>(pooled_height), arguments.pooled_width = static_cast<int>(pooled_width);
  arguments.sampling_ratio = static_cast<int>(sampling_ratio), arguments.aligned = aligned;
  arguments.rule.levels = static_cast<int>(scales.size());
  arguments.rule.thresholds = static_cast<int>(thresholds.size());
  for (size_t i = 0; i < thresholds.size(); ++i) arguments.rule.threshold[i] = static_cast<float>(thresholds[i]);
  for (size_t i = 0; i < scales.size(); ++i) arguments.scale[i] = static_cast<acc_t>(scales[i]);
  return arguments;
}

inline Tensor empty_pooled(const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& levels,
                           int64_t pooled_height, int64_t pooled_width, const std::vector<double>& scales,
                           const std::vector<double>& thresholds, int64_t sampling_ratio, const char* op) {
  check_maps(features, op);
  check_rois(rois, levels, features[0], features.size(), pooled_height, pooled_width, scales, thresholds,
             sampling_ratio, op);
  return empty_maps(features[0], rois.size(0), pooled_height, pooled_width, is_channels_last(features[0]));
}

// The gradients of the features, uninitialised. `sizes` holds H and W per map.
inline std::vector<Tensor> empty_feature_grads(const Tensor& grad, const Tensor& rois,
                                               const std::optional<Tensor>& levels, int64_t batch,
                                               const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                                               const std::vector<double>& thresholds, int64_t sampling_ratio,
                                               bool channels_last, const char* op) {
  check_maps({grad}, op);
  check_rois(rois, levels, grad, sizes.size() / 2, grad.size(2), grad.size(3), scales, thresholds, sampling_ratio, op);
  STD_TORCH_CHECK(grad.size(0) == rois.size(0), op, " takes a gradient for each RoI, got ", grad.size(0), " for ",
                  rois.size(0));
  STD_TORCH_CHECK(batch >= 0 && sizes.size() % 2 == 0, op, " takes a batch of 0 or more, and H and W of each map, got ",
                  batch, " and ", sizes.size(), " sizes");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    STD_TORCH_CHECK(sizes[i] > 0 && sizes[i + 1] > 0 && sizes[i] <= INT32_MAX && sizes[i + 1] <= INT32_MAX, op,
                    " takes maps of at least 1 x 1 pixel, got ", sizes[i], " x ", sizes[i + 1]);
    grads.push_back(empty_maps(grad, batch, sizes[i], sizes[i + 1], channels_last));
  }
  return grads;
}

template <class Device>
Tensor multiscale_roi_align(std::vector<Tensor> features, Tensor rois, std::optional<Tensor> levels,
                            int64_t pooled_height, int64_t pooled_width, std::vector<double> scales,
                            std::vector<double> thresholds, int64_t sampling_ratio, bool aligned) {
  constexpr const char* kOp = "multiscale_roi_align";
  const Tensor pooled =
      empty_pooled(features, rois, levels, pooled_height, pooled_width, scales, thresholds, sampling_ratio, kOp);
  if (pooled.numel() == 0) return pooled;
  dispatch_floating(features[0].scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments =
        roi_align_arguments<acc_type<T>>(rois, levels, features[0].size(0), features[0].size(1), pooled_height,
                                         pooled_width, scales, thresholds, sampling_ratio, aligned);
    Device::template pool<T>(arguments, to_feature_maps<const T>(features), to_feature_map<T>(pooled), pooled);
  });
  return pooled;
}

template <class Device>
std::vector<Tensor> multiscale_roi_align_backward(Tensor grad, Tensor rois, std::optional<Tensor> levels, int64_t batch,
                                                  std::vector<int64_t> sizes, std::vector<double> scales,
                                                  std::vector<double> thresholds, int64_t sampling_ratio, bool aligned,
                                                  bool channels_last) {
  constexpr const char* kOp = "multiscale_roi_align_backward";
  std::vector<Tensor> grads =
      empty_feature_grads(grad, rois, levels, batch, sizes, scales, thresholds, sampling_ratio, channels_last, kOp);
  if (grads[0].numel() == 0) return grads;
  dispatch_floating(grad.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments = roi_align_arguments<acc_type<T>>(rois, levels, batch, grad.size(1), grad.size(2),
                                                            grad.size(3), scales, thresholds, sampling_ratio, aligned);
    Device::template gather<T>(arguments, to_feature_map<const T>(grad), to_feature_maps<T>(grads), channels_last,
                               grad);
  });
  return grads;
}

}  // namespace fpn_fast
