// SPDX-License-Identifier: Apache-2.0
// Greedy non-maximum suppression of sorted candidates.
//
// A list (an image, or a level of one) is divided into segments: the runs of one label, with the best box first. Boxes
// are decided in chunks of 64, one bit per box. The boxes of a chunk are tested against one another first, and then all
// later boxes of the segment against the kept boxes of the chunk.
//
// Note [Segments small and large]
// One block decides a segment of up to 1024 boxes, or of up to 4096 if there are many lists. A larger segment has too
// many pairs for one multiprocessor. It is decided in regions of 2048 boxes, with two launches each. In the first, many
// blocks find which boxes of the region overlap, as words of 64 bits, and which boxes the kept boxes of earlier regions
// suppress. In the second, one block decides the region from these words. They take 256 bytes per box, whatever the
// size of the segment.
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
// By estimate the 17 chunks of one block take as long as the two launches of a region.
constexpr int kSmallSegment = 1024;
// This many blocks fill a GPU, so one block may take a segment of up to kLongestSmall.
constexpr int64_t kManyLists = 64;
constexpr int kLongestSmall = 4096;
// 2048 boxes. The words of a region fit into the L2 cache, and the warps of a block hold a chunk's row of words in
// registers.
constexpr int kRegionChunks = 32;
constexpr int kRegionBoxes = kRegionChunks * kNmsChunk;
// Blocks that share the tests of a chunk against earlier boxes: one per 256 boxes of the region.
constexpr int kRowSplits = kRegionBoxes / kNmsThreads;

// The type that atomicOr takes.
using NmsWord = unsigned long long;

struct Segment {
  int begin, end;
};

template <class acc_t>
struct Candidates {
  Box<acc_t>* boxes;  // [lists, room]; x1 is NaN where there is no box
  uint64_t* labels;   // [lists, room], sorted; or null: a list is one segment
  int* counts;        // [lists]
  int* ranks;         // [lists, room], indices into `flags`; or null
  int64_t lists;
  int room;   // a multiple of kNmsChunk
  int small;  // largest segment that one block decides
  OverlapRule<acc_t> rule;
  int* kept;         // [lists, room]: the positions of a segment's kept boxes, best first, from its begin on
  int* kept_counts;  // [lists, room]: their number, at the segment's begin
  uint8_t* flags;    // [lists, room]: 1 for a kept box; or null
  // For large segments.
  Segment* large;        // [lists, slots]
  NmsWord* removed;      // [lists, room / 64]: boxes that kept boxes of earlier regions suppress
  NmsWord* overlapping;  // [lists, kRegionChunks, room]: the boxes of each chunk of its region that a box overlaps
};

HOST_DEVICE int large_slots(int room) { return (room + kSmallSegment - 1) / kSmallSegment; }

// `flagged`: the caller reads the kept boxes from `flags`, otherwise from `kept`.
template <class acc_t>
Candidates<acc_t> plan_candidates(Scratch& scratch, int64_t lists, int64_t count, bool labelled, bool flagged,
                                  const OverlapRule<acc_t>& rule) {
  Candidates<acc_t> candidates{};
  const int64_t room = (std::max<int64_t>(count, 1) + kNmsChunk - 1) / kNmsChunk * kNmsChunk;
  candidates.lists = lists, candidates.room = static_cast<int>(room), candidates.rule = rule;
  candidates.small = lists >= kManyLists && room <= kLongestSmall ? kLongestSmall : kSmallSegment;
  candidates.boxes = scratch.take<Box<acc_t>>(lists * room);
  candidates.counts = scratch.take<int>(lists);
  candidates.kept = scratch.take<int>(lists * room);
  candidates.kept_counts = scratch.take<int>(lists * room);
  if (labelled) candidates.labels = scratch.take<uint64_t>(lists * room);
  if (labelled) candidates.ranks = scratch.take<int>(lists * room);
  if (flagged) candidates.flags = scratch.take<uint8_t>(lists * room);
  if (room > candidates.small) {
    candidates.large = scratch.take<Segment>(lists * large_slots(candidates.room));
    candidates.removed = scratch.take<NmsWord>(lists * room / kNmsChunk);
    candidates.overlapping = scratch.take<NmsWord>(lists * kRegionChunks * room);
  }
  return candidates;
}

