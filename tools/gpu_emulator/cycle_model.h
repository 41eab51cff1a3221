// SPDX-License-Identifier: Apache-2.0
// How long instructions take, as far as the machine code and a few constants of the GPU say it. Not calibrated on a
// GPU: a model of what happens, not a measurement.
#pragma once

#include <cstdint>
#include <queue>
#include <unordered_map>
#include <vector>

#include "counters.h"
#include "emulator.h"

namespace gpu_emulator {

// Every constant of the model, for an H200. "Assumed" ones are in the range of published microbenchmarks of Hopper and
// are to be settled by measuring on the GPU itself.
struct ModelConstants {
  double clock_ghz = 1.98;       // H200 SXM, boost clock (data sheet)
  int sms = 132;                 // H200 SXM (data sheet)
  int schedulers = 4;            // of a multiprocessor (Hopper tuning guide)
  int alu_cycles = 2;            // 16 lanes for 32 (Programming Guide, "Arithmetic Instructions": 64 results per clock)
  int fma_cycles = 2;            // two such pipes, light and heavy: 128 results per clock together
  int fp64_cycles = 2;           // 64 results per clock
  int xu_cycles = 8;             // 16 results per clock; conversions as well
  int lsu_cycles = 2;            // assumed: an instruction every second cycle to the memory pipe
  int uniform_cycles = 2;        // assumed
  int jump_cycles = 8;           // assumed: until the first instruction after a jump
  int barrier_cycles = 20;       // assumed
  int block_start_cycles = 300;  // assumed: from a block's end to its successor's first instruction
  int xu_latency = 22;           // assumed, as the next six
  int special_latency = 25;
  int constant_latency = 40;
  int shuffle_latency = 24;
  int shared_latency = 30;
  int l1_latency = 36;
  int l2_latency = 273;
  int dram_latency = 620;
  int atomic_latency = 273;            // assumed: an L2 round trip
  uint32_t l1_bytes = 128 << 10;       // assumed: what shared memory leaves of 256 KiB, less what the carve-out rounds
  double l2_bytes_per_cycle = 3030;    // of the GPU: 6 TB/s, assumed
  double dram_bytes_per_cycle = 2170;  // of the GPU: 4.3 TB/s of the data sheet's 4.8
  double port_bytes_per_cycle = 64;    // of a multiprocessor to L2, assumed
  double store_backlog = 2000;         // assumed: cycles of DRAM writes that may be outstanding
};
inline constexpr ModelConstants kModel;

class CycleModel {
 public:
  CycleModel(const Program& program, const Launch& launch, const Options& options);
  struct WarpTime {
    double ready = 0;
    double scoreboards[6] = {};
  };
  struct Sm {
    explicit Sm() : l1(kModel.l1_bytes) {}
    double pipe_free[4][static_cast<int>(Pipe::kCount)] = {};
    double lsu_free = 0, port_free = 0;
    L1Cache l1;
  };
  // The first cycle in which a warp of this scheduler can issue the instruction.
  double earliest(const Sm& sm, int scheduler, const WarpTime& warp, const Instruction& ins) const;
  // It was issued in cycle `now`. Returns the hits in the first-level cache.
  int issue(Sm& sm, int scheduler, WarpTime& warp, const Instruction& ins, const MemoryAccess& access,
            const Request& request, double now);
  void finish(Counters& counters, double cycles) const;

 private:
  int load(Sm& sm, const Request& request, double start, double& done);
  double l2_free_ = 0, dram_free_ = 0, bytes_in_flight_ = 0, l2_bytes_ = 0, dram_bytes_ = 0;
  double busy_[static_cast<int>(Pipe::kCount)] = {};
  // Sectors that L2 has, and those that are to be written back.
  std::unordered_map<uint64_t, uint8_t> in_l2_, dirty_;
};

}  // namespace gpu_emulator
