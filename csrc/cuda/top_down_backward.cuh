// SPDX-License-Identifier: Apache-2.0
// Gradient of the top-down merge of maps of any sizes and strides, and bilinear, in one launch for the whole pathway:
// see top_down.cuh. It is gathered, without atomics or zero fill.
//
// Note [Tiles of the coarsest map]
// With nearest sources every pixel has one parent, so the pixels under a tile of the coarsest map belong to no other
// tile. A block owns such a tile and walks up the levels, with a barrier after each. It reads each gradient once, finds
// the sums of the previous level in cache, and writes every value once. Bilinear tiles overlap, so bilinear takes one
// launch per level.
#pragma once

#include "../common/resample.h"
#include "launch.h"
#include "top_down.cuh"
#include "vector.cuh"

namespace fpn_fast {

template <class T>
struct GradientPathway {
  int levels;
  int grads;  // `levels`, or one fewer if the pathway ends at the coarsest map, which is its own lateral
  bool average;
  FeatureMap<const T> grad[kMaxLevels];  // of the merged maps
  FeatureMap<T> sum[kMaxLevels];         // of the laterals; [0] is unused, because it equals grad[0]
  Axis<acc_type<T>> rows[kMaxLevels - 1], cols[kMaxLevels - 1];
  int tile_rows, tile_cols;
  unsigned row_tiles, col_tiles;
  unsigned lane_bits;  // channels_last: log2 of the threads along the channels
};

// Tasks per thread that keep a block busy.
constexpr int kTasksPerThread = 2;

template <class T, bool kChannelsLast>
LaunchConfig top_down_backward_launch(GradientPathway<T>& pathway) {
  const FeatureMap<T>& coarsest = pathway.sum[pathway.levels - 1];
  const FeatureMap<T>& finest = pathway.sum[1];
  const int64_t chunks = ((kChannelsLast ? finest.channels : finest.width) + kVec<T> - 1) / kVec<T>;
  const auto tiles = [](int64_t size, int64_t tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  // Pixels of level 1 under a pixel of the coarsest map, along each axis.
  const int64_t rows_under = std::max(1, finest.height / coarsest.height);
  const int64_t cols_under = std::max(1, finest.width / coarsest.width);
  const int64_t wanted = kTasksPerThread * kTopDownThreads;
  pathway.lane_bits = 0;
  if (kChannelsLast) {
    while ((1 << pathway.lane_bits) < chunks && (1 << pathway.lane_bits) < kTopDownThreads) ++pathway.lane_bits;
    pathway.tile_rows = 1;
    const int64_t tasks_under = rows_under * cols_under * chunks;
    pathway.tile_cols = static_cast<int>(std::clamp<int64_t>(wanted / tasks_under, 1, coarsest.width));
  } else {
    const int64_t tasks_under = rows_under * chunks;
    pathway.tile_rows = static_cast<int>(std::clamp<int64_t>(wanted / tasks_under, 1, coarsest.height));
    pathway.tile_cols = coarsest.width;
  }
  pathway.row_tiles = tiles(coarsest.height, pathway.tile_rows);
  pathway.col_tiles = tiles(coarsest.width, pathway.tile_cols);
  const int64_t groups = kChannelsLast ? coarsest.batch : coarsest.batch * coarsest.channels;
  return {groups * pathway.row_tiles * pathway.col_tiles, kTopDownThreads};
}

template <class T, bool kBilinear>
struct Weights {
  const Axis<acc_type<T>>& axis;
  int src;

  __device__ __forceinline__ acc_type<T> operator()(int dst) const {
    if constexpr (kBilinear) return bilinear_weight(axis, dst, src);
    return 1;
  }
};

// The gradient of a source with bilinear weights, of `kCount` adjacent elements: two rows by four columns of the pixels
// that read it are loaded before the first is used.
template <class T, int kCount>
__device__ __forceinline__ void gather_weighted(const Axis<acc_type<T>>& row_axis, const Axis<acc_type<T>>& col_axis,
                                                const T* fine, int64_t stride_h, int64_t stride_w, Range rows, int y,
                                                int x, acc_type<T> (&sum)[kCount]) {
  constexpr int kRows = 2, kCols = 4;
  const Range cols = targets<true>(col_axis, x);
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum[k] = 0;
#pragma unroll 1
  for (int fine_x = cols.begin; fine_x < cols.end; fine_x += kCols) {
    acc_type<T> col_weights[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      col_weights[j] = fine_x + j < cols.end ? bilinear_weight(col_axis, fine_x + j, x) : 0;
    }
#pragma unroll 1
    for (int fine_y = rows.begin; fine_y < rows.end; fine_y += kRows) {
      Run<T, kCount> raw[kRows][kCols] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T* row = fine + (fine_y + i) * stride_h;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const bool reads = fine_y + i < rows.end && fine_x + j < cols.end;
          if (reads) raw[i][j] = load_run<kCount>(row + (fine_x + j) * stride_w);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const acc_type<T> row_weight = fine_y + i < rows.end ? bilinear_weight(row_axis, fine_y + i, y) : 0;
        acc_type<T> line[kCount] = {};
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          acc_type<T> values[kCount];
          widen_run(raw[i][j], values);
#pragma unroll
          for (int k = 0; k < kCount; ++k) line[k] += col_weights[j] * values[k];
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += row_weight * line[k];
      }
    }
  }
}

// The gradient of one source pixel by 16 bytes of channels.
template <class T, bool kBilinear>
__device__ __forceinline__ void gather_channels(const GradientPathway<T>& pathway, int level,
                                                const FeatureMap<const T>& fine, int64_t n, int64_t c, int count, int y,
                                                int x, acc_type<T> (&sum)[kVec<T>]) {
  const Range rows = targets<kBilinear>(pathway.rows[level - 1], y);
  if constexpr (kBilinear) {
    if (fine.vectorised) {
      gather_weighted(pathway.rows[level - 1], pathway.cols[level - 1], fine.at(n, c, 0, 0), fine.stride_h,
                      fine.stride_w, rows, y, x, sum);
      return;
    }
  }
  const Range cols = targets<kBilinear>(pathway.cols[level - 1], x);
  if (!kBilinear && rows.end - rows.begin == 2 && cols.end - cols.begin == 2) {
    // A ratio of two, for which Float's four loads are in flight at once.
    acc_type<T> values[4][kVec<T>];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load(fine.at(n, c, rows.begin + i / 2, cols.begin + i % 2), fine.stride_c, count, fine.vectorised, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) sum[i] = (values[0][i] + values[1][i]) + (values[2][i] + values[3][i]);
    return;
  }
  const Weights<T, kBilinear> row_weight{pathway.rows[level - 1], y}, col_weight{pathway.cols[level - 1], x};
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum[i] = 0;
#pragma unroll 1
  for (int fine_y = rows.begin; fine_y < rows.end; ++fine_y) {
    const acc_type<T> weight_y = row_weight(fine_y);
#pragma unroll 1
    for (int fine_x = cols.begin; fine_x < cols.end; ++fine_x) {
      const acc_type<T> weight = weight_y * col_weight(fine_x);
      acc_type<T> values[kVec<T>];
      load(fine.at(n, c, fine_y, fine_x), fine.stride_c, count, fine.vectorised, values);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) sum[i] += weight * values[i];
    }
  }
}