// Initialises the output. The kernel that writes the candidates calls it for every position of every list.
template <class acc_t>
__device__ __forceinline__ void prepare_place(const Candidates<acc_t>& candidates, int64_t list, int64_t place) {
  const int64_t index = list * candidates.room + place;
  candidates.kept_counts[index] = 0;
  if (candidates.flags != nullptr) candidates.flags[index] = 0;
  if (candidates.large == nullptr) return;
  if (place % kNmsChunk == 0) candidates.removed[index / kNmsChunk] = 0;
  if (place % kSmallSegment == 0) {
    candidates.large[list * large_slots(candidates.room) + place / kSmallSegment] = {0, 0};
  }
}

HOST_DEVICE NmsWord below(int bit) { return (NmsWord{1} << bit) - 1; }

__device__ __forceinline__ NmsWord or_of_warp(NmsWord word) {
  return warp_reduce(word, [](NmsWord a, NmsWord b) { return a | b; });
}

// One 16-byte access, or two for float64.
template <class acc_t>
struct alignas(16) ChunkBox {
  Box<acc_t> box;
};

template <class acc_t>
__device__ __forceinline__ bool overlaps_too_much(const OverlapRule<acc_t>& rule, const Box<acc_t>& a, acc_t a_area,
                                                  const Box<acc_t>& b, acc_t b_area) {
  const acc_t shared = intersection(a, b), united = subtract(add(a_area, b_area), shared);
  return may_overlap(rule, shared, united) && overlaps(rule, shared, united);
}

template <class acc_t>
struct Chunk {
  ChunkBox<acc_t> boxes[kNmsChunk];
  acc_t areas[kNmsChunk];
  unsigned there[2];
};

// Loads boxes [base, base + 64) that lie in [begin, end). `there` marks those that exist and are not in `removed`. Ends
// with a barrier.
template <class acc_t>
__device__ __forceinline__ void load_chunk(const Box<acc_t>* boxes, int base, int begin, int end, NmsWord removed,
                                           Chunk<acc_t>& chunk) {
  if (threadIdx.x < kNmsChunk) {
    const int place = base + threadIdx.x;
    Box<acc_t> box{};
    bool there = place >= begin && place < end && !(removed >> threadIdx.x & 1);
    if (there) box = boxes[place];
    there = there && box.x1 == box.x1;
    chunk.boxes[threadIdx.x].box = box;
    chunk.areas[threadIdx.x] = area(box);
    const unsigned votes = __ballot_sync(~0u, there);
    if (threadIdx.x % 32 == 0) chunk.there[threadIdx.x / 32] = votes;
  }
  __syncthreads();
}

template <class acc_t>
__device__ __forceinline__ NmsWord there(const Chunk<acc_t>& chunk) {
  return NmsWord{chunk.there[1]} << 32 | chunk.there[0];
}

// The boxes of `alive` that no kept box before them overlaps. Each lane passes the earlier boxes that overlap boxes
// `lane` and `lane + 32`. The iteration starts with all boxes kept and ends at the only fixed point, because each box
// depends on earlier ones. It takes as many rounds as the longest chain of overlaps, which is short in practice.
__device__ __forceinline__ NmsWord decide_chunk(NmsWord alive, NmsWord earlier, NmsWord earlier_32) {
  const int lane = threadIdx.x % 32;
  const bool first = alive >> lane & 1, second = alive >> (lane + 32) & 1;
  NmsWord kept = alive, before;
  do {
    before = kept;
    const unsigned low = __ballot_sync(~0u, first && (earlier & before) == 0);
    const unsigned high = __ballot_sync(~0u, second && (earlier_32 & before) == 0);
    kept = NmsWord{high} << 32 | low;
  } while (kept != before);
  return kept;
}

