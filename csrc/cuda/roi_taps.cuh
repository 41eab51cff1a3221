// SPDX-License-Identifier: Apache-2.0
// Weighted sums of several channels at once, for multi-level RoIAlign and its gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/roi_align_arguments.h"
#include "vector.cuh"

namespace fpn_fast {

template <class T>
struct WeightedSource {
  const T* address;
  acc_type<T> weight;
};

template <class acc_t, int kWidth>
__device__ __forceinline__ void add_weighted(acc_t weight, const acc_t (&values)[kWidth], acc_t (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += weight * values[i];
}

// A global address as one integer. Otherwise the compiler splits and rebuilds it for each access.
template <class T>
__device__ __forceinline__ const T* whole(const T* address) {
  size_t number = __cvta_generic_to_global(address);
  asm volatile("" : "+l"(number));
  address = static_cast<const T*>(__cvta_global_to_generic(number));
  return address;
}

// The channels of a thread as one aligned 16-byte access, with kInFlight of them in flight.
template <class T, int kInFlight>
struct VectorChannels {
  // Adds source_at(0) to source_at(count - 1) to `sum`, in order. Each is called once.
  template <class SourceAt>
  __device__ __forceinline__ void add_sources(int count, const SourceAt& source_at, acc_type<T> (&sum)[kVec<T>]) const {
    int first = 0;
#pragma unroll 1
    for (; first + kInFlight <= count; first += kInFlight) add_group<kInFlight>(first, source_at, sum);
    add_rest<kInFlight - 1>(first, count, source_at, sum);
  }

  __device__ __forceinline__ void put(T* target, const acc_type<T> (&values)[kVec<T>]) const {
    store(target, 1, kVec<T>, true, values);
  }

 private:
  template <int kSources, class SourceAt>
  __device__ __forceinline__ static void add_rest(int first, int count, const SourceAt& source_at,
                                                  acc_type<T> (&sum)[kVec<T>]) {
    if constexpr (kSources > 0) {
      if (count - first == kSources) {
        add_group<kSources>(first, source_at, sum);
      } else {
        add_rest<kSources - 1>(first, count, source_at, sum);
      }
    }
  }

  // kSources loads in flight, in the storage type. Widened values would take twice the registers.
  template <int kSources, class SourceAt>
  __device__ __forceinline__ static void add_group(int first, const SourceAt& source_at, acc_type<T> (&sum)[kVec<T>]) {
    uint4 raw[kSources];
    acc_type<T> weights[kSources];
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const WeightedSource<T> source = source_at(first + i);
      raw[i] = *reinterpret_cast<const uint4*>(source.address);
      weights[i] = source.weight;
    }
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      acc_type<T> values[kVec<T>];
      widen<T>(raw[i], values);
      add_weighted(weights[i], values, sum);
    }
  }
};

// Up to kVec<T> channels with any strides.
template <class T>
struct StridedChannels {
  int64_t source_stride, target_stride;
  int count;

  template <class SourceAt>
  __device__ __forceinline__ void add_sources(int sources, const SourceAt& source_at,
                                              acc_type<T> (&sum)[kVec<T>]) const {
#pragma unroll 1
    for (int i = 0; i < sources; ++i) {
      const WeightedSource<T> source = source_at(i);
      const T* element = whole(source.address);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j, element += source_stride) {
        if (j < count) sum[j] += source.weight * to_acc(*element);
      }
    }
  }

  __device__ __forceinline__ void put(T* target, const acc_type<T> (&values)[kVec<T>]) const {
    store(target, target_stride, count, false, values);
  }
};

// Marks the maps that can be accessed 16 bytes of channels at a time. Returns whether all can.
template <class T>
bool mark_vectorised(std::vector<FeatureMap<const T>>& sources, std::vector<FeatureMap<T>>& targets) {
  bool all = true;
  for (auto& map : sources) mark_vectorised(map, true), all &= map.vectorised;
  for (auto& map : targets) mark_vectorised(map, true), all &= map.vectorised;
  return all;
}

// Whether copying channels_first maps takes less time than channels_last saves: the bins are at least a quarter of the
// pixels. By the model of an H200, a bin of a channel saves 7 ps and a pixel of a channel costs 1 or 2.
template <class acc_t, class T>
bool pays_to_copy(const RoiAlignArguments<acc_t>& arguments, const std::vector<FeatureMap<T>>& maps) {
  int64_t pixels = 0;
  for (const auto& map : maps) pixels += map.batch * map.height * map.width;
  return 4 * arguments.count * arguments.pooled_height * arguments.pooled_width >= pixels;
}

}  // namespace fpn_fast
