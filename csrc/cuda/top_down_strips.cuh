// SPDX-License-Identifier: Apache-2.0
// Note [Halving pathways] for channels_first: a thread takes a strip of columns under one row of the coarsest map. Its
// rows are adjacent to those of the next threads at every level.
//
// Wide strips are for sizes that double exactly, and widths to which they add up. They have 16 bytes of the finest map
// and half as many of each coarser one, down to a single element, so every access is aligned. Beyond that, 2 or 4
// adjacent threads have the same elements: all of them read these, and the first one writes them. Other strips have a
// single column of the finest map, so 2, 4 or 8 threads have the same elements of the others.
#pragma once

#include "top_down_halving.cuh"

namespace fpn_fast {

constexpr int kStripThreads = 256;

template <class T, bool kWide, int kLevels>
struct Strip {
  static constexpr int kDoublings = !kWide ? 0 : sizeof(T) == 2 ? 3 : sizeof(T) == 4 ? 2 : 1;
  static_assert(!kWide || 1 << kDoublings == kVec<T>);
  static constexpr int rows(int level) { return 1 << (kLevels - 1 - level); }
  static constexpr int columns(int level) { return level < kDoublings ? 1 << (kDoublings - level) : 1; }
  // log2 of the threads that have the same elements.
  static constexpr int sharing(int level) { return level < kDoublings ? 0 : level - kDoublings; }

  template <int kLevel>
  struct Rows {
    Run<T, columns(kLevel)> row[rows(kLevel)];
  };

  const HalvingSizes& sizes;
  unsigned row;     // of the coarsest maps, all planes
  unsigned plane;   // not of a wide strip
  unsigned y;       // of the coarsest map; not of a wide strip
  unsigned column;  // in strips

  __device__ __forceinline__ unsigned first_column(int level) const {
    return (column * columns(level)) >> sharing(level);
  }
  // Of the rows of a level, those that the map has.
  __device__ __forceinline__ int height(int level) const {
    if constexpr (kWide) return rows(level);
    const bool inside = first_column(level) < static_cast<unsigned>(sizes.width[level]);
    return inside ? sizes.height[level] - static_cast<int>(y) * rows(level) : 0;
  }
  // Of the first row. The next ones follow at 32-bit distances.
  __device__ __forceinline__ int64_t offset(int level) const {
    const int64_t first =
        kWide ? int64_t{row} * rows(level) : int64_t{plane} * sizes.height[level] + int64_t{y} * rows(level);
    return first * sizes.width[level] + first_column(level);
  }

  // Zero where there is no row or column.
  template <int kLevel>
  __device__ __forceinline__ Rows<kLevel> load(const T* map) const {
    const T* first = map + offset(kLevel);
    const int count = height(kLevel);
    Rows<kLevel> values{};
#pragma unroll
    for (int i = 0; i < rows(kLevel); ++i) {
      if (i < count) values.row[i] = load_run<columns(kLevel)>(first + i * sizes.width[kLevel]);
    }
    return values;
  }
  template <int kLevel>
  __device__ __forceinline__ void store(T* map, const Rows<kLevel>& values) const {
    if (column % (1u << sharing(kLevel)) != 0) return;
    T* first = map + offset(kLevel);
    const int count = height(kLevel);
#pragma unroll
    for (int i = 0; i < rows(kLevel); ++i) {
      if (i < count) store_run(first + i * sizes.width[kLevel], values.row[i]);
    }
  }
};

template <class T, bool kWide, int kLevels>
__device__ __forceinline__ Strip<T, kWide, kLevels> find_strip(const HalvingSizes& sizes, unsigned task) {
  using S = Strip<T, kWide, kLevels>;
  const unsigned width = kWide ? sizes.width[0] / kVec<T> : sizes.width[kLevels - 1] << (kLevels - 1);
  const unsigned row = task / width, column = task - row * width;
  const unsigned height = sizes.height[kLevels - 1], plane = kWide ? 0 : row / height;
  return {sizes, row, plane, row - plane * height, column};
}

template <int kLevel, class T, bool kWide, int kLevels>
__device__ __forceinline__ auto merge_strip(const HalvingPathway<T>& pathway, const Strip<T, kWide, kLevels>& strip) {
  auto values = strip.template load<kLevel>(pathway.lateral[kLevel]);
  if constexpr (kLevel + 1 < kLevels) {
    using S = Strip<T, kWide, kLevels>;
    const auto top = merge_strip<kLevel + 1>(pathway, strip);
#pragma unroll
    for (int i = 0; i < S::rows(kLevel); ++i) {
      if constexpr (kLevel < S::kDoublings) {
        values.row[i] = fused(values.row[i], doubled(top.row[i / 2]), pathway.average);
      } else {
        values.row[i] = fused(values.row[i], top.row[i / 2], pathway.average);
      }
    }
    strip.template store<kLevel>(pathway.merged[kLevel], values);
  }
  return values;
}

template <class T, bool kWide, int kLevels>
__global__ void __launch_bounds__(kStripThreads)
    top_down_strips_kernel(const __grid_constant__ HalvingPathway<T> pathway) {
  const unsigned task = blockIdx.x * kStripThreads + threadIdx.x;
  if (task < pathway.sizes.tasks) merge_strip<0>(pathway, find_strip<T, kWide, kLevels>(pathway.sizes, task));
}

// The sums of a strip's elements of one level. `mask` has the lanes that have a strip.
template <int kLevel, class T, bool kWide, int kLevels>
__device__ __forceinline__ auto gather_strip(const HalvingGradients<T>& gradients,
                                             const Strip<T, kWide, kLevels>& strip, unsigned mask) {
  using S = Strip<T, kWide, kLevels>;
  typename S::template Rows<kLevel> values;
  if constexpr (kLevel + 1 < kLevels) values = strip.template load<kLevel>(gradients.grad[kLevel]);
  if constexpr (kLevel > 0) {
    const auto fine = gather_strip<kLevel - 1>(gradients, strip, mask);
    constexpr int kColumns = S::columns(kLevel), kFineColumns = S::columns(kLevel - 1);
#pragma unroll
    for (int i = 0; i < S::rows(kLevel); ++i) {
      acc_type<T> above[kFineColumns], below[kFineColumns], sum[kColumns];
      widen_run(fine.row[2 * i], above), widen_run(fine.row[2 * i + 1], below);
      if constexpr (kLevel <= S::kDoublings) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[j] = (above[2 * j] + above[2 * j + 1]) + (below[2 * j] + below[2 * j + 1]);
        }
      } else {
        // A neighbour has the other column.
        constexpr int kOther = 1 << S::sharing(kLevel - 1);
        sum[0] =
            (above[0] + __shfl_xor_sync(mask, above[0], kOther)) + (below[0] + __shfl_xor_sync(mask, below[0], kOther));
      }
      if constexpr (kLevel + 1 < kLevels) {
        values.row[i] = with_own(sum, values.row[i], gradients.average);
      } else {
        values.row[i] = round_to_run<T>(sum);
      }
    }
    strip.template store<kLevel>(gradients.sum[kLevel - 1], values);
  }
  return values;
}