template <class acc_t>
__device__ __forceinline__ void write_kept(const Candidates<acc_t>& candidates, int64_t list, int place, int begin,
                                           int number) {
  const int64_t first = list * candidates.room;
  candidates.kept[first + begin + number] = place;
  if (candidates.flags == nullptr) return;
  candidates.flags[first + (candidates.ranks != nullptr ? candidates.ranks[first + place] : place)] = 1;
}

// The end of the run of the label at `begin - 1`. A warp reads 32 positions at a time.
__device__ __forceinline__ int end_of_label(const uint64_t* labels, int begin, int end) {
  const uint64_t label = labels[begin - 1];
  const int lane = threadIdx.x % 32;
  while (begin < end) {
    const int stride = (end - begin + 31) / 32;
    const int64_t place = begin + int64_t{lane + 1} * stride - 1;
    const int same = __popc(__ballot_sync(~0u, place < end && labels[place] == label));
    const int64_t next = begin + int64_t{same} * stride;
    // Position next + stride - 1 has another label or is past the end.
    begin = static_cast<int>(min(next, int64_t{end})), end = static_cast<int>(min(next + stride - 1, int64_t{end}));
  }
  return begin;
}

// The positions of [base, base + 64) where a segment begins. All threads of the warp call it.
__device__ __forceinline__ NmsWord segment_begins(const uint64_t* labels, int base, int count) {
  if (labels == nullptr) return base == 0;
  unsigned votes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = base + 32 * half + static_cast<int>(threadIdx.x % 32);
    votes[half] = __ballot_sync(~0u, place < count && (place == 0 || labels[place] != labels[place - 1]));
  }
  return NmsWord{votes[1]} << 32 | votes[0];
}

