// SPDX-License-Identifier: Apache-2.0
// Copies of maps in the other memory format. RoIAlign takes so much less time in channels_last that it copies
// channels_first maps where there are enough RoIs. The memory's bandwidth limits the copies.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "launch.h"
#include "scratch.h"
#include "vector.cuh"

namespace fpn_fast {

// Channels and pixels of a block: 128 bytes of 16-bit channels, a cache line.
constexpr int kTransposeTile = 64;
constexpr int kTransposeThreads = 256;
constexpr int kMaxTransposed = 8;

// A map whose planes and images are dense.
template <class T>
struct TransposedMap {
  T* planes;  // [batch, channels, pixels]
  T* rows;    // [batch, pixels, channels]
  int64_t pixels;
  bool wide;  // whether planes can be accessed 16 bytes at a time
  unsigned first_block, pixel_tiles;
};

template <class T>
struct MapTransposition {
  TransposedMap<T> maps[kMaxTransposed];
  int count;
  int64_t channels;
  unsigned channel_tiles;
};

// Scratch memory for `map` in channels_last.
template <class T>
FeatureMap<T> copy_in_rows(Scratch& scratch, const FeatureMap<T>& map) {
  FeatureMap<T> copy = map;
  copy.data = scratch.take<std::remove_const_t<T>>(map.batch * map.channels * map.height * map.width);
  copy.stride_c = 1, copy.stride_w = map.channels, copy.stride_h = map.width * map.channels;
  copy.stride_n = map.height * copy.stride_h;
  return copy;
}

// Whether `map` is channels_first, dense, and of channels whose copy can be accessed 16 bytes at a time.
template <class T>
bool has_dense_planes(const FeatureMap<T>& map) {
  const int64_t pixels = int64_t{map.height} * map.width;
  return map.channels % kVec<T> == 0 && map.stride_w == 1 && (map.height == 1 || map.stride_h == map.width) &&
         map.stride_c == pixels && (map.batch == 1 || map.stride_n == map.channels * pixels);
}

// Columns of a tile in shared memory: an odd number of words, so that neighbouring rows are in different banks.
template <class T>
constexpr int kTransposePitch = kTransposeTile + (sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1);

template <class T, bool kToRows>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_maps_kernel(const __grid_constant__ MapTransposition<T> transposition) {
  constexpr int kWide = kTransposeTile / kVec<T>;
  __shared__ T tile[kTransposeTile][kTransposePitch<T>];
  int which = transposition.count - 1;
  while (blockIdx.x < transposition.maps[which].first_block) --which;
  const TransposedMap<T>& map = transposition.maps[which];
  unsigned index = blockIdx.x - map.first_block;
  const int64_t first_channel = int64_t{index % transposition.channel_tiles} * kTransposeTile;
  index /= transposition.channel_tiles;
  const int64_t first_pixel = int64_t{index % map.pixel_tiles} * kTransposeTile, image = index / map.pixel_tiles;
  T* planes = map.planes + (image * transposition.channels + first_channel) * map.pixels + first_pixel;
  T* rows = map.rows + (image * map.pixels + first_pixel) * transposition.channels + first_channel;
  const int channels = static_cast<int>(min(transposition.channels - first_channel, int64_t{kTransposeTile}));
  const int pixels = static_cast<int>(min(map.pixels - first_pixel, int64_t{kTransposeTile}));

  const auto of_planes = [&] {
    if (map.wide) {
#pragma unroll
      for (int i = 0; i < kTransposeTile * kWide / kTransposeThreads; ++i) {
        const int number = i * kTransposeThreads + threadIdx.x;
        const int channel = number / kWide, pixel = number % kWide * kVec<T>;
        if (channel >= channels || pixel >= pixels) continue;
        T* place = planes + channel * map.pixels + pixel;
        T elements[kVec<T>];
        if constexpr (kToRows) {
          const uint4 raw = *reinterpret_cast<const uint4*>(place);
          memcpy(elements, &raw, sizeof raw);
#pragma unroll
          for (int j = 0; j < kVec<T>; ++j) tile[channel][pixel + j] = elements[j];
        } else {
#pragma unroll
          for (int j = 0; j < kVec<T>; ++j) elements[j] = tile[channel][pixel + j];
          uint4 raw;
          memcpy(&raw, elements, sizeof raw);
          store_raw(place, raw);
        }
      }
      return;
    }
    constexpr int kRows = kTransposeThreads / kTransposeTile;
    const int pixel = threadIdx.x % kTransposeTile;
    if (pixel >= pixels) return;
    int channel = threadIdx.x / kTransposeTile;
    T* place = planes + channel * map.pixels + pixel;
#pragma unroll 8
    for (; channel < channels; channel += kRows, place += kRows * map.pixels) {
      if constexpr (kToRows) {
        tile[channel][pixel] = *place;
      } else {
        *place = tile[channel][pixel];
      }
    }
  };
  const auto of_rows = [&] {
#pragma unroll
    for (int i = 0; i < kTransposeTile * kWide / kTransposeThreads; ++i) {
      const int number = i * kTransposeThreads + threadIdx.x;
      const int pixel = number / kWide, channel = number % kWide * kVec<T>;
      if (channel >= channels || pixel >= pixels) continue;
      T* place = rows + pixel * transposition.channels + channel;
      T elements[kVec<T>];
      if constexpr (kToRows) {
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) elements[j] = tile[channel + j][pixel];
        uint4 raw;
        memcpy(&raw, elements, sizeof raw);
        store_raw(place, raw);
      } else {
        const uint4 raw = *reinterpret_cast<const uint4*>(place);
        memcpy(elements, &raw, sizeof raw);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) tile[channel + j][pixel] = elements[j];
      }
    }
  };
  if constexpr (kToRows) {
    of_planes();
    __syncthreads();
    of_rows();
  } else {
    of_rows();
    __syncthreads();
    of_planes();
  }
}

// Copies planes[i] to rows[i] = copy_in_rows(planes[i]), or the reverse. All maps have the same channels.
template <bool kToRows, class T, class Launch>
void transpose_in_launch(const std::vector<FeatureMap<T>>& planes, const std::vector<FeatureMap<T>>& rows,
                         const Launch& launch) {
  using Element = std::remove_const_t<T>;
  MapTransposition<Element> transposition{};
  transposition.count = static_cast<int>(planes.size()), transposition.channels = planes[0].channels;
  transposition.channel_tiles = static_cast<unsigned>(ceil_div(planes[0].channels, kTransposeTile));
  int64_t blocks = 0;
  for (size_t i = 0; i < planes.size(); ++i) {
    const FeatureMap<T>& map = planes[i];
    const int64_t pixels = int64_t{map.height} * map.width, tiles = ceil_div(pixels, kTransposeTile);
    const bool wide = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && pixels % kVec<T> == 0;
    transposition.maps[i] = {const_cast<Element*>(map.data), const_cast<Element*>(rows[i].data), pixels, wide,
                             static_cast<unsigned>(blocks),  static_cast<unsigned>(tiles)};
    blocks += map.batch * tiles * transposition.channel_tiles;
  }
  launch(transpose_maps_kernel<Element, kToRows>, LaunchConfig{blocks, kTransposeThreads}, transposition);
}

}  // namespace fpn_fast
