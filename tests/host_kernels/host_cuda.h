// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to compile the project's .cuh kernels with a C++20 host compiler (`-include host_cuda.h`) and run them
// without a GPU. Under -fsanitize=address,undefined this checks a kernel's memory accesses, and under -fsanitize=thread
// its races; each CUDA thread is then an OS thread. Without a sanitizer CUDA threads take turns on one OS thread and
// switch at barriers, because switching between hundreds of OS threads takes most of the time.
//
// Note [What the host machine checks]
//   - Blocks run one after another, so that `__shared__` can be a static variable. All threads synchronise between
//     blocks, so a conflict between two blocks is not reported as a race. HOST_CUDA_ONLY_BLOCK=i runs block i alone:
//     blocks must write disjoint elements, and a block must write the same as in the whole grid. A kernel without
//     barriers can be launched with Blocks::kUnordered. Then threads do not synchronise between blocks, and conflicts
//     are races.
//   - A thread that returns leaves the barriers of its block and warp, as on a GPU.
//   - A shuffle or vote synchronises all live threads of a warp, so its mask must name them all.
//   - Vector types have the alignment of their GPU access, and UBSan reports misaligned addresses.
//   - A block or grid that a GPU would refuse to launch ends the program.
// Dynamic shared memory, memory fences and streams are missing. `volatile` and warp-synchronous code without barriers
// are races, as on a GPU.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace host_cuda {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// std::barrier yields several times before it sleeps. With hundreds of threads on a few cores each yield is a useless
// thread switch.
inline void wait_while(std::atomic<uint32_t>& number, uint32_t value) {
  while (number.load(std::memory_order_acquire) == value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&number), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  }
}
inline void wake_all(std::atomic<uint32_t>& number) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&number), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
inline void let_the_next_run();
inline void wait_while(std::atomic<uint32_t>& number, uint32_t value) {
  while (number.load(std::memory_order_relaxed) == value) let_the_next_run();
}
inline void wake_all(std::atomic<uint32_t>&) {}
#endif

class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads), missing_(threads) {}

  void arrive_and_wait() {
    arrive_and_wait([] {});
  }

  // The last thread to arrive calls `complete` before the others continue.
  template <class Complete>
  void arrive_and_wait(const Complete& complete) {
    // The phase cannot change before this thread arrives.
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      complete();
      end_phase();
    } else {
      wait_while(phase_, phase);
    }
  }

  void arrive_and_drop() {
    expected_.fetch_sub(1, std::memory_order_relaxed);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) end_phase();
  }

 private:
  void end_phase() {
    missing_.store(expected_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    wake_all(phase_);
  }

  std::atomic<uint32_t> expected_, missing_, phase_ = 0;
};

class Warp {
 public:
  // The value of every live lane.
  using Lanes = std::array<std::optional<uint64_t>, warpSize>;

  void reset(unsigned threads) {
    threads_ = threads;
    barrier_.emplace(threads);
    for (auto& slots : slots_) slots.fill({});
  }

  void leave() { barrier_->arrive_and_drop(); }

  // Two sets of slots alternate, so that one barrier is enough: all lanes have read a set before it is written again.
  Lanes exchange(unsigned mask, unsigned lane, uint64_t value, uint64_t turn) {
    if (~mask << (warpSize - threads_) != 0) fail("the mask of a shuffle or vote has to name every thread of the warp");
    auto& slots = slots_[turn % 2];
    slots[lane] = {value, turn};
    barrier_->arrive_and_wait();
    Lanes lanes;
    for (int i = 0; i < warpSize; ++i) {
      if (slots[i].turn == turn) lanes[i] = slots[i].value;
    }
    return lanes;
  }

 private:
  struct Slot {
    uint64_t value, turn;
  };
  unsigned threads_ = 0;
  std::optional<Barrier> barrier_;
  std::array<Slot, warpSize> slots_[2] = {};
};

struct Block {
  std::optional<Barrier> barrier;
  std::atomic<bool> vote{false};
  std::vector<Warp> warps;

  explicit Block(unsigned threads) : warps((threads + warpSize - 1) / warpSize) { reset(threads); }

  void reset(unsigned threads) {
    barrier.emplace(threads);
    for (size_t i = 0; i < warps.size(); ++i) warps[i].reset(std::min<unsigned>(warpSize, threads - i * warpSize));
  }
};

struct Thread {
  Block* waiting_block;  // null if blocks are unordered
  unsigned index;
  uint64_t exchanges;

  Block& block() const {
    if (waiting_block == nullptr) fail("a kernel launched with unordered blocks may not wait");
    return *waiting_block;
  }
  Warp& warp() const { return block().warps[index / warpSize]; }
  unsigned lane() const { return index % warpSize; }
};

inline constinit thread_local Thread current{};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// Calls `body` with each index below `threads`, each in a thread of its own.
template <class Body>
void run_all(unsigned threads, const Body& body) {
  std::vector<std::jthread> pool;
  for (unsigned index = 0; index < threads; ++index) pool.emplace_back(body, index);
}
#else
// A suspended CUDA thread and its thread-local variables.
struct Turn {
  static constexpr size_t kStackBytes = 128 << 10;

