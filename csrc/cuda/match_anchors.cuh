// SPDX-License-Identifier: Apache-2.0
// Anchor matching: Note [Matching without the matrix] in common/matching.h. A thread owns an anchor, which it computes
// or loads. A block lists the ground truths that any of its anchors touches, usually few: consecutive anchors are
// neighbours. A warp goes through the list and skips those that none of its own anchors touches. The highest IoU of a
// ground truth is an integer maximum, so it does not depend on the order of the blocks.
#pragma once

#include <limits>
#include <type_traits>

#include "../common/anchors.h"
#include "../common/boxes.h"
#include "../common/matching.h"
#include "launch.h"
#include "warp.cuh"

namespace fpn_fast {

// 8 warps, which share the loading of ground truths.
constexpr int kMatchThreads = 256;
constexpr int kMatchWarps = kMatchThreads / 32;
// These limits keep the argument of a kernel below 4 KB in float64: 8 levels of 8 anchors per position, or 5 of 12.
constexpr int kMaxAnchorLevels = 8;
constexpr int kMaxCellAnchors = 64;

// Ground truths of which a thread computes the IoUs at a time, so that their latencies overlap.
constexpr int kMatchGroup = 4;

// IoUs are not negative, so their bits compare like integers. Zeroed memory is an IoU of 0.
template <class T>
using IouBits = std::conditional_t<sizeof(T) == sizeof(double), unsigned long long, unsigned>;

template <class T>
struct AnchorMatching {
  const T* gt_boxes;             // [images, gts_per_image, 4]
  const int64_t* gt_counts;      // [images]
  const T* anchors;              // boxes, or null: computed from `level`
  const int64_t* anchor_counts;  // [images], or null: all exist
  int64_t images, anchors_per_image;
  int gts_per_image;
  bool anchors_differ;  // between images
  MatchRule<T> rule;
  int64_t* matches;
  T* ious;
  IouBits<T>* highest;  // per ground truth, zeroed before the launch; only for low-quality matches
  int levels;
  AnchorLevel level[kMaxAnchorLevels];
  T cell_anchor[4 * kMaxCellAnchors];
  BoxCoding<T> coding;  // only its offset is used

  HOST_DEVICE int64_t blocks_per_image() const { return (anchors_per_image + kMatchThreads - 1) / kMatchThreads; }

  // A grid has fewer than 2^31 blocks.
  __device__ __forceinline__ int64_t image() const { return blockIdx.x / static_cast<unsigned>(blocks_per_image()); }
  __device__ __forceinline__ int64_t index() const {
    return int64_t{blockIdx.x % static_cast<unsigned>(blocks_per_image())} * kMatchThreads + threadIdx.x;
  }
};

// Stands for a missing box. It overlaps nothing and does not enlarge a union.
template <class T>
__device__ __forceinline__ Box<T> no_box() {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  return {kInfinity, kInfinity, -kInfinity, -kInfinity};
}

template <class T>
__device__ __forceinline__ Box<T> made_anchor(const AnchorMatching<T>& matching, int64_t index) {
  int l = 0;
  // A level without positions begins where the next level does.
  while (l + 1 < matching.levels && index >= matching.level[l + 1].first) ++l;
  const AnchorLevel& level = matching.level[l];
  index -= level.first;
  const auto anchor = [&](auto i) {
    using index_t = decltype(i);
    const auto cells = static_cast<index_t>(level.cells), width = static_cast<index_t>(level.width);
    const index_t place = i / cells, y = place / width;
    const T* corners = matching.cell_anchor + 4 * (level.first_cell + (i - place * cells));
    return anchor_at(matching.coding, Box<T>{corners[0], corners[1], corners[2], corners[3]}, y, place - y * width,
                     static_cast<T>(level.stride_y), static_cast<T>(level.stride_x));
  };
  // Divisions of 32 bits take a fifth of the instructions.
  return index <= UINT32_MAX ? anchor(static_cast<uint32_t>(index)) : anchor(index);
}

template <class T>
__device__ __forceinline__ Box<T> anchor_of(const AnchorMatching<T>& matching, int64_t image, int64_t index) {
  const int64_t counted =
      matching.anchor_counts == nullptr ? matching.anchors_per_image : matching.anchor_counts[image];
  if (index >= counted || index >= matching.anchors_per_image) return no_box<T>();
  Box<T> box;
  if (matching.anchors == nullptr) {
    box = made_anchor(matching, index);
  } else {
    const T* corners =
        matching.anchors + 4 * ((matching.anchors_differ ? image * matching.anchors_per_image : 0) + index);
    box = {corners[0], corners[1], corners[2], corners[3]};
  }
  return is_finite(box) ? box : no_box<T>();
}

// The smallest box around the boxes of the warp.
template <class T>
__device__ __forceinline__ Box<T> warp_union(const Box<T>& box) {
  return {-warp_maximum(-box.x1), -warp_maximum(-box.y1), warp_maximum(box.x2), warp_maximum(box.y2)};
}

// The highest of the warp's IoUs, which are not negative.
template <class T>
__device__ __forceinline__ T highest_of_warp(T iou) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == sizeof(float)) return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(iou)));
#endif
  return warp_maximum(iou);
}