// A block decides the segments that begin in one chunk. All segments that also end in it are decided together; only the
// last one can be longer.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 3)
    greedy_nms_kernel(const __grid_constant__ Candidates<acc_t> candidates) {
  __shared__ Chunk<acc_t> chunk;
  __shared__ NmsWord earlier[kNmsChunk], decided;
  // A segment of 4096 boxes touches up to 65 chunks.
  __shared__ unsigned removed[2 * (kLongestSmall / kNmsChunk + 1)];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunks = candidates.labels != nullptr ? candidates.room / kNmsChunk : 1;
  const int64_t list = blockIdx.x / chunks, first = list * candidates.room;
  const int first_base = static_cast<int>(blockIdx.x % chunks) * kNmsChunk;
  const int count = candidates.counts[list];
  if (first_base >= count) return;
  const uint64_t* labels = candidates.labels != nullptr ? candidates.labels + first : nullptr;
  const Box<acc_t>* boxes = candidates.boxes + first;
  const NmsWord begins = segment_begins(labels, first_base, count);
  if (begins == 0) return;

  const int begin = first_base + __ffsll(begins) - 1, last = first_base + 63 - __clzll(begins);
  int end = labels != nullptr ? end_of_label(labels, last + 1, count) : count;
  if (end - last > candidates.small) {
    if (threadIdx.x == 0) {
      const int slot = (last + kSmallSegment - 1) / kSmallSegment;
      candidates.large[list * large_slots(candidates.room) + slot] = {last, end};
    }
    end = last;
  }
  for (int i = threadIdx.x; i < 2 * (kLongestSmall / kNmsChunk + 1); i += kNmsThreads) removed[i] = 0;
  __syncthreads();

  int found = 0;
#pragma unroll 1
  for (int base = first_base; base < end; base += kNmsChunk) {
    const bool is_first = base == first_base;
    const int half = (base - first_base) / 32;
    load_chunk(boxes, base, begin, end, NmsWord{removed[half + 1]} << 32 | removed[half], chunk);
    const NmsWord alive = there(chunk);
    {
      // Four threads test one box against the earlier boxes of its segment.
      const int own = threadIdx.x / 4, part = threadIdx.x % 4 * 16;
      const NmsWord segments = is_first ? begins & (below(own) << 1 | 1) : 1;
      const int lowest = segments != 0 ? 63 - __clzll(segments) : 0;
      NmsWord word = 0;
      if (alive >> own & 1) {
        const Box<acc_t> box = chunk.boxes[own].box;
        const acc_t size = chunk.areas[own];
        for (int i = max(part, lowest); i < min(part + 16, own); ++i) {
          if ((alive >> i & 1) && overlaps_too_much(candidates.rule, chunk.boxes[i].box, chunk.areas[i], box, size)) {
            word |= NmsWord{1} << i;
          }
        }
      }
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (part == 0) earlier[own] = word;
    }
    __syncthreads();
    if (warp == 0) {
      const NmsWord kept = decide_chunk(alive, earlier[lane], earlier[lane + 32]);
      if (lane == 0) decided = kept;
    }
    __syncthreads();
    const NmsWord kept = decided;
    if (threadIdx.x < kNmsChunk) {
      const int own = threadIdx.x;
      const int lowest = is_first ? 63 - __clzll(begins & (below(own) << 1 | 1)) : 0;
      if (kept >> own & 1) {
        const int before = __popcll(kept & below(own) & ~below(lowest));
        write_kept(candidates, list, base + own, is_first ? first_base + lowest : last, found + before);
      }
      if (is_first && (begins >> own & 1) && first_base + own < last) {
        const NmsWord next = begins & ~(below(own) << 1 | 1);
        candidates.kept_counts[first + first_base + own] = __popcll(kept & below(__ffsll(next) - 1) & ~below(own));
      }
    }
    const NmsWord survivors = is_first ? kept & ~below(last - first_base) : kept;
    found += __popcll(survivors);
#pragma unroll 1
    for (int next = base + kNmsChunk + 32 * warp; next < end; next += kNmsThreads) {
      const int place = next + lane, word = (next - first_base) / 32;
      bool gone = removed[word] >> lane & 1;
      if (!gone && place < end) {
        const Box<acc_t> box = boxes[place];
        const acc_t size = area(box);
        for (NmsWord left = survivors; left != 0 && !gone; left &= left - 1) {
          const int i = __ffsll(left) - 1;
          gone = overlaps_too_much(candidates.rule, chunk.boxes[i].box, chunk.areas[i], box, size);
        }
      }
      const unsigned votes = __ballot_sync(~0u, gone);
      if (lane == 0) removed[word] = votes;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && end > last) candidates.kept_counts[first + last] = found;
}

template <class acc_t>
struct NmsRound {
  Candidates<acc_t> candidates;
  int round;     // index of the region in each large segment
  int segments;  // upper bound of such segments per list
};

// The large segment `number` that has a region in this round, or an empty one. All threads of the warp call it.
template <class acc_t>
__device__ __forceinline__ Segment segment_of_round(const NmsRound<acc_t>& round, int64_t list, int number) {
  const int slots = large_slots(round.candidates.room), lane = threadIdx.x % 32;
  const Segment* large = round.candidates.large + list * slots;
#pragma unroll 1
  for (int first = 0; first < slots; first += 32) {
    const Segment own = first + lane < slots ? large[first + lane] : Segment{0, 0};
    const bool reaches = own.end > own.begin / kNmsChunk * kNmsChunk + round.round * kRegionBoxes;
    unsigned votes = __ballot_sync(~0u, reaches);
    if (number >= __popc(votes)) {
      number -= __popc(votes);
      continue;
    }
    for (; number > 0; --number) votes &= votes - 1;
    const int source = __ffs(votes) - 1;
    return {__shfl_sync(~0u, own.begin, source), __shfl_sync(~0u, own.end, source)};
  }
  return {0, 0};
}

template <class acc_t>
__device__ __forceinline__ NmsWord overlapped(const OverlapRule<acc_t>& rule, const Chunk<acc_t>& chunk,
                                              const Box<acc_t>& box) {
  const acc_t size = area(box);
  NmsWord word = 0;
#pragma unroll 1
  for (NmsWord left = there(chunk); left != 0; left &= left - 1) {
    const int i = __ffsll(left) - 1;
    if (overlaps_too_much(rule, box, size, chunk.boxes[i].box, chunk.areas[i])) word |= NmsWord{1} << i;
  }
  return word;
}

// A block takes one chunk of a region and an eighth of the boxes before it.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 4) nms_pairs_kernel(const __grid_constant__ NmsRound<acc_t> round) {
  __shared__ Chunk<acc_t> chunk;
  const Candidates<acc_t>& candidates = round.candidates;
  const int split = blockIdx.x % kRowSplits, column = blockIdx.x / kRowSplits % kRegionChunks;
  const int block = blockIdx.x / (kRowSplits * kRegionChunks);
  const int64_t list = block / round.segments, first = list * candidates.room;
  const Segment segment = segment_of_round(round, list, block % round.segments);
  const int region = segment.begin / kNmsChunk * kNmsChunk + round.round * kRegionBoxes;
  const int base = region + column * kNmsChunk;
  if (base >= segment.end) return;
  const Box<acc_t>* boxes = candidates.boxes + first;
  load_chunk(boxes, base, segment.begin, segment.end, 0, chunk);
  NmsWord* removed = candidates.removed + (first + base) / kNmsChunk;

  const int row = region + split * kNmsThreads + threadIdx.x;
  if (row >= segment.begin && row < min(base + kNmsChunk, segment.end)) {
    NmsWord word = overlapped(candidates.rule, chunk, boxes[row]);
    if (row >= base) word &= ~(NmsWord{1} << (row - base));
    candidates.overlapping[(list * kRegionChunks + column) * candidates.room + row] = word;
  }
  const NmsWord absent = ~there(chunk);
  if (split == 0 && threadIdx.x == 0 && absent != 0) {
    const int from = max(segment.begin - base, 0), to = min(segment.end - base, kNmsChunk);
    atomicOr(removed, absent & ~below(from) & (to == kNmsChunk ? ~NmsWord{0} : below(to)));
  }
  const int kept = candidates.kept_counts[first + segment.begin];
#pragma unroll 1
  for (int i = split * kNmsThreads; i < kept; i += kRowSplits * kNmsThreads) {
    const int number = i + threadIdx.x;
    NmsWord word = 0;
    if (number < kept) {
      word = overlapped(candidates.rule, chunk, boxes[candidates.kept[first + segment.begin + number]]);
    }
    word = or_of_warp(word);
    if (threadIdx.x % 32 == 0 && word != 0) atomicOr(removed, word);
  }
}

