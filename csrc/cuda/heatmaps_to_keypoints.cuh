// SPDX-License-Identifier: Apache-2.0
// Keypoints of heatmaps. A block has every eighth strip of a heatmap resized to its box, so that a large person keeps
// several multiprocessors busy; a second launch chooses the highest of the blocks' peaks. A thread walks down a piece
// of a column of the box. It keeps the four resized heatmap rows of that column in registers, so a pixel costs four
// products. The resized map is never stored.
#pragma once

#include "../common/feature_map.h"
#include "../common/heatmaps_to_keypoints.h"
#include "../common/scalar.h"
#include "launch.h"

namespace fpn_fast {

// 8 warps. More would idle for the boxes of most objects.
constexpr int kKeypointThreads = 256;
// Rows whose taps a block computes at a time: 5 KB in float64.
constexpr int kTapRows = 128;
// Rows of a piece. At its first row a thread reads four rows of the heatmap, so short pieces cost more.
constexpr int kPieceRows = 32;
// Blocks of a heatmap. A strip is kTapRows high, so boxes of up to 1024 rows are shared evenly.
constexpr int kKeypointSplits = 8;

template <class T>
struct KeypointSearch {
  const T* heatmaps;    // [boxes, keypoints, height, width]
  const void* corners;  // [boxes, 4]
  bool double_boxes;    // the boxes are double, not float
  int64_t boxes, keypoints;
  int height, width;
  Peak<acc_type<T>>* peaks;  // [boxes, keypoints, kKeypointSplits]
  float* points;             // [boxes, keypoints, 3]
  float* scores;             // [boxes, keypoints]
};

template <class T, class Body>
__device__ __forceinline__ void with_box(const KeypointSearch<T>& search, int64_t map, const Body& body) {
  const int64_t offset = map / search.keypoints * 4;
  if (search.double_boxes) {
    body(KeypointBox<double>(static_cast<const double*>(search.corners) + offset));
  } else {
    body(KeypointBox<float>(static_cast<const float*>(search.corners) + offset));
  }
}

// The peak of column `x`, rows [begin, end) from `top` on. `pixels` is the number of columns of the box.
template <class T, class acc_t = acc_type<T>>
__device__ __forceinline__ Peak<acc_t> highest_of_piece(const T* heatmap, int height, int width,
                                                        const CubicTaps<acc_t>* taps, int top, int begin, int end,
                                                        int x, int pixels) {
  const CubicTaps<acc_t> across = cubic_taps(x, divide(static_cast<acc_t>(width), static_cast<acc_t>(pixels)), width);
  int columns[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) columns[i] = clamp_tap(across.first + i, width);
  acc_t rows[4] = {};
  int first = taps[begin].first - 4;
  Peak<acc_t> peak = no_peak<acc_t>((top + begin) * pixels + x);
#pragma unroll 1
  for (int y = begin; y < end; ++y) {
#pragma unroll 1
    for (; first < taps[y].first; ++first) {
      const T* row = heatmap + int64_t{clamp_tap(first + 4, height)} * width;
      rows[0] = rows[1], rows[1] = rows[2], rows[2] = rows[3];
      rows[3] = blend(across.weights, to_acc(row[columns[0]]), to_acc(row[columns[1]]), to_acc(row[columns[2]]),
                      to_acc(row[columns[3]]));
    }
    const acc_t value = blend(taps[y].weights, rows[0], rows[1], rows[2], rows[3]);
    if (value <= peak.value) continue;
    peak = {value, (top + y) * pixels + x};
    // No later value ranks above the first NaN.
    if (value != value) break;
  }
  return peak;
}

template <class T>
__global__ void __launch_bounds__(kKeypointThreads)
    heatmaps_to_keypoints_kernel(const __grid_constant__ KeypointSearch<T> search) {
  using acc_t = acc_type<T>;
  __shared__ CubicTaps<acc_t> taps[kTapRows];
  __shared__ Peak<acc_t> peaks[kKeypointThreads];
  const int64_t map = blockIdx.x / kKeypointSplits;
  const int split = static_cast<int>(blockIdx.x % kKeypointSplits);
  const int thread = static_cast<int>(threadIdx.x);
  int box_height = 0, box_width = 0;
  with_box(search, map, [&](const auto& box) {
    if (!box.empty()) box_height = box.y.pixels, box_width = box.x.pixels;
  });
  const T* heatmap = search.heatmaps + map * search.height * search.width;
  Peak<acc_t> peak = no_peak<acc_t>();
#pragma unroll 1
  for (int top = split * kTapRows; top < box_height; top += kKeypointSplits * kTapRows) {
    const int rows = min(kTapRows, box_height - top);
    const acc_t scale = divide(static_cast<acc_t>(search.height), static_cast<acc_t>(box_height));
    __syncthreads();
    for (int row = thread; row < rows; row += kKeypointThreads) taps[row] = cubic_taps(top + row, scale, search.height);
    __syncthreads();
    const int pieces = (rows + kPieceRows - 1) / kPieceRows * box_width;
    for (int piece = thread; piece < pieces; piece += kKeypointThreads) {
      const int begin = piece / box_width * kPieceRows;
      const Peak<acc_t> found = highest_of_piece(heatmap, search.height, search.width, taps, top, begin,
                                                 min(begin + kPieceRows, rows), piece % box_width, box_width);
      if (peak.is_below(found)) peak = found;
    }
  }
  peaks[thread] = peak;
  for (int half = kKeypointThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half && peaks[thread].is_below(peaks[thread + half])) peaks[thread] = peaks[thread + half];
  }
  if (thread == 0) search.peaks[blockIdx.x] = peaks[0];
}

// A thread writes a keypoint.
template <class T>
__global__ void __launch_bounds__(kKeypointThreads)
    write_keypoints_kernel(const __grid_constant__ KeypointSearch<T> search) {
  using acc_t = acc_type<T>;
  const int64_t map = int64_t{blockIdx.x} * kKeypointThreads + threadIdx.x;
  if (map >= search.boxes * search.keypoints) return;
  Peak<acc_t> peak = search.peaks[map * kKeypointSplits];
#pragma unroll
  for (int i = 1; i < kKeypointSplits; ++i) {
    const Peak<acc_t> other = search.peaks[map * kKeypointSplits + i];
    if (peak.is_below(other)) peak = other;
  }
  float point[3] = {};
  bool empty = true;
  with_box(search, map, [&](const auto& box) {
    empty = box.empty();
    if (!empty) box.keypoint(peak.position, point);
  });
#pragma unroll
  for (int i = 0; i < 3; ++i) search.points[map * 3 + i] = point[i];
  search.scores[map] = empty ? 0.0f : static_cast<float>(peak.value);
}

template <class T, class Launch>
void search_in_launches(const KeypointSearch<T>& search, const Launch& launch) {
  const int64_t maps = search.boxes * search.keypoints;
  launch(heatmaps_to_keypoints_kernel<T>, LaunchConfig{maps * kKeypointSplits, kKeypointThreads}, search);
  launch(write_keypoints_kernel<T>, LaunchConfig{ceil_div(maps, kKeypointThreads), kKeypointThreads}, search);
}

}  // namespace fpn_fast