// The smallest box around the boxes of the block's warps. Barriers have to come before and after.
template <class T>
__device__ __forceinline__ Box<T> block_union(const Box<T> (&of_warps)[kMatchWarps]) {
  Box<T> around = of_warps[0];
#pragma unroll
  for (int i = 1; i < kMatchWarps; ++i) {
    around = {smaller(around.x1, of_warps[i].x1), smaller(around.y1, of_warps[i].y1), larger(around.x2, of_warps[i].x2),
              larger(around.y2, of_warps[i].y2)};
  }
  return around;
}

// The ground truth that a thread passes on; no box where there is none.
template <class T>
__device__ __forceinline__ Box<T> own_gt(const AnchorMatching<T>& matching, int64_t image, int64_t g) {
  if (g >= matching.gts_per_image) return no_box<T>();
  const T* corners = matching.gt_boxes + 4 * (image * matching.gts_per_image + g);
  return {corners[0], corners[1], corners[2], corners[3]};
}

// Ground truths that a block wants of 256, in their order.
template <class T>
struct GroundTruths {
  Box<T> box[kMatchThreads];
  T area[kMatchThreads];
  int place[kMatchThreads];
  int counts[kMatchWarps];
  int first_bad[kMatchWarps];

  // Lists the thread's ground truth if it is `wanted`. Returns the number of those that are, and as `bad` the first of
  // those that are `unwanted`, or kMatchThreads. Begins with a barrier, and one has to follow.
  __device__ __forceinline__ int list(const Box<T>& gt, bool wanted, bool unwanted, int& own, int& bad) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned votes = __ballot_sync(~0u, wanted), others = __ballot_sync(~0u, unwanted);
    __syncthreads();
    if (lane == 0) {
      counts[warp] = __popc(votes), first_bad[warp] = others != 0 ? 32 * warp + __ffs(others) - 1 : kMatchThreads;
    }
    __syncthreads();
    int all = 0;
    own = __popc(votes & ((1u << lane) - 1)), bad = kMatchThreads;
#pragma unroll
    for (int i = 0; i < kMatchWarps; ++i) {
      if (i < warp) own += counts[i];
      all += counts[i], bad = min(bad, first_bad[i]);
    }
    if (wanted) box[own] = gt, area[own] = fpn_fast::area(gt), place[own] = threadIdx.x;
    // Fill up the last group.
    const int next = all + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kMatchGroup && next < kMatchThreads) box[next] = no_box<T>(), area[next] = 0, place[next] = 0;
    return all;
  }

  // A NaN, as between boxes without area, becomes 0.
  __device__ __forceinline__ T iou(int i, const Box<T>& anchor, T anchor_area) const {
    const T value = box_iou(box[i], area[i], anchor, anchor_area);
    return value > 0 ? value : T(0);
  }
};

template <class T>
__device__ __forceinline__ int gt_count(const AnchorMatching<T>& matching, int64_t image) {
  const int64_t count = matching.gt_counts[image];
  return static_cast<int>(max(int64_t{0}, min(count, int64_t{matching.gts_per_image})));
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads, 2)
    match_anchors_kernel(const __grid_constant__ AnchorMatching<T> matching) {
  __shared__ GroundTruths<T> gts;
  __shared__ Box<T> of_warps[kMatchWarps];
  // One row per warp, so that a block issues one atomic per ground truth.
  __shared__ T highest[kMatchWarps][kMatchThreads];
  const int64_t image = matching.image(), index = matching.index();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // In flight while the anchors are computed.
  Box<T> gt = own_gt(matching, image, threadIdx.x);
  const int count = gt_count(matching, image);
  const Box<T> anchor = anchor_of(matching, image, index);
  const T anchor_area = area(anchor);
  const Box<T> around = warp_union(anchor);
  if (lane == 0) of_warps[warp] = around;
  __syncthreads();
  const Box<T> around_block = block_union(of_warps);
  T best = 0;
  // Only an IoU above 0 replaces the first.
  int match = count > 0 ? 0 : -1, not_finite = -1;
#pragma unroll 1
  for (int64_t begin = 0; begin < count; begin += kMatchThreads) {
    if (begin > 0) gt = own_gt(matching, image, begin + threadIdx.x);
    const bool there = begin + threadIdx.x < count, finite = is_finite(gt);
    int own, bad;
    const int listed = gts.list(gt, there && finite && boxes_meet(gt, around_block), there && !finite, own, bad);
    if (matching.rule.low_quality) {
#pragma unroll
      for (int i = 0; i < kMatchWarps; ++i) highest[i][threadIdx.x] = 0;
    }
    __syncthreads();
    if (not_finite < 0 && bad < kMatchThreads) not_finite = static_cast<int>(begin) + bad;
#pragma unroll 1
    for (int i = 0; i < listed; i += kMatchGroup) {
      bool any = false;
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) any |= boxes_meet(gts.box[i + k], around);
      if (!any) continue;
      T iou[kMatchGroup];
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) iou[k] = gts.iou(i + k, anchor, anchor_area);
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) {
        // The first of equal IoUs stays, because the comparison is strict.
        if (iou[k] > best) best = iou[k], match = static_cast<int>(begin) + gts.place[i + k];
      }
      if (!matching.rule.low_quality) continue;
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) iou[k] = highest_of_warp(iou[k]);
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) {
        if (lane == 0) highest[warp][i + k] = iou[k];
      }
    }
    if (!matching.rule.low_quality) continue;
    __syncthreads();
    if (threadIdx.x >= listed) continue;
    T top = 0;
