// SPDX-License-Identifier: Apache-2.0
// Anchor matching: Note [Matching without the matrix] in common/matching.h. A thread owns an anchor, which it computes
// or loads. Ground truths pass through shared memory. A warp skips those that none of its anchors touches: consecutive
// anchors are neighbours. The highest IoU of a ground truth is an integer maximum, so it does not depend on the order
// of the blocks.
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
  const int64_t place = index / level.cells, y = place / level.width, x = place % level.width;
  const T* corners = matching.cell_anchor + 4 * (level.first_cell + index % level.cells);
  return anchor_at(matching.coding, Box<T>{corners[0], corners[1], corners[2], corners[3]}, y, x,
                   static_cast<T>(level.stride_y), static_cast<T>(level.stride_x));
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

template <class T>
struct GroundTruths {
  Box<T> box[kMatchThreads];
  T area[kMatchThreads];

  // Each thread loads one ground truth of `image`, from `begin` on, below `count`. Returns whether it is there and
  // finite.
  __device__ __forceinline__ bool load(const AnchorMatching<T>& matching, int64_t image, int64_t begin, int count) {
    const int64_t g = begin + threadIdx.x;
    Box<T> gt = no_box<T>();
    if (g < count) {
      const T* corners = matching.gt_boxes + 4 * (image * matching.gts_per_image + g);
      gt = {corners[0], corners[1], corners[2], corners[3]};
    }
    box[threadIdx.x] = gt, area[threadIdx.x] = fpn_fast::area(gt);
    return is_finite(gt);
  }

  // The first that is not finite. There must be one.
  __device__ __forceinline__ int first_not_finite() const {
    int g = 0;
    while (is_finite(box[g])) ++g;
    return g;
  }

  // A NaN, as between boxes without area, becomes 0.
  __device__ __forceinline__ T iou(int g, const Box<T>& anchor, T anchor_area) const {
    const T value = box_iou(box[g], area[g], anchor, anchor_area);
    return value > 0 ? value : T(0);
  }
};

template <class T>
__device__ __forceinline__ int gt_count(const AnchorMatching<T>& matching, int64_t image) {
  const int64_t count = matching.gt_counts[image];
  return static_cast<int>(max(int64_t{0}, min(count, int64_t{matching.gts_per_image})));
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads)
    match_anchors_kernel(const __grid_constant__ AnchorMatching<T> matching) {
  __shared__ GroundTruths<T> gts;
  // One row per warp, so that a block issues one atomic per ground truth.
  __shared__ T highest[kMatchWarps][kMatchThreads];
  const int64_t image = blockIdx.x / matching.blocks_per_image();
  const int64_t index = blockIdx.x % matching.blocks_per_image() * kMatchThreads + threadIdx.x;
  const Box<T> anchor = anchor_of(matching, image, index);
  const T anchor_area = area(anchor);
  const Box<T> around = warp_union(anchor);
  const int count = gt_count(matching, image), warp = threadIdx.x / 32;
  T best = 0;
  // Only an IoU above 0 replaces the first.
  int match = count > 0 ? 0 : -1, not_finite = -1;
  for (int64_t begin = 0; begin < count; begin += kMatchThreads) {
    __syncthreads();
    const bool finite = gts.load(matching, image, begin, count);
    if (matching.rule.low_quality) {
#pragma unroll
      for (int i = 0; i < kMatchWarps; ++i) highest[i][threadIdx.x] = 0;
    }
    const bool any = __syncthreads_or(!finite && begin + threadIdx.x < count);
    if (any && not_finite < 0) not_finite = static_cast<int>(begin) + gts.first_not_finite();
    const int here = static_cast<int>(min(int64_t{kMatchThreads}, count - begin));
    for (int g = 0; g < here; ++g) {
      if (!boxes_meet(gts.box[g], around)) continue;
      const T iou = gts.iou(g, anchor, anchor_area);
      // The first of equal IoUs stays, because the comparison is strict.
      if (iou > best) best = iou, match = static_cast<int>(begin) + g;
      if (!matching.rule.low_quality) continue;
      const T top = warp_maximum(iou);
      if (threadIdx.x % 32 == 0) highest[warp][g] = top;
    }
    if (!matching.rule.low_quality) continue;
    __syncthreads();
    T top = 0;
#pragma unroll
    for (int i = 0; i < kMatchWarps; ++i) top = max(top, highest[i][threadIdx.x]);
    if (top > 0) {
      IouBits<T> bits;
      memcpy(&bits, &top, sizeof bits);
      atomicMax(matching.highest + image * matching.gts_per_image + begin + threadIdx.x, bits);
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
__global__ void __launch_bounds__(kMatchThreads)
    match_anchors_low_quality_kernel(const __grid_constant__ AnchorMatching<T> matching) {
  __shared__ GroundTruths<T> gts;
  __shared__ T highest[kMatchThreads];
  const int64_t image = blockIdx.x / matching.blocks_per_image();
  const int64_t index = blockIdx.x % matching.blocks_per_image() * kMatchThreads + threadIdx.x;
  const int64_t at = image * matching.anchors_per_image + index;
  const bool exists = index < matching.anchors_per_image;
  const int64_t match = exists ? matching.matches[at] : kBelowLowThreshold;
  const T best = exists ? matching.ious[at] : T(0);
  // An anchor's own best IoU bounds all of its IoUs.
  const T bound = warp_maximum(match >= 0 ? best : T(-1));
  const Box<T> anchor = anchor_of(matching, image, index);
  const T anchor_area = area(anchor);
  const int count = gt_count(matching, image);
  bool restored = false;
  for (int64_t begin = 0; begin < count; begin += kMatchThreads) {
    __syncthreads();
    T wanted = std::numeric_limits<T>::infinity();
    if (gts.load(matching, image, begin, count)) {
      // As a word: a copy from global memory is a load for each byte.
      const IouBits<T> bits = matching.highest[image * matching.gts_per_image + begin + threadIdx.x];
      memcpy(&wanted, &bits, sizeof wanted);
    }
    highest[threadIdx.x] = wanted;
    __syncthreads();
    const int here = static_cast<int>(min(int64_t{kMatchThreads}, count - begin));
    for (int g = 0; g < here; ++g) {
      // If no anchor overlaps a ground truth, its highest IoU is 0, and every anchor reaches it.
      if (highest[g] <= bound && gts.iou(g, anchor, anchor_area) == highest[g]) restored = true;
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
