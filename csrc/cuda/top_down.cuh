// SPDX-License-Identifier: Apache-2.0
// The top-down merge of maps of any sizes and strides, and bilinear, in one launch for the whole pathway. Where sizes
// halve and maps are dense, top_down_trees.cuh and top_down_strips.cuh take a fraction of its instructions. These limit
// it: for the benchmark's channels_first pathway in bfloat16 a GPU issues them three times as long as it moves the
// bytes.
//
// Note [Recomputed chain]
// The merged map of level l needs that of level l + 1, which other blocks write. Instead of synchronising, a thread
// recomputes the coarser values that it needs from the coarser laterals. It rounds at every level like a sequence of
// launches, so the results are bit-equal. The additional reads are of small maps, from cache. A thread owns two rows by
// two pixels (channels_last) or two rows by 16 bytes (channels_first), so that at a ratio of two it computes each
// coarser value once.
// Bilinear would need four times as many taps per level, so it takes one launch per level.
#pragma once

#include <vector>

#include "../common/resample.h"
#include "launch.h"
#include "runs.cuh"
#include "vector.cuh"

namespace fpn_fast {

constexpr int kMaxLevels = 8;

// How the blocks of one level divide its merged map. 32-bit, because 64-bit divisions are slow.
struct TopDownTiling {
  unsigned first_block;  // after the blocks of finer levels
  unsigned per_row;      // channels_last: blocks per pair of rows; channels_first: blocks per plane
  unsigned row_pairs;
  unsigned inner_chunks;  // 16-byte vectors along the inner axis
  unsigned lane_bits;     // channels_last: log2 of the threads along the channels
};

// The maps of a pathway, finest first. It is passed by value: 8 levels fill a third of the parameter space.
template <class T>
struct Pathway {
  int levels;
  bool average;
  FeatureMap<const T> lateral[kMaxLevels];
  FeatureMap<T> merged[kMaxLevels - 1];
  Axis<acc_type<T>> rows[kMaxLevels - 1], cols[kMaxLevels - 1];
  TopDownTiling tiling[kMaxLevels - 1];
};

// 8 warps. Half and BFloat16 are widened in the branch that loads them, so that a warp has one of their loads in
// flight.
constexpr int kTopDownThreads = 256;
// Allows 80 registers: 24 warps on a multiprocessor. With 2 the compiler takes up to 124; without a bound it spills at
// 64.
constexpr int kTopDownBlocks = 3;
// Bilinear has ten 16-byte loads in flight, so that fewer warps do.
constexpr int kBilinearBlocks = 2;

template <class T, bool kChannelsLast>
LaunchConfig top_down_launch(Pathway<T>& pathway) {
  int64_t blocks = 0;
  for (int level = 0; level + 1 < pathway.levels; ++level) {
    const FeatureMap<T>& map = pathway.merged[level];
    const int64_t inner = kChannelsLast ? map.channels : map.width;
    const int64_t chunks = (inner + kVec<T> - 1) / kVec<T>;
    const int64_t row_pairs = (map.height + 1) / 2;
    unsigned lane_bits = 0;
    int64_t per_row = (row_pairs * chunks + kTopDownThreads - 1) / kTopDownThreads;
    if (kChannelsLast) {
      while ((1 << lane_bits) < chunks && (1 << lane_bits) < kTopDownThreads) ++lane_bits;
      const int pairs_per_block = kTopDownThreads >> lane_bits;
      per_row = ((map.width + 1) / 2 + pairs_per_block - 1) / pairs_per_block;
    }
    pathway.tiling[level] = {static_cast<unsigned>(blocks), static_cast<unsigned>(per_row),
                             static_cast<unsigned>(row_pairs), static_cast<unsigned>(chunks), lane_bits};
    blocks += per_row * (kChannelsLast ? map.batch * row_pairs : map.batch * map.channels);
  }
  return {blocks, kTopDownThreads};
}

template <class T>
__device__ __forceinline__ acc_type<T> fuse(acc_type<T> lateral, acc_type<T> top, bool average) {
  const acc_type<T> sum = round_to<T>(lateral + top);
  return average ? round_to<T>(sum * acc_type<T>(0.5)) : sum;
}

// Follows pixel (y, x) of level `from` along the nearest sources to level `to`.
template <class T>
__device__ __forceinline__ void project(const Pathway<T>& pathway, int from, int to, int& y, int& x) {
  for (int level = from; level < to; ++level) {
    y = nearest_source(pathway.rows[level], y);
    x = nearest_source(pathway.cols[level], x);
  }
}

// merged[level](n, c..., y, x) for 16 bytes of channels: Note [Recomputed chain].
template <class T>
__device__ __forceinline__ void merged_channels(const Pathway<T>& pathway, int level, int64_t n, int64_t c, int count,
                                                int y, int x, acc_type<T> (&value)[kVec<T>]) {
  const int last = pathway.levels - 1;
  for (int k = last; k >= level; --k) {
    int yk = y, xk = x;
    project(pathway, level, k, yk, xk);
    const FeatureMap<const T>& map = pathway.lateral[k];
    acc_type<T> lateral[kVec<T>];
    load(map.at(n, c, yk, xk), map.stride_c, count, map.vectorised, lateral);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      value[i] = k == last ? lateral[i] : fuse<T>(lateral[i], value[i], pathway.average);
    }
  }
}

