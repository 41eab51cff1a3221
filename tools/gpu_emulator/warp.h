// SPDX-License-Identifier: Apache-2.0
// Blocks and warps: registers, and which lanes are where.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator.h"
#include "memory.h"

namespace gpu_emulator {

struct Block;

// What the last instruction did to memory.
struct MemoryAccess {
  enum Space : uint8_t { kNowhere, kGlobal, kShared, kLocal } space = kNowhere;
  enum Kind : uint8_t { kLoad, kStore, kAtomic } kind = kLoad;
  uint8_t bytes = 0;
  uint32_t mask = 0;
  std::array<uint64_t, 32> address;
};

class Warp {
 public:
  Warp(const Program& program, Block& block, uint32_t first_thread, uint32_t threads, uint64_t seed);

  using Row = uint32_t[32];
  alignas(64) Row rows[kRows];
  // Bits of them that nobody wrote, and the lanes that have such bits.
  alignas(64) Row undefined_bits[kRows];
  uint32_t undefined[kRows];
  uint32_t predicates[kPredicates], undefined_predicates[kPredicates];
  // Of all lanes, one after another.
  std::vector<uint8_t> local, local_undefined;

  Block* block;
  uint32_t first_thread;
  // Lanes that have not left, and those that execute together now; these are at instruction `pc`.
  uint32_t live, active;
  int32_t pc = 0;
  // When lanes of this warp last met in a __syncwarp, by the block's clock.
  uint32_t warp_sync = 0;
  // Of BSSY and BSYNC; the last one is WARPSYNC's.
  static constexpr int kBarriers = 17, kWarpSync = 16;
  bool done() const { return live == 0; }

  // Makes lanes at two places: those of `mask` at `target`, the other active ones at `next`.
  void split(uint32_t mask, int32_t target, int32_t next);
  void leave(uint32_t mask, int32_t next);
  void join(int barrier, uint32_t mask);
  void break_out(int barrier, uint32_t mask);
  // Waits for the lanes that joined, or for those of `members`; goes on at `next`.
  void meet(int barrier, int32_t next);
  void meet(uint32_t members, int32_t next);
  // The active lanes wait for the block's barrier, and go on at `next`.
  void wait_for_block(int32_t next);
  void released();
  uint32_t at_barrier() const { return at_barrier_; }
  bool waits_for_lanes() const;
  int32_t barrier_index(int lane) const { return barrier_next_[lane] - 1; }
  // An instruction that waiting lanes wait at.
  int32_t waiting_index() const;
  int collective_target = -1;

 private:
  struct Group {
    int32_t pc;
    uint32_t mask;
  };
  void pick();

  std::vector<Group> groups_;
  uint32_t members_[kBarriers][32] = {}, waiting_[kBarriers] = {};
  int32_t resume_[kBarriers][32] = {};
  uint32_t at_barrier_ = 0;
  int32_t barrier_next_[32] = {};
  uint64_t random_;
};

struct Block {
  Block(const Program& program, const Launch& launch, uint64_t number, uint64_t seed);

  uint64_t number;
  Dim3 index;
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
  uint32_t live, arrived = 0;
  // Counts barriers and __syncwarp; when the last barrier was.
  uint32_t clock = 1, block_sync = 0;
  // Of BAR.RED, so far and of the last one that was met.
  uint32_t votes = 0, reduced = 0;
  bool done() const { return live == 0; }
};

}  // namespace gpu_emulator
