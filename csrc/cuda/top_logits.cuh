// SPDX-License-Identifier: Apache-2.0
// The highest logits of every image and level, read directly from a head's maps in either memory format.
//
// A histogram of the first 12 bits of each logit finds the bin of the k-th highest logit of a list. Then a block per
// span of a map keeps the logits of that bin and above, usually little more than k per list in all, and sorts them into
// a run for sorted_runs.cuh. Only counts are added atomically, so the result does not depend on the order of threads.
// Equal logits are ordered by their indices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/boxes.h"
#include "../common/feature_map.h"
#include "../common/head_decoding.h"
#include "../common/ordered_bits.h"
#include "../common/scalar.h"
#include "block_sort.cuh"
#include "launch.h"
#include "scratch.h"
#include "sorted_runs.cuh"

namespace fpn_fast {

constexpr int kLogitThreads = kSortThreads;
// The sign, the exponent and three digits of a float32. The bins take 16 KB of shared memory.
constexpr int kBinBits = 12;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsOwn = kBins / kLogitThreads;
// Logits in flight per thread.
constexpr int kLogitsOwn = 8;
constexpr int kLogitsStep = kLogitThreads * kLogitsOwn;
// Of these, logits whose keys a thread adds at a time. Half of a block's keys are reserved for them.
constexpr int kKeysOwn = 4;
constexpr int kKeysStep = kLogitThreads * kKeysOwn;
// The logits of a block are as few as keep all multiprocessors busy, and more only where there are many. Longer spans
// make fewer runs to merge.
constexpr int64_t kLogitSpan = 8192;
constexpr int64_t kFewSpans = 264, kLogitSpans = 512;

// The length of a span, for `logits` in all. It exceeds what a block can sort only if the keys can be cut back to
// `limit`, the number that a list wants.
inline uint32_t logit_span_of(int64_t limit, int64_t logits) {
  if (limit > kSortItems - kKeysStep) return kSortItems;
  const int64_t longer = ceil_div(logits, kLogitSpan * kLogitSpans);
  if (longer > 1) return static_cast<uint32_t>(std::min<int64_t>(kLogitSpan * longer, 1 << 30));
  const int64_t steps = ceil_div(logits, kFewSpans * kLogitsStep);
  return static_cast<uint32_t>(std::clamp<int64_t>(steps * kLogitsStep, kLogitsStep, kLogitSpan));
}

// A map of logits, read in the order of its memory.
template <class T>
struct LogitMap {
  FeatureMap<const T> map;
  bool channels_inner, dense;
};

template <class T>
LogitMap<T> logit_map(const FeatureMap<const T>& map) {
  const int64_t width = map.width, pixels = width * map.height;
  LogitMap<T> logits{map, map.stride_c < map.stride_w, false};
  logits.dense = logits.channels_inner
                     ? map.stride_c == 1 && map.stride_w == map.channels && map.stride_h == width * map.channels
                     : map.stride_w == 1 && map.stride_h == width && map.stride_c == pixels;
  return logits;
}

template <class T>
HOST_DEVICE uint32_t logits_of(const LogitMap<T>& logits) {
  return static_cast<uint32_t>(logits.map.channels * logits.map.height * logits.map.width);
}

// The index (y, x, channel) of the i-th logit in the order of reading.
template <class T>
__device__ __forceinline__ uint32_t logit_index(const LogitMap<T>& logits, uint32_t i) {
  if (logits.channels_inner) return i;
  const uint32_t pixels = static_cast<uint32_t>(logits.map.height) * logits.map.width;
  return i % pixels * static_cast<uint32_t>(logits.map.channels) + i / pixels;
}

template <class T>
__device__ __forceinline__ acc_type<T> logit_at(const LogitMap<T>& logits, int64_t image, uint32_t i) {
  const FeatureMap<const T>& map = logits.map;
  if (logits.dense) return to_acc(map.data[image * map.stride_n + i]);
  const uint32_t index = logit_index(logits, i), channels = static_cast<uint32_t>(map.channels);
  const uint32_t pixel = index / channels, width = map.width;
  return to_acc(*map.at(image, index % channels, pixel / width, pixel % width));
}

template <class acc_t>
__device__ __forceinline__ int bin_of(acc_t logit) {
  return static_cast<int>(ordered_bits(logit) >> (8 * sizeof(acc_t) - kBinBits));
}

// A lower bound of the numbers of a bin.
template <class acc_t>
__device__ __forceinline__ acc_t least_of_bin(int bin) {
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  if (bin <= bin_of(-kInfinity)) return -kInfinity;
  if (bin >= bin_of(kInfinity)) return kInfinity;
  return from_ordered_bits(static_cast<OrderedBits<acc_t>>(bin) << (8 * sizeof(acc_t) - kBinBits));
}

template <class T>
struct LogitSelection {
  LogitMap<T> levels[kMaxProposalLevels];
  int64_t images;
  uint32_t span;
  acc_type<T> lowest;  // lower logits are not selected
  uint32_t* bins;  // [images, levels, kBins], zeroed before the launch; or null: all logits above `lowest` are sorted
  SortedRuns<RankKey<acc_type<T>>> runs;  // one list per image and level
};

struct LogitSpan {
  int64_t image;
  int level;
  uint32_t begin, end;
};

template <class T>
__device__ __forceinline__ LogitSpan logit_span(const LogitSelection<T>& selection) {
  const int all = selection.runs.first[selection.runs.lists];
  const int run = blockIdx.x % all;
  LogitSpan span{blockIdx.x / all, 0, 0, 0};
  while (run >= selection.runs.first[span.level + 1]) ++span.level;
  const uint32_t count = logits_of(selection.levels[span.level]);
  span.begin = static_cast<uint32_t>(run - selection.runs.first[span.level]) * selection.span;
  span.end = min(span.begin + selection.span, count);
  return span;
}

template <class T>
__device__ __forceinline__ void load_logits(const LogitMap<T>& logits, const LogitSpan& span, uint32_t first,
                                            acc_type<T> (&values)[kLogitsOwn]) {
  if (logits.dense && first + kLogitsStep <= span.end) {
    // Without a condition per load, the loads overlap.
    const T* data = logits.map.data + span.image * logits.map.stride_n + first + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kLogitsOwn; ++k) values[k] = to_acc(data[k * kLogitThreads]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kLogitsOwn; ++k) {
    const uint32_t i = first + k * kLogitThreads + threadIdx.x;
    // NaN is never selected.
    values[k] = i < span.end ? logit_at(logits, span.image, i) : std::numeric_limits<acc_type<T>>::quiet_NaN();
  }
}

// Ranks a logit by itself. Logits that are not finite are not selected.
template <class T>
struct RankedByLogit {
  acc_type<T> lowest;