// Adds the merged map's own gradient, if the level has one, and writes the sum.
template <class T>
__device__ __forceinline__ void finish(const GradientPathway<T>& pathway, int level, int64_t n, int64_t c, int y, int x,
                                       int64_t grad_stride, int64_t sum_stride, int count,
                                       acc_type<T> (&sum)[kVec<T>]) {
  if (level < pathway.grads) {
    const FeatureMap<const T>& grad = pathway.grad[level];
    acc_type<T> values[kVec<T>];
    load(grad.at(n, c, y, x), grad_stride, count, grad.vectorised, values);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      sum[i] += values[i];
      if (pathway.average) sum[i] *= acc_type<T>(0.5);
    }
  }
  const FeatureMap<T>& out = pathway.sum[level];
  store(out.at(n, c, y, x), sum_stride, count, out.vectorised, sum);
}

// The gradient of one source pixel and channel, for maps whose columns cannot be read 16 bytes at a time. `rows` read
// it.
template <class T, bool kBilinear>
__device__ __forceinline__ void gather_pixel(const GradientPathway<T>& pathway, int level,
                                             const FeatureMap<const T>& fine, int64_t n, int64_t c, Range rows, int y,
                                             int x) {
  const auto &row_axis = pathway.rows[level - 1], &col_axis = pathway.cols[level - 1];
  acc_type<T> sum[1] = {0};
  if constexpr (kBilinear) {
    gather_weighted(row_axis, col_axis, fine.at(n, c, 0, 0), fine.stride_h, fine.stride_w, rows, y, x, sum);
  } else {
    const Range cols = targets<kBilinear>(col_axis, x);
#pragma unroll 1
    for (int fine_y = rows.begin; fine_y < rows.end; ++fine_y) {
      const T* row = fine.at(n, c, fine_y, 0);
#pragma unroll 1
      for (int fine_x = cols.begin; fine_x < cols.end; ++fine_x) sum[0] += to_acc(row[fine_x * fine.stride_w]);
    }
  }
  if (level < pathway.grads) {
    sum[0] += to_acc(*pathway.grad[level].at(n, c, y, x));
    if (pathway.average) sum[0] *= acc_type<T>(0.5);
  }
  *pathway.sum[level].at(n, c, y, x) = Rounded<T>::from(sum[0]);
}

