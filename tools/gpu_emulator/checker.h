// SPDX-License-Identifier: Apache-2.0
// The rules: what may be launched, and, for each byte of memory, who wrote and read it last.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator.h"

namespace gpu_emulator {

// What an H100 or H200 can hold (CUDA C++ Programming Guide, "Compute Capabilities", 9.0).
inline constexpr uint32_t kMaxThreads = 1024, kMaxShared = 227 * 1024, kRegisterFile = 64 * 1024, kMaxWarps = 64,
                          kMaxBlocks = 32, kSharedReserved = 1024, kSharedOfSm = 228 * 1024;

// Throws Fault (launch) for what a GPU refuses.
void check_launch(const Program& program, const Launch& launch);

// Registers that the hardware gives to a warp.
uint32_t registers_of_warp(const Program& program);

// Of global memory, where blocks have no order: bytes that one block writes, no other may touch, but by atomics on
// both sides. A write of the value that is there already conflicts with nothing.
class GlobalShadow {
 public:
  explicit GlobalShadow(const Allocation& allocation);
  // `block` counts from 1. Throw Fault (unwritten_memory, block_conflict).
  void read(uint64_t offset, uint32_t bytes, uint32_t block);
  void write(uint64_t offset, uint32_t bytes, uint32_t block, bool same_value);
  void atomic(uint64_t offset, uint32_t bytes, uint32_t block);
  uint64_t unwritten() const;
  // Into the caller's own account of what is initialised.
  void hand_back() const;
  uint64_t sectors_read() const { return sectors(kRead); }
  uint64_t sectors_written() const { return sectors(kWritten); }

 private:
  enum : uint8_t { kInitialised = 1, kRead = 2, kWritten = 4, kAtomic = 8 };
  static constexpr uint32_t kSeveral = ~0u;
  static constexpr uint64_t kPage = 4096;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  // Untouched pages of these take no memory.
  template <class T>
  using Array = std::unique_ptr<T[], Free>;
  template <class T>
  static Array<T> zeros(uint64_t count);
  // An aligned access lies in one page.
  void touch(uint64_t offset) { touched_[(address_ % kPage + offset) / kPage] = 1; }
  uint64_t sectors(uint8_t flag) const;
  [[noreturn]] void conflict(const char* what, uint64_t offset, uint32_t block, uint32_t other) const;

  std::string name_;
  uint64_t address_ = 0, bytes_ = 0;
  bool initialised_ = true;
  Array<uint8_t> flags_;
  // By page, so that nobody looks through what is not touched.
  std::vector<uint8_t> touched_;
  uint8_t* known_ = nullptr;
  // The block that wrote or read a byte, or kSeveral; only of what may be written.
  Array<uint32_t> writer_, reader_;
};

// Of a block's shared memory. Two threads' accesses are ordered by a barrier between them, those of one warp by
// __syncwarp also. `clock` counts both.
class SharedShadow {
 public:
  explicit SharedShadow(uint32_t bytes) : cells_(bytes), split_(bytes / 4 + 1) {}
  struct Access {
    uint32_t thread;
    // When it happens, and the last points that order it after other warps' and its own warp's accesses.
    uint32_t now, block_sync, warp_sync;
    bool atomic = false;
  };
  // False: some byte was never written. Throw Fault (shared_race).
  bool read(uint32_t offset, uint32_t bytes, const Access& access);
  void write(uint32_t offset, uint32_t bytes, const Access& access, bool same_value);
  bool written(uint32_t offset, uint32_t bytes);

 private:
  static constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe, kOfWarp = 0x8000;
  struct Cell {
    uint32_t written_at = 0, read_at = 0;
    uint16_t writer = kNobody, reader = kNobody;
    bool atomic = false;
  };
  // Calls `act` for the cells of an access: one for a word, unless its bytes were accessed on their own.
  template <class Act>
  void for_cells(uint32_t offset, uint32_t bytes, Act act);
  void after_write(const Cell& cell, uint32_t offset, const Access& access, const char* what) const;

  std::vector<Cell> cells_;
  std::vector<uint8_t> split_;
};

}  // namespace gpu_emulator