  __device__ __forceinline__ acc_type<T> operator()(const LogitSpan&, acc_type<T> logit, uint32_t) const {
    return logit >= lowest ? logit : std::numeric_limits<acc_type<T>>::infinity();
  }

  // Lower logits have no value in `bin` or above.
  __device__ __forceinline__ acc_type<T> bound(int bin) const { return larger(lowest, least_of_bin<acc_type<T>>(bin)); }
};

// A block counts the values `number(span, logit, place)` of a span's logits.
template <class T, class Number>
__device__ __forceinline__ void count_span(const LogitSelection<T>& selection, const Number& number) {
  __shared__ uint32_t bins[kBins];
  for (int i = threadIdx.x; i < kBins; i += kLogitThreads) bins[i] = 0;
  __syncthreads();
  const LogitSpan span = logit_span(selection);
  const LogitMap<T>& logits = selection.levels[span.level];
#pragma unroll 1
  for (uint32_t first = span.begin; first < span.end; first += kLogitsStep) {
    acc_type<T> values[kLogitsOwn];
    load_logits(logits, span, first, values);
#pragma unroll
    for (int k = 0; k < kLogitsOwn; ++k) {
      const acc_type<T> ranked = number(span, values[k], first + k * kLogitThreads + threadIdx.x);
      if (is_finite(ranked)) atomicAdd(&bins[bin_of(ranked)], 1u);
    }
  }
  __syncthreads();
  uint32_t* sums = selection.bins + (span.image * selection.runs.lists + span.level) * kBins;
  for (int i = threadIdx.x; i < kBins; i += kLogitThreads) {
    if (bins[i] != 0) atomicAdd(&sums[i], bins[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kLogitThreads, 3)
    count_logits_kernel(const __grid_constant__ LogitSelection<T> selection) {
  count_span(selection, RankedByLogit<T>{selection.lowest});
}

// The highest bin at which `wanted` logits are reached. 0 if there are fewer; kBins if none is wanted. All threads of
// the block call it.
__device__ __forceinline__ int lowest_bin(const uint32_t* bins, uint32_t wanted) {
  __shared__ uint32_t sums[kLogitThreads / 32];
  __shared__ int lowest;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Each thread reads 16 bins, from the highest down.
  const int top = kBins - 1 - kBinsOwn * static_cast<int>(threadIdx.x);
  uint32_t own[kBinsOwn], sum = 0;
#pragma unroll
  for (int k = 0; k < kBinsOwn; k += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(bins + top - k - 3);
    own[k] = four.w, own[k + 1] = four.z, own[k + 2] = four.y, own[k + 3] = four.x;
    sum += four.x + four.y + four.z + four.w;
  }
  uint32_t before = sum;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, before, delta);
    if (lane >= delta) before += other;
  }
  if (lane == 31) sums[warp] = before;
  if (threadIdx.x == 0) lowest = wanted == 0 ? kBins : 0;
  __syncthreads();
  before -= sum;
  for (int i = 0; i < warp; ++i) before += sums[i];
#pragma unroll
  for (int k = 0; k < kBinsOwn; ++k) {
    if (before < wanted && wanted <= before + own[k]) lowest = top - k;
    before += own[k];
  }
  __syncthreads();
  return lowest;
}

// A block sorts the values of its span that can be among the highest.
template <class T, class Number>
__device__ __forceinline__ void select_span(const LogitSelection<T>& selection, const Number& number) {
  using acc_t = acc_type<T>;
  using Key = RankKey<acc_t>;
  __shared__ Key keys[kSortItems];
  __shared__ int fill;
  const LogitSpan span = logit_span(selection);
  const LogitMap<T>& logits = selection.levels[span.level];
  const SortedRuns<Key>& runs = selection.runs;
  if (threadIdx.x == 0) fill = 0;
  acc_t values[kLogitsOwn];
  load_logits(logits, span, span.begin, values);
  int lowest = runs.limit > 0 ? 0 : kBins;
  if (selection.bins != nullptr) {
    const uint32_t* bins = selection.bins + (span.image * runs.lists + span.level) * kBins;
    lowest = lowest_bin(bins, static_cast<uint32_t>(runs.limit));
  }
  const acc_t bound = number.bound(lowest);
  Key lowest_key = 0;
#pragma unroll 1
  for (uint32_t first = span.begin; first < span.end; first += kLogitsStep) {
    if (first != span.begin) load_logits(logits, span, first, values);
    bool any = false;
#pragma unroll
    for (int k = 0; k < kLogitsOwn; ++k) any |= values[k] >= bound;
    // Mostly no logit of a block is high enough.
    if (!__syncthreads_or(any)) continue;
#pragma unroll 1
    for (uint32_t part = first; part < min(first + kLogitsStep, span.end); part += kKeysStep) {
      Key own[kKeysOwn];
      unsigned votes[kKeysOwn];
      int all = 0;
#pragma unroll
      for (int k = 0; k < kKeysOwn; ++k) {
        const uint32_t place = part + k * kLogitThreads + threadIdx.x;
        const acc_t ranked = number(span, values[k], place);
        const bool may = is_finite(ranked) && bin_of(ranked) >= lowest;
        own[k] = may ? rank_key(ranked, logit_index(logits, place)) : Key{0};
        votes[k] = __ballot_sync(~0u, own[k] > lowest_key);
        all += __popc(votes[k]);
      }
      if (all != 0) {
        int target = 0;
        if (threadIdx.x % 32 == 0) target = atomicAdd(&fill, all);
        target = __shfl_sync(~0u, target, 0);
#pragma unroll
        for (int k = 0; k < kKeysOwn; ++k) {
          if (own[k] > lowest_key) keys[target + __popc(votes[k] & ((1u << threadIdx.x % 32) - 1))] = own[k];
          target += __popc(votes[k]);
        }
      }
#pragma unroll
      for (int k = kKeysOwn; k < kLogitsOwn; ++k) values[k - kKeysOwn] = values[k];
      __syncthreads();
      const int filled = fill;
      __syncthreads();
      if (filled <= kSortItems - kKeysStep || part + kKeysStep >= span.end) continue;
      // Cut back to the wanted keys, which makes room for the next ones.
      sort_block(keys, filled);
      lowest_key = keys[runs.limit - 1];
      if (threadIdx.x == 0) fill = runs.limit;
      __syncthreads();
    }
  }
  __syncthreads();
  const int length = fill;
  sort_block(keys, length);
  const int count = min(length, runs.limit);
  for (int i = threadIdx.x; i < count; i += kLogitThreads) {
    runs.keys[int64_t{blockIdx.x} * runs.capacity + i] = keys[i];
  }
  if (threadIdx.x == 0) runs.counts[blockIdx.x] = count;
}

template <class T>
__global__ void __launch_bounds__(kLogitThreads, 3)
    select_logits_kernel(const __grid_constant__ LogitSelection<T> selection) {
  select_span(selection, RankedByLogit<T>{selection.lowest});
}

// Plans one list per image and level, with room for `room` keys, of which `limit` are wanted. Without `counted` all
// logits above `lowest` are sorted, which is less work for short lists.
template <class T>
LogitSelection<T> plan_selection(Scratch& scratch, const std::vector<FeatureMap<const T>>& maps, int64_t limit,
                                 int64_t room, acc_type<T> lowest, bool counted) {
  LogitSelection<T> selection{};
  selection.images = maps[0].batch, selection.lowest = lowest;
  int64_t all = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    selection.levels[i] = logit_map<T>(maps[i]);
    all += selection.images * logits_of(selection.levels[i]);
  }
  selection.span = logit_span_of(limit, all);
  std::vector<int64_t> lengths;
  for (size_t i = 0; i < maps.size(); ++i) {
    const int64_t spans = (int64_t{logits_of(selection.levels[i])} + selection.span - 1) / selection.span;
    lengths.push_back(std::max<int64_t>(spans, 1));
  }
  if (counted) selection.bins = scratch.take<uint32_t>(selection.images * maps.size() * kBins);
  selection.runs =
      plan_runs<RankKey<acc_type<T>>>(scratch, selection.images, lengths, std::min<int64_t>(room, kSortItems), limit);
  return selection;
}

template <class T>
LaunchConfig selection_config(const LogitSelection<T>& selection) {
  return {selection.images * selection.runs.first[selection.runs.lists], kLogitThreads};
}

// Two launches, which need zeroed bins; one without bins.
template <class T, class Launch>
void select_in_launches(const LogitSelection<T>& selection, const Launch& launch) {
  if (selection.bins != nullptr) launch(count_logits_kernel<T>, selection_config(selection), selection);
  launch(select_logits_kernel<T>, selection_config(selection), selection);
}

}  // namespace fpn_fast
