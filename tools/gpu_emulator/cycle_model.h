// SPDX-License-Identifier: Apache-2.0
// How long instructions take, as far as the machine code and a few constants of the GPU say it. Not calibrated on a
// GPU: a model of what happens, not a measurement.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "counters.h"
#include "emulator.h"

namespace gpu_emulator {

// Every constant of the model, for an H200 SXM: its name, its value, the least and the largest that it may well be, and
// where it comes from. docs/gpu-model.md has what each moves. Cycles are of the multiprocessors' clock.
#define GPU_EMULATOR_CONSTANTS(EACH)                                                                              \
  EACH(clock_ghz, 1.98, 1.6, 1.98, "boost clock of the data sheet; under load it may be lower")                   \
  EACH(sms, 132, 132, 132, "data sheet: multiprocessors")                                                         \
  EACH(schedulers, 4, 4, 4, "Hopper Tuning Guide: of a multiprocessor, an instruction a cycle each")              \
  EACH(alu_cycles, 2, 2, 2, "Programming Guide, arithmetic throughput of 9.0: 64 integer results a cycle")        \
  EACH(fma_cycles, 2, 2, 2, "Programming Guide: 128 float32 results a cycle, by two pipes")                       \
  EACH(fp64_cycles, 2, 2, 2, "Programming Guide: 64 float64 results a cycle")                                     \
  EACH(xu_cycles, 8, 2, 8, "Programming Guide: 16 special functions a cycle; conversions may be faster")          \
  EACH(lsu_cycles, 2, 1, 4, "assumed: from a scheduler's memory instruction to its next")                         \
  EACH(uniform_cycles, 2, 1, 4, "assumed")                                                                        \
  EACH(lsu_queue, 64, 32, 128, "assumed: cycles of accesses that wait before the memory pipe")                    \
  EACH(source_latency, 10, 5, 20, "assumed: until an instruction has read its sources")                           \
  EACH(store_source_latency, 20, 10, 40, "assumed: the same of a store")                                          \
  EACH(jump_cycles, 8, 4, 16, "assumed: until the first instruction after a jump")                                \
  EACH(barrier_cycles, 20, 10, 40, "assumed: from a barrier's last arrival to the next instruction")              \
  EACH(block_start_cycles, 300, 100, 1000, "assumed: from a block's end to its successor's first instruction")    \
  EACH(xu_latency, 22, 14, 40, "assumed")                                                                         \
  EACH(special_latency, 25, 15, 50, "assumed: reading a special register, a vote of registers")                   \
  EACH(constant_latency, 40, 25, 80, "assumed: a load from constant memory that hits")                            \
  EACH(shuffle_latency, 24, 20, 32, "assumed")                                                                    \
  EACH(shared_latency, 30, 23, 36, "assumed")                                                                     \
  EACH(l1_latency, 36, 32, 44, "assumed; pointer chases of others: 40 on GH200")                                  \
  EACH(l2_latency, 273, 200, 350, "assumed; pointer chases of others: 281 on GH200, more for the far half")       \
  EACH(dram_latency, 620, 480, 900, "assumed; pointer chases of others: 690 on GH200")                            \
  EACH(atomic_latency, 273, 200, 700, "assumed: a round trip to L2")                                              \
  EACH(l1_bytes, 131072, 65536, 196608, "assumed: what shared memory leaves of 256 KiB")                          \
  EACH(l2_bytes_per_cycle, 3030, 2000, 4000, "assumed: 6 TB/s for the whole GPU")                                 \
  EACH(dram_bytes_per_cycle, 2170, 2000, 2424, "assumed: 4.3 TB/s of the data sheet's 4.8, which is the largest") \
  EACH(port_bytes_per_cycle, 64, 32, 64, "assumed: of a multiprocessor to L2")                                    \
  EACH(store_backlog, 2000, 500, 8000, "assumed: cycles of DRAM writes that may be outstanding")

struct ModelConstants {
#define MEMBER(name, value, least, largest, origin) double name = value;
  GPU_EMULATOR_CONSTANTS(MEMBER)
#undef MEMBER
  ModelConstants() = default;
  // With others in their places; throws Fault (launch) for a name that there is not.
  explicit ModelConstants(const std::map<std::string, double>& others);
};

struct ModelConstant {
  const char* name;
  double value, least, largest;
  const char* origin;
};
const std::vector<ModelConstant>& model_constants();

class CycleModel {
 public:
  explicit CycleModel(const Options& options);
  struct WarpTime {
    double ready = 0;
    double scoreboards[6] = {};
  };
  struct Sm {
    explicit Sm(uint32_t l1_bytes) : l1(l1_bytes) {}
    double pipe_free[4][static_cast<int>(Pipe::kCount)] = {};
    double lsu_free = 0, port_free = 0;
    L1Cache l1;
  };
  const ModelConstants& constants() const { return k_; }
  // Multiprocessors that run: with a share of the blocks that share of the GPU, L2 and DRAM included.
  int sms() const { return sms_; }
  // The first cycle in which a warp of this scheduler can issue the instruction.
  double earliest(const Sm& sm, int scheduler, const WarpTime& warp, const Instruction& ins) const;
  // It was issued in cycle `now`. Returns the hits in the first-level cache.
  int issue(Sm& sm, int scheduler, WarpTime& warp, const Instruction& ins, const MemoryAccess& access,
            const Request& request, double now);
  void finish(Counters& counters, double cycles) const;

 private:
  double cycles_of(Pipe pipe) const;
  double latency_of(const Instruction& ins) const;
  int load(Sm& sm, const Request& request, double start, double& done);
  ModelConstants k_;
  int sms_;
  double l2_rate_, dram_rate_;
  double l2_free_ = 0, dram_free_ = 0, bytes_in_flight_ = 0, l2_bytes_ = 0, dram_bytes_ = 0;
  double busy_[static_cast<int>(Pipe::kCount)] = {};
  // Sectors that L2 has, and those that are to be written back.
  std::unordered_map<uint64_t, uint8_t> in_l2_, dirty_;
};

}  // namespace gpu_emulator
