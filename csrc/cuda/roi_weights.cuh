// SPDX-License-Identifier: Apache-2.0
// The weights with which the bins of a batch of RoIs read a tile of pixels along one axis, in shared memory.
#pragma once

#include "../common/roi_align.h"
#include "roi_lists.cuh"

namespace fpn_fast {

// Pixels of a tile whose weights are one access. A thread of the strided kernel has so many along an axis.
constexpr int kRoiRun = 4;
constexpr int kRoiRuns = 2;
static_assert(kRoiTile == kRoiRun * kRoiRuns);
// One thread for each of 16 bins of 8 RoIs along both axes, enough for 14 by 14 bins.
constexpr int kRoiBatch = 8;
constexpr int kRoiBatchBins = 16;

template <class acc_t>
struct RoiWeights {
  alignas(16) acc_t weight[kRoiBatch][kRoiBatchBins][kRoiTile];
  int64_t offset[kRoiBatch];  // of the first bin in the gradient
  int bins[kRoiBatch];        // on the tile, in all rounds
};

// A range with all bins that can read [lo, hi], and up to two more.
template <class acc_t>
__device__ __forceinline__ Range bins_between(const RoiAxis<acc_t>& axis, int pooled, int lo, int hi) {
  if (!(axis.bin > 0)) return {0, pooled};
  // Exceeds the rounding error of the coordinates.
  const acc_t margin = (axis.size + (axis.start < 0 ? -axis.start : axis.start)) * acc_t(0x1p-20);
  const auto clamped = [&](acc_t bin) { return bin > 0 ? (bin < pooled ? static_cast<int>(bin) : pooled) : 0; };
  return {clamped((lo - margin - axis.start) / axis.bin - 1), clamped((hi + margin - axis.start) / axis.bin + 1)};
}

// Returns the pixels that have a weight other than zero, a bit for each.
template <class acc_t>
__device__ __forceinline__ unsigned weigh_pixels(const RoiAxis<acc_t>& axis, int bin, int first, acc_t scale,
                                                 acc_t (&weights)[kRoiTile]) {
  unsigned reads = 0;
#pragma unroll
  for (int i = 0; i < kRoiTile; ++i) weights[i] = 0;
  const auto add = [&](unsigned pixel, acc_t weight) {
    if (pixel < kRoiTile && weight != 0) weights[pixel] += weight * scale, reads |= 1u << pixel;
  };
  const Range samples = samples_between(axis, bin, first - 1, first + kRoiTile);
#pragma unroll 1
  for (int sample = samples.begin; sample < samples.end; ++sample) {
    Taps<acc_t> taps;
    if (!sample_taps(axis, bin, sample, taps)) continue;
    add(taps.lo - first, taps.weight_lo), add(taps.hi - first, taps.weight_hi);
  }
  return reads;
}

// The bins of one round that have a weight other than zero on kPixels pixels from `first` on.
template <int kPixels, class acc_t>
__device__ __forceinline__ Range reading_bins(const RoiWeights<acc_t>& table, int entry, int round, int first) {
  const int bins = min(table.bins[entry] - round * kRoiBatchBins, kRoiBatchBins);
  Range found{kRoiBatchBins, 0};
#pragma unroll 1
  for (int bin = 0; bin < bins; ++bin) {
    bool reads = false;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) reads |= table.weight[entry][bin][first + i] != 0;
    if (reads) found = {min(found.begin, bin), bin + 1};
  }
  return found;
}

template <class acc_t>
__device__ __forceinline__ int count_rounds(const RoiWeights<acc_t>& table, int batched) {
  int most = 1;
#pragma unroll 1
  for (int entry = 0; entry < batched; ++entry) most = max(most, table.bins[entry]);
  return (most + kRoiBatchBins - 1) / kRoiBatchBins;
}

template <class acc_t>
struct alignas(16) RunWeights {
  acc_t weight[kRoiRun];
};

}  // namespace fpn_fast
