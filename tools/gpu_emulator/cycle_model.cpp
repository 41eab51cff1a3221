// SPDX-License-Identifier: Apache-2.0
#include "cycle_model.h"

#include <algorithm>

namespace gpu_emulator {
namespace {

int cycles_of(Pipe pipe) {
  switch (pipe) {
    case Pipe::kAlu:
      return kModel.alu_cycles;
    case Pipe::kFma:
    case Pipe::kFmaHeavy:
      return kModel.fma_cycles;
    case Pipe::kFp64:
      return kModel.fp64_cycles;
    case Pipe::kXu:
      return kModel.xu_cycles;
    case Pipe::kLsu:
      return kModel.lsu_cycles;
    case Pipe::kUniform:
      return kModel.uniform_cycles;
    default:
      return 1;
  }
}

// Of what a scoreboard awaits, beside memory.
int latency_of(const Instruction& ins) {
  switch (ins.op) {
    case Opcode::kSHFL:
      return kModel.shuffle_latency;
    case Opcode::kLDC:
      return kModel.constant_latency;
    case Opcode::kS2R:
    case Opcode::kS2UR:
    case Opcode::kREDUX:
    case Opcode::kB2R:
      return kModel.special_latency;
    default:
      return kModel.xu_latency;
  }
}

}  // namespace

CycleModel::CycleModel(const Program&, const Launch&, const Options&) {}

double CycleModel::earliest(const Sm& sm, int scheduler, const WarpTime& warp, const Instruction& ins) const {
  double at = warp.ready;
  for (int k = 0; k < 6; ++k) {
    if (ins.wait_mask >> k & 1) at = std::max(at, warp.scoreboards[k]);
  }
  const auto free = [&](Pipe pipe) { return sm.pipe_free[scheduler][static_cast<int>(pipe)]; };
  if (ins.pipe == Pipe::kFma) return std::max(at, std::min(free(Pipe::kFma), free(Pipe::kFmaHeavy)));
  at = std::max(at, free(ins.pipe));
  // A queue of some accesses before the memory pipe.
  const bool queues =
      ins.op == Opcode::kLDG || ins.op == Opcode::kSTG || ins.op == Opcode::kLDS || ins.op == Opcode::kSTS;
  return queues ? std::max(at, sm.lsu_free - 64) : at;
}

int CycleModel::load(Sm& sm, const Request& request, double start, double& done) {
  int hits = 0;
  done = start + kModel.l1_latency;
  for (int k = 0; k < request.sector_count; ++k) {
    const uint64_t sector = request.sectors[k];
    double* filled_at;
    if (sm.l1.touch(sector, filled_at)) {
      ++hits;
      done = std::max(done, *filled_at);
      continue;
    }
    l2_bytes_ += 32;
    l2_free_ = std::max(start, l2_free_) + 32 / kModel.l2_bytes_per_cycle;
    sm.port_free = std::max(l2_free_, sm.port_free) + 32 / kModel.port_bytes_per_cycle;
    double end = sm.port_free + kModel.l2_latency;
    uint8_t& present = in_l2_[sector / 4];
    if (!(present >> sector % 4 & 1)) {
      present = static_cast<uint8_t>(present | 1 << sector % 4);
      dram_bytes_ += 32;
      dram_free_ = std::max(start, dram_free_) + 32 / kModel.dram_bytes_per_cycle;
      end = std::max(sm.port_free, dram_free_) + kModel.dram_latency;
    }
    *filled_at = end;
    done = std::max(done, end);
  }
  bytes_in_flight_ += (done - start) * request.sector_count * 32;
  return hits;
}

int CycleModel::issue(Sm& sm, int scheduler, WarpTime& warp, const Instruction& ins, const MemoryAccess& access,
                      const Request& request, double now) {
  double results = now + latency_of(ins), sources = now + 10;
  int hits = 0;
  if (access.space == MemoryAccess::kGlobal) {
    const double start = std::max(now, sm.lsu_free);
    sm.lsu_free = start + std::max(request.lines, 1);
    if (access.kind == MemoryAccess::kLoad) {
      hits = load(sm, request, start, results);
    } else {
      for (int k = 0; k < request.sector_count; ++k) {
        const uint64_t sector = request.sectors[k];
        const auto bit = static_cast<uint8_t>(1 << sector % 4);
        in_l2_[sector / 4] |= bit;
        sm.port_free = std::max(sm.port_free, start) + 32 / kModel.port_bytes_per_cycle;
        uint8_t& dirty = dirty_[sector / 4];
        if (dirty & bit) continue;
        dirty |= bit;
        dram_bytes_ += 32;
        dram_free_ = std::max(dram_free_, start) + 32 / kModel.dram_bytes_per_cycle;
      }
      if (dram_free_ - start > kModel.store_backlog) {
        sm.lsu_free = std::max(sm.lsu_free, dram_free_ - kModel.store_backlog);
      }
      sources = start + 20;
      results = start + kModel.atomic_latency;
    }
  } else if (access.space != MemoryAccess::kNowhere) {
    const double start = std::max(now, sm.lsu_free);
    sm.lsu_free = start + std::max(request.wavefronts, 1u);
    results = start + (access.space == MemoryAccess::kShared ? kModel.shared_latency : kModel.l1_latency);
    sources = start + 10;
  }
  Pipe pipe = ins.pipe;
  double (&free)[static_cast<int>(Pipe::kCount)] = sm.pipe_free[scheduler];
  if (pipe == Pipe::kFma && free[static_cast<int>(Pipe::kFmaHeavy)] < free[static_cast<int>(Pipe::kFma)]) {
    pipe = Pipe::kFmaHeavy;
  }
  const int k = static_cast<int>(pipe);
  free[k] = std::max(free[k], now) + cycles_of(pipe);
  busy_[k] += cycles_of(pipe);
  if (ins.write_scoreboard < 6) {
    warp.scoreboards[ins.write_scoreboard] = std::max(warp.scoreboards[ins.write_scoreboard], results);
  }
  if (ins.read_scoreboard < 6) {
    warp.scoreboards[ins.read_scoreboard] = std::max(warp.scoreboards[ins.read_scoreboard], sources);
  }
  const bool jump =
      ins.op == Opcode::kBRA || ins.op == Opcode::kCALL || ins.op == Opcode::kRET || ins.op == Opcode::kBSYNC;
  const int stall = std::max<int>(ins.stall, jump ? kModel.jump_cycles : 1);
  warp.ready = std::max(warp.ready, now + stall);
  return hits;
}

void CycleModel::finish(Counters& counters, double cycles) const {
  counters.model_cycles = cycles;
  counters.model_us = cycles / (kModel.clock_ghz * 1e3);
  counters.loads_in_flight_bytes = cycles > 0 ? bytes_in_flight_ / cycles / kModel.sms : 0;
  counters.model_l2_bytes = l2_bytes_;
  counters.model_dram_bytes = dram_bytes_;
  for (int k = 0; k < static_cast<int>(Pipe::kCount); ++k) {
    counters.pipe_busy[kPipeNames[k]] = cycles > 0 ? busy_[k] / (cycles * kModel.schedulers * kModel.sms) : 0;
  }
}

}  // namespace gpu_emulator
