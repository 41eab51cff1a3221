// SPDX-License-Identifier: Apache-2.0
// Segmented NMS. Boxes are sorted by score, and then by group if there are groups. They are suppressed, and the kept
// ones are listed by score. For up to 8192 boxes this takes five launches without groups and seven with them.
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

// Boxes that a block sorts. 128 such runs are 65,536 boxes, which one launch merges; longer ones keep fewer
// multiprocessors busy.
constexpr int kNmsRun = 512;
constexpr int kNmsRunOwn = kNmsRun / kSortThreads;

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

// A block sorts a run of an image's boxes by score.
template <class acc_t>
__global__ void __launch_bounds__(kSortThreads, 3)
    nms_scores_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  __shared__ RankKey<acc_t> keys[kSortItems];
  const NmsInput<acc_t>& input = sorting.input;
  const int runs = sorting.by_score.first[1];
  const int64_t image = blockIdx.x / runs, first = int64_t{blockIdx.x % runs} * kNmsRun;
  int64_t count = input.room;
  if (input.counts != nullptr) count = min(max(input.counts[image], int64_t{0}), input.room);
  const int length = static_cast<int>(min(max(count - first, int64_t{0}), int64_t{kNmsRun}));
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  // All loads before the first store, so that they overlap.
  RankKey<acc_t> own[kNmsRunOwn];
#pragma unroll
  for (int k = 0; k < kNmsRunOwn; ++k) {
    const int i = k * kSortThreads + threadIdx.x;
    const int64_t index = image * input.room + first + i;
    Box<acc_t> box{};
    acc_t score = std::numeric_limits<acc_t>::quiet_NaN();
    if (i < length) box = input.boxes[index], score = input.scores[index];
    const bool there = is_finite(box) && is_finite(score);
    own[k] = there ? rank_key(score, static_cast<uint32_t>(first + i)) : RankKey<acc_t>{0};
    if (!there) continue;
    for (const acc_t value : {box.x1, box.y1, box.x2, box.y2}) largest = value > largest ? value : largest;
  }
#pragma unroll
  for (int k = 0; k < kNmsRunOwn; ++k) {
    const int i = k * kSortThreads + threadIdx.x;
    if (i < length) keys[i] = own[k];
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
  const MergeBlock block = merge_block(runs);
  const int64_t first = block.image * candidates.room, first_box = block.image * input.room;
  for (int place = block.thread(); place < candidates.room; place += block.threads()) {
    prepare_place(candidates, block.image, place);
  }
  const int count = place_in_order(runs, block, [&](int rank, const RankKey<acc_t>& key) {
    const int64_t index = index_of_key(key);
    sorting.order[first + rank] = static_cast<int>(index);
    if (input.labelled()) return;
    const Box<acc_t> box = input.boxes[first_box + index];
    const bool moves = sorting.largest != nullptr;
    candidates.boxes[first + rank] =
        moves ? moved_by_group(sorting, block.image, input.groups[first_box + index], box) : box;
  });
  if (block.thread() == 0) candidates.counts[block.image] = count;
}

// A block sorts a run of ranks by group.
template <class acc_t>
__global__ void __launch_bounds__(kSortThreads, 3)
    nms_groups_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  __shared__ GroupKey keys[kSortItems];
  const int runs = sorting.by_group.first[1];
  const int64_t image = blockIdx.x / runs;
  const int first = static_cast<int>(blockIdx.x % runs) * kNmsRun;
  const int length = min(max(sorting.candidates.counts[image] - first, 0), kNmsRun);
  const int* order = sorting.order + image * sorting.candidates.room + first;
  // All loads before the first store, so that they overlap.
  int64_t groups[kNmsRunOwn];
#pragma unroll
  for (int k = 0; k < kNmsRunOwn; ++k) {
    const int i = k * kSortThreads + threadIdx.x;
    groups[k] = i < length ? sorting.input.groups[image * sorting.input.room + order[i]] : 0;
  }
#pragma unroll
  for (int k = 0; k < kNmsRunOwn; ++k) {
    const int i = k * kSortThreads + threadIdx.x;
    if (i < length) keys[i] = group_key(groups[k], static_cast<uint32_t>(first + i));
  }
  sort_run(sorting.by_group, blockIdx.x, keys, length);
}

