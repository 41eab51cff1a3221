// SPDX-License-Identifier: Apache-2.0
// Large outputs on the CPU, in memory that earlier outputs gave back. The C library returns a large block to the system
// as soon as it is freed, and the system hands out the next one a page of 4 KiB at a time, by a fault at the first
// write to each: in a merge those faults take three quarters of the time. torch keeps a GPU's memory for the same
// reason; on a CPU it leaves it to the C library.
#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../torch/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fpn_fast {
namespace {

// Less is as cheap from the C library, which keeps small blocks itself.
constexpr int64_t kSmallest = int64_t{1} << 20;
constexpr int64_t kDefaultLimit = int64_t{512} << 20;
// A block that this many outputs did not want goes back to the system.
constexpr int64_t kStale = 256;
// To give a block back must not allocate: it happens in a destructor.
constexpr size_t kMostBlocks = 256;
// A cache line, and what torch aligns to.
constexpr int64_t kAlignment = 64;

// Pages of a fresh block, by all threads: asked for in runs, they cost less than by faults. Huge pages would cost less
// still, but not on a virtual machine that returns free ones to its host: each then is fetched back through it.
void page_in(void* data, int64_t bytes) {
#if defined(__linux__)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; a C library's headers are often older
#endif
  // What glibc maps anew at every call; less comes from memory that was in use before, as a rule.
  constexpr int64_t kFresh = int64_t{32} << 20;
  constexpr int64_t kRun = int64_t{2} << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kFresh) return;
  torch::stable::parallel_for(0, (bytes + kRun - 1) / kRun, 1, [&](int64_t first, int64_t last) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (start + first * kRun + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (start + std::min(last * kRun, bytes)) & ~(kPage - 1);
    // A kernel that refuses, an older one or one of larger pages, leaves the faults, which are right as well.
    if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
  });
#endif
}

struct Block {
  void* data;
  int64_t bytes;
  int64_t given_at = 0;
};

class OutputCache {
 public:
  // Never destroyed: an output may outlive every static object.
  static OutputCache& instance() {
    static OutputCache* const cache = make();
    return *cache;
  }

  Block take(int64_t bytes) {
    if (const auto kept = find(bytes)) return *kept;
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, bytes) != 0) {
      clear();
      STD_TORCH_CHECK(posix_memalign(&data, kAlignment, bytes) == 0, "not enough memory for an output of ", bytes,
                      " bytes");
    }
    page_in(data, bytes);
    return {data, bytes};
  }

  void give(Block block) {
    const std::lock_guard lock(mutex_);
    if (block.bytes > limit_) {
      std::free(block.data);
      return;
    }
    block.given_at = takes_;
    const auto too_much = [&] {
      return held_ + block.bytes > limit_ || idle_.size() == kMostBlocks || takes_ - idle_[0].given_at > kStale;
    };
    while (!idle_.empty() && too_much()) drop_oldest();
    idle_.push_back(block);
    held_ += block.bytes;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    while (!idle_.empty()) drop_oldest();
  }

  int64_t held() {
    const std::lock_guard lock(mutex_);
    return held_;
  }

  int64_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }

  void set_limit(int64_t bytes) {
    STD_TORCH_CHECK(bytes >= 0, "the limit must be 0 bytes or more, got ", bytes);
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    while (held_ > limit_) drop_oldest();
  }

 private:
  OutputCache() { idle_.reserve(kMostBlocks); }

  static OutputCache* make() {
    auto* const cache = new OutputCache;
    // A child has the one thread that forked it: what another one holds at that moment stays locked there for good.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
    return cache;
  }

  std::optional<Block> find(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    ++takes_;
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      // A larger block would be wasted on it. Of equal ones the newest, which is likelier to be in the caches.
      const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 4;
      if (fits && (best == idle_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == idle_.end()) return std::nullopt;
    const Block found = *best;
    idle_.erase(best);
    held_ -= found.bytes;
    return found;
  }

  void drop_oldest() {
    held_ -= idle_.front().bytes;
    std::free(idle_.front().data);
    idle_.erase(idle_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the longest idle first
  int64_t held_ = 0, limit_ = kDefaultLimit, takes_ = 0;
};

int64_t output_cache_held() { return OutputCache::instance().held(); }
int64_t output_cache_limit() { return OutputCache::instance().limit(); }
void output_cache_set_limit(int64_t bytes) { OutputCache::instance().set_limit(bytes); }
void output_cache_clear() { OutputCache::instance().clear(); }

}  // namespace

AtenTensorHandle empty_on_cpu(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  // There is one CPU.
  constexpr int32_t kNoIndex = -1;
  AtenTensorHandle made = nullptr;
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  bool overflow = false;
  for (int64_t i = 0; i < dimensions; ++i) overflow |= __builtin_mul_overflow(bytes, sizes[i], &bytes);
  // Of sizes beyond all numbers torch says what is wrong.
  if (overflow || bytes < kSmallest) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, dtype, cpu, kNoIndex, &made));
    return made;
  }
  auto block = std::make_unique<Block>();
  *block = OutputCache::instance().take(bytes);
  const auto give_back = [](void*, void* context) {
    auto* const block = static_cast<Block*>(context);
    OutputCache::instance().give(*block);
    delete block;
  };
  void* const data = block->data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(data, dimensions, sizes, strides, 0, dtype, cpu, kNoIndex, &made,
                                                aoti_torch_layout_strided(), nullptr, 0, give_back, block.release()));
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CompositeExplicitAutograd, library) {
  library.impl("output_cache_held", TORCH_BOX(&output_cache_held));
  library.impl("output_cache_limit", TORCH_BOX(&output_cache_limit));
  library.impl("output_cache_set_limit", TORCH_BOX(&output_cache_set_limit));
  library.impl("output_cache_clear", TORCH_BOX(&output_cache_clear));
}

}  // namespace fpn_fast
