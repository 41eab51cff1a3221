// SPDX-License-Identifier: Apache-2.0
// Which RoIs read each map of each image: what the gradient of multi-level RoIAlign is gathered from.
//
// A block lists the RoIs of one map of one image, ascending, in a region of its own: the RoIs of the maps before it are
// counted first. No atomics, so the lists are the same in every run.
#pragma once

#include <cstdint>

#include "../common/roi_align.h"
#include "../common/roi_align_arguments.h"
#include "launch.h"

namespace fpn_fast {

constexpr int kRoiListThreads = 256;
constexpr int kRoiListWarps = kRoiListThreads / 32;

// What a RoI reads of its map, pixels [top, bottom) by [left, right). One 16-byte access.
struct alignas(16) PixelBox {
  int top, bottom, left, right;
};

template <class acc_t>
struct alignas(16) ListedRoi {
  RoiAxis<acc_t> rows, cols;
  acc_t scale;  // one over the samples of a bin
  int roi;
};

// In scratch memory. The lists of all maps lie in `boxes` and `rois`; that of map `level` of image `n` is
// [ranges[n * levels + level].begin, .end).
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
size_t roi_lists_bytes(int64_t rois, int64_t maps) {
  return rois * (sizeof(PixelBox) + sizeof(ListedRoi<acc_t>)) + maps * sizeof(Range);
}

template <class acc_t>
RoiLists<acc_t> roi_lists_at(char* scratch, int64_t rois) {
  char* listed = scratch + rois * sizeof(PixelBox);
  char* ranges = listed + rois * sizeof(ListedRoi<acc_t>);
  return {reinterpret_cast<PixelBox*>(scratch), reinterpret_cast<ListedRoi<acc_t>*>(listed),
          reinterpret_cast<Range*>(ranges)};
}

// Numbers what the threads of a block keep, in the order of rounds, then threads: `position`. Returns how many.
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
  // The counts are the next call's too.
  __syncthreads();
  return total;
}

// The pixels that a RoI can read along one axis; empty where `begin` is not below `end`.
template <class acc_t>
__device__ __forceinline__ Range pixels_read(const RoiAxis<acc_t>& axis, int pooled) {
  if (axis.samples <= 0) return {0, 0};
  // Each step of a coordinate's arithmetic keeps the order, so that no sample lies outside the first and the last.
  const acc_t first = sample_coordinate(axis, 0, 0), last = sample_coordinate(axis, pooled - 1, axis.samples - 1);
  const acc_t low = first < last ? first : last, high = first < last ? last : first;
  // Written so that NaN fails: a RoI has none unless it is infinite, and then it reads nothing.
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
  // RoIs that a list before this one may hold.
  int before = 0;
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < arguments.count; k += kRoiListThreads) {
    const Roi<acc_t> roi = locate_roi(arguments, k);
    before += roi.level >= 0 && (roi.image < image || (roi.image == image && roi.level < level));
  }
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) before += __shfl_xor_sync(~0u, before, delta);
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

}  // namespace fpn_fast
