// SPDX-License-Identifier: Apache-2.0
// Tensors of the stable ABI, and the feature maps that kernels see of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/feature_map.h"
#include "../common/scalar.h"

// torch 2.11 has only the macro without the error in its message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fpn_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct TypeTag {
  using type = T;
};

template <class Body>
void dispatch_floating(ScalarType type, const char* op, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, op, " takes float64, float32, float16 or bfloat16 maps");
  }
}

// A map with adjacent channels is channels_last, unless it is also contiguous (one channel, or one pixel). Python has
// the same rule for fake tensors.
inline bool is_channels_last(const Tensor& map) {
  return map.stride(1) == 1 && map.size(1) > 1 && !map.is_contiguous();
}

// An uninitialised dense tensor on the device of `like`. It calls the C shim, because torch::stable::empty looks its
// operator up by name, which takes longer than the rest of a call on tiny maps.
inline Tensor empty_strided(const Tensor& like, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                            int32_t dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty_maps(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width,
                         bool channels_last) {
  const int64_t sizes[4] = {batch, channels, height, width};
  const int64_t image = std::max<int64_t>(channels, 1) * height * width;
  const int64_t first[4] = {image, height * width, width, 1};
  const int64_t last[4] = {image, 1, width * channels, channels};
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(like, 4, sizes, channels_last ? last : first, dtype);
}

// With the channels of `like`.
inline Tensor empty_maps(const Tensor& like, int64_t batch, int64_t height, int64_t width, bool channels_last) {
  return empty_maps(like, batch, like.size(1), height, width, channels_last);
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                       static_cast<int32_t>(type));
}

inline bool on_device_of(const Tensor& tensor, const Tensor& like) {
  return tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index();
}

template <class T>
const T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <class T>
FeatureMap<T> to_feature_map(const Tensor& map) {
  T* data = const_cast<T*>(static_cast<const T*>(map.data_ptr()));
  const auto sizes = map.sizes();
  const auto strides = map.strides();
  return {data,       sizes[0],   sizes[1],  static_cast<int>(sizes[2]), static_cast<int>(sizes[3]), strides[0],
          strides[1], strides[2], strides[3]};
}

template <class T>
std::vector<FeatureMap<T>> to_feature_maps(const std::vector<Tensor>& maps) {
  std::vector<FeatureMap<T>> views;
  for (const Tensor& map : maps) views.push_back(to_feature_map<T>(map));
  return views;
}

// Python checks first, with better messages. This makes the kernels safe whatever calls them.
inline void check_maps(const std::vector<Tensor>& maps, const char* op, bool any_channels = false) {
  STD_TORCH_CHECK(!maps.empty(), op, " takes at least one map");
  const auto read = [](auto getter, const Tensor& map) {
    int32_t value = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(getter(map.get(), &value));
    return value;
  };
  const int32_t dtype = read(aoti_torch_get_dtype, maps[0]);
  const int32_t device_type = read(aoti_torch_get_device_type, maps[0]);
  const int32_t device_index = read(aoti_torch_get_device_index, maps[0]);
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_float32() ||
                      dtype == aoti_torch_dtype_float16() || dtype == aoti_torch_dtype_bfloat16(),
                  op, " takes float64, float32, float16 or bfloat16 maps");
  int64_t batch = 0, channels = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& map = maps[i];
    const auto sizes = map.sizes();
    STD_TORCH_CHECK(sizes.size() == 4, op, " takes maps [N, C, H, W], got ", sizes.size(), " dimensions");
    if (i == 0) batch = sizes[0], channels = sizes[1];
    STD_TORCH_CHECK(read(aoti_torch_get_dtype, map) == dtype, op, " takes maps of one dtype; map ", i, " differs");
    STD_TORCH_CHECK(
        read(aoti_torch_get_device_type, map) == device_type && read(aoti_torch_get_device_index, map) == device_index,
        op, " takes maps on one device; map ", i, " differs");
    STD_TORCH_CHECK(sizes[0] == batch && (sizes[1] == channels || any_channels), op,
                    " takes maps of one batch and channel count, (", batch, ", ", channels, "), got (", sizes[0], ", ",
                    sizes[1], ") at ", i);
    STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0 && sizes[2] <= INT32_MAX && sizes[3] <= INT32_MAX, op,
                    " takes maps of at least 1 x 1 pixel, got ", sizes[2], " x ", sizes[3], " at ", i);
  }
}

}  // namespace fpn_fast
