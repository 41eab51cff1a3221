// SPDX-License-Identifier: Apache-2.0
// Sorts up to 2048 integers in shared memory. Each thread sorts eight of them, and then sorted runs are merged
// pairwise. In a merge each thread writes eight results.
#pragma once

#include "../common/host_device.h"

namespace fpn_fast {

// Eight warps. Shared memory (16 or 32 KB) then allows enough blocks to fill a multiprocessor.
constexpr int kSortThreads = 256;
// With fewer keys per thread a merge is mostly search. With more, sorting them costs more than the merges it saves.
constexpr int kSortOwn = 8;
constexpr int kSortItems = kSortThreads * kSortOwn;

// Odd-even transposition, largest first.
template <class Key>
__device__ __forceinline__ void sort_own(Key (&items)[kSortOwn]) {
#pragma unroll
  for (int round = 0; round < kSortOwn; ++round) {
#pragma unroll
    for (int i = round % 2; i + 1 < kSortOwn; i += 2) {
      const Key a = items[i], b = items[i + 1];
      items[i] = a < b ? b : a;
      items[i + 1] = a < b ? a : b;
    }
  }
}

// Results [place, place + kSortOwn) of merging a[0, a_count) with b[0, b_count), all with the largest first.
template <class Key>
__device__ __forceinline__ void merge_own(const Key* a, int a_count, const Key* b, int b_count, int place,
                                          Key (&items)[kSortOwn]) {
  // Find how many of the first `place` results come from `a`.
  int low = max(0, place - b_count), high = min(place, a_count);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (a[middle] < b[place - 1 - middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  int i = low, j = place - low;
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    if (i + j >= a_count + b_count) break;
    const bool from_b = i >= a_count || (j < b_count && a[i] < b[j]);
    items[k] = from_b ? b[j] : a[i];
    from_b ? ++j : ++i;
  }
}

// Sorts keys[0, count), largest first. All threads of the block call it. It begins and ends with a barrier.
template <class Key>
__device__ __forceinline__ void sort_block(Key (&keys)[kSortItems], int count) {
  const int first = threadIdx.x * kSortOwn;
  Key items[kSortOwn] = {};
  const auto store = [&] {
#pragma unroll
    for (int k = 0; k < kSortOwn; ++k) {
      if (first + k < count) keys[first + k] = items[k];
    }
  };
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    if (first + k < count) items[k] = keys[first + k];
  }
  // Keys past the end are zero, the smallest.
  sort_own(items);
  store();
#pragma unroll 1
  for (int width = kSortOwn; width < count; width *= 2) {
    __syncthreads();
    const int begin = first & -(2 * width), middle = min(begin + width, count), end = min(begin + 2 * width, count);
    if (first < count) {
      merge_own(keys + begin, middle - begin, keys + middle, end - middle, first - begin, items);
    }
    __syncthreads();
    store();
  }
  __syncthreads();
}

}  // namespace fpn_fast
