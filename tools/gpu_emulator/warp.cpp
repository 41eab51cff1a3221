// SPDX-License-Identifier: Apache-2.0
#include "warp.h"

#include <bit>
#include <cstring>

namespace gpu_emulator {

Warp::Warp(const Program& program, Block& of, uint32_t first, uint32_t threads, uint64_t seed)
    : local(size_t{32} * program.local_bytes),
      local_undefined(local.size(), 0xff),
      block(&of),
      first_thread(first),
      live(threads >= 32 ? ~0u : (1u << threads) - 1),
      active(live),
      random_(seed * 0x9e3779b97f4a7c15u + of.number * 1024 + first) {
  const uint32_t poison = 0xeeee0000u ^ static_cast<uint32_t>(seed * 0x9e3779b9u);
  for (int row = 0; row < kRows; ++row) {
    const bool exists = row < program.registers || (row >= kUniform && row != kURZ);
    if (!exists && row != kRZ && row != kURZ) continue;
    undefined[row] = exists ? ~0u : 0;
    for (int lane = 0; lane < 32; ++lane) {
      rows[row][lane] = exists ? poison + static_cast<uint32_t>(row) : 0;
      undefined_bits[row][lane] = undefined[row];
    }
  }
  for (int k = 0; k < kPredicates; ++k) {
    const bool always = k == kPT || k == kUPT;
    predicates[k] = always ? ~0u : poison & 0x10000 ? ~0u : 0;
    undefined_predicates[k] = always ? 0 : ~0u;
  }
}

void Warp::split(uint32_t mask, int32_t target, int32_t next) {
  if (mask == active) {
    pc = target;
  } else if (mask == 0) {
    pc = next;
  } else {
    groups_.push_back({next, active & ~mask});
    groups_.push_back({target, mask});
    pick();
  }
}

void Warp::leave(uint32_t mask, int32_t next) {
  live &= ~mask;
  active &= ~mask;
  block->live -= static_cast<uint32_t>(std::popcount(mask));
  pc = next;
  if (active == 0) pick();
}

void Warp::join(int barrier, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) members_[barrier][lane] = mask;
  }
}

void Warp::break_out(int barrier, uint32_t mask) {
  uint32_t (&members)[32] = members_[barrier];
  uint32_t left = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) left |= members[lane];
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1)
      members[lane] = 0;
    else if (left >> lane & 1)
      members[lane] &= ~mask;
  }
}

void Warp::meet(int barrier, int32_t next) {
  uint32_t needed = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) needed |= members_[barrier][lane];
  }
  if ((needed & live & ~active) == 0) {
    pc = next;
    return;
  }
  waiting_[barrier] |= active;
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) resume_[barrier][lane] = next;
  }
  pick();
}

void Warp::meet(uint32_t members, int32_t next) {
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) members_[kWarpSync][lane] = members;
  }
  meet(kWarpSync, next);
}

void Warp::wait_for_block(int32_t next) {
  at_barrier_ |= active;
  for (int lane = 0; lane < 32; ++lane) {
    if (active >> lane & 1) barrier_next_[lane] = next;
  }
  pick();
}

void Warp::released() {
  const uint32_t mask = at_barrier_ & live;
  at_barrier_ = 0;
  // All lanes wait at the same instruction, which the caller has checked.
  if (mask != 0) groups_.push_back({barrier_next_[std::countr_zero(mask)], mask});
  if (active == 0) pick();
}

bool Warp::waits_for_lanes() const {
  for (const uint32_t waiting : waiting_) {
    if (waiting & live) return true;
  }
  return false;
}

int32_t Warp::waiting_index() const {
  for (int barrier = 0; barrier < kBarriers; ++barrier) {
    if (const uint32_t lanes = waiting_[barrier] & live) return resume_[barrier][std::countr_zero(lanes)] - 1;
  }
  return at_barrier_ ? barrier_next_[std::countr_zero(at_barrier_)] - 1 : 0;
}

// Lanes go on together only where they meet at a barrier, never because they happen to be at the same instruction.
void Warp::pick() {
  active = 0;
  for (int barrier = 0; barrier < kBarriers; ++barrier) {
    uint32_t left = waiting_[barrier] &= live;
    while (left != 0) {
      const int lane = std::countr_zero(left);
      const uint32_t needed = members_[barrier][lane] & live;
      uint32_t met = 1u << lane;
      for (int other = 0; other < 32; ++other) {
        if (waiting_[barrier] >> other & 1 && needed >> other & 1) met |= 1u << other;
      }
      left &= ~met;
      if ((needed & ~met) != 0) continue;
      waiting_[barrier] &= ~met;
      // Lanes may meet in __syncwarp from different places.
      while (met != 0) {
        const int32_t next = resume_[barrier][std::countr_zero(met)];
        uint32_t together = 0;
        for (int other = 0; other < 32; ++other) {
          if (met >> other & 1 && resume_[barrier][other] == next) together |= 1u << other;
        }
        groups_.push_back({next, together});
        met &= ~together;
      }
    }
  }
  if (groups_.empty()) return;
  // Which side of a branch goes first is undefined: a seed decides.
  random_ = random_ * 6364136223846793005u + 1442695040888963407u;
  const size_t chosen = (random_ >> 33) % groups_.size();
  pc = groups_[chosen].pc;
  active = groups_[chosen].mask;
  groups_.erase(groups_.begin() + static_cast<long>(chosen));
}

Block::Block(const Program& program, const Launch& launch, uint64_t number_, uint64_t seed)
    : number(number_),
      shared(program.static_shared + launch.dynamic_shared, static_cast<uint32_t>(0xcd ^ seed)),
      live(static_cast<uint32_t>(launch.block.count())) {
  index.x = static_cast<uint32_t>(number % launch.grid.x);
  index.y = static_cast<uint32_t>(number / launch.grid.x % launch.grid.y);
  index.z = static_cast<uint32_t>(number / launch.grid.x / launch.grid.y);
  for (uint32_t first = 0; first < live; first += 32) {
    warps.push_back(std::make_unique<Warp>(program, *this, first, live - first, seed));
  }
}

}  // namespace gpu_emulator