template <class T>
__device__ __forceinline__ acc_type<T> merged_pixel(const Pathway<T>& pathway, int level, int64_t n, int64_t c, int y,
                                                    int x) {
  const int last = pathway.levels - 1;
  acc_type<T> value = 0;
  for (int k = last; k >= level; --k) {
    int yk = y, xk = x;
    project(pathway, level, k, yk, xk);
    const acc_type<T> lateral = to_acc(*pathway.lateral[k].at(n, c, yk, xk));
    value = k == last ? lateral : fuse<T>(lateral, value, pathway.average);
  }
  return value;
}

// Merges two rows by two pixels by 16 bytes of channels.
template <class T>
__device__ __forceinline__ void merge_pixels(const Pathway<T>& pathway, int level, int64_t n, int64_t c, int y0,
                                             int x0) {
  const FeatureMap<const T>& lateral = pathway.lateral[level];
  const FeatureMap<T>& merged = pathway.merged[level];
  const int64_t left = merged.channels - c;
  const int count = left < kVec<T> ? static_cast<int>(left) : kVec<T>;
  acc_type<T> values[4][kVec<T>];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int y = y0 + i / 2, x = x0 + i % 2;
    if (y < merged.height && x < merged.width) {
      load(lateral.at(n, c, y, x), lateral.stride_c, count, lateral.vectorised, values[i]);
    }
  }
  acc_type<T> top[kVec<T>];
  int top_y = -1, top_x = -1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int y = y0 + i / 2, x = x0 + i % 2;
    if (y >= merged.height || x >= merged.width) continue;
    const int source_y = nearest_source(pathway.rows[level], y), source_x = nearest_source(pathway.cols[level], x);
    if (source_y != top_y || source_x != top_x) {
      merged_channels(pathway, level + 1, n, c, count, source_y, source_x, top);
      top_y = source_y, top_x = source_x;
    }
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) values[i][j] = fuse<T>(values[i][j], top[j], pathway.average);
    store(merged.at(n, c, y, x), merged.stride_c, count, merged.vectorised, values[i]);
  }
}

// Two pixels of a row, bilinear, of vectorised maps: their ten loads are issued before the first value is used.
template <class T>
__device__ __forceinline__ void blend_two_pixels(const Pathway<T>& pathway, int64_t n, int64_t c, int y, int x0) {
  const FeatureMap<const T>&lateral = pathway.lateral[0], &top = pathway.lateral[1];
  const FeatureMap<T>& merged = pathway.merged[0];
  const auto rows = bilinear_source(pathway.rows[0], y);
  const T *above = top.at(n, c, rows.lo, 0), *below = top.at(n, c, rows.hi, 0);
  const T* own = lateral.at(n, c, y, x0);
  const bool two = x0 + 1 < merged.width;
  Taps<acc_type<T>> cols[2];
  Run<T, kVec<T>> laterals[2], taps[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    // The last pixel again where there is no second one.
    const int step = two ? j : 0;
    cols[j] = bilinear_source(pathway.cols[0], x0 + step);
    const int64_t lo = cols[j].lo * top.stride_w, hi = cols[j].hi * top.stride_w;
    laterals[j] = load_run<kVec<T>>(own + step * lateral.stride_w);
    taps[j][0] = load_run<kVec<T>>(above + lo), taps[j][1] = load_run<kVec<T>>(above + hi);
    taps[j][2] = load_run<kVec<T>>(below + lo), taps[j][3] = load_run<kVec<T>>(below + hi);
  }
  T* target = merged.at(n, c, y, x0);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    acc_type<T> values[4][kVec<T>], blend[kVec<T>];
#pragma unroll
    for (int k = 0; k < 4; ++k) widen_run(taps[j][k], values[k]);
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) {
      const acc_type<T> upper = cols[j].weight_lo * values[0][k] + cols[j].weight_hi * values[1][k];
      const acc_type<T> lower = cols[j].weight_lo * values[2][k] + cols[j].weight_hi * values[3][k];
      blend[k] = rows.weight_lo * upper + rows.weight_hi * lower;
    }
    widen_run(laterals[j], values[0]);
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) blend[k] += values[0][k];
    auto sum = round_to_run<T>(blend);
    if (pathway.average) sum = halved(sum);
    if (j == 0 || two) store_run(target + j * merged.stride_w, sum);
  }
}

