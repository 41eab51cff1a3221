// SPDX-License-Identifier: Apache-2.0
// Sorts more keys than a block holds. Blocks sort runs. The rank of an element is its index in its own run plus the
// number of larger keys in each other run, found by bisection. One launch merges up to 32 runs, which is 65,536 keys.
// Keys are unique and not zero; the largest comes first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/head_decoding.h"
#include "launch.h"
#include "scratch.h"

namespace fpn_fast {

constexpr int kMergeThreads = 256;
constexpr int kMergeWays = 32;
// Bisections in flight, whose memory accesses overlap. Four groups of eight cover all runs.
constexpr int kBisections = 8;
constexpr int kMaxRunLists = kMaxProposalLevels;

template <class Key>
struct SortedRuns {
  Key* keys;    // [images, runs, capacity]
  int* counts;  // [images, runs]
  int capacity;
  int limit;                    // keys wanted per list
  int lists;                    // per image
  int first[kMaxRunLists + 1];  // list i of an image has the runs [first[i], first[i + 1])

  HOST_DEVICE int64_t index(int64_t image, int run) const { return image * first[lists] + run; }
};

// The element that a thread places: element `i` of a run, if it exists, among the runs [begin, end) of its list.
struct RunElement {
  int64_t image;
  int list, run, i, begin, end;
};

template <class Key>
HOST_DEVICE int64_t blocks_of_run(const SortedRuns<Key>& runs) {
  return (runs.capacity + kMergeThreads - 1) / kMergeThreads;
}

template <class Key>
__device__ __forceinline__ RunElement run_element(const SortedRuns<Key>& runs) {
  const int parts = static_cast<int>(blocks_of_run(runs)), all = runs.first[runs.lists];
  const int block = blockIdx.x / parts;
  RunElement element;
  element.image = block / all, element.run = block % all, element.list = 0;
  element.i = static_cast<int>(blockIdx.x % parts) * kMergeThreads + threadIdx.x;
  while (element.run >= runs.first[element.list + 1]) ++element.list;
  const int first = runs.first[element.list];
  element.begin = first + (element.run - first) / kMergeWays * kMergeWays;
  element.end = min(element.begin + kMergeWays, runs.first[element.list + 1]);
  return element;
}

// The number of wanted elements in the runs that `element` is merged with.
template <class Key>
__device__ __forceinline__ int merged_count(const SortedRuns<Key>& runs, const RunElement& element) {
  int64_t count = 0;
  for (int run = element.begin; run < element.end; ++run) count += runs.counts[runs.index(element.image, run)];
  return static_cast<int>(count < runs.limit ? count : runs.limit);
}

template <class Key>
__device__ __forceinline__ int rank_in_runs(const SortedRuns<Key>& runs, const RunElement& element, const Key& key) {
  int rank = element.i;
#pragma unroll 1
  for (int first = element.begin; first < element.end; first += kBisections) {
    const Key* keys = runs.keys + runs.index(element.image, first) * runs.capacity;
    int counts[kBisections], found[kBisections];
#pragma unroll
    for (int k = 0; k < kBisections; ++k) {
      const bool other = first + k < element.end && first + k != element.run;
      counts[k] = other ? runs.counts[runs.index(element.image, first + k)] : 0, found[k] = 0;
    }
#pragma unroll 1
    for (int step = 1 << (31 - __clz(runs.capacity)); step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kBisections; ++k) {
        const int next = found[k] + step;
        if (next <= counts[k] && keys[int64_t{k} * runs.capacity + next - 1] > key) found[k] = next;
      }
    }
#pragma unroll
    for (int k = 0; k < kBisections; ++k) rank += found[k];
  }
  return rank;
}

// Calls `place(rank, key)` for the thread's element, if it exists and is wanted.
template <class Key, class Place>
__device__ __forceinline__ void place_in_runs(const SortedRuns<Key>& runs, const RunElement& element,
                                              const Place& place) {
  const int64_t run = runs.index(element.image, element.run);
  if (element.i >= runs.counts[run]) return;
  const Key key = runs.keys[run * runs.capacity + element.i];
  const int rank = rank_in_runs(runs, element, key);
  if (rank < runs.limit) place(rank, key);
}

template <class Key>
struct RunMerge {
  SortedRuns<Key> from, to;
};

template <class Key>
__global__ void __launch_bounds__(kMergeThreads, 4) merge_runs_kernel(const __grid_constant__ RunMerge<Key> merge) {
  const RunElement element = run_element(merge.from);
  const int run = merge.to.first[element.list] + (element.run - merge.from.first[element.list]) / kMergeWays;
  const int64_t target = merge.to.index(element.image, run);
  if (element.run == element.begin && element.i == 0) merge.to.counts[target] = merged_count(merge.from, element);
  place_in_runs(merge.from, element,
                [&](int rank, const Key& key) { merge.to.keys[target * merge.to.capacity + rank] = key; });
}

// `lengths` holds the number of runs of each list, one or more.
template <class Key>
SortedRuns<Key> plan_runs(Scratch& scratch, int64_t images, const std::vector<int64_t>& lengths, int64_t capacity,
                          int64_t limit) {
  SortedRuns<Key> runs{};
  runs.capacity = static_cast<int>(capacity), runs.limit = static_cast<int>(limit);
  runs.lists = static_cast<int>(lengths.size());
  for (int i = 0; i < runs.lists; ++i) runs.first[i + 1] = runs.first[i] + static_cast<int>(lengths[i]);
  const int64_t all = images * runs.first[runs.lists];
  runs.keys = scratch.take<Key>(all * capacity), runs.counts = scratch.take<int>(all);
  return runs;
}

template <class Key>
int64_t blocks_of_runs(const SortedRuns<Key>& runs, int64_t images) {
  return images * runs.first[runs.lists] * blocks_of_run(runs);
}

// Plans merges until no list has more than kMergeWays runs, and sets `runs` to these. `room` is the limit of a list,
// rounded up like capacities.
template <class Key>
std::vector<RunMerge<Key>> plan_merges(Scratch& scratch, int64_t images, int64_t room, SortedRuns<Key>& runs) {
  std::vector<RunMerge<Key>> merges;
  while (true) {
    std::vector<int64_t> lengths;
    bool enough = true;
    for (int i = 0; i < runs.lists; ++i) {
      const int length = runs.first[i + 1] - runs.first[i];
      enough &= length <= kMergeWays;
      lengths.push_back((length + kMergeWays - 1) / kMergeWays);
    }
    if (enough) return merges;
    const int64_t capacity = std::min<int64_t>(int64_t{kMergeWays} * runs.capacity, room);
    merges.push_back({runs, plan_runs<Key>(scratch, images, lengths, capacity, runs.limit)});
    runs = merges.back().to;
  }
}

template <class Key, class Launch>
void merge_in_launches(const std::vector<RunMerge<Key>>& merges, int64_t images, const Launch& launch) {
  for (const RunMerge<Key>& merge : merges) {
    launch(merge_runs_kernel<Key>, LaunchConfig{blocks_of_runs(merge.from, images), kMergeThreads}, merge);
  }
}

}  // namespace fpn_fast