#pragma unroll
    for (int i = 0; i < kMatchWarps; ++i) top = max(top, highest[i][threadIdx.x]);
    if (top > 0) {
      IouBits<T> bits;
      memcpy(&bits, &top, sizeof bits);
      atomicMax(matching.highest + image * matching.gts_per_image + begin + gts.place[threadIdx.x], bits);
    }
  }
  if (index >= matching.anchors_per_image) return;
  const int64_t at = image * matching.anchors_per_image + index;
  const bool can_match = match >= 0 && is_finite(anchor);
  // Note [Ground truths that are not finite]. Either kernel's code for a NaN is the match.
  if (not_finite >= 0 && can_match) best = std::numeric_limits<T>::quiet_NaN(), match = not_finite;
  matching.ious[at] = best;
  // With low-quality matches the second kernel writes the codes.
  const int64_t code = matching.rule.low_quality ? match : matching.rule.code(best, match);
  matching.matches[at] = can_match ? code : kBelowLowThreshold;
}

// Replaces matches by codes, except where an anchor reaches the highest IoU of a ground truth.
template <class T>
__global__ void __launch_bounds__(kMatchThreads, 2)
    match_anchors_low_quality_kernel(const __grid_constant__ AnchorMatching<T> matching) {
  __shared__ GroundTruths<T> gts;
  __shared__ Box<T> of_warps[kMatchWarps];
  __shared__ T bounds[kMatchWarps], highest[kMatchThreads];
  const int64_t image = matching.image(), index = matching.index();
  const int64_t at = image * matching.anchors_per_image + index;
  const bool exists = index < matching.anchors_per_image;
  const int64_t match = exists ? matching.matches[at] : kBelowLowThreshold;
  const T best = exists ? matching.ious[at] : T(0);
  const int count = gt_count(matching, image);
  const Box<T> anchor = anchor_of(matching, image, index);
  const T anchor_area = area(anchor);
  const Box<T> around = warp_union(anchor);
  // An anchor's own best IoU bounds all of its IoUs.
  const T bound = warp_maximum(match >= 0 ? best : T(-1));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = around, bounds[threadIdx.x / 32] = bound;
  __syncthreads();
  const Box<T> around_block = block_union(of_warps);
  T block_bound = bounds[0];
#pragma unroll
  for (int i = 1; i < kMatchWarps; ++i) block_bound = larger(block_bound, bounds[i]);
  bool restored = false;
#pragma unroll 1
  for (int64_t begin = 0; begin < count; begin += kMatchThreads) {
    const int64_t g = begin + threadIdx.x;
    const Box<T> gt = own_gt(matching, image, g);
    T wanted = std::numeric_limits<T>::infinity();
    if (g < count && is_finite(gt)) {
      // As a word: a copy from global memory is a load for each byte.
      const IouBits<T> bits = matching.highest[image * matching.gts_per_image + g];
      memcpy(&wanted, &bits, sizeof wanted);
    }
    int own, bad;
    // If no anchor overlaps a ground truth, its highest IoU is 0, and every anchor reaches it.
    const bool may = wanted <= block_bound && (wanted == 0 || boxes_meet(gt, around_block));
    const int listed = gts.list(gt, may, false, own, bad);
    if (may) highest[own] = wanted;
    const int next = listed + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kMatchGroup && next < kMatchThreads) highest[next] = std::numeric_limits<T>::infinity();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < listed; i += kMatchGroup) {
      bool any = false;
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) any |= highest[i + k] <= bound;
      if (!any) continue;
#pragma unroll
      for (int k = 0; k < kMatchGroup; ++k) {
        restored |= highest[i + k] <= bound && gts.iou(i + k, anchor, anchor_area) == highest[i + k];
      }
    }
  }
  if (match >= 0 && !restored) matching.matches[at] = matching.rule.code(best, match);
}

template <class T, class Launch>
void match_in_launches(const AnchorMatching<T>& matching, const Launch& launch) {
  const LaunchConfig config{matching.images * matching.blocks_per_image(), kMatchThreads};
  launch(match_anchors_kernel<T>, config, matching);
  if (!matching.rule.low_quality || matching.gts_per_image == 0) return;
  launch(match_anchors_low_quality_kernel<T>, config, matching);
}

}  // namespace fpn_fast
