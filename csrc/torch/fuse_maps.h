// SPDX-License-Identifier: Apache-2.0
// Fused maps, resized and concatenated maps, and their gradients on every device: checks and outputs.
#pragma once

#include <optional>
#include <vector>

#include "../common/fuse_maps.h"
#include "checks.h"

namespace fpn_fast {

inline std::vector<Form> to_forms(const std::vector<int64_t>& codes, size_t count, const char* op) {
  STD_TORCH_CHECK(codes.size() == count, op, " takes one form for each of ", count, " maps, got ", codes.size());
  std::vector<Form> forms;
  for (const int64_t code : codes) {
    STD_TORCH_CHECK(code >= 0 && code <= static_cast<int>(Form::kAdaptiveMax), op, " does not know form ", code);
    forms.push_back(static_cast<Form>(code));
  }
  return forms;
}

inline void check_extent(Form form, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                         const char* op) {
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT32_MAX / 2 && width <= INT32_MAX / 2 && out_height > 0 &&
                      out_width > 0 && out_height <= INT32_MAX / 2 && out_width <= INT32_MAX / 2,
                  op, " takes maps of 1 x 1 to 2^30 x 2^30 pixels, got ", height, " x ", width, " and ", out_height,
                  " x ", out_width);
  STD_TORCH_CHECK(
      resized_extent(form, height, out_height) == out_height && resized_extent(form, width, out_width) == out_width, op,
      ": form ", static_cast<int>(form), " does not make ", out_height, " x ", out_width, " of ", height, " x ", width);
}

// The maps, their forms and what they are multiplied by. Pointers are to the device's memory.
template <class T>
struct FusedMaps {
  std::vector<FeatureMap<const T>> maps;
  std::vector<Form> forms;
  const T* weights;  // [K], nullptr without
  const T* gate;     // [N, C], of the first map, nullptr without
  bool fast, sequential;
  int divide;
  Activation activation;
};

// `Device::fuse<T>` writes the fused map, which has the memory format of the first map.
template <class Device>
Tensor fuse_maps(std::vector<Tensor> maps, int64_t height, int64_t width, std::vector<int64_t> codes,
                 std::optional<Tensor> weights, bool fast, std::optional<Tensor> gate, bool sequential, int64_t divide,
                 int64_t activation) {
  constexpr const char* kOp = "fuse_maps";
  check_maps(maps, kOp);
  STD_TORCH_CHECK(maps.size() <= kMostFused, kOp, " takes ", kMostFused, " maps or fewer, got ", maps.size());
  const std::vector<Form> forms = to_forms(codes, maps.size(), kOp);
  for (size_t k = 0; k < maps.size(); ++k) {
    check_extent(forms[k], maps[k].size(2), maps[k].size(3), height, width, kOp);
  }
  const Tensor& first = maps[0];
  STD_TORCH_CHECK(
      !weights.has_value() || matches(*weights, {static_cast<int64_t>(maps.size())}, first.scalar_type(), first), kOp,
      " takes contiguous weights [K] of the maps' type and device, K is ", maps.size(), ", got ", shape_of(*weights));
  STD_TORCH_CHECK(!gate.has_value() || matches(*gate, {first.size(0), first.size(1), 1, 1}, first.scalar_type(), first),
                  kOp, " takes a contiguous gate [N, C, 1, 1] of the maps' type and device, got ", shape_of(*gate));
  STD_TORCH_CHECK(divide >= 1 && divide <= INT32_MAX, kOp, " divides by a positive integer, got ", divide);
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::kSilu), kOp,
                  " does not know activation ", activation);
  const Tensor out = empty_maps(first, first.size(0), height, width, is_channels_last(first));
  if (out.numel() == 0) return out;
  dispatch_floating(first.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FusedMaps<T> fused{to_feature_maps<const T>(maps),
                             forms,
                             optional_data<T>(weights),
                             optional_data<T>(gate),
                             fast,
                             sequential,
                             static_cast<int>(divide),
                             static_cast<Activation>(activation)};
    Device::template fuse<T>(fused, to_feature_map<T>(out), first);
  });
  return out;
}

// `Device::resize<T>` writes the concatenation, which has the memory format of the first map.
template <class Device>
Tensor resize_cat(std::vector<Tensor> maps, int64_t height, int64_t width, std::vector<int64_t> codes) {
  constexpr const char* kOp = "resize_cat";
  check_maps(maps, kOp, true);
  STD_TORCH_CHECK(maps.size() <= kMostResized, kOp, " takes ", kMostResized, " maps or fewer, got ", maps.size());
  const std::vector<Form> forms = to_forms(codes, maps.size(), kOp);
  int64_t channels = 0;
  for (size_t k = 0; k < maps.size(); ++k) {
    STD_TORCH_CHECK(!is_pooled(forms[k]), kOp, " does not pool");
    check_extent(forms[k], maps[k].size(2), maps[k].size(3), height, width, kOp);
    channels += maps[k].size(1);
  }
  const Tensor& first = maps[0];
  const Tensor out = empty_maps(first, first.size(0), channels, height, width, is_channels_last(first));
  if (out.numel() == 0) return out;
  dispatch_floating(first.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Device::template resize<T>(to_feature_maps<const T>(maps), forms, to_feature_map<T>(out), first);
  });
  return out;
}

// The gradient of one map: gathered from channels `channel` on of the gradient of the result.
template <class T>
struct ResampleGradient {
  FeatureMap<const T> grad;
  FeatureMap<T> out;
  FeatureMap<const T> map;  // of pooling forms alone
  Form form;
};

