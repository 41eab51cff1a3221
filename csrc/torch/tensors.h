// SPDX-License-Identifier: Apache-2.0
// The only header that knows torch: stable-ABI tensors in, feature maps out.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../common/feature_map.h"
#include "../common/scalar.h"

namespace fpn_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct TypeTag {
  using type = T;
};

// Calls `body(TypeTag<scalar_t>{})` for the tensor's type.
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

// One rule, repeated in Python for fake tensors: a map whose channels are adjacent is channels_last, unless it is
// contiguous as well (one channel, or one pixel).
inline bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && map.size(1) > 1 && !map.is_contiguous(); }

inline Tensor empty_map(const Tensor& like, int64_t height, int64_t width, bool channels_last) {
  const std::vector<int64_t> size{like.size(0), like.size(1), height, width};
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <class T>
FeatureMap<T> to_feature_map(const Tensor& map) {
  T* data = const_cast<T*>(static_cast<const T*>(map.data_ptr()));
  const auto sizes = map.sizes();
  const auto strides = map.strides();
  return {data,       sizes[0],   sizes[1],   static_cast<int>(sizes[2]), static_cast<int>(sizes[3]),
          strides[0], strides[1], strides[2], strides[3]};
}

template <class T>
std::vector<FeatureMap<T>> to_feature_maps(const std::vector<Tensor>& maps) {
  std::vector<FeatureMap<T>> views;
  for (const Tensor& map : maps) views.push_back(to_feature_map<T>(map));
  return views;
}

// The second fence behind the checks in Python: a kernel must not read out of bounds whatever calls it.
inline void check_maps(const std::vector<Tensor>& maps, const char* op) {
  STD_TORCH_CHECK(!maps.empty(), op, " takes at least one map");
  for (const Tensor& map : maps) {
    STD_TORCH_CHECK(map.dim() == 4, op, " takes maps [N, C, H, W], got ", map.dim(), " dimensions");
    STD_TORCH_CHECK(map.scalar_type() == maps[0].scalar_type(), op, " takes maps of one dtype");
    STD_TORCH_CHECK(map.size(0) == maps[0].size(0) && map.size(1) == maps[0].size(1), op,
                    " takes maps of one batch and channel count");
    STD_TORCH_CHECK(map.is_cuda() == maps[0].is_cuda() && map.get_device_index() == maps[0].get_device_index(), op,
                    " takes maps on one device");
    STD_TORCH_CHECK(map.size(2) > 0 && map.size(3) > 0 && map.size(2) <= INT32_MAX && map.size(3) <= INT32_MAX, op,
                    " takes maps of at least 1 x 1 pixel");
  }
}

}  // namespace fpn_fast
