// SPDX-License-Identifier: Apache-2.0
// Executes one instruction of a warp.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "emulator.h"
#include "lanes.h"
#include "memory.h"
#include "warp.h"

namespace gpu_emulator {

class Executor {
 public:
  Executor(const Program& program, const Launch& launch, const Options& options);

  // Executes the warp's next instruction. Throws Fault, with its place.
  void step(Warp& warp);

  // Of the last step: the lanes that executed, and what they did to memory.
  uint32_t executed() const { return mask_; }
  const MemoryAccess& access() const { return access_; }
  GlobalMemory& memory() { return memory_; }
  // Lets a block's threads go on if all of them wait at its barrier.
  void release_barrier(Block& block);
  // Throws Fault (barrier, warp_mask) for a block of which no warp can go on.
  [[noreturn]] void report_stuck(Block& block) const;
  uint64_t barriers = 0;

 private:
  using Row = Warp::Row;
  [[noreturn]] void fail(const char* kind, const std::string& detail, uint32_t lanes) const;
  void locate(Fault& fault, const Warp& warp, int32_t index, uint32_t lanes) const;

  bool control(const Instruction& ins);
  bool memory_instruction(const Instruction& ins);
  void compute(const Instruction& ins);
  void compute_with_undefined(const Instruction& ins);

  // The 32 values of an operand: its row itself, or `buffer`.
  const uint32_t* values(const Operand& operand, Row& buffer) const;
  void wide_values(const Operand& operand, uint64_t (&out)[32]) const;
  uint32_t predicate(const Operand& operand) const;
  void write(const Operand& result, const uint32_t* values, int offset = 0);
  void write_wide(const Operand& result, const uint64_t* values);
  void write(const Operand& result, uint32_t truth);
  void check_defined(const Operand& operand, uint32_t lanes, const char* use) const;
  uint32_t constant(int64_t offset, uint32_t bytes, uint32_t lane) const;

  template <int kSources, class F>
  void map(const Instruction& ins, F f);
  template <class F>
  void map_double(const Instruction& ins, F f);
  template <class F>
  void map_halves(const Instruction& ins, F f);
  void set_predicates(const Instruction& ins, uint32_t truth, uint32_t with);

  void integer_add(const Instruction& ins);
  void multiply_add(const Instruction& ins);
  void load_effective_address(const Instruction& ins);
  void integer_compare(const Instruction& ins);
  void double_compare(const Instruction& ins);
  void half_compare(const Instruction& ins);
  void to_integers(const Instruction& ins);
  void from_integers(const Instruction& ins);
  void between_floats(const Instruction& ins);
  void shuffle(const Instruction& ins);
  void vote(const Instruction& ins);
  void match(const Instruction& ins);
  void reduce(const Instruction& ins);
  uint32_t special(Special which, uint32_t lane) const;

  void addresses(const Instruction& ins, const Operand& operand, bool global);
  void load(const Instruction& ins);
  void load_constant(const Instruction& ins);
  void store(const Instruction& ins);
  void atomic(const Instruction& ins);
  void matrices(const Instruction& ins);
  uint8_t* locate_bytes(uint64_t address, uint32_t bytes, uint32_t lane, uint8_t*& undefined, uint64_t& offset);
  SharedShadow::Access shared_access(uint32_t lane, bool is_atomic = false) const;

  const Program& program_;
  const Launch& launch_;
  Options options_;
  std::vector<uint8_t> constants_;
  GlobalMemory memory_;
  GlobalMemory::Region* region_ = nullptr;
  MemoryAccess access_;
  Warp* warp_ = nullptr;
  uint32_t mask_ = 0;
};

}  // namespace gpu_emulator