  ucontext_t context;
  uint3 thread_index, block_index;
  Thread thread;
  bool ended;
};

struct Turns {
  std::vector<Turn> all;
  unsigned index, left;
  ucontext_t end;
  std::function<void(unsigned)> body;
};

inline Turns turns;

inline void let_the_next_run() {
  Turn& from = turns.all[turns.index];
  from.thread_index = threadIdx, from.block_index = blockIdx, from.thread = current;
  do {
    turns.index = (turns.index + 1) % turns.all.size();
  } while (turns.all[turns.index].ended);
  Turn& to = turns.all[turns.index];
  if (&to == &from) return;
  threadIdx = to.thread_index, blockIdx = to.block_index, current = to.thread;
  swapcontext(&from.context, &to.context);
}

inline void take_turns() {
  turns.body(turns.index);
  turns.all[turns.index].ended = true;
  if (--turns.left == 0) setcontext(&turns.end);
  let_the_next_run();
}

// Calls `body` with each index below `threads`, each on a stack of its own.
template <class Body>
void run_all(unsigned threads, const Body& body) {
  static std::vector<std::unique_ptr<char[]> > stacks;
  while (stacks.size() < threads) stacks.push_back(std::make_unique_for_overwrite<char[]>(Turn::kStackBytes));
  turns.all.assign(threads, Turn{});
  turns.index = 0, turns.left = threads, turns.body = body;
  for (unsigned index = 0; index < threads; ++index) {
    ucontext_t& context = turns.all[index].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[index].get();
    context.uc_stack.ss_size = Turn::kStackBytes;
    makecontext(&context, take_turns, 0);
  }
  swapcontext(&turns.end, &turns.all[0].context);
}
#endif

inline Warp::Lanes exchange(unsigned mask, uint64_t value) {
  return current.warp().exchange(mask, current.lane(), value, ++current.exchanges);
}

// The value of `lane` of the caller's warp. For a lane that has returned it is undefined on a GPU; here all bits are
// set.
template <class T>
T shuffle(unsigned mask, T value, unsigned lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits)[lane].value_or(~uint64_t{0});
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void check_launch(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("a block has 1 to 1024 threads, at most 64 deep");
  if (uint64_t{grid.x} * grid.y * grid.z == 0) fail("a grid has at least one block");
  if (grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535) fail("a grid has at most 2^31 - 1, 65535, 65535 blocks");
}

enum class Blocks { kOneByOne, kUnordered };

// Calls `body` as each thread of each block.
template <class Body>
void launch(dim3 grid, dim3 block, const Body& body, Blocks order = Blocks::kOneByOne) {
  check_launch(grid, block);
  const unsigned threads = block.x * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const char* setting = std::getenv("HOST_CUDA_ONLY_BLOCK");
  const uint64_t first = setting != nullptr ? std::strtoull(setting, nullptr, 10) : 0;
  const uint64_t last = setting != nullptr ? first + 1 : blocks;
  if (last > blocks) fail("no such block");
  const bool one_by_one = order == Blocks::kOneByOne;
  Block state(threads);
  const auto reset = [&]() noexcept { state.reset(threads); };
  Barrier between_blocks(threads);
  const auto run_thread = [&](unsigned index) {
    gridDim = grid, blockDim = block;
    threadIdx = {index % block.x, index / block.x % block.y, index / block.x / block.y};
    for (uint64_t number = first; number < last; ++number) {
      blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y)};
      current = {one_by_one ? &state : nullptr, index, 0};
      body();
      if (!one_by_one) continue;
      current.warp().leave();
      state.barrier->arrive_and_drop();
      between_blocks.arrive_and_wait(reset);
    }
  };
  run_all(threads, run_thread);
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::current.block().barrier->arrive_and_wait(); }

inline int __syncthreads_or(int predicate) {
  std::atomic<bool>& vote = host_cuda::current.block().vote;
  if (predicate) vote = true;
  __syncthreads();
  const bool any = vote;
  __syncthreads();
  vote = false;
  __syncthreads();
  return any;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned ballot = 0;
  const auto lanes = host_cuda::exchange(mask, predicate != 0);
  for (int i = 0; i < warpSize; ++i) ballot |= static_cast<unsigned>(lanes[i].value_or(0)) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

// `width` splits the warp into segments in which lanes are counted. A lane outside the segment reads its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const unsigned lane = host_cuda::current.lane();
  return host_cuda::shuffle(mask, value, (lane & -width) + (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = host_cuda::current.lane();
  return host_cuda::shuffle(mask, value, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = host_cuda::current.lane();
  return host_cuda::shuffle(mask, value, (lane & (width - 1)) + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const unsigned lane = host_cuda::current.lane(), source = lane ^ lane_mask;
  return host_cuda::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}

// Relaxed, as on a GPU.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref(*address).fetch_or(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  T old = std::atomic_ref(*address).load(std::memory_order_relaxed);
  while (old < value && !std::atomic_ref(*address).compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }
inline int __ffsll(long long value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(value)) + 1;
}

template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
