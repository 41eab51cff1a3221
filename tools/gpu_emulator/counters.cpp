// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <algorithm>
#include <bit>

#include "checker.h"
#include "decoder.h"

namespace gpu_emulator {

Request request_of(const MemoryAccess& access) {
  Request request;
  request.bytes = uint64_t{access.bytes} * static_cast<uint64_t>(std::popcount(access.mask));
  if (access.space == MemoryAccess::kShared) {
    // Words that lanes share are read once; a bank gives one word in a pass.
    std::array<uint32_t, 128> words;
    int count = 0;
    for (uint32_t left = access.mask; left != 0; left &= left - 1) {
      const auto first = static_cast<uint32_t>(access.address[std::countr_zero(left)] / 4);
      for (uint32_t k = 0; k < std::max(1, access.bytes / 4); ++k) words[count++] = first + k;
    }
    std::sort(words.begin(), words.begin() + count);
    count = static_cast<int>(std::unique(words.begin(), words.begin() + count) - words.begin());
    std::array<uint32_t, 32> of_bank{};
    for (int k = 0; k < count; ++k) {
      request.wavefronts = std::max(request.wavefronts, ++of_bank[words[k] & 31]);
    }
    request.needed_wavefronts = static_cast<uint32_t>(count + 31) / 32;
    return request;
  }
  // Accesses are aligned and of at most 16 bytes, so each is in one sector.
  uint64_t previous = ~uint64_t{0};
  for (uint32_t left = access.mask; left != 0; left &= left - 1) {
    const uint64_t sector = access.address[std::countr_zero(left)] / 32;
    if (sector != previous) request.sectors[request.sector_count++] = sector;
    previous = sector;
  }
  const auto begin = request.sectors.begin();
  if (!std::is_sorted(begin, begin + request.sector_count)) std::sort(begin, begin + request.sector_count);
  request.sector_count = static_cast<int>(std::unique(begin, begin + request.sector_count) - begin);
  // A line's tag is looked up once for each quarter, half or whole warp that its width makes a request.
  const int group = access.bytes == 16 ? 8 : access.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += group) {
    std::array<uint64_t, 32> seen;
    int count = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!(access.mask >> lane & 1)) continue;
      const uint64_t line = access.address[lane] / 128;
      if (std::find(seen.begin(), seen.begin() + count, line) == seen.begin() + count) seen[count++] = line;
    }
    request.lines += count;
  }
  return request;
}

bool L1Cache::touch(uint64_t sector, double*& filled_at) {
  const uint64_t tag = sector / 4;
  const auto part = static_cast<int>(sector % 4);
  Line* set = &lines_[(tag ^ tag / sets_) % sets_ * kWays];
  Line* oldest = set;
  Line* found = nullptr;
  for (uint32_t way = 0; way < kWays; ++way) {
    if (set[way].tag == tag) found = &set[way];
    if (set[way].used < oldest->used) oldest = &set[way];
  }
  if (found == nullptr) {
    found = oldest;
    found->tag = tag;
    found->present = 0;
  }
  found->used = ++clock_;
  filled_at = &found->filled_at[part];
  const bool hit = found->present >> part & 1;
  found->present = static_cast<uint8_t>(found->present | 1 << part);
  return hit;
}

void L1Cache::clear() { std::fill(lines_.begin(), lines_.end(), Line{}); }

void Counting::memory(const MemoryAccess& access, const Request& request, int l1_hits) {
  const auto sectors = static_cast<uint64_t>(request.sector_count);
  if (access.space == MemoryAccess::kLocal) {
    ++sums_.local_accesses;
  } else if (access.space == MemoryAccess::kShared) {
    ++sums_.shared_accesses;
    sums_.shared_atomics += access.kind == MemoryAccess::kAtomic;
    sums_.shared_wavefronts += request.wavefronts;
    sums_.shared_conflicts += request.wavefronts - request.needed_wavefronts;
  } else if (access.kind == MemoryAccess::kLoad) {
    ++sums_.global_loads;
    sums_.load_sectors += sectors;
    sums_.load_bytes += request.bytes;
    sums_.l1_hit_sectors += static_cast<uint64_t>(l1_hits);
  } else if (access.kind == MemoryAccess::kStore) {
    ++sums_.global_stores;
    sums_.store_sectors += sectors;
    sums_.store_bytes += request.bytes;
  } else {
    ++sums_.global_atomics;
    sums_.atomic_sectors += sectors;
  }
}

void Counting::finish(Counters& counters, const Program& program, const Launch& launch, GlobalMemory& memory) const {
  counters = sums_;
  for (int k = 0; k < static_cast<int>(Opcode::kCount); ++k) {
    if (opcodes_[k] == 0) continue;
    counters.by_opcode[name_of(static_cast<Opcode>(k))] = opcodes_[k];
  }
  for (int k = 0; k < static_cast<int>(Pipe::kCount); ++k) counters.by_pipe[kPipeNames[k]] = pipes_[k];
  counters.warp_instructions = instructions_;
  counters.lane_instructions = lanes_;
  counters.blocks = launch.grid.count();
  counters.threads_per_block = launch.block.count();
  for (GlobalMemory::Region& region : memory.regions()) {
    counters.distinct_read_bytes += 32 * region.shadow.sectors_read();
    counters.distinct_written_bytes += 32 * region.shadow.sectors_written();
    region.shadow.hand_back();
    if (!region.allocation.initialised) counters.unwritten_bytes[region.allocation.name] += region.shadow.unwritten();
  }
  const uint32_t warps = static_cast<uint32_t>(launch.block.count() + 31) / 32;
  counters.blocks_per_sm = occupancy(program, launch, counters.occupancy_limit);
  counters.warps_per_sm = counters.blocks_per_sm * warps;
}

uint32_t occupancy(const Program& program, const Launch& launch, std::string& limit) {
  const uint32_t warps = static_cast<uint32_t>(launch.block.count() + 31) / 32;
  // Each of the four schedulers has a quarter of the registers.
  const uint32_t by_registers = kRegisterFile / 4 / registers_of_warp(program) * 4 / warps;
  const uint32_t shared = program.static_shared + launch.dynamic_shared + kSharedReserved;
  const uint32_t by_shared = kSharedOfSm / ((shared + 127) / 128 * 128);
  const uint32_t blocks = std::min({by_registers, by_shared, kMaxWarps / warps, kMaxBlocks});
  limit = blocks == by_registers ? "registers"
          : blocks == by_shared  ? "shared"
          : blocks == kMaxBlocks ? "blocks"
                                 : "warps";
  return std::max(blocks, 1u);
}

}  // namespace gpu_emulator
