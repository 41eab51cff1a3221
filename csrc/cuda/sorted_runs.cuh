// SPDX-License-Identifier: Apache-2.0
// Sorts more keys than a block holds. Blocks sort runs. The rank of an element is the number of larger keys in all
// runs, found by bisection, in shared memory if the keys fit. One launch merges up to 128 runs, which the eight lanes
// that work for a key share. Keys are unique and not zero; the largest comes first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/head_decoding.h"
#include "launch.h"
#include "scratch.h"

namespace fpn_fast {

constexpr int kMergeThreads = 256;
constexpr int kMergeLanes = 8;
// Keys of a block at a time.
constexpr int kMergeKeys = kMergeThreads / kMergeLanes;
// Bisections in flight of a lane, whose memory accesses overlap.
constexpr int kBisections = 8;
constexpr int kMergeWays = 128;
// 16 KB. Short runs of a list are about as many keys as it wants.
template <class Key>
constexpr int kStagedKeys = 16384 / sizeof(Key);
constexpr int kMaxRunLists = kMaxProposalLevels;
// Blocks that fill a GPU. With more lists, a block ranks more of its keys.
constexpr int64_t kMergeBlocks = 1024;

template <class Key>
struct SortedRuns {
  Key* keys;    // [images, runs, capacity]
  int* counts;  // [images, runs]
  int capacity;
  int limit;                    // keys wanted per list
  int lists;                    // per image
  int first[kMaxRunLists + 1];  // list i of an image has the runs [first[i], first[i + 1])
  // Of their merge: kMergeWays runs of a list are a group. List i of an image has the groups [group[i], group[i + 1]).
  int group[kMaxRunLists + 1];
  int blocks;  // per group

  HOST_DEVICE int64_t index(int64_t image, int run) const { return image * first[lists] + run; }
};

// A group of runs [begin, end) of a list, and the block's place among those that merge it.
struct MergeBlock {
  int64_t image;
  int list, begin, end, block, blocks;

  __device__ __forceinline__ int thread() const { return block * kMergeThreads + static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return blocks * kMergeThreads; }
};

template <class Key>
__device__ __forceinline__ MergeBlock merge_block(const SortedRuns<Key>& runs) {
  const unsigned group = blockIdx.x / runs.blocks, all = runs.group[runs.lists];
  const int own = static_cast<int>(group % all);
  MergeBlock block{group / all, 0, 0, 0, static_cast<int>(blockIdx.x % runs.blocks), runs.blocks};
  while (own >= runs.group[block.list + 1]) ++block.list;
  block.begin = runs.first[block.list] + (own - runs.group[block.list]) * kMergeWays;
  block.end = min(block.begin + kMergeWays, runs.first[block.list + 1]);
  return block;
}

// The largest i below `ways` with firsts[i] <= element.
__device__ __forceinline__ int run_of(const int (&firsts)[kMergeWays + 1], int ways, int element) {
  int run = 0;
#pragma unroll
  for (int step = kMergeWays / 2; step > 0; step /= 2) {
    if (run + step < ways && firsts[run + step] <= element) run += step;
  }
  return run;
}

// The number of larger keys among the runs of a group. `key_at(run, i)` is key i of a run. The lanes of a key call it
// together, and each returns its share.
template <class Key, class KeyAt>
__device__ __forceinline__ int larger_keys(const int (&firsts)[kMergeWays + 1], int ways, const Key& key,
                                           const KeyAt& key_at) {
  int rank = 0;
#pragma unroll 1
  for (int first = 0; first < ways; first += kMergeLanes * kBisections) {
    int counts[kBisections], found[kBisections] = {}, most = 0;
#pragma unroll
    for (int k = 0; k < kBisections; ++k) {
      const int run = first + k * kMergeLanes + static_cast<int>(threadIdx.x % kMergeLanes);
      counts[k] = run < ways ? firsts[run + 1] - firsts[run] : 0;
      most = max(most, counts[k]);
    }
#pragma unroll 1
    for (int step = most > 0 ? 1 << (31 - __clz(most)) : 0; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kBisections; ++k) {
        if (first + k * kMergeLanes >= ways) break;
        const int run = first + k * kMergeLanes + static_cast<int>(threadIdx.x % kMergeLanes), next = found[k] + step;
        if (next <= counts[k] && key_at(run, next - 1) > key) found[k] = next;
      }
    }
#pragma unroll
    for (int k = 0; k < kBisections; ++k) rank += found[k];
  }
  return rank;
}

// Calls `place(rank, key)` for the block's share of the wanted keys of a group, by different threads. Returns the
// number of wanted keys of the group. All threads of the block call it.
template <class Key, class Place>
__device__ __forceinline__ int place_in_order(const SortedRuns<Key>& runs, const MergeBlock& block,
                                              const Place& place) {
  __shared__ int firsts[kMergeWays + 1];
  __shared__ Key staged[kStagedKeys<Key>], placed[kMergeKeys];
  __shared__ int ranks[kMergeKeys];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kMergeLanes, number = thread / kMergeLanes;
  const int ways = block.end - block.begin, capacity = runs.capacity;
  const int64_t first_run = runs.index(block.image, block.begin);
  const Key* keys = runs.keys + first_run * capacity;
  if (thread < 32) {
    // Where each run begins in the order of runs.
    constexpr int kOwn = kMergeWays / 32;
    int own[kOwn], sum = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) own[k] = kOwn * thread + k < ways ? runs.counts[first_run + kOwn * thread + k] : 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) sum += own[k];
    int before = sum;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, before, delta);
      if (thread >= delta) before += other;
    }
    before -= sum;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) firsts[kOwn * thread + k] = before, before += own[k];
    if (thread == 31) firsts[kMergeWays] = before;
  }
  __syncthreads();
  const int total = firsts[kMergeWays];
  const auto in_memory = [&](int run, int i) { return keys[int64_t{run} * capacity + i]; };
  const auto in_stage = [&](int run, int i) { return staged[firsts[run] + i]; };
  const bool is_staged = total <= kStagedKeys<Key> && block.block * kMergeKeys < total;
  if (is_staged) {
    // All loads before the first store, so that they overlap.
    constexpr int kOwn = kStagedKeys<Key> / kMergeThreads;
    Key own[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int i = k * kMergeThreads + thread;
      const int run = run_of(firsts, ways, i);
      own[k] = i < total ? in_memory(run, i - firsts[run]) : Key{0};
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) staged[k * kMergeThreads + thread] = own[k];
    __syncthreads();
  }
