// SPDX-License-Identifier: Apache-2.0
// Sorts up to 2048 integers in shared memory by a bitonic sort (K. E. Batcher, "Sorting networks and their
// applications", 1968). Each thread has eight neighbouring keys. Keys of a thread are compared in registers, those of a
// warp by shuffles, and the rest through shared memory.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace fpn_fast {

// Eight warps. Shared memory (16 or 32 KB) then allows enough blocks to fill a multiprocessor.
constexpr int kSortThreads = 256;
constexpr int kSortOwn = 8;
constexpr int kSortItems = kSortThreads * kSortOwn;

template <class Key>
__device__ __forceinline__ Key exchanged(Key key, int lanes) {
  if constexpr (sizeof(Key) == sizeof(uint64_t)) {
    return __shfl_xor_sync(~0u, static_cast<unsigned long long>(key), lanes);
  } else {
    const auto high = static_cast<uint64_t>(key >> 64), low = static_cast<uint64_t>(key);
    return Key{exchanged(high, lanes)} << 64 | exchanged(low, lanes);
  }
}

// One step of the sort within a thread. Key `k` is ordered with key `k + stride`, the larger one first if `descending`.
template <int kStride, class Key, class Descending>
__device__ __forceinline__ void order_own(Key (&items)[kSortOwn], const Descending& descending) {
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    if ((k & kStride) != 0) continue;
    const Key a = items[k], b = items[k + kStride];
    const bool swaps = (a < b) == descending(k);
    items[k] = swaps ? b : a, items[k + kStride] = swaps ? a : b;
  }
}

// Sorts keys[0, count), largest first. All threads of the block call it. It begins and ends with a barrier.
template <class Key>
__device__ __forceinline__ void sort_block(Key (&keys)[kSortItems], int count) {
  const int thread = static_cast<int>(threadIdx.x), first = thread * kSortOwn;
  // Keys past the end are zero, the smallest, and fill up to a power of two.
  const int padded = count > kSortOwn ? 1 << (32 - __clz(count - 1)) : kSortOwn;
  const int threads = padded / kSortOwn;
  const bool idle = thread / 32 * 32 >= threads;
  Key items[kSortOwn] = {};
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    // In any order, so that neighbouring threads read neighbouring keys.
    const int i = k * threads + thread;
    if (thread < threads && i < count) items[k] = keys[i];
  }
  if (!idle) {
    order_own<1>(items, [](int k) { return (k & 2) == 0; });
    order_own<2>(items, [](int k) { return (k & 4) == 0; });
    order_own<1>(items, [](int k) { return (k & 4) == 0; });
    const auto of_thread = [&](int) { return (first & kSortOwn) == 0; };
    order_own<4>(items, of_thread), order_own<2>(items, of_thread), order_own<1>(items, of_thread);
  }
#pragma unroll 1
  for (int width = 2 * kSortOwn; width <= padded; width *= 2) {
    // Bitonic halves become sorted runs of `width` keys, every other one with the smallest first.
    const bool descending = (first & width) == 0;
#pragma unroll 1
    for (int stride = width / 2; stride >= kSortOwn; stride /= 2) {
      const bool larger = ((first & stride) == 0) == descending;
      const int lanes = stride / kSortOwn;
      if (lanes < 32) {
        if (idle) continue;
#pragma unroll
        for (int k = 0; k < kSortOwn; ++k) {
          const Key other = exchanged(items[k], lanes);
          if ((items[k] < other) == larger) items[k] = other;
        }
        continue;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSortOwn; ++k) keys[k * kSortThreads + thread] = items[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSortOwn; ++k) {
        const Key other = keys[k * kSortThreads + (thread ^ lanes)];
        if ((items[k] < other) == larger) items[k] = other;
      }
    }
    if (idle) continue;
    const auto of_thread = [&](int) { return descending; };
    order_own<4>(items, of_thread), order_own<2>(items, of_thread), order_own<1>(items, of_thread);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSortOwn; ++k) {
    if (first + k < count) keys[first + k] = items[k];
  }
  __syncthreads();
}

}  // namespace fpn_fast
