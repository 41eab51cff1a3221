// SPDX-License-Identifier: Apache-2.0
// Which block and warp goes next: one after another, mixed by a seed, or as the cycle model has them.
#include <algorithm>
#include <numeric>
#include <queue>
#include <random>

#include "checker.h"
#include "counters.h"
#include "cycle_model.h"
#include "decoder.h"
#include "disassembly.h"
#include "emulator.h"
#include "executor.h"

namespace gpu_emulator {
namespace {

// The numbers of the blocks that run, in order.
std::vector<uint64_t> chosen_blocks(const Launch& launch, const Options& options, std::mt19937_64& random) {
  const uint64_t all = launch.grid.count();
  const auto count =
      std::clamp<uint64_t>(static_cast<uint64_t>(static_cast<double>(all) * options.share + 0.5), 1, all);
  std::vector<uint64_t> blocks(count);
  for (uint64_t k = 0; k < count; ++k) {
    blocks[k] = static_cast<uint64_t>(static_cast<unsigned __int128>(k) * all / count);
  }
  if (options.order != Options::kInOrder) std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

struct Run {
  const Program& program;
  const Launch& launch;
  const Options& options;
  const ModelConstants constants;
  Executor executor;
  Counting counting;
  std::mt19937_64 random;
  std::vector<uint64_t> order;
  uint64_t largest_block = 0;

  Run(const Program& p, const Launch& l, const Options& o)
      : program(p),
        launch(l),
        options(o),
        constants(o.constants),
        executor(p, l, o),
        random(o.seed),
        order(chosen_blocks(l, o, random)) {}

  const Instruction& next(const Warp& warp) const { return program.code[static_cast<size_t>(warp.pc)]; }

  std::unique_ptr<Block> start(uint64_t number) const {
    return std::make_unique<Block>(program, launch, number, options.seed);
  }

  // One instruction, with its counters; `l1` is the cache of where the block is.
  void step(Warp& warp, L1Cache& l1) {
    const Instruction& ins = next(warp);
    executor.step(warp);
    counting.instruction(ins, executor.executed());
    const MemoryAccess& access = executor.access();
    if (access.space == MemoryAccess::kNowhere) return;
    const Request request = request_of(access);
    int hits = 0;
    if (access.space == MemoryAccess::kGlobal && access.kind == MemoryAccess::kLoad) {
      double* filled_at;
      for (int k = 0; k < request.sector_count; ++k) hits += l1.touch(request.sectors[k], filled_at);
    }
    counting.memory(access, request, hits);
  }

  void one_after_another() {
    L1Cache l1(static_cast<uint32_t>(constants.l1_bytes));
    for (const uint64_t number : order) {
      const auto block = start(number);
      const uint64_t before = counting.instructions();
      l1.clear();
      if (options.order == Options::kShuffled) std::shuffle(block->warps.begin(), block->warps.end(), random);
      while (!block->done()) {
        bool moved = false;
        for (const auto& warp : block->warps) {
          while (warp->active != 0) {
            step(*warp, l1);
            moved = true;
          }
        }
        if (!moved) executor.report_stuck(*block);
      }
      largest_block = std::max(largest_block, counting.instructions() - before);
    }
  }

  // Some blocks at a time, of which a random warp executes some instructions.
  void interleaved() {
    constexpr size_t kTogether = 8;
    L1Cache l1(static_cast<uint32_t>(constants.l1_bytes));
    std::vector<std::unique_ptr<Block>> blocks;
    size_t started = 0;
    while (started < order.size() || !blocks.empty()) {
      while (blocks.size() < kTogether && started < order.size()) blocks.push_back(start(order[started++]));
      const size_t chosen = random() % blocks.size();
      Block& block = *blocks[chosen];
      std::vector<Warp*> able;
      for (const auto& warp : block.warps) {
        if (warp->active != 0) able.push_back(warp.get());
      }
      if (able.empty()) executor.report_stuck(block);
      Warp& warp = *able[random() % able.size()];
      for (uint64_t k = random() % 64 + 1; k > 0 && warp.active != 0; --k) step(warp, l1);
      if (block.done()) blocks.erase(blocks.begin() + static_cast<long>(chosen));
    }
  }

  void by_the_model(Counters& counters);
};

// Every multiprocessor has its own time; the one that is behind goes on by the next cycle in which it can issue.
void Run::by_the_model(Counters& counters) {
  struct Resident {
    Warp* warp;
    CycleModel::WarpTime time;
  };
  struct Multiprocessor : CycleModel::Sm {
    using CycleModel::Sm::Sm;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Resident> warps[4];
    size_t turn[4] = {};
  };
  CycleModel model(options);
  std::string limit;
  const size_t resident = occupancy(program, launch, limit);
  std::vector<Multiprocessor> sms;
  for (int k = 0; k < model.sms(); ++k) sms.emplace_back(static_cast<uint32_t>(constants.l1_bytes));
  size_t started = 0, scheduler = 0;
  const auto fill = [&](Multiprocessor& sm, size_t most, double now) {
    while (sm.blocks.size() < most && started < order.size()) {
      sm.blocks.push_back(start(order[started++]));
      for (const auto& warp : sm.blocks.back()->warps) {
        Resident added{warp.get(), {}};
        added.time.ready = now == 0 ? 0 : now + constants.block_start_cycles;
        sm.warps[scheduler++ % 4].push_back(added);
      }
    }
  };
  for (size_t round = 1; round <= resident; ++round) {
    for (Multiprocessor& sm : sms) fill(sm, round, 0);
  }
  using Event = std::pair<double, size_t>;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events;
  for (size_t k = 0; k < sms.size(); ++k) {
    if (!sms[k].blocks.empty()) events.push({0, k});
  }
  double end = 0;
  while (!events.empty()) {
    const auto [now, which] = events.top();
    events.pop();
    Multiprocessor& sm = sms[which];
    double next_time = 1e300;
    bool block_ended = false, issued_any = false;
    for (int part = 0; part < 4; ++part) {
      std::vector<Resident>& warps = sm.warps[part];
      bool issued = false;
      for (size_t k = 0; k < warps.size(); ++k) {
        const size_t at = (sm.turn[part] + k) % warps.size();
        Warp& warp = *warps[at].warp;
        if (warp.active == 0) continue;
        const Instruction& ins = next(warp);
        const double can = model.earliest(sm, part, warps[at].time, ins);
        if (issued || can > now) {
          next_time = std::min(next_time, std::max(can, now + 1));
          continue;
        }
        issued = issued_any = true;
        sm.turn[part] = at;
        const uint64_t barriers = executor.barriers;
        Block& block = *warp.block;
        executor.step(warp);
        counting.instruction(ins, executor.executed());
        const MemoryAccess& access = executor.access();
        const Request request = access.space == MemoryAccess::kNowhere ? Request{} : request_of(access);
        const int hits = model.issue(sm, part, warps[at].time, ins, access, request, now);
        if (access.space != MemoryAccess::kNowhere) counting.memory(access, request, hits);
        if (executor.barriers != barriers) {
          for (auto& others : sm.warps) {
            for (Resident& other : others) {
              if (other.warp->block == &block)
                other.time.ready = std::max(other.time.ready, now + constants.barrier_cycles);
            }
          }
        }
        block_ended |= block.done();
        next_time = std::min(next_time, now + 1);
      }
    }
    end = std::max(end, now);
    if (block_ended) {
      for (auto& warps : sm.warps) std::erase_if(warps, [](const Resident& each) { return each.warp->block->done(); });
      std::erase_if(sm.blocks, [](const auto& block) { return block->done(); });
      fill(sm, resident, now);
      next_time = now + 1;
    }
    if (sm.blocks.empty()) continue;
    if (next_time == 1e300) {
      if (!issued_any) executor.report_stuck(*sm.blocks.front());
      next_time = now + 1;
    }
    events.push({next_time, which});
  }
  model.finish(counters, end);
}

}  // namespace

Counters run(const Program& program, const Launch& launch, const Options& options) {
  check_launch(program, launch);
  Run run(program, launch, options);
  Counters counters, modelled;
  if (options.model) {
    run.by_the_model(modelled);
  } else if (options.order == Options::kInterleaved) {
    run.interleaved();
  } else {
    run.one_after_another();
  }
  run.counting.finish(counters, program, launch, run.executor.memory());
  counters.blocks_run = run.order.size();
  counters.barriers = run.executor.barriers;
  counters.largest_block = run.largest_block;
  counters.model_sms = modelled.model_sms;
  counters.model_cycles = modelled.model_cycles;
  counters.model_us = modelled.model_us;
  counters.loads_in_flight_bytes = modelled.loads_in_flight_bytes;
  counters.model_l2_bytes = modelled.model_l2_bytes;
  counters.model_dram_bytes = modelled.model_dram_bytes;
  counters.pipe_busy = modelled.pipe_busy;
  return counters;
}

Program Program::parse(const std::string& text, const std::string& kernel) {
  const Disassembly disassembly = read_disassembly(text, kernel);
  Program program;
  program.kernel = kernel;
  program.registers = disassembly.registers;
  program.static_shared = disassembly.shared;
  program.local_bytes = disassembly.local;
  if (disassembly.constant_bytes >= 0) program.parameter_bytes = disassembly.constant_bytes - kParameters;
  std::unordered_map<uint32_t, int32_t> index_of;
  for (const Line& line : disassembly.lines) index_of.emplace(line.pc, static_cast<int32_t>(index_of.size()));
  for (const Line& line : disassembly.lines) {
    program.code.push_back(decode(line, index_of));
    program.text.push_back(line.text);
  }
  return program;
}

Program Program::load(const std::string& path, const std::string& kernel, const std::string& cuobjdump) {
  const auto ends_with = [&](const std::string& end) { return path.size() > end.size() && path.ends_with(end); };
  std::string text;
  if (ends_with(".sass") || ends_with(".txt")) {
    text = read_file(path);
  } else {
    for (const char* what : {"-res-usage", "-sass"}) {
      text += output_of(ends_with(".cubin")
                            ? std::vector<std::string>{cuobjdump, what, "-fun", kernel, path}
                            : std::vector<std::string>{cuobjdump, what, "-arch", "sm_90", "-fun", kernel, path});
    }
  }
  Program program = parse(text, kernel);
  program.path_ = path;
  program.cuobjdump_ = cuobjdump;
  return program;
}

std::string Program::source_line(uint32_t pc) const { return find_source_line(path_, kernel, cuobjdump_, pc); }

}  // namespace gpu_emulator