// A block decides a region chunk by chunk. Warp i holds the words of every eighth chunk, starting at the current one.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads, 2) nms_region_kernel(const __grid_constant__ NmsRound<acc_t> round) {
  constexpr int kOwn = kRegionChunks / kNmsWarps;
  __shared__ NmsWord removed[kRegionChunks], decided;
  const Candidates<acc_t>& candidates = round.candidates;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t list = blockIdx.x / round.segments, first = list * candidates.room;
  const Segment segment = segment_of_round(round, list, blockIdx.x % round.segments);
  if (segment.begin == segment.end) return;
  const int region = segment.begin / kNmsChunk * kNmsChunk + round.round * kRegionBoxes;
  const int chunks = min((segment.end - region + kNmsChunk - 1) / kNmsChunk, kRegionChunks);
  if (threadIdx.x < chunks) {
    const int base = region + threadIdx.x * kNmsChunk;
    const int from = max(segment.begin - base, 0), to = min(segment.end - base, kNmsChunk);
    const NmsWord outside = below(from) | (to == kNmsChunk ? NmsWord{0} : ~below(to));
    removed[threadIdx.x] = candidates.removed[(first + base) / kNmsChunk] | outside;
  }
  int found = candidates.kept_counts[first + segment.begin];
  const NmsWord* words = candidates.overlapping + list * kRegionChunks * candidates.room + region;
  const auto load = [&](int chunk, NmsWord(&own)[kOwn][2]) {
    // Rows that are not of the segment have no words.
    const int row = region + chunk * kNmsChunk + lane;
    const bool low = row >= segment.begin && row < segment.end;
    const bool high = row + 32 >= segment.begin && row + 32 < segment.end;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int column = chunk + warp + i * kNmsWarps;
      const NmsWord* source = words + int64_t{column} * candidates.room + chunk * kNmsChunk + lane;
      own[i][0] = low && column < chunks ? source[0] : 0, own[i][1] = high && column < chunks ? source[32] : 0;
    }
  };
  NmsWord next[kOwn][2];
  load(0, next);
  __syncthreads();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    NmsWord own[kOwn][2];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i][0] = next[i][0], own[i][1] = next[i][1];
    // The addresses do not depend on which boxes are kept, so the next words can be loaded early.
    if (chunk + 1 < chunks) load(chunk + 1, next);
    if (warp == 0) {
      const NmsWord kept = decide_chunk(~removed[chunk], own[0][0] & below(lane), own[0][1] & below(lane + 32));
      if (lane == 0) decided = kept;
    }
    __syncthreads();
    const NmsWord kept = decided;
    const bool low = kept >> lane & 1, high = kept >> (lane + 32) & 1;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int column = chunk + warp + i * kNmsWarps;
      const NmsWord word = or_of_warp((low ? own[i][0] : 0) | (high ? own[i][1] : 0));
      if (lane == 0 && column > chunk && column < chunks) removed[column] |= word;
    }
    if (threadIdx.x < kNmsChunk && (kept >> threadIdx.x & 1)) {
      const int place = region + chunk * kNmsChunk + threadIdx.x;
      write_kept(candidates, list, place, segment.begin, found + __popcll(kept & below(threadIdx.x)));
    }
    found += __popcll(kept);
    __syncthreads();
  }
  if (threadIdx.x == 0) candidates.kept_counts[first + segment.begin] = found;
}

