// SPDX-License-Identifier: Apache-2.0
#include "cycle_model.h"

#include <algorithm>
#include <cmath>

namespace gpu_emulator {

const std::vector<ModelConstant>& model_constants() {
  static const std::vector<ModelConstant> table = {
#define ROW(name, value, least, largest, origin) {#name, value, least, largest, origin},
      GPU_EMULATOR_CONSTANTS(ROW)
#undef ROW
  };
  return table;
}

ModelConstants::ModelConstants(const std::map<std::string, double>& others) {
  for (const auto& [key, other] : others) {
    double* constant = nullptr;
#define FIND(name, value, least, largest, origin) \
  if (key == #name) constant = &name;
    GPU_EMULATOR_CONSTANTS(FIND)
#undef FIND
    if (constant == nullptr) throw Fault("launch", "the cycle model has no constant " + key);
    *constant = other;
  }
}

CycleModel::CycleModel(const Options& options) : k_(options.constants) {
  sms_ = std::clamp(static_cast<int>(std::lround(k_.sms * options.share)), 1, static_cast<int>(k_.sms));
  const double share = sms_ / k_.sms;
  l2_rate_ = k_.l2_bytes_per_cycle * share;
  dram_rate_ = k_.dram_bytes_per_cycle * share;
}

double CycleModel::cycles_of(Pipe pipe) const {
  switch (pipe) {
    case Pipe::kAlu:
      return k_.alu_cycles;
    case Pipe::kFma:
    case Pipe::kFmaHeavy:
      return k_.fma_cycles;
    case Pipe::kFp64:
      return k_.fp64_cycles;
    case Pipe::kXu:
      return k_.xu_cycles;
    case Pipe::kLsu:
      return k_.lsu_cycles;
    case Pipe::kUniform:
      return k_.uniform_cycles;
    default:
      return 1;
  }
}

// Of what a scoreboard awaits, beside memory.
double CycleModel::latency_of(const Instruction& ins) const {
  switch (ins.op) {
    case Opcode::kSHFL:
      return k_.shuffle_latency;
    case Opcode::kLDC:
      return k_.constant_latency;
    case Opcode::kS2R:
    case Opcode::kS2UR:
    case Opcode::kREDUX:
    case Opcode::kB2R:
      return k_.special_latency;
    default:
      return k_.xu_latency;
  }
}

double CycleModel::earliest(const Sm& sm, int scheduler, const WarpTime& warp, const Instruction& ins) const {
  double at = warp.ready;
  for (int k = 0; k < 6; ++k) {
    if (ins.wait_mask >> k & 1) at = std::max(at, warp.scoreboards[k]);
  }
  const auto free = [&](Pipe pipe) { return sm.pipe_free[scheduler][static_cast<int>(pipe)]; };
  if (ins.pipe == Pipe::kFma) return std::max(at, std::min(free(Pipe::kFma), free(Pipe::kFmaHeavy)));
  at = std::max(at, free(ins.pipe));
  const bool queues =
      ins.op == Opcode::kLDG || ins.op == Opcode::kSTG || ins.op == Opcode::kLDS || ins.op == Opcode::kSTS;
  return queues ? std::max(at, sm.lsu_free - k_.lsu_queue) : at;
}

int CycleModel::load(Sm& sm, const Request& request, double start, double& done) {
  int hits = 0;
  done = start + k_.l1_latency;
  for (int k = 0; k < request.sector_count; ++k) {
    const uint64_t sector = request.sectors[k];
    double* filled_at;
    if (sm.l1.touch(sector, filled_at)) {
      ++hits;
      done = std::max(done, *filled_at);
      continue;
    }
    l2_bytes_ += 32;
    l2_free_ = std::max(start, l2_free_) + 32 / l2_rate_;
    sm.port_free = std::max(l2_free_, sm.port_free) + 32 / k_.port_bytes_per_cycle;
    double end = sm.port_free + k_.l2_latency;
    uint8_t& present = in_l2_[sector / 4];
    if (!(present >> sector % 4 & 1)) {
      present = static_cast<uint8_t>(present | 1 << sector % 4);
      dram_bytes_ += 32;
      dram_free_ = std::max(start, dram_free_) + 32 / dram_rate_;
      end = std::max(sm.port_free, dram_free_) + k_.dram_latency;
    }
    *filled_at = end;
    done = std::max(done, end);
  }
  bytes_in_flight_ += (done - start) * request.sector_count * 32;
  return hits;
}

int CycleModel::issue(Sm& sm, int scheduler, WarpTime& warp, const Instruction& ins, const MemoryAccess& access,
                      const Request& request, double now) {
  double results = now + latency_of(ins), sources = now + k_.source_latency;
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
        sm.port_free = std::max(sm.port_free, start) + 32 / k_.port_bytes_per_cycle;
        uint8_t& dirty = dirty_[sector / 4];
        if (dirty & bit) continue;
        dirty |= bit;
        dram_bytes_ += 32;
        dram_free_ = std::max(dram_free_, start) + 32 / dram_rate_;
      }
      if (dram_free_ - start > k_.store_backlog) {
        sm.lsu_free = std::max(sm.lsu_free, dram_free_ - k_.store_backlog);
      }
      sources = start + k_.store_source_latency;
      results = start + k_.atomic_latency;
    }
  } else if (access.space != MemoryAccess::kNowhere) {
    const double start = std::max(now, sm.lsu_free);
    sm.lsu_free = start + std::max(request.wavefronts, 1u);
    results = start + (access.space == MemoryAccess::kShared ? k_.shared_latency : k_.l1_latency);
    sources = start + k_.source_latency;
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
  warp.ready = std::max(warp.ready, now + std::max<double>(ins.stall, jump ? k_.jump_cycles : 1));
  return hits;
}

void CycleModel::finish(Counters& counters, double cycles) const {
  // What was stored is to arrive.
  cycles = std::max({cycles, l2_free_, dram_free_});
  counters.model_cycles = cycles;
  counters.model_us = cycles / (k_.clock_ghz * 1e3);
  counters.model_sms = static_cast<uint64_t>(sms_);
  counters.loads_in_flight_bytes = cycles > 0 ? bytes_in_flight_ / cycles / sms_ : 0;
  counters.model_l2_bytes = l2_bytes_;
  counters.model_dram_bytes = dram_bytes_;
  for (int k = 0; k < static_cast<int>(Pipe::kCount); ++k) {
    counters.pipe_busy[kPipeNames[k]] = cycles > 0 ? busy_[k] / (cycles * k_.schedulers * sms_) : 0;
  }
}

}  // namespace gpu_emulator
