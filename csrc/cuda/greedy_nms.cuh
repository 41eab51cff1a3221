// SPDX-License-Identifier: Apache-2.0
// Greedy non-maximum suppression of sorted candidates.
//
// A list (an image, or a level of one) is divided into segments: the runs of one label, with the best box first. Boxes
// are decided in chunks of 64, one bit per box.
//
// Note [Pairs first]
// Two launches decide all segments. In the first, many blocks find which earlier boxes of its segment a box overlaps,
// as one word of 64 bits per chunk. In the second, a block decides a segment from these words. Each warp has a chunk:
// the kept boxes of a chunk are all that the warp of the next one waits for. Words reach back to the start of a region
// of up to 8192 boxes. A list of several regions takes two more launches for each: in the first the kept boxes of
// earlier regions suppress, in the second the rest is decided as before. Many short lists need no help from other
// multiprocessors: one block decides a list, without words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/boxes.h"
#include "launch.h"
#include "scratch.h"
#include "warp.cuh"

namespace fpn_fast {

constexpr int kNmsThreads = 256;
constexpr int kNmsWarps = kNmsThreads / 32;
constexpr int kNmsChunk = 64;
// This many blocks fill a GPU, so one block may take a list of up to kLongestList.
constexpr int64_t kManyLists = 64;
constexpr int kLongestList = 4096;
// A region has the chunks of its list, but not more than this: 8192 boxes, whose words one block reads in about the
// time that it takes to decide them (by the model).
constexpr int kRegionChunks = 128;
// If the words of such regions take more than 64 MB, regions have 2048 boxes.
constexpr int kSmallRegionChunks = 32;
constexpr int64_t kMostWords = int64_t{64} << 17;
// Chunks of later boxes in a block of nms_pairs_kernel: one box per thread.
constexpr int kPairChunks = kNmsThreads / kNmsChunk;
// One warp per chunk. 16 are the chunks of an RPN's level.
constexpr int kDecideWarps = 16;
constexpr int kDecideThreads = 32 * kDecideWarps;
// A warp's words that are in flight.
constexpr int kWordsAhead = 4;
// Blocks that share the kept boxes of earlier regions.
constexpr int kKeptSplits = 16;

// The type that atomicOr takes.
using NmsWord = unsigned long long;

template <class acc_t>
struct Candidates {
  Box<acc_t>* boxes;  // [lists, room]; x1 is NaN where there is no box
  uint64_t* labels;   // [lists, room], sorted; or null: a list is one segment
  int* counts;        // [lists]
  int* ranks;         // [lists, room], indices into `flags`; or null
  int64_t lists;
  int room;           // a multiple of kNmsChunk
  int region_chunks;  // 0: one block decides a list
  OverlapRule<acc_t> rule;
  int* kept;         // [lists, room]: the positions of a segment's kept boxes, best first, from its begin on; or null
  int* kept_counts;  // [lists, room]: their number, at the segment's begin
  const acc_t* scores;   // [lists, room], of all boxes; or null
  acc_t* kept_scores;    // [lists, room], of `kept`
  uint8_t* flags;        // [lists, room]: 1 for a kept box; or null
  NmsWord* removed;      // [lists, room / 64]: boxes that kept boxes of earlier regions suppress; null: one region
  NmsWord* overlapping;  // [lists, region_chunks, room]: the boxes of each chunk of its region that a box overlaps

