// SPDX-License-Identifier: Apache-2.0
// Checks, arguments and outputs of multi-level RoIAlign, the same on every device.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/roi_align_arguments.h"
#include "tensors.h"

namespace fpn_fast {

inline void check_rois(const Tensor& rois, const std::optional<Tensor>& levels, ScalarType type, const Tensor& like,
                       size_t maps, const std::vector<double>& scales, const std::vector<double>& thresholds,
                       const char* op) {
  const ScalarType coordinates = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto on_device = [&](const Tensor& tensor) {
    return tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index();
  };
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5 && rois.is_contiguous() && rois.scalar_type() == coordinates, op,
                  " takes contiguous rois [K, 5], float64 for float64 maps and float32 otherwise");
  STD_TORCH_CHECK(on_device(rois), op, " takes rois on the maps' device");
  if (levels.has_value()) {
    STD_TORCH_CHECK(levels->dim() == 1 && levels->size(0) == rois.size(0) && levels->is_contiguous() &&
                        levels->scalar_type() == ScalarType::Long && on_device(*levels),
                    op, " takes int64 levels [K] on the maps' device");
  }
  STD_TORCH_CHECK(maps >= 1 && maps <= kMaxRoiLevels, op, " takes 1 to ", kMaxRoiLevels, " maps, got ", maps);
  STD_TORCH_CHECK(scales.size() == maps, op, " takes a scale for each map");
  STD_TORCH_CHECK(thresholds.size() <= maps, op, " takes at most one threshold for each map");
}

template <class acc_t>
RoiAlignArguments<acc_t> roi_align_arguments(const Tensor& rois, const std::optional<Tensor>& levels, int64_t batch,
                                             int64_t channels, int64_t pooled_height, int64_t pooled_width,
                                             const std::vector<double>& scales, const std::vector<double>& thresholds,
                                             int64_t sampling_ratio, bool aligned) {
  RoiAlignArguments<acc_t> arguments{};
  arguments.rois = static_cast<const acc_t*>(rois.data_ptr());
  arguments.levels = levels.has_value() ? static_cast<const int64_t*>(levels->data_ptr()) : nullptr;
  arguments.count = rois.size(0), arguments.batch = batch, arguments.channels = channels;
  arguments.pooled_height = static_cast<int>(pooled_height), arguments.pooled_width = static_cast<int>(pooled_width);
  arguments.sampling_ratio = static_cast<int>(sampling_ratio), arguments.aligned = aligned;
  arguments.rule.levels = static_cast<int>(scales.size());
  arguments.rule.thresholds = static_cast<int>(thresholds.size());
  for (size_t i = 0; i < thresholds.size(); ++i) arguments.rule.threshold[i] = static_cast<float>(thresholds[i]);
  for (size_t i = 0; i < scales.size(); ++i) arguments.scale[i] = static_cast<acc_t>(scales[i]);
  return arguments;
}

inline void check_pooled(int64_t height, int64_t width, int64_t sampling_ratio, const char* op) {
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= 1024 && width <= 1024, op,
                  " pools to 1 x 1 to 1024 x 1024 bins");
  STD_TORCH_CHECK(sampling_ratio <= 1024, op, " takes at most 1024 samples along an axis of a bin");
}

// The pooled RoIs, unwritten, in the memory format of the finest map.
inline Tensor empty_pooled(const std::vector<Tensor>& features, const Tensor& rois, const std::optional<Tensor>& levels,
                           int64_t pooled_height, int64_t pooled_width, const std::vector<double>& scales,
                           const std::vector<double>& thresholds, int64_t sampling_ratio) {
  constexpr const char* kOp = "multiscale_roi_align";
  check_maps(features, kOp);
  check_rois(rois, levels, features[0].scalar_type(), features[0], features.size(), scales, thresholds, kOp);
  check_pooled(pooled_height, pooled_width, sampling_ratio, kOp);
  return empty_maps(features[0], rois.size(0), pooled_height, pooled_width, is_channels_last(features[0]));
}

// The gradients of the features, unwritten. `sizes` holds H and W of each.
inline std::vector<Tensor> empty_feature_grads(const Tensor& grad, const Tensor& rois,
                                               const std::optional<Tensor>& levels, int64_t batch,
                                               const std::vector<int64_t>& sizes, const std::vector<double>& scales,
                                               const std::vector<double>& thresholds, int64_t sampling_ratio,
                                               bool channels_last) {
  constexpr const char* kOp = "multiscale_roi_align_backward";
  check_maps({grad}, kOp);
  check_rois(rois, levels, grad.scalar_type(), grad, sizes.size() / 2, scales, thresholds, kOp);
  check_pooled(grad.size(2), grad.size(3), sampling_ratio, kOp);
  STD_TORCH_CHECK(grad.size(0) == rois.size(0), kOp, " takes a gradient for each RoI");
  STD_TORCH_CHECK(batch >= 0 && sizes.size() % 2 == 0, kOp, " takes the batch, and H and W of each map");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    STD_TORCH_CHECK(sizes[i] > 0 && sizes[i + 1] > 0 && sizes[i] <= INT32_MAX && sizes[i + 1] <= INT32_MAX, kOp,
                    " takes maps of at least 1 x 1 pixel");
    grads.push_back(empty_maps(grad, batch, sizes[i], sizes[i + 1], channels_last));
  }
  return grads;
}

}  // namespace fpn_fast
