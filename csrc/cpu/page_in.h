// SPDX-License-Identifier: Apache-2.0
// Fresh outputs, paged in. The kernel hands out a large output one page of 4 KiB at a time, by a fault at the first
// write to each, and those faults take several times as long as a merge's arithmetic. Asked for in runs they cost less.
// Huge pages would cost less still, but not on a virtual machine that returns free ones to its host: each then is
// fetched back through it, and a merge inside a model took four times as long as with small pages.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fpn_fast {

// What glibc maps anew at every call; less comes from memory that was in use before, as a rule.
constexpr int64_t kFreshBytes = int64_t{32} << 20;

// Of an output of `total` bytes these `bytes`, by this thread alone, which then writes them.
inline void page_in_part(void* data, int64_t bytes, int64_t total) {
#if defined(__linux__)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; a C library's headers are often older
#endif
  if (total < kFreshBytes) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  // A kernel that refuses, an older one or one of larger pages, leaves the faults, which are right as well.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
}

// A whole output, by all threads.
inline void page_in(void* data, int64_t bytes) {
  constexpr int64_t kRun = int64_t{2} << 20;
  if (bytes < kFreshBytes) return;
  torch::stable::parallel_for(0, (bytes + kRun - 1) / kRun, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kRun, end = std::min(last * kRun, bytes);
    page_in_part(static_cast<char*>(data) + begin, end - begin, bytes);
  });
}

}  // namespace fpn_fast
