// SPDX-License-Identifier: Apache-2.0
// The RoIs that read a part of a map, from which the gradients of multi-level RoIAlign are gathered. One launch finds
// the map and the pixels of each RoI. A block that owns pixels then asks for the RoIs that read them, in ascending
// order. There are no atomics, so the answer is the same in every run.
#pragma once

#include <climits>
#include <cstdint>
#include <vector>

#include "../common/feature_map.h"
#include "../common/roi_align.h"
#include "../common/roi_align_arguments.h"
#include "../common/scalar.h"
#include "launch.h"
#include "scratch.h"
#include "warp.cuh"

namespace fpn_fast {

// Few: 1000 RoIs are on eight multiprocessors.
constexpr int kRoiListThreads = 128;
// Pixels of a tile along each axis: a block of the gradient owns a tile, or a part of one.
constexpr int kRoiTile = 8;

// The pixels of its map that a RoI reads: rows [top, bottom), columns [left, right). It is one 16-byte access.
struct alignas(16) PixelBox {
  int top, bottom, left, right;
};

template <class acc_t>
struct alignas(16) ListedRoi {
  RoiAxis<acc_t> rows, cols;
  acc_t scale;  // one over the samples of a bin
};

// 32 RoIs in a row, those of a warp. Their maps lie in [first_map, last_map], which is empty if they read none.
struct alignas(8) RoiChunk {
  int first_map, last_map;
};

// Scratch memory. Map `level` of image `n` has the number n * levels + level.
template <class acc_t>
struct RoiLists {
  int count;
  PixelBox* boxes;         // [count]; empty if the RoI reads nothing
  int* maps;               // [count]
  ListedRoi<acc_t>* rois;  // [count]; not written if the RoI reads nothing
  RoiChunk* chunks;        // [ceil(count / 32)]
};

template <class acc_t>
struct RoiListing {
  RoiAlignArguments<acc_t> arguments;
  int height[kMaxRoiLevels], width[kMaxRoiLevels];
  RoiLists<acc_t> lists;
};

template <class acc_t>
RoiLists<acc_t> plan_roi_lists(Scratch& scratch, const RoiAlignArguments<acc_t>& arguments) {
  const int64_t count = arguments.count;
  return {static_cast<int>(count), scratch.take<PixelBox>(count), scratch.take<int>(count),
          scratch.take<ListedRoi<acc_t>>(count), scratch.take<RoiChunk>(ceil_div(count, 32))};
}

// The pixels that a RoI can read along one axis. Empty unless `begin` is below `end`.
template <class acc_t>
__device__ __forceinline__ Range pixels_read(const RoiAxis<acc_t>& axis, int pooled) {
  if (axis.samples <= 0) return {0, 0};
  // Each step of a coordinate's arithmetic is monotonic, so every sample lies between the first and the last.
  const acc_t first = sample_coordinate(axis, 0, 0), last = sample_coordinate(axis, pooled - 1, axis.samples - 1);
  const acc_t low = first < last ? first : last, high = first < last ? last : first;
  // A NaN fails this test. It comes from an infinite RoI, which reads nothing.
  if (!(high >= -1 && low <= axis.size)) return {0, 0};
  return {low > 0 ? min(static_cast<int>(low), axis.size - 1) : 0,
          high < axis.size - 1 ? min(static_cast<int>(high) + 2, axis.size) : axis.size};
}

template <class acc_t>
__global__ void __launch_bounds__(kRoiListThreads) roi_lists_kernel(const __grid_constant__ RoiListing<acc_t> listing) {
  const RoiAlignArguments<acc_t>& arguments = listing.arguments;
  const int64_t k = int64_t{blockIdx.x} * kRoiListThreads + threadIdx.x;
  int map = -1;
  if (k < arguments.count) {
    const Roi<acc_t> roi = locate_roi(arguments, k);
    PixelBox box{0, 0, 0, 0};
    if (roi.level >= 0) {
      ListedRoi<acc_t> listed;
      listed.rows = roi_rows(arguments, roi, listing.height[roi.level]);
      listed.cols = roi_cols(arguments, roi, listing.width[roi.level]);
      listed.scale = inverse_count(listed.rows, listed.cols);
      const Range rows = pixels_read(listed.rows, arguments.pooled_height);
      const Range cols = pixels_read(listed.cols, arguments.pooled_width);
      if (rows.begin < rows.end && cols.begin < cols.end) {
        map = static_cast<int>(roi.image * arguments.rule.levels + roi.level);
        box = {rows.begin, rows.end, cols.begin, cols.end};
        listing.lists.rois[k] = listed;
      }
    }
    listing.lists.boxes[k] = box;
    listing.lists.maps[k] = map;
  }
  const int first = warp_reduce(map < 0 ? INT_MAX : map, [](int a, int b) { return min(a, b); });
  const int last = warp_maximum(map);
  if (k < arguments.count && threadIdx.x % 32 == 0) listing.lists.chunks[k / 32] = {first, last};
}

template <class T, class Launch, class acc_t = acc_type<T>>
void list_in_launch(const RoiAlignArguments<acc_t>& arguments, const std::vector<FeatureMap<T>>& maps,
                    const RoiLists<acc_t>& lists, const Launch& launch) {
  RoiListing<acc_t> listing{arguments, {}, {}, lists};
  for (size_t level = 0; level < maps.size(); ++level) {
    listing.height[level] = maps[level].height, listing.width[level] = maps[level].width;
  }
  launch(roi_lists_kernel<acc_t>, LaunchConfig{ceil_div(arguments.count, kRoiListThreads), kRoiListThreads}, listing);
}

// What follows is for blocks of this many threads.
constexpr int kRoiReaders = 256;
constexpr int kRoiReaderWarps = kRoiReaders / 32;
// RoIs that a block tests at a time, a word of votes for each lane of a warp.
constexpr int kRoiRound = 1024;

// Pixels of a map.
struct MapArea {
  int map;
  PixelBox box;
};

// RoIs of a round that a thread tests.
constexpr int kRoiBoxes = 32 / kRoiReaderWarps;

// Loads the boxes of RoIs of the round from `first` on, which is below their number: boxes[i] that of RoI number
// 32 * (warp + i * kRoiReaderWarps) + lane of the round. It is empty if the RoI does not read the map.
template <class acc_t>
__device__ __forceinline__ void load_boxes(const RoiLists<acc_t>& lists, int first, int map,
                                           PixelBox (&boxes)[kRoiBoxes]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool may = false;
  if (first + 32 * lane < lists.count) {
    const RoiChunk& chunk = lists.chunks[first / 32 + lane];
    may = chunk.first_map <= map && map <= chunk.last_map;
  }
  const unsigned candidates = __ballot_sync(~0u, may);
  int maps[kRoiBoxes];
#pragma unroll
  for (int i = 0; i < kRoiBoxes; ++i) {
    const int chunk = warp + i * kRoiReaderWarps, k = first + 32 * chunk + lane;
    maps[i] = -1, boxes[i] = {};
    if ((candidates >> chunk & 1) != 0 && k < lists.count) maps[i] = lists.maps[k], boxes[i] = lists.boxes[k];
  }
#pragma unroll
  for (int i = 0; i < kRoiBoxes; ++i) {
    if (maps[i] != map) boxes[i] = {};
  }
}

// Sets bit `b` of votes[i] if RoI first + 32 * i + b reads the area, for RoIs [first, first + kRoiRound). The block
// waits for the votes of all. `first` is below the number of RoIs.
template <class acc_t>
__device__ __forceinline__ void vote(const RoiLists<acc_t>& lists, int first, const MapArea& area,
                                     unsigned (&votes)[32]) {
  PixelBox boxes[kRoiBoxes];
  load_boxes(lists, first, area.map, boxes);
#pragma unroll
  for (int i = 0; i < kRoiBoxes; ++i) {
    const bool reads = boxes[i].top < area.box.bottom && boxes[i].bottom > area.box.top &&
                       boxes[i].left < area.box.right && boxes[i].right > area.box.left;
    const unsigned word = __ballot_sync(~0u, reads);
    if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32 + i * kRoiReaderWarps] = word;
  }
  __syncthreads();
}

// Of the RoIs for which votes were cast, in order, lists in `hits` those with the numbers [begin, end) of all rounds,
// as their distance from the round's first. `seen` is the number of hits of earlier rounds. Returns this round's. The
// block waits until all are listed.
__device__ __forceinline__ int list_hits(const unsigned (&votes)[32], int seen, int begin, int end,
                                         uint16_t (&hits)[kRoiRound]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned word = votes[lane];
  int before = 0;
  const int total = warp_prefix(__popc(word), before);
#pragma unroll
  for (int chunk = warp; chunk < 32; chunk += kRoiReaderWarps) {
    const unsigned own = __shfl_sync(~0u, word, chunk);
    const int at = __shfl_sync(~0u, before, chunk) + seen + __popc(own & ((1u << lane) - 1));
    if ((own >> lane & 1) != 0 && at >= begin && at < end) {
      hits[at - max(begin, seen)] = static_cast<uint16_t>(32 * chunk + lane);
    }
  }
  __syncthreads();
  return total;
}

}  // namespace fpn_fast
