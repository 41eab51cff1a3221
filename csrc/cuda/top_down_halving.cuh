// SPDX-License-Identifier: Apache-2.0
// The nearest merge and its gradient for maps of which each is half as high and wide as the next finer one, rounded up,
// as the maps of a detector's backbone are.
//
// Note [Halving pathways]
// There pixel (y, x) reads pixel (y / 2, x / 2): up to four pixels lie under one of the next coarser map, and only they
// read it. So a thread takes a pixel of a coarse map with every pixel under it. It reads each map once and writes each
// map once, keeps what lies between in registers, and waits for no other thread. Before it uses the first value it has
// issued as many loads as it has registers for. top_down_trees.cuh does so for channels_last, top_down_strips.cuh for
// channels_first.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"
#include "runs.cuh"

namespace fpn_fast {

// With four levels a thread has 64 pixels under one: more would take too many registers.
constexpr int kHalvingLevels = 4;

// The maps of a pathway are dense and start at 16-byte boundaries. Finest first.
struct HalvingSizes {
  int height[kHalvingLevels], width[kHalvingLevels];
  unsigned channels;
  unsigned tasks;  // threads, or groups of them, that have work
  bool exact;      // every size is twice the next coarser one
};

template <class T>
struct HalvingPathway {
  const T* lateral[kHalvingLevels];
  T* merged[kHalvingLevels - 1];
  HalvingSizes sizes;
  bool average;
  unsigned groups, lane_bits;  // channels_last: groups of 2^lane_bits threads cover the channels of a pixel
};

template <class T>
struct HalvingGradients {
  const T* grad[kHalvingLevels - 1];  // of the merged maps
  T* sum[kHalvingLevels - 1];         // of the laterals from the second on
  HalvingSizes sizes;
  bool average;
  unsigned groups, lane_bits;
};

// Adds a merged map's own gradient to what the pixels under it gave.
template <class T, int kCount>
__device__ __forceinline__ Run<T, kCount> with_own(acc_type<T> (&sum)[kCount], const Run<T, kCount>& own,
                                                   bool average) {
  acc_type<T> values[kCount];
  widen_run(own, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum[i] = add(sum[i], values[i]);
    if (average) sum[i] = multiply(sum[i], acc_type<T>(0.5));
  }
  return round_to_run<T>(sum);
}

// Whether `map` fills its memory, in this format, from a 16-byte boundary on.
template <class T>
bool is_dense(const FeatureMap<T>& map, bool channels_last) {
  const int64_t height = map.height, width = map.width, pixels = height * width;
  const auto has = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
  return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && has(map.batch, map.stride_n, map.channels * pixels) &&
         has(map.channels, map.stride_c, channels_last ? 1 : pixels) &&
         has(height, map.stride_h, channels_last ? width * map.channels : width) &&
         has(width, map.stride_w, channels_last ? map.channels : 1);
}

// Whether the kernels take these maps, finest first. Fills in their sizes.
template <class T>
bool are_halving(const std::vector<FeatureMap<const T>>& maps, bool channels_last, HalvingSizes& sizes) {
  if (maps.size() < 2 || maps.size() > kHalvingLevels) return false;
  sizes = {};
  sizes.channels = static_cast<unsigned>(maps[0].channels);
  sizes.exact = true;
  for (size_t level = 0; level < maps.size(); ++level) {
    const int height = maps[level].height, width = maps[level].width;
    if (!is_dense(maps[level], channels_last)) return false;
    sizes.height[level] = height, sizes.width[level] = width;
    if (level == 0) continue;
    const int fine_height = maps[level - 1].height, fine_width = maps[level - 1].width;
    if (height != (fine_height + 1) / 2 || width != (fine_width + 1) / 2) return false;
    sizes.exact = sizes.exact && fine_height == 2 * height && fine_width == 2 * width;
  }
  // PyTorch's source is floor(x * float32(in / out)). With out = 2 in that is x / 2 for every x that float32 has. With
  // out = 2 in - 1 the product is at least 1 / out below the next integer, and rounding takes less than out / 2^24.
  const int most = sizes.exact ? 1 << 24 : 1 << 12;
  if (sizes.height[0] > most || sizes.width[0] > most) return false;
  // Tasks are counted in 32 bits. Up to eight share a pixel.
  const FeatureMap<const T>& last = maps.back();
  return last.batch * last.channels * last.height * last.width <= INT32_MAX / 8;
}

// The maps of each argument, or false where the kernels do not take them.
template <class T>
bool fill_halving(HalvingPathway<T>& pathway, const std::vector<FeatureMap<const T>>& laterals,
                  const std::vector<FeatureMap<T>>& merged, bool average, bool channels_last) {
  if (!are_halving(laterals, channels_last, pathway.sizes)) return false;
  pathway.average = average;
  for (size_t level = 0; level < laterals.size(); ++level) {
    pathway.lateral[level] = laterals[level].data;
    if (level == merged.size()) continue;
    if (!is_dense(merged[level], channels_last)) return false;
    pathway.merged[level] = merged[level].data;
  }
  return true;
}

template <class T>
bool fill_halving(HalvingGradients<T>& gradients, const std::vector<FeatureMap<const T>>& grads,
                  const std::vector<FeatureMap<T>>& sums, bool average, bool channels_last) {
  std::vector<FeatureMap<const T>> maps = {grads[0]};
  for (const FeatureMap<T>& sum : sums) maps.push_back(read_only(sum));
  if (!are_halving(maps, channels_last, gradients.sizes)) return false;
  gradients.average = average;
  for (size_t level = 0; level < grads.size(); ++level) {
    if (!is_dense(grads[level], channels_last)) return false;
    gradients.grad[level] = grads[level].data, gradients.sum[level] = sums[level].data;
  }
  return true;
}

}  // namespace fpn_fast
