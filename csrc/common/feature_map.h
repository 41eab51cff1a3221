// SPDX-License-Identifier: Apache-2.0
// A kernel's view of a tensor [N, C, H, W].
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fpn_fast {

template <class T>
struct FeatureMap {
  T* data;
  int64_t batch, channels;
  int height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  // Set by `mark_vectorised`: every run of kVec<T> elements along the kernel's inner axis is one aligned 16-byte
  // access.
  bool vectorised = false;

  // Indices are 64-bit before they are multiplied: P2 of a large batch exceeds 2^31 elements.
  HOST_DEVICE T* at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return data + n * stride_n + c * stride_c + y * stride_h + x * stride_w;
  }
};

template <class T>
HOST_DEVICE FeatureMap<const T> read_only(const FeatureMap<T>& map) {
  return {map.data,     map.batch,    map.channels, map.height,   map.width,
          map.stride_n, map.stride_c, map.stride_h, map.stride_w, map.vectorised};
}

// Elements of one 16-byte access, the widest of a GPU thread.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// Sets whether `map` can be accessed 16 bytes at a time along C (channels_last) or W (channels_first). A dimension of
// size one has an arbitrary stride in torch, so that stride is ignored.
template <class T>
void mark_vectorised(FeatureMap<T>& map, bool along_channels) {
  constexpr int kElements = kVec<T>;
  const auto aligned = [](int64_t stride, int64_t size) { return size == 1 || stride % kElements == 0; };
  const int64_t inner_stride = along_channels ? map.stride_c : map.stride_w;
  const int64_t inner_size = along_channels ? map.channels : map.width;
  map.vectorised = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && inner_stride == 1 &&
                   inner_size % kElements == 0 && aligned(map.stride_n, map.batch) &&
                   aligned(map.stride_h, map.height) &&
                   (along_channels ? aligned(map.stride_w, map.width) : aligned(map.stride_c, map.channels));
}

}  // namespace fpn_fast