// The gradients of 16 bytes of columns of one source row.
template <class T, bool kBilinear>
__device__ __forceinline__ void gather_columns(const GradientPathway<T>& pathway, int level,
                                               const FeatureMap<const T>& fine, int64_t n, int64_t c, int y, int x0) {
  const auto &row_axis = pathway.rows[level - 1], &col_axis = pathway.cols[level - 1];
  const FeatureMap<T>& out = pathway.sum[level];
  bool vectorised = false;
  if constexpr (!kBilinear) {
    vectorised =
        fine.vectorised && out.vectorised && col_axis.out == 2 * col_axis.in && row_axis.out == 2 * row_axis.in;
  }
  if (vectorised) {
    acc_type<T> values[4][kVec<T>], sum[kVec<T>];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load(fine.at(n, c, 2 * y + i / 2, 2 * x0 + i % 2 * kVec<T>), 1, kVec<T>, true, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      constexpr int kHalf = kVec<T> / 2;
      const int half = i / kHalf, j = i % kHalf * 2;
      sum[i] = (values[half][j] + values[half][j + 1]) + (values[2 + half][j] + values[2 + half][j + 1]);
    }
    finish(pathway, level, n, c, y, x0, level < pathway.grads ? pathway.grad[level].stride_w : 0, 1, kVec<T>, sum);
    return;
  }
  const Range rows = targets<kBilinear>(row_axis, y);
#pragma unroll 1
  for (int x = x0; x < x0 + kVec<T> && x < out.width; ++x) {
    gather_pixel<T, kBilinear>(pathway, level, fine, n, c, rows, y, x);
  }
}

// The rows or columns of `level` under [begin, end) of the coarsest map.
template <class T>
__device__ __forceinline__ Range region(const Axis<T>* axes, int coarsest, int level, int begin, int end) {
#pragma unroll 1
  for (int k = coarsest - 1; k >= level; --k) {
    begin = first_target<false>(axes[k], begin);
    end = first_target<false>(axes[k], end);
  }
  return {begin, end};
}