// One launch, and two more per 2048 boxes for lists with room for more than 1024.
template <class acc_t, class Launch>
void suppress_in_launches(const Candidates<acc_t>& candidates, const Launch& launch) {
  const int64_t room = candidates.room;
  const int64_t chunks = candidates.labels != nullptr ? room / kNmsChunk : 1;
  launch(greedy_nms_kernel<acc_t>, LaunchConfig{candidates.lists * chunks, kNmsThreads}, candidates);
  if (candidates.large == nullptr) return;
  for (int64_t first = 0; first < room; first += kRegionBoxes) {
    // A segment with a region in this round is longer than all earlier regions, minus what its first chunk lacks.
    const int64_t shortest = std::max<int64_t>(kSmallSegment + 1, first - kNmsChunk + 1);
    const int64_t segments = candidates.labels != nullptr ? std::max<int64_t>(room / shortest, 1) : 1;
    const NmsRound<acc_t> round{candidates, static_cast<int>(first / kRegionBoxes), static_cast<int>(segments)};
    const int64_t blocks = candidates.lists * segments;
    launch(nms_pairs_kernel<acc_t>, LaunchConfig{blocks * kRegionChunks * kRowSplits, kNmsThreads}, round);
    launch(nms_region_kernel<acc_t>, LaunchConfig{blocks, kNmsThreads}, round);
  }
}

}  // namespace fpn_fast
