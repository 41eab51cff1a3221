// SPDX-License-Identifier: Apache-2.0
// The RoIs that read each map of each image, from which the gradients of multi-level RoIAlign are gathered. A block
// lists the RoIs of one map of one image in ascending order. It counts the RoIs of earlier maps first, to find the
// position of its list. There are no atomics, so the lists are the same in every run.
#pragma once

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

constexpr int kRoiListThreads = 256;
constexpr int kRoiListWarps = kRoiListThreads / 32;

// The pixels of its map that a RoI reads: rows [top, bottom), columns [left, right). It is one 16-byte access.
struct alignas(16) PixelBox {
  int top, bottom, left, right;
};

template <class acc_t>
struct alignas(16) ListedRoi {
  RoiAxis<acc_t> rows, cols;
  acc_t scale;  // one over the samples of a bin
  int roi;
};

// Scratch memory. `boxes` and `rois` hold the lists of all maps. Map `level` of image `n` has the range ranges[n *
// levels + level].
template <class acc_t>
struct RoiLists {
  PixelBox* boxes;
  ListedRoi<acc_t>* rois;
  Range* ranges;
};

template <class acc_t>
struct RoiListing {
  RoiAlignArguments<acc_t> arguments;
  int height[kMaxRoiLevels], width[kMaxRoiLevels];
  RoiLists<acc_t> lists;
};

template <class acc_t>
RoiLists<acc_t> plan_roi_lists(Scratch& scratch, const RoiAlignArguments<acc_t>& arguments) {
  const int64_t maps = arguments.batch * arguments.rule.levels;
  return {scratch.take<PixelBox>(arguments.count), scratch.take<ListedRoi<acc_t>>(arguments.count),
          scratch.take<Range>(maps)};
}

// Sets `position` to the rank of what a thread keeps, ordered by round and then by thread. Returns the number kept.
template <int kRounds>
__device__ __forceinline__ int number_kept(const bool (&keep)[kRounds], int (&position)[kRounds],
                                           int (&counts)[kRounds][kRoiListWarps]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const unsigned votes = __ballot_sync(~0u, keep[round]);
    position[round] = __popc(votes & ((1u << lane) - 1));
    if (lane == 0) counts[round][warp] = __popc(votes);
  }
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kRoiListWarps; ++i) {
      if (i == warp) position[round] += total;
      total += counts[round][i];
    }
  }
  // The next call writes the counts again.
  __syncthreads();
  return total;
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
__global__ void __launch_bounds__(kRoiListThreads, 4)
    roi_lists_kernel(const __grid_constant__ RoiListing<acc_t> listing) {
  __shared__ int counts[1][kRoiListWarps];
  const RoiAlignArguments<acc_t>& arguments = listing.arguments;
  const int64_t image = blockIdx.x / arguments.rule.levels;
  const int level = blockIdx.x % arguments.rule.levels;
  // An upper bound of the RoIs on earlier lists.
  int before = 0;
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < arguments.count; k += kRoiListThreads) {
    const Roi<acc_t> roi = locate_roi(arguments, k);
    before += roi.level >= 0 && (roi.image < image || (roi.image == image && roi.level < level));
  }
  before = warp_sum(before);
  if (threadIdx.x % 32 == 0) counts[0][threadIdx.x / 32] = before;
  __syncthreads();
  int begin = 0;
  for (int i = 0; i < kRoiListWarps; ++i) begin += counts[0][i];
  __syncthreads();
  int end = begin;
#pragma unroll 1
  for (int64_t first = 0; first < arguments.count; first += kRoiListThreads) {
    const int64_t k = first + threadIdx.x;
    ListedRoi<acc_t> listed;
    PixelBox box;
    bool keep[1] = {false};
    int position[1];
    if (k < arguments.count) {
      const Roi<acc_t> roi = locate_roi(arguments, k);
      if (roi.image == image && roi.level == level) {
        listed.rows = roi_rows(arguments, roi, listing.height[level]);
        listed.cols = roi_cols(arguments, roi, listing.width[level]);
        listed.scale = inverse_count(listed.rows, listed.cols);
        listed.roi = static_cast<int>(k);
        const Range rows = pixels_read(listed.rows, arguments.pooled_height);
        const Range cols = pixels_read(listed.cols, arguments.pooled_width);
        box = {rows.begin, rows.end, cols.begin, cols.end};
        keep[0] = rows.begin < rows.end && cols.begin < cols.end;
      }
    }
    const int kept = number_kept(keep, position, counts);
    if (keep[0]) {
      listing.lists.boxes[end + position[0]] = box;
      listing.lists.rois[end + position[0]] = listed;
    }
    end += kept;
  }
  if (threadIdx.x == 0) listing.lists.ranges[blockIdx.x] = {begin, end};
}

template <class T, class Launch, class acc_t = acc_type<T>>
void list_in_launch(const RoiAlignArguments<acc_t>& arguments, const std::vector<FeatureMap<T>>& maps,
                    const RoiLists<acc_t>& lists, const Launch& launch) {
  RoiListing<acc_t> listing{arguments, {}, {}, lists};
  for (size_t level = 0; level < maps.size(); ++level) {
    listing.height[level] = maps[level].height, listing.width[level] = maps[level].width;
  }
  launch(roi_lists_kernel<acc_t>, LaunchConfig{arguments.batch * arguments.rule.levels, kRoiListThreads}, listing);
}

}  // namespace fpn_fast