template <class T>
struct ResampleGradients {
  std::vector<ResampleGradient<T>> maps;
  const acc_type<T>* coefficients;  // [K], nullptr without
  const T* gate;                    // [N, C], of the first map, nullptr without
};

// `Device::gather<T>` writes the gradients of maps, each times its coefficient. Map k reads channels[2 k + 1] channels
// of `grad` from channels[2 k] on and has sizes[2 k] x sizes[2 k + 1] pixels. `pooled` are those of a pooling form. The
// gradients have the memory format of `grad`.
template <class Device>
std::vector<Tensor> resample_backward(Tensor grad, std::vector<int64_t> channels, std::vector<int64_t> sizes,
                                      std::vector<int64_t> codes, std::vector<Tensor> pooled,
                                      std::optional<Tensor> coefficients, std::optional<Tensor> gate) {
  constexpr const char* kOp = "resample_backward";
  check_maps({grad}, kOp);
  const size_t count = codes.size();
  STD_TORCH_CHECK(count <= kMostResized, kOp, " takes ", kMostResized, " maps or fewer, got ", count);
  const std::vector<Form> forms = to_forms(codes, count, kOp);
  STD_TORCH_CHECK(channels.size() == 2 * count && sizes.size() == 2 * count, kOp,
                  " takes a first channel, channels, height and width for each map");
  const ScalarType type = grad.scalar_type();
  STD_TORCH_CHECK(
      !coefficients.has_value() || matches(*coefficients, {static_cast<int64_t>(count)}, accumulate_type(type), grad),
      kOp, " takes contiguous coefficients [K], float64 for a float64 gradient and float32 otherwise, K is ", count,
      ", got ", shape_of(*coefficients));
  STD_TORCH_CHECK(!gate.has_value() || matches(*gate, {grad.size(0), grad.size(1), 1, 1}, type, grad), kOp,
                  " takes a contiguous gate [N, C, 1, 1] of the gradient's type and device, got ", shape_of(*gate));
  const bool last = is_channels_last(grad);
  std::vector<Tensor> outs;
  size_t next = 0;
  for (size_t k = 0; k < count; ++k) {
    const int64_t begin = channels[2 * k], own = channels[2 * k + 1], height = sizes[2 * k], width = sizes[2 * k + 1];
    STD_TORCH_CHECK(begin >= 0 && own >= 0 && begin + own <= grad.size(1), kOp, " takes channels of the gradient, got ",
                    begin, " to ", begin + own, " of ", grad.size(1));
    STD_TORCH_CHECK(!gate.has_value() || k > 0 || own == grad.size(1), kOp, " takes a gate of all channels");
    check_extent(forms[k], height, width, grad.size(2), grad.size(3), kOp);
    if (is_pooled(forms[k])) {
      STD_TORCH_CHECK(next < pooled.size(), kOp, " takes the maps of pooling forms, got ", pooled.size());
      const Tensor& map = pooled[next++];
      STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == grad.size(0) && map.size(1) == own && map.size(2) == height &&
                          map.size(3) == width && map.scalar_type() == type && on_device_of(map, grad),
                      kOp, " takes maps like their gradients, got ", shape_of(map));
    }
    outs.push_back(empty_maps(grad, grad.size(0), own, height, width, last));
  }
  STD_TORCH_CHECK(next == pooled.size(), kOp, " takes the maps of pooling forms, got ", pooled.size());
  if (count == 0 || grad.size(0) == 0) return outs;
  dispatch_floating(type, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    ResampleGradients<T> pass{{}, optional_data<acc_type<T>>(coefficients), optional_data<T>(gate)};
    next = 0;
    for (size_t k = 0; k < count; ++k) {
      FeatureMap<const T> own = to_feature_map<const T>(grad);
      own.data = own.at(0, channels[2 * k], 0, 0), own.channels = channels[2 * k + 1];
      const auto map = is_pooled(forms[k]) ? to_feature_map<const T>(pooled[next++]) : FeatureMap<const T>{};
      pass.maps.push_back({own, to_feature_map<T>(outs[k]), map, forms[k]});
    }
    Device::template gather<T>(pass, last, grad);
  });
  return outs;
}

// `Device::sum<T>` writes the parts [N, bands, K, C] of the sums of gradient times resampled map: Note [Fixed order of
// sums].
template <class Device>
Tensor resample_sums(Tensor grad, std::vector<Tensor> maps, std::vector<int64_t> codes) {
  constexpr const char* kOp = "resample_sums";
  std::vector<Tensor> all{grad};
  all.insert(all.end(), maps.begin(), maps.end());
  check_maps(all, kOp);
  STD_TORCH_CHECK(!maps.empty() && maps.size() <= kMostFused, kOp, " takes 1 to ", kMostFused, " maps, got ",
                  maps.size());
  const std::vector<Form> forms = to_forms(codes, maps.size(), kOp);
  for (size_t k = 0; k < maps.size(); ++k) {
    check_extent(forms[k], maps[k].size(2), maps[k].size(3), grad.size(2), grad.size(3), kOp);
  }
  const int64_t count = static_cast<int64_t>(maps.size());
  const Tensor parts = empty_like(grad, {grad.size(0), sum_bands(grad.size(2)), count, grad.size(1)},
                                  accumulate_type(grad.scalar_type()));
  if (parts.numel() == 0) return parts;
  dispatch_floating(grad.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Device::template sum<T>(to_feature_map<const T>(grad), to_feature_maps<const T>(maps), forms,
                            data<acc_type<T>>(parts), is_channels_last(grad), grad);
  });
  return parts;
}

}  // namespace fpn_fast