  HOST_DEVICE int region_boxes() const { return region_chunks * kNmsChunk; }
  HOST_DEVICE int regions() const { return (room + region_boxes() - 1) / region_boxes(); }
};

// `flagged`: the caller reads the kept boxes from `flags`, otherwise from `kept`.
template <class acc_t>
Candidates<acc_t> plan_candidates(Scratch& scratch, int64_t lists, int64_t count, bool labelled, bool flagged,
                                  const OverlapRule<acc_t>& rule) {
  Candidates<acc_t> candidates{};
  const int64_t room = (std::max<int64_t>(count, 1) + kNmsChunk - 1) / kNmsChunk * kNmsChunk;
  candidates.lists = lists, candidates.room = static_cast<int>(room), candidates.rule = rule;
  candidates.boxes = scratch.take<Box<acc_t>>(lists * room);
  candidates.counts = scratch.take<int>(lists);
  if (labelled) candidates.labels = scratch.take<uint64_t>(lists * room);
  if (labelled) candidates.ranks = scratch.take<int>(lists * room);
  if (flagged) candidates.flags = scratch.take<uint8_t>(lists * room);
  if (labelled || lists < kManyLists || room > kLongestList) {
    int64_t chunks = std::min<int64_t>(room / kNmsChunk, kRegionChunks);
    if (lists * room * chunks > kMostWords) chunks = std::min<int64_t>(chunks, kSmallRegionChunks);
    candidates.region_chunks = static_cast<int>(chunks);
    candidates.overlapping = scratch.take<NmsWord>(lists * chunks * room);
    if (candidates.regions() > 1) candidates.removed = scratch.take<NmsWord>(lists * room / kNmsChunk);
  }
  if (!flagged || candidates.removed != nullptr) {
    candidates.kept = scratch.take<int>(lists * room);
    candidates.kept_counts = scratch.take<int>(lists * room);
  }
  return candidates;
}

// Initialises the output. The kernel that writes the candidates calls it for every position of every list.
template <class acc_t>
__device__ __forceinline__ void prepare_place(const Candidates<acc_t>& candidates, int64_t list, int64_t place) {
  const int64_t index = list * candidates.room + place;
  if (candidates.kept != nullptr && place == 0) candidates.kept_counts[index] = 0;
  if (candidates.flags != nullptr) candidates.flags[index] = 0;
  if (candidates.removed != nullptr && place % kNmsChunk == 0) candidates.removed[index / kNmsChunk] = 0;
}

HOST_DEVICE NmsWord below(int bit) { return bit < kNmsChunk ? (NmsWord{1} << bit) - 1 : ~NmsWord{0}; }

// One 16-byte access, or two for float64.
template <class acc_t>
struct alignas(16) ChunkBox {
  Box<acc_t> box;
};

template <class acc_t>
struct Chunk {
  ChunkBox<acc_t> boxes[kNmsChunk];
  alignas(16) acc_t areas[kNmsChunk];
  unsigned there[2];
};

// Loads boxes [base, base + 64) below `end`. `there` marks those that exist and are not in `removed`; the others are
// empty. The block's first two warps call it, and a barrier has to follow.
template <class acc_t>
__device__ __forceinline__ void load_chunk(const Box<acc_t>* boxes, int base, int end, NmsWord removed,
                                           Chunk<acc_t>& chunk) {
  const int place = base + threadIdx.x;
  Box<acc_t> box{};
  bool there = place < end && !(removed >> threadIdx.x & 1);
  if (there) box = boxes[place];
  there = there && box.x1 == box.x1;
  if (!there) box = Box<acc_t>{};
  chunk.boxes[threadIdx.x].box = box;
  chunk.areas[threadIdx.x] = area(box);
  const unsigned votes = __ballot_sync(~0u, there);
  if (threadIdx.x % 32 == 0) chunk.there[threadIdx.x / 32] = votes;
}

template <class acc_t>
__device__ __forceinline__ NmsWord there(const Chunk<acc_t>& chunk) {
  return NmsWord{chunk.there[1]} << 32 | chunk.there[0];
}

// Tests in a row without a branch, so that they overlap.
constexpr int kNmsTests = 16;

// Which of the boxes [first, first + 16) of a chunk the box overlaps too much.
template <class acc_t>
__device__ __forceinline__ unsigned overlapped(const OverlapRule<acc_t>& rule, const Chunk<acc_t>& chunk, int first,
                                               const Box<acc_t>& box, acc_t size) {
  // A test in float64 takes twice the registers.
  constexpr int kAtOnce = sizeof(acc_t) == sizeof(float) ? kNmsTests : kNmsTests / 4;
  unsigned found = 0;
  bool unsure = false;
#pragma unroll kAtOnce
  for (int i = 0; i < kNmsTests; ++i) {
    const acc_t shared = intersection(chunk.boxes[first + i].box, box);
    const acc_t united = subtract(add(chunk.areas[first + i], size), shared);
    const bool may = may_overlap(rule, shared, united);
    found |= may ? 1u << i : 0u;
    unsure |= may & !surely_overlaps(rule, shared, united);
  }
  if (unsure) {
#pragma unroll 1
    for (unsigned left = found; left != 0; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const acc_t shared = intersection(chunk.boxes[first + i].box, box);
      const acc_t united = subtract(add(chunk.areas[first + i], size), shared);
      if (!overlaps(rule, shared, united)) found ^= 1u << i;
    }
  }
  return found;
}

// The boxes of a chunk that no kept box before them overlaps. Each lane passes whether boxes `lane` and `lane + 32` are
// alive, and the earlier boxes that overlap them. The iteration starts with all of these kept and ends at the only
// fixed point, because each box depends on earlier ones. It takes as many rounds as the longest chain of overlaps,
// which is short in practice; of two rounds at a time the first tells whether the second changes anything.
__device__ __forceinline__ NmsWord decide_chunk(bool alive, NmsWord earlier, bool alive_32, NmsWord earlier_32) {
  const auto without = [&](NmsWord kept) {
    const unsigned low = __ballot_sync(~0u, alive & ((earlier & kept) == 0));
    const unsigned high = __ballot_sync(~0u, alive_32 & ((earlier_32 & kept) == 0));
    return NmsWord{high} << 32 | low;
  };
  NmsWord kept = without(0), before;
  do {
    before = without(kept), kept = without(before);
  } while (kept != before);
  return kept;
}

template <class acc_t>
__device__ __forceinline__ void list_kept(const Candidates<acc_t>& candidates, int64_t first, int number, int place) {
  candidates.kept[first + number] = place;
  if (candidates.scores != nullptr) candidates.kept_scores[first + number] = candidates.scores[first + place];
}

// A block decides a list of up to kLongestList boxes.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 3)
    greedy_nms_kernel(const __grid_constant__ Candidates<acc_t> candidates) {
  __shared__ Chunk<acc_t> chunk, survivors;
  __shared__ NmsWord earlier[kNmsChunk], decided;
  __shared__ unsigned removed[kLongestList / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * candidates.room;
  const int count = candidates.counts[blockIdx.x];
  const Box<acc_t>* boxes = candidates.boxes + first;
  for (int i = threadIdx.x; i < kLongestList / 32; i += kNmsThreads) removed[i] = 0;
  if (threadIdx.x < kNmsChunk) survivors.boxes[threadIdx.x].box = {}, survivors.areas[threadIdx.x] = 0;
  __syncthreads();

  int found = 0;
#pragma unroll 1
  for (int base = 0; base < count; base += kNmsChunk) {
    if (threadIdx.x < kNmsChunk) {
      load_chunk(boxes, base, count, NmsWord{removed[base / 32 + 1]} << 32 | removed[base / 32], chunk);
    }
    __syncthreads();
    const NmsWord alive = there(chunk);
    {
      // Four threads test one box against the earlier ones.
      const int own = threadIdx.x / 4, part = threadIdx.x % 4 * kNmsTests;
      NmsWord word = 0;
      if (part < own && (alive >> own & 1)) {
        word = NmsWord{overlapped(candidates.rule, chunk, part, chunk.boxes[own].box, chunk.areas[own])} << part;
      }
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (part == 0) earlier[own] = word & below(own);
    }
    __syncthreads();
    if (warp == 0) {
      const NmsWord kept = decide_chunk(alive >> lane & 1, earlier[lane], alive >> (lane + 32) & 1, earlier[lane + 32]);
      if (lane == 0) decided = kept;
    }
    __syncthreads();
    const NmsWord kept = decided;
    if (threadIdx.x < kNmsChunk && (kept >> threadIdx.x & 1)) {
      const int number = __popcll(kept & below(threadIdx.x)), place = base + threadIdx.x;
      survivors.boxes[number] = chunk.boxes[threadIdx.x], survivors.areas[number] = chunk.areas[threadIdx.x];
      if (candidates.kept != nullptr) list_kept(candidates, first, found + number, place);
      if (candidates.flags != nullptr) candidates.flags[first + place] = 1;
    }
    const int number = __popcll(kept);
    found += number;
    __syncthreads();
#pragma unroll 1
    for (int next = base + kNmsChunk + 32 * warp; next < count; next += kNmsThreads) {
      const int place = next + lane;
      bool gone = removed[next / 32] >> lane & 1;
      if (!gone && place < count) {
        const Box<acc_t> box = boxes[place];
        const acc_t size = area(box);
#pragma unroll 1
        for (int i = 0; i < number && !gone; i += kNmsTests) {
          gone = (overlapped(candidates.rule, survivors, i, box, size) & below(number - i)) != 0;
        }
      }
      const unsigned votes = __ballot_sync(~0u, gone);
      // All lanes have read the word.
      __syncwarp();
      if (lane == 0) removed[next / 32] = votes;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && candidates.kept != nullptr) candidates.kept_counts[first] = found;
}

// Blocks of nms_pairs_kernel for a region: its groups of later chunks with all chunks before them, and within them. Two
// groups, of which one is as long as the other is short, fill a row of blocks.
HOST_DEVICE int pair_groups(int chunks) { return (chunks + kPairChunks - 1) / kPairChunks; }
HOST_DEVICE int pair_columns(int groups) { return kPairChunks * (groups + 1); }
HOST_DEVICE int64_t pair_blocks(int chunks) {
  const int groups = pair_groups(chunks);
  return int64_t{(groups + 1) / 2} * pair_columns(groups);
}

// A block takes a chunk and a group of chunks that are not before it.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 4)
    nms_pairs_kernel(const __grid_constant__ Candidates<acc_t> candidates) {
  __shared__ Chunk<acc_t> chunk;
  __shared__ uint64_t labels_of_chunk[kNmsChunk];
  const int groups = pair_groups(candidates.region_chunks), columns = pair_columns(groups);
  const auto blocks = static_cast<unsigned>(pair_blocks(candidates.region_chunks));
  const int block = static_cast<int>(blockIdx.x % blocks);
  const int64_t list = blockIdx.x / blocks / candidates.regions(), first = list * candidates.room;
  const int region = static_cast<int>(blockIdx.x / blocks % candidates.regions()) * candidates.region_boxes();
  int group = block / columns, column = block % columns;
  if (column >= kPairChunks * (group + 1)) {
    column -= kPairChunks * (group + 1), group = groups - 1 - group;
    // The middle of an odd number of groups has no counterpart.
    if (2 * group + 1 == groups) return;
  }
  const int end = min(candidates.counts[list], region + candidates.region_boxes());
  const int rows = region + group * kNmsThreads, base = region + column * kNmsChunk;
  if (max(rows, base) >= end) return;
  const uint64_t* labels = candidates.labels != nullptr ? candidates.labels + first : nullptr;
  // Labels are sorted: with these two apart, all are.
  if (labels != nullptr && base + kNmsChunk <= rows && labels[base + kNmsChunk - 1] != labels[rows]) return;
  const Box<acc_t>* boxes = candidates.boxes + first;
  const int row = rows + threadIdx.x;
  const bool exists = row < end && row >= base;
  Box<acc_t> box{};
  uint64_t label = 0;
  if (exists) box = boxes[row];
  if (exists && labels != nullptr) label = labels[row];
  if (threadIdx.x < kNmsChunk) {
    load_chunk(boxes, base, end, 0, chunk);
    if (labels != nullptr && base + threadIdx.x < end) labels_of_chunk[threadIdx.x] = labels[base + threadIdx.x];
  }
  __syncthreads();
  if (!exists) return;
  NmsWord word = 0;
  if (box.x1 == box.x1) {
    // The earlier boxes of the segment are the last ones before the row.
    const int to = min(row - base, kNmsChunk);
    int from = to;
    if (labels == nullptr) {
      from = 0;
    } else {
#pragma unroll
      for (int step = kNmsChunk / 2; step > 0; step /= 2) {
        if (from >= step && labels_of_chunk[from - step] == label) from -= step;
      }
      if (from == 1 && labels_of_chunk[0] == label) from = 0;
    }
    const acc_t size = area(box);
#pragma unroll 1
    for (int i = from / kNmsTests * kNmsTests; i < to; i += kNmsTests) {
      word |= NmsWord{overlapped(candidates.rule, chunk, i, box, size)} << i;
    }
    word &= there(chunk) & below(to) & ~below(from);
  }
  candidates.overlapping[(list * candidates.region_chunks + column) * candidates.room + row] = word;
}

// The first position of [begin, end) where `holds` is false, which stays false from there on. A warp asks for 32
// positions at a time.
template <class Holds>
__device__ __forceinline__ int first_without(int begin, int end, const Holds& holds) {
  const int lane = threadIdx.x % 32;
  while (begin < end) {
    const int stride = (end - begin + 31) / 32;
    const int64_t place = begin + int64_t{lane + 1} * stride - 1;
    const int same = __popc(__ballot_sync(~0u, place < end && holds(place)));
    const int64_t next = begin + int64_t{same} * stride;
    // It does not hold at next + stride - 1, or this is past the end.
    begin = static_cast<int>(min(next, int64_t{end})), end = static_cast<int>(min(next + stride - 1, int64_t{end}));
  }
  return begin;
}

template <class acc_t>
struct NmsRound {
  Candidates<acc_t> candidates;
  // Regions between the one where a segment begins and the one that is decided.
  int round;

  // Blocks of nms_decide_kernel for a list. Each takes the segments that begin in a chunk or, later, the one that
  // reaches into a region.
  HOST_DEVICE int parts() const {
    if (candidates.labels == nullptr) return 1;
    return round == 0 ? candidates.room / kNmsChunk : candidates.regions() - round;
  }
};

// Boxes [begin, end) of a region, which are all that `round` decides of some segments, or empty. The last one of these
// begins at `segment`, and is the only one that may be longer.
struct SegmentPart {
  int begin, end, segment;
};

// All threads of the warp call it.
template <class acc_t>
__device__ __forceinline__ SegmentPart segment_part(const NmsRound<acc_t>& round, int64_t list, int part) {
  const Candidates<acc_t>& candidates = round.candidates;
  const int count = candidates.counts[list], length = candidates.region_boxes();
  if (candidates.labels == nullptr) {
    const int begin = round.round * length;
    return {begin, max(min(count, begin + length), begin), 0};
  }
  const uint64_t* labels = candidates.labels + list * candidates.room;
  if (round.round == 0) {
    const int base = part * kNmsChunk;
    unsigned votes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = base + 32 * half + static_cast<int>(threadIdx.x % 32);
      votes[half] = __ballot_sync(~0u, place < count && (place == 0 || labels[place] != labels[place - 1]));
    }
    const NmsWord begins = NmsWord{votes[1]} << 32 | votes[0];
    if (begins == 0) return {0, 0, 0};
    const int last = base + 63 - __clzll(begins), limit = min(count, (base / length + 1) * length);
    const uint64_t label = labels[last];
    const int end = first_without(last + 1, limit, [&](int64_t place) { return labels[place] == label; });
    return {base + __ffsll(begins) - 1, end, last};
  }
  const int begin = (part + round.round) * length, from = part * length;
  if (begin >= count) return {0, 0, 0};
  const uint64_t label = labels[begin];
  if (labels[from + length - 1] != label || (from > 0 && labels[from - 1] == label)) return {0, 0, 0};
  const int segment = first_without(from, from + length, [&](int64_t place) { return labels[place] != label; });
  const int limit = min(count, begin + length);
  return {begin, first_without(begin, limit, [&](int64_t place) { return labels[place] == label; }), segment};
}

// A block tests 256 boxes of a region against some of the boxes that their segment kept in earlier regions.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 4) nms_suppress_kernel(const __grid_constant__ NmsRound<acc_t> round) {
  __shared__ Chunk<acc_t> chunk;
  const Candidates<acc_t>& candidates = round.candidates;
  const int groups = pair_groups(candidates.region_chunks), parts = round.parts();
  const int split = static_cast<int>(blockIdx.x % kKeptSplits), group = blockIdx.x / kKeptSplits % groups;
  const unsigned block = blockIdx.x / kKeptSplits / groups;
  const int64_t list = block / parts, first = list * candidates.room;
  const SegmentPart part = segment_part(round, list, static_cast<int>(block % parts));
  const int row = part.begin + group * kNmsThreads + threadIdx.x;
  if (part.begin + group * kNmsThreads >= part.end) return;
  const Box<acc_t>* boxes = candidates.boxes + first;
  const int kept = candidates.kept_counts[first + part.segment];
  Box<acc_t> box{};
  if (row < part.end) box = boxes[row];
  const acc_t size = area(box);
  bool gone = false;
#pragma unroll 1
  for (int i = split * kNmsChunk; i < kept; i += kKeptSplits * kNmsChunk) {
    __syncthreads();
    if (threadIdx.x < kNmsChunk) {
      const int number = i + threadIdx.x;
      ChunkBox<acc_t> earlier{};
      if (number < kept) earlier.box = boxes[candidates.kept[first + part.segment + number]];
      chunk.boxes[threadIdx.x] = earlier, chunk.areas[threadIdx.x] = area(earlier.box);
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kNmsChunk && k < kept - i; k += kNmsTests) {
      gone |= (overlapped(candidates.rule, chunk, k, box, size) & below(kept - i - k)) != 0;
    }
  }
  const unsigned votes = __ballot_sync(~0u, gone && row < part.end);
  if (threadIdx.x % 32 != 0 || votes == 0) return;
  atomicOr(candidates.removed + (first + row) / kNmsChunk, NmsWord{votes} << row % kNmsChunk);
}

template <class acc_t>
__global__ void __launch_bounds__(kDecideThreads, 2) nms_decide_kernel(const __grid_constant__ NmsRound<acc_t> round) {
  __shared__ NmsWord kept[kRegionChunks];
  const Candidates<acc_t>& candidates = round.candidates;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = round.parts();
  const int64_t list = blockIdx.x / parts, first = list * candidates.room, room = candidates.room;
  const SegmentPart part = segment_part(round, list, static_cast<int>(blockIdx.x % parts));
  if (part.begin >= part.end) return;
  const int found = candidates.kept != nullptr && round.round > 0 ? candidates.kept_counts[first + part.segment] : 0;
  const int region = part.begin / candidates.region_boxes() * candidates.region_boxes();
  const int begin = (part.begin - region) / kNmsChunk, end = (part.end - region + kNmsChunk - 1) / kNmsChunk;
#pragma unroll 1
  for (int window = begin; window < end; window += kDecideWarps) {
    const int column = window + warp, last = min(window + kDecideWarps, end);
    // Two boxes of the lane.
    bool alive[2];
    const NmsWord* words =
        candidates.overlapping + list * candidates.region_chunks * room + region + column * kNmsChunk + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = region + column * kNmsChunk + 32 * half + lane;
      alive[half] = place >= part.begin && place < part.end;
      if (!alive[half]) continue;
      const acc_t x1 = candidates.boxes[first + place].x1;
      alive[half] = x1 == x1;
      if (candidates.removed == nullptr) continue;
      alive[half] = alive[half] && !(candidates.removed[(first + place) / kNmsChunk] >> (32 * half + lane) & 1);
    }
    const auto word = [&](int half, int chunk) {
      return alive[half] && chunk <= column ? words[chunk * room + 32 * half] : NmsWord{0};
    };
    // The chunks of earlier windows are decided.
#pragma unroll 1
    for (int chunk = begin; chunk < window; chunk += kWordsAhead) {
      NmsWord own[2][kWordsAhead];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) own[half][i] = word(half, chunk + i);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) {
          if ((own[half][i] & kept[chunk + i]) != 0) alive[half] = false;
        }
      }
    }
    NmsWord next[2][kWordsAhead];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kWordsAhead; ++i) next[half][i] = word(half, window + i);
    }
