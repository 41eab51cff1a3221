// SPDX-License-Identifier: Apache-2.0
// Large outputs on huge pages. A fresh output is paged in while it is written; in pages of 4 KiB that takes several
// times as long as the merge itself. The hint covers only the whole huge pages inside the buffer, so it costs no
// memory.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fpn_fast {

inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  // A refusal leaves small pages, which are right as well.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fpn_fast
