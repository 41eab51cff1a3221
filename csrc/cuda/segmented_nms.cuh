// SPDX-License-Identifier: Apache-2.0
// Segmented NMS. Boxes are sorted by score, and then by group if there are groups. They are suppressed, and the kept
// ones are listed by score. For up to 1024 boxes this takes four launches without groups and six with them.
// sorted_runs.cuh and greedy_nms.cuh say when there are more.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../common/boxes.h"
#include "../common/nms_input.h"
#include "../common/ordered_bits.h"
#include "block_sort.cuh"
#include "greedy_nms.cuh"
#include "launch.h"
#include "scratch.h"
#include "sorted_runs.cuh"
#include "warp.cuh"

namespace fpn_fast {

// A group and a rank by score as one integer, never zero. The largest comes first.
using GroupKey = unsigned __int128;

// The groups may come in any order.
HOST_DEVICE GroupKey group_key(int64_t group, uint32_t rank) {
  return GroupKey{1} << 96 | GroupKey{static_cast<uint64_t>(group)} << 32 | static_cast<uint32_t>(~rank);
}

HOST_DEVICE uint64_t group_of_key(GroupKey key) { return static_cast<uint64_t>(key >> 32); }

template <class acc_t>
struct NmsSorting {
  NmsInput<acc_t> input;
  Candidates<acc_t> candidates;
  SortedRuns<RankKey<acc_t>> by_score;
  int* order;  // [batch, candidates.room]
  // The largest coordinate in each of an image's first runs, or null if no box is moved.
  acc_t* largest;
  int largest_count;
  SortedRuns<GroupKey> by_group;
};

// Sorts the keys of a block, and stores those that are not zero and their number. All threads of the block call it.
template <class Key>
__device__ __forceinline__ void sort_run(const SortedRuns<Key>& runs, int64_t run, Key (&keys)[kSortItems],
                                         int length) {
  // Apart from the rest, or the compiler reads keys[0] where there is none.
  if (length == 0) {
    if (threadIdx.x == 0) runs.counts[run] = 0;
    return;
  }
  sort_block(keys, length);
  if (threadIdx.x == 0 && keys[0] == 0) runs.counts[run] = 0;
  for (int i = threadIdx.x; i < length && i < runs.capacity && keys[i] != 0; i += kSortThreads) {
    runs.keys[run * runs.capacity + i] = keys[i];
    if (i + 1 == length || keys[i + 1] == 0) runs.counts[run] = i + 1;
  }
}

template <class acc_t>
__device__ __forceinline__ acc_t largest_of_block(acc_t value) {
  __shared__ acc_t largest[kSortThreads / 32];
  value = warp_maximum(value);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kSortThreads / 32; ++i) value = largest[i] > value ? largest[i] : value;
  return value;
}

// A block sorts 2048 boxes of an image by score.
template <class acc_t>
__global__ void __launch_bounds__(kSortThreads, 3)
    nms_scores_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  __shared__ RankKey<acc_t> keys[kSortItems];
  const NmsInput<acc_t>& input = sorting.input;
  const int runs = sorting.by_score.first[1];
  const int64_t image = blockIdx.x / runs, first = int64_t{blockIdx.x % runs} * kSortItems;
  int64_t count = input.room;
  if (input.counts != nullptr) count = min(max(input.counts[image], int64_t{0}), input.room);
  const int length = static_cast<int>(min(max(count - first, int64_t{0}), int64_t{kSortItems}));
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    const int i = k * kSortThreads + threadIdx.x;
    if (i >= length) break;
    const int64_t index = image * input.room + first + i;
    const Box<acc_t> box = input.boxes[index];
    const acc_t score = input.scores[index];
    const bool there = is_finite(box) && is_finite(score);
    keys[i] = there ? rank_key(score, static_cast<uint32_t>(first + i)) : RankKey<acc_t>{0};
    if (!there) continue;
    for (const acc_t value : {box.x1, box.y1, box.x2, box.y2}) largest = value > largest ? value : largest;
  }
  if (sorting.largest != nullptr) {
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) sorting.largest[blockIdx.x] = largest;
  }
  sort_run(sorting.by_score, blockIdx.x, keys, length);
}