// Merges the runs of an image into the order of the candidates.
template <class acc_t>
__global__ void __launch_bounds__(kMergeThreads, 4)
    nms_candidates_kernel(const __grid_constant__ NmsSorting<acc_t> sorting) {
  const Candidates<acc_t>& candidates = sorting.candidates;
  const MergeBlock block = merge_block(sorting.by_group);
  const int64_t first = block.image * candidates.room;
  place_in_order(sorting.by_group, block, [&](int place, const GroupKey& key) {
    const int rank = static_cast<int>(index_of_key(key));
    candidates.labels[first + place] = group_of_key(key);
    candidates.ranks[first + place] = rank;
    candidates.boxes[first + place] =
        sorting.input.boxes[block.image * sorting.input.room + sorting.order[first + rank]];
  });
}

// The kept boxes of an image, by score.
struct KeptRanks {
  const uint8_t* flags;  // [batch, room]
  const int* order;      // [batch, room]
  int64_t room;
};

// Flags of one 16-byte access.
constexpr int kFlagsOwn = 16;

// Calls `write(i, index)` for the i-th kept box of an image, for i below `limit`. Returns the number of calls. All
// threads of the block call it.
template <class Write>
__device__ __forceinline__ int64_t write_by_score(const KeptRanks& ranks, int64_t image, int64_t limit,
                                                  const Write& write) {
  __shared__ int sums[kNmsWarps];
  __shared__ int places[kNmsThreads * kFlagsOwn];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint8_t* all = ranks.flags + image * ranks.room;
  const int* order = ranks.order + image * ranks.room;
  int64_t found = 0;
#pragma unroll 1
  for (int64_t first = 0; first < ranks.room && found < limit; first += kNmsThreads * kFlagsOwn) {
    const int place = threadIdx.x * kFlagsOwn;
    uint4 flags{0, 0, 0, 0};
    // `room` is a multiple of 64.
    if (first + place < ranks.room) flags = *reinterpret_cast<const uint4*>(all + first + place);
    const int own = __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w);
    int before = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, before, delta);
      if (lane >= delta) before += other;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int target = before - own, here = 0;
#pragma unroll
    for (int i = 0; i < kNmsWarps; ++i) {
      if (i < warp) target += sums[i];
      here += sums[i];
    }
    const unsigned words[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
    for (int i = 0; i < kFlagsOwn; ++i) {
      if ((words[i / 4] >> i % 4 * 8 & 1) != 0) places[target++] = place + i;
    }
    __syncthreads();
    // Neighbouring threads write neighbours, and their loads overlap.
    for (int i = threadIdx.x; i < here && found + i < limit; i += kNmsThreads) {
      write(found + i, order[first + places[i]]);
    }
    found += here;
  }
  return min(found, limit);
}

template <class Index>
struct NmsOutput {
  KeptRanks ranks;
  int64_t max_output;
  Index *keep, *counts;  // [batch, max_output], [batch]
};

// A block lists an image's kept boxes by score and writes the padding.
template <class Index>
__global__ void __launch_bounds__(kNmsThreads, 4) nms_output_kernel(const __grid_constant__ NmsOutput<Index> output) {
  const int64_t image = blockIdx.x;
  Index* keep = output.keep + image * output.max_output;
  const int64_t found =
      write_by_score(output.ranks, image, output.max_output, [&](int64_t i, int index) { keep[i] = index; });
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
  const int64_t room = sorting.candidates.room, runs = ceil_div(room, kNmsRun);
  const int64_t capacity = std::min<int64_t>(room, kNmsRun);
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
  launch(nms_order_kernel<acc_t>, merge_config(last.by_score, batch), last);
  if (!first.input.labelled()) return;
  launch(nms_groups_kernel<acc_t>, LaunchConfig{batch * first.by_group.first[1], kSortThreads}, first);
  merge_in_launches(plan.group_merges, batch, launch);
  launch(nms_candidates_kernel<acc_t>, merge_config(last.by_group, batch), last);
}

template <class acc_t, class Launch>
KeptRanks nms_in_launches(const NmsPlan<acc_t>& plan, const Launch& launch) {
  const Candidates<acc_t>& candidates = plan.first.candidates;
  sort_in_launches(plan, launch);
  suppress_in_launches(candidates, launch);
  return {candidates.flags, plan.first.order, candidates.room};
}

}  // namespace fpn_fast
