// SPDX-License-Identifier: Apache-2.0
// Executes sm_90 machine code on the CPU: what callers see. README.md says what is checked and counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction.h"

namespace gpu_emulator {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// A kernel, decoded once.
class Program {
 public:
  // `path`: a library, an object file or a cubin, read by the program `cuobjdump`; or a text (.sass, .txt) of what
  // `cuobjdump -res-usage` and `cuobjdump -sass` print, of one kernel or of several.
  static Program load(const std::string& path, const std::string& kernel, const std::string& cuobjdump);
  // From such a text itself.
  static Program parse(const std::string& text, const std::string& kernel);

  // "file:line" of the source at `pc`, or nothing without -lineinfo.
  std::string source_line(uint32_t pc) const;

  std::string kernel;
  std::vector<Instruction> code;
  // Of each instruction, as disassembled.
  std::vector<std::string> text;
  int registers = 255;
  uint32_t static_shared = 0;
  uint32_t local_bytes = 0;
  // -1: the text did not say.
  int64_t parameter_bytes = -1;

 private:
  std::string path_, cuobjdump_;
};

// Memory that a kernel may touch. Its address is the host's.
struct Allocation {
  uint64_t address = 0, bytes = 0;
  bool initialised = true;
  bool writable = false;
  std::string name;
  // Where given, which bytes are initialised: not 0. A launch marks those that it writes.
  uint8_t* written = nullptr;
};

struct Launch {
  Dim3 grid, block;
  uint32_t dynamic_shared = 0;
  std::vector<std::byte> parameters;
  std::vector<Allocation> allocations;
};

struct Options {
  uint64_t seed = 0;
  // One block after another, in the order of their numbers or in a seeded one; or several at a time, warp by warp.
  enum Order { kInOrder, kShuffled, kInterleaved } order = kInOrder;
  // The correctly rounded result of an approximation, or one moved by a seeded amount within its largest error.
  enum Mufu { kExact, kAdversarial } mufu = kExact;
  // Also runs the cycle model, which then says which warp executes next.
  bool model = false;
  // Of the blocks, evenly spread; counters are of those that ran, and the model is of that share of the GPU.
  double share = 1;
  // Of the cycle model, that differ from cycle_model.h.
  std::map<std::string, double> constants;
};

struct Counters {
  uint64_t blocks = 0, blocks_run = 0, threads_per_block = 0;
  uint64_t warp_instructions = 0, lane_instructions = 0;
  // Warp instructions of the block that has most, where blocks run one after another.
  uint64_t largest_block = 0;
  std::map<std::string, uint64_t> by_pipe, by_opcode;
  // Global memory: requests of warps, sectors of 32 bytes that they ask for, bytes that lanes use.
  uint64_t global_loads = 0, global_stores = 0, global_atomics = 0;
  uint64_t load_sectors = 0, store_sectors = 0, atomic_sectors = 0, load_bytes = 0, store_bytes = 0;
  uint64_t l1_hit_sectors = 0;
  // Distinct sectors times 32: the least that DRAM moves, where nothing is in a cache before or evicted.
  uint64_t distinct_read_bytes = 0, distinct_written_bytes = 0;
  // Passes of the shared memory's banks, and those beyond what the words would need without conflicts.
  uint64_t shared_accesses = 0, shared_wavefronts = 0, shared_conflicts = 0, shared_atomics = 0;
  uint64_t barriers = 0, local_accesses = 0;
  // Resident on a multiprocessor.
  uint64_t blocks_per_sm = 0, warps_per_sm = 0;
  std::string occupancy_limit;
  // Bytes of each allocation that was not initialised and that no block wrote.
  std::map<std::string, uint64_t> unwritten_bytes;
  // Of the model alone.
  uint64_t model_sms = 0;
  double model_cycles = 0, model_us = 0, loads_in_flight_bytes = 0, model_dram_bytes = 0, model_l2_bytes = 0;
  std::map<std::string, double> pipe_busy;
};

// What a kernel did that it may not, or an instruction that the emulator does not know.
struct Fault : std::runtime_error {
  Fault(std::string kind_, std::string detail);
  // out_of_bounds, read_only, misaligned, unwritten_memory, unwritten_shared, unwritten_register, shared_race,
  // block_conflict, barrier, warp_mask, launch, unknown_instruction, bad_jump
  std::string kind, detail, kernel, instruction, source;
  Dim3 block, thread;
  uint32_t pc = 0;
  // Fills in where it happened.
  void at(const Program& program, uint32_t index);
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

Counters run(const Program& program, const Launch& launch, const Options& options);

}  // namespace gpu_emulator