// The same with four taps per pixel.
template <class T>
__device__ __forceinline__ void merge_pixels_bilinear(const Pathway<T>& pathway, int64_t n, int64_t c, int y0, int x0) {
  const FeatureMap<const T>&lateral = pathway.lateral[0], &top = pathway.lateral[1];
  const FeatureMap<T>& merged = pathway.merged[0];
  if (lateral.vectorised && top.vectorised && merged.vectorised) {
#pragma unroll 1
    for (int y = y0; y < y0 + 2 && y < merged.height; ++y) blend_two_pixels(pathway, n, c, y, x0);
    return;
  }
  const int64_t left = merged.channels - c;
  const int count = left < kVec<T> ? static_cast<int>(left) : kVec<T>;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int y = y0 + i / 2, x = x0 + i % 2;
    if (y >= merged.height || x >= merged.width) continue;
    const auto rows = bilinear_source(pathway.rows[0], y);
    const auto cols = bilinear_source(pathway.cols[0], x);
    acc_type<T> values[kVec<T>], blend[kVec<T>];
    load(lateral.at(n, c, y, x), lateral.stride_c, count, lateral.vectorised, values);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) blend[j] = 0;
    // One row after the other, to save registers.
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
      const int tap_y = row ? rows.hi : rows.lo;
      const acc_type<T> weight = row ? rows.weight_hi : rows.weight_lo;
      acc_type<T> left[kVec<T>], right[kVec<T>];
      load(top.at(n, c, tap_y, cols.lo), top.stride_c, count, top.vectorised, left);
      load(top.at(n, c, tap_y, cols.hi), top.stride_c, count, top.vectorised, right);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) blend[j] += weight * (cols.weight_lo * left[j] + cols.weight_hi * right[j]);
    }
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) values[j] = fuse<T>(values[j], blend[j], pathway.average);
    store(merged.at(n, c, y, x), merged.stride_c, count, merged.vectorised, values);
  }
}

// Merges two rows by 16 bytes of columns.
template <class T>
__device__ __forceinline__ void merge_columns(const Pathway<T>& pathway, int level, int64_t n, int64_t c, int y0,
                                              int x0) {
  const FeatureMap<const T>& lateral = pathway.lateral[level];
  const FeatureMap<T>& merged = pathway.merged[level];
  const int left = merged.width - x0;
  const int count = left < kVec<T> ? left : kVec<T>;
  acc_type<T> values[2][kVec<T>];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (y0 + i < merged.height) {
      load(lateral.at(n, c, y0 + i, x0), lateral.stride_w, count, lateral.vectorised, values[i]);
    }
  }
  // A column and row of the coarser map is computed again only if it differs from the previous one.
  acc_type<T> top[2] = {0, 0};
  int sources[2] = {-1, -1};
  const int rows[2] = {nearest_source(pathway.rows[level], y0), nearest_source(pathway.rows[level], y0 + 1)};
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) {
    if (j >= count) continue;
    const int x = nearest_source(pathway.cols[level], x0 + j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (y0 + i >= merged.height) continue;
      if (x != sources[i]) {
        const bool copy = i == 1 && rows[0] == rows[1];
        top[i] = copy ? top[0] : merged_pixel(pathway, level + 1, n, c, rows[i], x);
        sources[i] = x;
      }
      values[i][j] = fuse<T>(values[i][j], top[i], pathway.average);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (y0 + i < merged.height) {
      store(merged.at(n, c, y0 + i, x0), merged.stride_w, count, merged.vectorised, values[i]);
    }
  }
}