template <class T, bool kChannelsLast, bool kBilinear>
__global__ void __launch_bounds__(kTopDownThreads, kBilinear ? kBilinearBlocks : kTopDownBlocks)
    top_down_backward_kernel(const __grid_constant__ GradientPathway<T> pathway) {
  const int coarsest = kBilinear ? 1 : pathway.levels - 1;
  const FeatureMap<T>& coarsest_map = pathway.sum[coarsest];
  unsigned block = blockIdx.x;
  const int tile_x = block % pathway.col_tiles * pathway.tile_cols;
  block /= pathway.col_tiles;
  const int tile_y = block % pathway.row_tiles * pathway.tile_rows;
  block /= pathway.row_tiles;
  const int tile_right = min(tile_x + pathway.tile_cols, coarsest_map.width);
  const int tile_bottom = min(tile_y + pathway.tile_rows, coarsest_map.height);
  const int64_t channels = coarsest_map.channels;
#pragma unroll 1
  for (int level = 1; level <= coarsest; ++level) {
    const FeatureMap<const T> fine = level == 1 ? pathway.grad[0] : read_only(pathway.sum[level - 1]);
    const Range rows = region(pathway.rows, coarsest, level, tile_y, tile_bottom);
    const Range cols = region(pathway.cols, coarsest, level, tile_x, tile_right);
    const unsigned width = cols.end - cols.begin;
    if constexpr (kChannelsLast) {
      const unsigned lanes = 1u << pathway.lane_bits;
      const unsigned pixels = (rows.end - rows.begin) * width;
#pragma unroll 1
      for (unsigned pixel = threadIdx.x >> pathway.lane_bits; pixel < pixels;
           pixel += kTopDownThreads >> pathway.lane_bits) {
        const int y = rows.begin + pixel / width, x = cols.begin + pixel % width;
#pragma unroll 1
        for (int64_t c = int64_t{threadIdx.x & (lanes - 1)} * kVec<T>; c < channels; c += lanes * kVec<T>) {
          const int count = static_cast<int>(channels - c < kVec<T> ? channels - c : kVec<T>);
          acc_type<T> sum[kVec<T>];
          gather_channels<T, kBilinear>(pathway, level, fine, block, c, count, y, x, sum);
          finish(pathway, level, block, c, y, x, level < pathway.grads ? pathway.grad[level].stride_c : 0,
                 pathway.sum[level].stride_c, count, sum);
        }
      }
    } else {
      const int64_t n = block / static_cast<unsigned>(channels), c = block % static_cast<unsigned>(channels);
      const unsigned chunks = (width + kVec<T> - 1) / kVec<T>;
      const unsigned tasks = (rows.end - rows.begin) * chunks;
#pragma unroll 1
      for (unsigned task = threadIdx.x; task < tasks; task += kTopDownThreads) {
        const int y = rows.begin + task / chunks, x = task % chunks * kVec<T>;
        gather_columns<T, kBilinear>(pathway, level, fine, n, c, y, x);
      }
    }
    // The next level reads what other threads of this block wrote.
    __syncthreads();
  }
}

// The part with the gradients of laterals first + 1 to `last`, computed from that of lateral `first`.
template <class T>
GradientPathway<T> part_of_gradient(const std::vector<FeatureMap<const T>>& grads,
                                    const std::vector<FeatureMap<T>>& sums, size_t first, size_t last, Resample mode,
                                    bool average) {
  GradientPathway<T> pathway{};
  pathway.levels = static_cast<int>(last - first) + 1;
  pathway.grads = pathway.levels - (last == grads.size());
  pathway.average = average;
  for (size_t level = first; level <= last; ++level) {
    const size_t i = level - first;
    if (level < grads.size()) pathway.grad[i] = i == 0 && first > 0 ? read_only(sums[first - 1]) : grads[level];
    if (i == 0) continue;
    pathway.sum[i] = sums[level - 1];
    const FeatureMap<const T> fine = level == 1 ? grads[0] : read_only(sums[level - 2]);
    pathway.rows[i - 1] = make_axis<acc_type<T>>(pathway.sum[i].height, fine.height, mode);
    pathway.cols[i - 1] = make_axis<acc_type<T>>(pathway.sum[i].width, fine.width, mode);
  }
  return pathway;
}

// Finest levels first.
template <class T, bool kChannelsLast, class Launch>
void gather_in_launches(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                        Resample mode, bool average, const Launch& launch) {
  const size_t step = mode == Resample::kNearest ? kMaxLevels - 1 : 1;
  for (size_t first = 0; first < sums.size(); first += step) {
    const size_t last = std::min(first + step, sums.size());
    GradientPathway<T> pathway = part_of_gradient(grads, sums, first, last, mode, average);
    const LaunchConfig config = top_down_backward_launch<T, kChannelsLast>(pathway);
    mode == Resample::kNearest ? launch(top_down_backward_kernel<T, kChannelsLast, false>, config, pathway)
                               : launch(top_down_backward_kernel<T, kChannelsLast, true>, config, pathway);
  }
}

}  // namespace fpn_fast
