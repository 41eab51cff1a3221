// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign in max mode, and its gradient: Note [Winners] in common/roi_align_max.h. The mode is rare, so
// the kernels are simple: a thread owns elements of the output. In the gradient these are pixels of one channel, which
// gather from the RoIs that read their tile (roi_lists.cuh), in order, the bins that can read them.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/feature_map.h"
#include "../common/roi_align_arguments.h"
#include "../common/roi_align_max.h"
#include "../common/scalar.h"
#include "launch.h"
#include "roi_lists.cuh"
#include "roi_tiles.cuh"

namespace fpn_fast {

// 8 warps, which share nothing.
constexpr int kRoiAlignMaxThreads = 256;
// Allows 80 registers: 24 warps on a multiprocessor. float64 would spill.
template <class T>
constexpr int kRoiAlignMaxBlocks = sizeof(T) == 8 ? 2 : 3;

struct MapElement {
  int64_t n, c;
  int y, x;
};

// Element `index` of a map, in the order of a dense map's memory.
template <class T>
__device__ __forceinline__ MapElement element_at(const FeatureMap<T>& map, bool channels_last, int64_t index) {
  MapElement element;
  if (channels_last) element.c = index % map.channels, index /= map.channels;
  element.x = static_cast<int>(index % map.width), index /= map.width;
  element.y = static_cast<int>(index % map.height), index /= map.height;
  if (!channels_last) element.c = index % map.channels, index /= map.channels;
  element.n = index;
  return element;
}

template <class T>
HOST_DEVICE int64_t elements_of(const FeatureMap<T>& map) {
  return map.batch * map.channels * map.height * map.width;
}

template <class T>
struct RoiAlignMaxPooling {
  RoiAlignArguments<acc_type<T>> arguments;
  FeatureMap<const T> feature[kMaxRoiLevels];
  FeatureMap<T> pooled;
  FeatureMap<int> winners;
  bool channels_last;
};

template <class T>
__global__ void __launch_bounds__(kRoiAlignMaxThreads, kRoiAlignMaxBlocks<T>)
    multiscale_roi_align_max_kernel(const __grid_constant__ RoiAlignMaxPooling<T> pooling) {
  using acc_t = acc_type<T>;
  const int64_t index = int64_t{blockIdx.x} * kRoiAlignMaxThreads + threadIdx.x;
  if (index >= elements_of(pooling.pooled)) return;
  const MapElement element = element_at(pooling.pooled, pooling.channels_last, index);
  const Roi<acc_t> roi = locate_roi(pooling.arguments, element.n);
  LargestSample<acc_t> largest{0, kNoWinner};
  if (roi.level >= 0) {
    const FeatureMap<const T>& map = pooling.feature[roi.level];
    const T* plane = map.at(roi.image, element.c, 0, 0);
    largest = largest_sample(roi_rows(pooling.arguments, roi, map.height), roi_cols(pooling.arguments, roi, map.width),
                             element.y, element.x,
                             [&](int y, int x) { return to_acc(plane[y * map.stride_h + x * map.stride_w]); });
  }
  *pooling.pooled.at(element.n, element.c, element.y, element.x) = Rounded<T>::from(largest.value);
  *pooling.winners.at(element.n, element.c, element.y, element.x) = largest.winner;
}

// Elements of a thread in the gradient: a block has 16 channels of a tile.
constexpr int kRoiAlignMaxElements = 4;
constexpr int kRoiAlignMaxChannels = kRoiAlignMaxElements * kRoiReaders / (kRoiTile * kRoiTile);

template <class T>
struct RoiAlignMaxGathering {
  RoiTiles<acc_type<T>> tiles;
  FeatureMap<const T> grad;  // [count, channels, pooled_height, pooled_width]
  FeatureMap<const int> winners;
  FeatureMap<T> sum[kMaxRoiLevels];
  unsigned channel_groups;  // blocks along the channels
  bool channels_last;
};

template <class T>
__device__ __forceinline__ void add_bins_of(const RoiAlignMaxGathering<T>& gathering, int k, const MapElement& pixel,
                                            acc_type<T>& sum) {
  using acc_t = acc_type<T>;
  const ListedRoi<acc_t>& roi = gathering.tiles.lists.rois[k];
  const Range row_bins = bins_near_pixel(roi.rows, gathering.grad.height, pixel.y);
  const Range col_bins = bins_near_pixel(roi.cols, gathering.grad.width, pixel.x);
#pragma unroll 1
  for (int ph = row_bins.begin; ph < row_bins.end; ++ph) {
#pragma unroll 1
    for (int pw = col_bins.begin; pw < col_bins.end; ++pw) {
      const int winner = *gathering.winners.at(k, pixel.c, ph, pw);
      if (winner < 0) continue;
      const acc_t row_weight = winner_weight(roi.rows, ph, winner >> 16, pixel.y);
      if (row_weight == 0) continue;
      const acc_t weight = row_weight * winner_weight(roi.cols, pw, winner, pixel.x);
      // Only the pixels that a bin reads receive its NaN.
      if (weight != 0) sum += weight * to_acc(*gathering.grad.at(k, pixel.c, ph, pw));
    }
  }
}

// Element `i` of a thread. Neighbouring threads have neighbouring channels (channels_last) or columns.
template <class T>
__device__ __forceinline__ MapElement element_of(const RoiAlignMaxGathering<T>& gathering, const RoiTile& tile,
                                                 int64_t first_channel, int i) {
  constexpr int kPixels = kRoiTile * kRoiTile;
  const int index = i * kRoiReaders + threadIdx.x;
  const int channel = gathering.channels_last ? index % kRoiAlignMaxChannels : index / kPixels;
  const int pixel = gathering.channels_last ? index / kRoiAlignMaxChannels : index % kPixels;
  return {tile.image, first_channel + channel, tile.top + pixel / kRoiTile, tile.left + pixel % kRoiTile};
}

template <class T>
__global__ void __launch_bounds__(kRoiReaders, kRoiAlignMaxBlocks<T>)
    multiscale_roi_align_max_backward_kernel(const __grid_constant__ RoiAlignMaxGathering<T> gathering) {
  __shared__ unsigned votes[32];
  __shared__ uint16_t hits[kRoiRound];
  const RoiLists<acc_type<T>>& lists = gathering.tiles.lists;
  const RoiTile tile = locate_tile(gathering.tiles, blockIdx.x / gathering.channel_groups);
  const int64_t first_channel = int64_t{blockIdx.x % gathering.channel_groups} * kRoiAlignMaxChannels;
  const FeatureMap<T>& map = gathering.sum[tile.level];
  acc_type<T> sum[kRoiAlignMaxElements] = {};
#pragma unroll 1
  for (int first = 0; first < lists.count; first += kRoiRound) {
    vote(lists, first, area_of(gathering.tiles, tile), votes);
    const int listed = list_hits(votes, 0, 0, kRoiRound, hits);
#pragma unroll 1
    for (int hit = 0; hit < listed; ++hit) {
      const int k = first + hits[hit];
      const PixelBox box = lists.boxes[k];
#pragma unroll
      for (int i = 0; i < kRoiAlignMaxElements; ++i) {
        const MapElement pixel = element_of(gathering, tile, first_channel, i);
        if (pixel.c >= map.channels || pixel.y < box.top || pixel.y >= box.bottom || pixel.x < box.left ||
            pixel.x >= box.right) {
          continue;
        }
        add_bins_of(gathering, k, pixel, sum[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRoiAlignMaxElements; ++i) {
    const MapElement pixel = element_of(gathering, tile, first_channel, i);
    if (pixel.c >= map.channels || pixel.y >= map.height || pixel.x >= map.width) continue;
    *map.at(pixel.n, pixel.c, pixel.y, pixel.x) = Rounded<T>::from(sum[i]);
  }
}

template <class T, class Launch>
void pool_max_in_launch(const RoiAlignArguments<acc_type<T>>& arguments,
                        const std::vector<FeatureMap<const T>>& features, const FeatureMap<T>& pooled,
                        const FeatureMap<int>& winners, bool channels_last, const Launch& launch) {
  RoiAlignMaxPooling<T> pooling{arguments, {}, pooled, winners, channels_last};
  std::copy(features.begin(), features.end(), pooling.feature);
  launch(multiscale_roi_align_max_kernel<T>,
         LaunchConfig{ceil_div(elements_of(pooled), kRoiAlignMaxThreads), kRoiAlignMaxThreads}, pooling);
}

template <class T, class Launch, class acc_t = acc_type<T>>
void gather_max_in_launches(const RoiAlignArguments<acc_t>& arguments, const FeatureMap<const T>& grad,
                            const FeatureMap<const int>& winners, const std::vector<FeatureMap<T>>& sums,
                            bool channels_last, const RoiLists<acc_t>& lists, const Launch& launch) {
  list_in_launch(arguments, sums, lists, launch);
  RoiAlignMaxGathering<T> gathering{make_roi_tiles(sums, lists, RoiPlan{}), grad, winners, {}, 0, channels_last};
  std::copy(sums.begin(), sums.end(), gathering.sum);
  gathering.channel_groups = static_cast<unsigned>(ceil_div(arguments.channels, kRoiAlignMaxChannels));
  launch(multiscale_roi_align_max_backward_kernel<T>,
         LaunchConfig{gathering.tiles.count * gathering.channel_groups, kRoiReaders}, gathering);
}

}  // namespace fpn_fast