template <class T, bool kWide, int kLevels>
__global__ void __launch_bounds__(kStripThreads)
    top_down_strips_backward_kernel(const __grid_constant__ HalvingGradients<T> gradients) {
  const unsigned task = blockIdx.x * kStripThreads + threadIdx.x;
  // Threads that share elements have strips all or none.
  const bool found = task < gradients.sizes.tasks;
  const unsigned mask = __ballot_sync(~0u, found);
  if (found) gather_strip<kLevels - 1>(gradients, find_strip<T, kWide, kLevels>(gradients.sizes, task), mask);
}

template <class T>
bool is_wide(const HalvingSizes& sizes) {
  return sizes.exact && sizes.width[0] % kVec<T> == 0;
}

// Completes the sizes.
template <class T, bool kWide>
LaunchConfig strip_launch(HalvingSizes& sizes, int levels, int64_t batch) {
  const int64_t width = kWide ? sizes.width[0] / kVec<T> : int64_t{sizes.width[levels - 1]} << (levels - 1);
  const int64_t tasks = batch * sizes.channels * sizes.height[levels - 1] * width;
  sizes.tasks = static_cast<unsigned>(tasks);
  return {ceil_div(tasks, kStripThreads), kStripThreads};
}

template <bool kWide, class T, class Launch>
void merge_strips_in_launch(HalvingPathway<T>& pathway, int levels, int64_t batch, const Launch& launch) {
  const LaunchConfig config = strip_launch<T, kWide>(pathway.sizes, levels, batch);
  if (levels == 2) launch(top_down_strips_kernel<T, kWide, 2>, config, pathway);
  if (levels == 3) launch(top_down_strips_kernel<T, kWide, 3>, config, pathway);
  if (levels == 4) launch(top_down_strips_kernel<T, kWide, 4>, config, pathway);
}

template <bool kWide, class T, class Launch>
void gather_strips_in_launch(HalvingGradients<T>& gradients, int levels, int64_t batch, const Launch& launch) {
  const LaunchConfig config = strip_launch<T, kWide>(gradients.sizes, levels, batch);
  if (levels == 2) launch(top_down_strips_backward_kernel<T, kWide, 2>, config, gradients);
  if (levels == 3) launch(top_down_strips_backward_kernel<T, kWide, 3>, config, gradients);
  if (levels == 4) launch(top_down_strips_backward_kernel<T, kWide, 4>, config, gradients);
}

// These return whether they launched.
template <class T, class Launch>
bool merge_strips_in_launch(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                            bool average, const Launch& launch) {
  HalvingPathway<T> pathway{};
  if (!fill_halving(pathway, laterals, merged, average, false)) return false;
  const int levels = static_cast<int>(laterals.size());
  is_wide<T>(pathway.sizes) ? merge_strips_in_launch<true>(pathway, levels, laterals[0].batch, launch)
                            : merge_strips_in_launch<false>(pathway, levels, laterals[0].batch, launch);
  return true;
}

template <class T, class Launch>
bool gather_strips_in_launch(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                             bool average, const Launch& launch) {
  HalvingGradients<T> gradients{};
  if (!fill_halving(gradients, grads, sums, average, false)) return false;
  const int levels = static_cast<int>(sums.size()) + 1;
  is_wide<T>(gradients.sizes) ? gather_strips_in_launch<true>(gradients, levels, grads[0].batch, launch)
                              : gather_strips_in_launch<false>(gradients, levels, grads[0].batch, launch);
  return true;
}

}  // namespace fpn_fast
