// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator.h"
#include "warp.h"

namespace gpu_emulator {

// What an access asks of memory: its sectors of 32 bytes, or passes of the shared memory's banks.
struct Request {
  std::array<uint64_t, 128> sectors;
  int sector_count = 0;
  int lines = 0;
  uint32_t wavefronts = 0, needed_wavefronts = 0;
  uint64_t bytes = 0;
};
Request request_of(const MemoryAccess& access);

// A multiprocessor's first-level cache: lines of four sectors, 16 ways, the least recently used one leaves.
class L1Cache {
 public:
  explicit L1Cache(uint32_t bytes) : sets_(bytes / kLine / kWays), lines_(sets_ * kWays) {}
  // Whether the sector is there; it is afterwards. `filled_at` is the cycle from which it is, to be set for a new one.
  bool touch(uint64_t sector, double*& filled_at);
  void clear();

 private:
  static constexpr uint32_t kLine = 128, kWays = 16;
  struct Line {
    uint64_t tag = ~uint64_t{0}, used = 0;
    uint8_t present = 0;
    double filled_at[4];
  };
  uint64_t sets_, clock_ = 0;
  std::vector<Line> lines_;
};

// Of one launch, cheap to add to; the names come at the end.
class Counting {
 public:
  void instruction(const Instruction& ins, uint32_t lanes) {
    ++instructions_;
    ++opcodes_[static_cast<int>(ins.op)];
    ++pipes_[static_cast<int>(ins.pipe)];
    lanes_ += static_cast<uint64_t>(__builtin_popcount(lanes));
  }
  uint64_t instructions() const { return instructions_; }
  void memory(const MemoryAccess& access, const Request& request, int l1_hits);
  void finish(Counters& counters, const Program& program, const Launch& launch, GlobalMemory& memory) const;

 private:
  std::array<uint64_t, static_cast<int>(Opcode::kCount)> opcodes_{};
  std::array<uint64_t, static_cast<int>(Pipe::kCount)> pipes_{};
  uint64_t instructions_ = 0, lanes_ = 0;
  Counters sums_;
};

// Resident blocks on a multiprocessor and what limits them.
uint32_t occupancy(const Program& program, const Launch& launch, std::string& limit);

}  // namespace gpu_emulator