// The same with four taps per pixel, one row after the other: both at once would take twice the registers.
template <class T>
__device__ __forceinline__ void merge_columns_bilinear(const Pathway<T>& pathway, int64_t n, int64_t c, int y0,
                                                       int x0) {
  const FeatureMap<const T>&lateral = pathway.lateral[0], &top = pathway.lateral[1];
  const FeatureMap<T>& merged = pathway.merged[0];
  const int left = merged.width - x0;
  const int count = left < kVec<T> ? left : kVec<T>;
#pragma unroll 1
  for (int y = y0; y < y0 + 2 && y < merged.height; ++y) {
    acc_type<T> values[kVec<T>];
    load(lateral.at(n, c, y, x0), lateral.stride_w, count, lateral.vectorised, values);
    const auto rows = bilinear_source(pathway.rows[0], y);
    const T *above = top.at(n, c, rows.lo, 0), *below = top.at(n, c, rows.hi, 0);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      if (j >= count) continue;
      const auto cols = bilinear_source(pathway.cols[0], x0 + j);
      const int64_t lo = cols.lo * top.stride_w, hi = cols.hi * top.stride_w;
      const acc_type<T> upper = cols.weight_lo * to_acc(above[lo]) + cols.weight_hi * to_acc(above[hi]);
      const acc_type<T> lower = cols.weight_lo * to_acc(below[lo]) + cols.weight_hi * to_acc(below[hi]);
      values[j] = fuse<T>(values[j], rows.weight_lo * upper + rows.weight_hi * lower, pathway.average);
    }
    store(merged.at(n, c, y, x0), merged.stride_w, count, merged.vectorised, values);
  }
}

template <class T, bool kChannelsLast, bool kBilinear>
__global__ void __launch_bounds__(kTopDownThreads, kChannelsLast&& kBilinear ? kBilinearBlocks : kTopDownBlocks)
    top_down_kernel(const __grid_constant__ Pathway<T> pathway) {
  int level = 0;
  while (level + 2 < pathway.levels && blockIdx.x >= pathway.tiling[level + 1].first_block) ++level;
  const TopDownTiling& tiling = pathway.tiling[level];
  const FeatureMap<T>& map = pathway.merged[level];
  const unsigned block = blockIdx.x - tiling.first_block;
  const unsigned row = block / tiling.per_row;
  const unsigned in_row = block - row * tiling.per_row;
  if constexpr (kChannelsLast) {
    const unsigned lanes = 1u << tiling.lane_bits;
    const int x = 2 * (in_row * (kTopDownThreads >> tiling.lane_bits) + (threadIdx.x >> tiling.lane_bits));
    if (x >= map.width) return;
    const unsigned n = row / tiling.row_pairs;
    const int y = 2 * (row - n * tiling.row_pairs);
    for (unsigned chunk = threadIdx.x & (lanes - 1); chunk < tiling.inner_chunks; chunk += lanes) {
      const int64_t c = int64_t{chunk} * kVec<T>;
      if constexpr (kBilinear) {
        merge_pixels_bilinear(pathway, n, c, y, x);
      } else {
        merge_pixels(pathway, level, n, c, y, x);
      }
    }
  } else {
    const unsigned task = in_row * kTopDownThreads + threadIdx.x;
    const unsigned row_pair = task / tiling.inner_chunks;
    if (row_pair >= tiling.row_pairs) return;
    const int x = (task - row_pair * tiling.inner_chunks) * kVec<T>;
    const unsigned channels = static_cast<unsigned>(map.channels);
    const unsigned n = row / channels, c = row - n * channels;
    if constexpr (kBilinear) {
      merge_columns_bilinear(pathway, n, c, 2 * row_pair, x);
    } else {
      merge_columns(pathway, level, n, c, 2 * row_pair, x);
    }
  }
}

template <class T>
Pathway<T> part_of(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                   size_t first, size_t last, Resample mode, bool average) {
  Pathway<T> pathway{};
  pathway.levels = static_cast<int>(last - first) + 1;
  pathway.average = average;
  for (size_t level = first; level <= last; ++level) {
    const size_t i = level - first;
    // A later launch starts from the map that the previous one merged.
    pathway.lateral[i] = level == last && last < merged.size() ? read_only(merged[last]) : laterals[level];
    if (level == last) continue;
    pathway.merged[i] = merged[level];
    pathway.rows[i] = make_axis<acc_type<T>>(laterals[level + 1].height, laterals[level].height, mode);
    pathway.cols[i] = make_axis<acc_type<T>>(laterals[level + 1].width, laterals[level].width, mode);
  }
  return pathway;
}

// Coarsest levels first. One launch, unless the mode is bilinear or there are more levels than a launch holds.
template <class T, bool kChannelsLast, class Launch>
void merge_in_launches(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                       Resample mode, bool average, const Launch& launch) {
  const size_t step = mode == Resample::kNearest ? kMaxLevels - 1 : 1;
  for (size_t last = merged.size(); last > 0;) {
    const size_t first = last > step ? last - step : 0;
    Pathway<T> pathway = part_of(laterals, merged, first, last, mode, average);
    const LaunchConfig config = top_down_launch<T, kChannelsLast>(pathway);
    mode == Resample::kNearest ? launch(top_down_kernel<T, kChannelsLast, false>, config, pathway)
                               : launch(top_down_kernel<T, kChannelsLast, true>, config, pathway);
    last = first;
  }
}

}  // namespace fpn_fast