#pragma unroll 1
  for (int base = block.block * kMergeKeys; base < total; base += block.blocks * kMergeKeys) {
    const int element = base + number;
    Key key = 0;
    if (element < total) {
      const int run = is_staged ? 0 : run_of(firsts, ways, element);
      key = is_staged ? staged[element] : in_memory(run, element - firsts[run]);
    }
    int rank = is_staged ? larger_keys(firsts, ways, key, in_stage) : larger_keys(firsts, ways, key, in_memory);
#pragma unroll
    for (int delta = kMergeLanes / 2; delta > 0; delta /= 2) rank += __shfl_xor_sync(~0u, rank, delta);
    if (lane == 0) ranks[number] = rank, placed[number] = key;
    __syncthreads();
    // By neighbouring threads, because this may take long.
    if (thread < kMergeKeys && base + thread < total && ranks[thread] < runs.limit) {
      place(ranks[thread], placed[thread]);
    }
    __syncthreads();
  }
  return min(total, runs.limit);
}

template <class Key>
struct RunMerge {
  SortedRuns<Key> from, to;
};

// Keys of 128 bits need the registers of a fourth block: sm_100 spills otherwise.
template <class Key>
constexpr int kMergeBlocksAtOnce = sizeof(Key) > 8 ? 3 : 4;

template <class Key>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocksAtOnce<Key>)
    merge_runs_kernel(const __grid_constant__ RunMerge<Key> merge) {
  const MergeBlock block = merge_block(merge.from);
  const int run = merge.to.first[block.list] + (block.begin - merge.from.first[block.list]) / kMergeWays;
  const int64_t target = merge.to.index(block.image, run);
  Key* keys = merge.to.keys + target * merge.to.capacity;
  const int count = place_in_order(merge.from, block, [&](int rank, const Key& key) { keys[rank] = key; });
  if (block.thread() == 0) merge.to.counts[target] = count;
}

// `lengths` holds the number of runs of each list, one or more.
template <class Key>
SortedRuns<Key> plan_runs(Scratch& scratch, int64_t images, const std::vector<int64_t>& lengths, int64_t capacity,
                          int64_t limit) {
  SortedRuns<Key> runs{};
  runs.capacity = static_cast<int>(capacity), runs.limit = static_cast<int>(limit);
  runs.lists = static_cast<int>(lengths.size());
  for (int i = 0; i < runs.lists; ++i) {
    runs.first[i + 1] = runs.first[i] + static_cast<int>(lengths[i]);
    runs.group[i + 1] = runs.group[i] + static_cast<int>(ceil_div(lengths[i], kMergeWays));
  }
  // Runs may hold more keys than are wanted, but seldom twice as many.
  const int64_t longest = std::min<int64_t>(*std::max_element(lengths.begin(), lengths.end()), kMergeWays);
  const int64_t wanted = ceil_div(std::min(2 * limit, longest * capacity), kMergeKeys);
  const int64_t share = std::max<int64_t>(kMergeBlocks / std::max<int64_t>(images * runs.group[runs.lists], 1), 4);
  runs.blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, share));
  const int64_t all = images * runs.first[runs.lists];
  runs.keys = scratch.take<Key>(all * capacity), runs.counts = scratch.take<int>(all);
  return runs;
}

template <class Key>
LaunchConfig merge_config(const SortedRuns<Key>& runs, int64_t images) {
  return {images * runs.group[runs.lists] * runs.blocks, kMergeThreads};
}

// Plans merges until no list has more than kMergeWays runs, and sets `runs` to these. `room` is the limit of a list,
// rounded up like capacities.
template <class Key>
std::vector<RunMerge<Key>> plan_merges(Scratch& scratch, int64_t images, int64_t room, SortedRuns<Key>& runs) {
  std::vector<RunMerge<Key>> merges;
  while (runs.group[runs.lists] > runs.lists) {
    std::vector<int64_t> lengths;
    for (int i = 0; i < runs.lists; ++i) lengths.push_back(runs.group[i + 1] - runs.group[i]);
    const int64_t capacity = std::min<int64_t>(int64_t{kMergeWays} * runs.capacity, room);
    merges.push_back({runs, plan_runs<Key>(scratch, images, lengths, capacity, runs.limit)});
    runs = merges.back().to;
  }
  return merges;
}

template <class Key, class Launch>
void merge_in_launches(const std::vector<RunMerge<Key>>& merges, int64_t images, const Launch& launch) {
  for (const RunMerge<Key>& merge : merges) launch(merge_runs_kernel<Key>, merge_config(merge.from, images), merge);
}

}  // namespace fpn_fast