// torchvision's trick of moving groups apart, with its arithmetic, because rounding decides which boxes still overlap.
template <class acc_t>
__device__ __forceinline__ Box<acc_t> moved_by_group(const NmsSorting<acc_t>& sorting, int64_t image, int64_t group,
                                                     const Box<acc_t>& box) {
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for (int i = 0; i < sorting.largest_count; ++i) {
    const acc_t value = sorting.largest[image * sorting.largest_count + i];
    largest = value > largest ? value : largest;
  }
  const acc_t offset = multiply(static_cast<acc_t>(group), add(largest, acc_t(1)));
  return {add(box.x1, offset), add(box.y1, offset), add(box.x2, offset), add(box.y2, offset)};
}

// Merges the runs of an image. Without labels this is the order of the candidates.
template <class acc_t>
__global__ void __launch_bounds__(kMergeThreads, 3)
    nms_order_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  const NmsInput<acc_t>& input = sorting.input;
  const Candidates<acc_t>& candidates = sorting.candidates;
  const SortedRuns<RankKey<acc_t>>& runs = sorting.by_score;
  const RunElement element = run_element(runs);
  const int64_t first = element.image * candidates.room;
  const int64_t threads = runs.first[1] * blocks_of_run(runs) * kMergeThreads;
  const int64_t thread = element.run * blocks_of_run(runs) * kMergeThreads + element.i;
  for (int64_t place = thread; place < candidates.room; place += threads) {
    prepare_place(candidates, element.image, place);
  }
  if (thread == 0) candidates.counts[element.image] = merged_count(runs, element);
  place_in_runs(runs, element, [&](int rank, const RankKey<acc_t>& key) {
    const int64_t index = index_of_key(key);
    sorting.order[first + rank] = static_cast<int>(index);
    if (input.labelled()) return;
    const Box<acc_t> box = input.boxes[element.image * input.room + index];
    const bool moves = sorting.largest != nullptr;
    candidates.boxes[first + rank] =
        moves ? moved_by_group(sorting, element.image, input.groups[element.image * input.room + index], box) : box;
  });
}

// A block sorts 2048 ranks by group.
template <class acc_t>
__global__ void __launch_bounds__(kSortThreads, 3)
    nms_groups_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  __shared__ GroupKey keys[kSortItems];
  const int runs = sorting.by_group.first[1];
  const int64_t image = blockIdx.x / runs;
  const int first = static_cast<int>(blockIdx.x % runs) * kSortItems;
  const int length = min(max(sorting.candidates.counts[image] - first, 0), kSortItems);
  const int* order = sorting.order + image * sorting.candidates.room + first;
  for (int i = threadIdx.x; i < length; i += kSortThreads) {
    keys[i] = group_key(sorting.input.groups[image * sorting.input.room + order[i]], static_cast<uint32_t>(first + i));
  }
  sort_run(sorting.by_group, blockIdx.x, keys, length);
}

// Merges the runs of an image into the order of the candidates.
template <class acc_t>
__global__ void __launch_bounds__(kMergeThreads, 4)
    nms_candidates_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  const Candidates<acc_t>& candidates = sorting.candidates;
  const RunElement element = run_element(sorting.by_group);
  const int64_t first = element.image * candidates.room;
  place_in_runs(sorting.by_group, element, [&](int place, const GroupKey& key) {
    const int rank = static_cast<int>(index_of_key(key));
    candidates.labels[first + place] = group_of_key(key);
    candidates.ranks[first + place] = rank;
    candidates.boxes[first + place] =
        sorting.input.boxes[element.image * sorting.input.room + sorting.order[first + rank]];
  });
}

template <class Index>
struct NmsOutput {
  const uint8_t* flags;  // [batch, room]
  const int* order;      // [batch, room]
  int64_t room, max_output;
  Index *keep, *counts;  // [batch, max_output], [batch]
};

// Flags of one 16-byte access.
constexpr int kFlagsOwn = 16;