#pragma unroll 1
    for (int chunk = window; chunk < last; chunk += kWordsAhead) {
#pragma unroll
      for (int i = 0; i < kWordsAhead; ++i) {
        if (chunk + i >= last) break;
        const NmsWord low = next[0][i], high = next[1][i];
        if (chunk + i == column) {
          const NmsWord decided = decide_chunk(alive[0], low, alive[1], high);
          if (lane == 0) kept[column] = decided;
        } else {
          next[0][i] = word(0, chunk + i + kWordsAhead), next[1][i] = word(1, chunk + i + kWordsAhead);
        }
        __syncthreads();
        if (chunk + i < column) {
          const NmsWord earlier = kept[chunk + i];
          if ((low & earlier) != 0) alive[0] = false;
          if ((high & earlier) != 0) alive[1] = false;
        }
      }
    }
  }

  // Kept boxes of the last segment are listed.
  const auto of_segment = [&](int chunk) {
    return kept[chunk] & ~below(max(part.segment - region - chunk * kNmsChunk, 0));
  };
#pragma unroll 1
  for (int chunk = begin + warp; chunk < end; chunk += kDecideWarps) {
    int before = 0;
    for (int i = begin + lane; i < chunk; i += 32) before += __popcll(of_segment(i));
    before = found + warp_sum(before);
    const NmsWord own = kept[chunk], listed = of_segment(chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int bit = 32 * half + lane, place = region + chunk * kNmsChunk + bit;
      if (!(own >> bit & 1)) continue;
      if (candidates.flags != nullptr) {
        candidates.flags[first + (candidates.ranks != nullptr ? candidates.ranks[first + place] : place)] = 1;
      }
      if (candidates.kept != nullptr && (listed >> bit & 1)) {
        list_kept(candidates, first, part.segment + before + __popcll(listed & below(bit)), place);
      }
    }
    if (candidates.kept != nullptr && chunk + 1 == end && lane == 0) {
      candidates.kept_counts[first + part.segment] = before + __popcll(listed);
    }
  }
}

// One launch for many short lists. Otherwise two, and two more for each further region.
template <class acc_t, class Launch>
void suppress_in_launches(const Candidates<acc_t>& candidates, const Launch& launch) {
  if (candidates.region_chunks == 0) {
    launch(greedy_nms_kernel<acc_t>, LaunchConfig{candidates.lists, kNmsThreads}, candidates);
    return;
  }
  const int64_t chunks = candidates.region_chunks;
  launch(nms_pairs_kernel<acc_t>,
         LaunchConfig{candidates.lists * candidates.regions() * pair_blocks(candidates.region_chunks), kNmsThreads},
         candidates);
  for (NmsRound<acc_t> round{candidates, 0}; round.round < candidates.regions(); ++round.round) {
    const int64_t blocks = candidates.lists * round.parts();
    if (round.round > 0) {
      launch(nms_suppress_kernel<acc_t>,
             LaunchConfig{blocks * pair_groups(candidates.region_chunks) * kKeptSplits, kNmsThreads}, round);
    }
    launch(nms_decide_kernel<acc_t>, LaunchConfig{blocks, kDecideThreads}, round);
  }
}

}  // namespace fpn_fast