// A block lists an image's kept boxes by score and writes the padding.
template <class Index>
__global__ void __launch_bounds__(kNmsThreads, 4) nms_output_kernel(const __grid_constant__ NmsOutput<Index> output) {
  __shared__ int counts[2][kNmsWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t image = blockIdx.x;
  Index* keep = output.keep + image * output.max_output;
  int64_t found = 0;
  int turn = 0;
#pragma unroll 1
  for (int64_t first = 0; first < output.room && found < output.max_output; first += kNmsThreads * kFlagsOwn) {
    const int64_t place = first + threadIdx.x * kFlagsOwn;
    uint4 flags{0, 0, 0, 0};
    // `room` is a multiple of 64.
    if (place < output.room) flags = *reinterpret_cast<const uint4*>(output.flags + image * output.room + place);
    const int own = __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w);
    int before = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, before, delta);
      if (lane >= delta) before += other;
    }
    if (lane == 31) counts[turn][warp] = before;
    __syncthreads();
    int64_t target = found + before - own;
    for (int i = 0; i < kNmsWarps; ++i) {
      if (i < warp) target += counts[turn][i];
      found += counts[turn][i];
    }
    // The two sets alternate, so that one barrier per turn is enough.
    turn = 1 - turn;
    const unsigned words[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
    for (int i = 0; i < kFlagsOwn; ++i) {
      if ((words[i / 4] >> i % 4 * 8 & 1) == 0) continue;
      if (target < output.max_output) keep[target] = output.order[image * output.room + place + i];
      ++target;
    }
  }
  found = min(found, output.max_output);
  for (int64_t i = found + threadIdx.x; i < output.max_output; i += kNmsThreads) keep[i] = -1;
  if (threadIdx.x == 0) output.counts[image] = found;
}

template <class acc_t>
struct NmsPlan {
  // `first` is written by the first launch. `last` is read by the last merge of runs.
  NmsSorting<acc_t> first, last;
  std::vector<RunMerge<RankKey<acc_t>>> score_merges;
  std::vector<RunMerge<GroupKey>> group_merges;
};

template <class acc_t>
NmsPlan<acc_t> plan_nms(Scratch& scratch, const NmsInput<acc_t>& input, const OverlapRule<acc_t>& rule) {
  NmsPlan<acc_t> plan{};
  NmsSorting<acc_t>& sorting = plan.first;
  sorting.input = input;
  sorting.candidates = plan_candidates<acc_t>(scratch, input.batch, input.room, input.labelled(), true, rule);
  const int64_t room = sorting.candidates.room, runs = (room + kSortItems - 1) / kSortItems;
  const int64_t capacity = std::min<int64_t>(room, kSortItems);
  sorting.order = scratch.take<int>(input.batch * room);
  sorting.by_score = plan_runs<RankKey<acc_t>>(scratch, input.batch, {runs}, capacity, input.room);
  if (input.groups != nullptr && input.offset) {
    sorting.largest_count = static_cast<int>(runs);
    sorting.largest = scratch.take<acc_t>(input.batch * runs);
  }
  if (input.labelled()) {
    sorting.by_group = plan_runs<GroupKey>(scratch, input.batch, {runs}, capacity, input.room);
  }
  plan.last = sorting;
  plan.score_merges = plan_merges(scratch, input.batch, room, plan.last.by_score);
  if (input.labelled()) plan.group_merges = plan_merges(scratch, input.batch, room, plan.last.by_group);
  return plan;
}

template <class acc_t, class Launch>
void sort_in_launches(const NmsPlan<acc_t>& plan, const Launch& launch) {
  const NmsSorting<acc_t>&first = plan.first, &last = plan.last;
  const int64_t batch = first.input.batch;
  launch(nms_scores_kernel<acc_t>, LaunchConfig{batch * first.by_score.first[1], kSortThreads}, first);
  merge_in_launches(plan.score_merges, batch, launch);
  launch(nms_order_kernel<acc_t>, LaunchConfig{blocks_of_runs(last.by_score, batch), kMergeThreads}, last);
  if (!first.input.labelled()) return;
  launch(nms_groups_kernel<acc_t>, LaunchConfig{batch * first.by_group.first[1], kSortThreads}, first);
  merge_in_launches(plan.group_merges, batch, launch);
  launch(nms_candidates_kernel<acc_t>, LaunchConfig{blocks_of_runs(last.by_group, batch), kMergeThreads}, last);
}

template <class acc_t, class Launch>
void nms_in_launches(const NmsPlan<acc_t>& plan, int64_t max_output, int64_t* keep, int64_t* counts,
                     const Launch& launch) {
  const Candidates<acc_t>& candidates = plan.first.candidates;
  sort_in_launches(plan, launch);
  suppress_in_launches(candidates, launch);
  launch(nms_output_kernel<int64_t>, LaunchConfig{plan.first.input.batch, kNmsThreads},
         NmsOutput<int64_t>{candidates.flags, plan.first.order, candidates.room, max_output, keep, counts});
}

}  // namespace fpn_fast
