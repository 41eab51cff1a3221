// SPDX-License-Identifier: Apache-2.0
// The memories of a launch: data and, beside them, what is known about each byte.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "checker.h"
#include "emulator.h"

namespace gpu_emulator {

// Offsets into the constant bank, by NVIDIA's calling convention of sm_90.
inline constexpr uint32_t kStackTop = 0x28, kParameters = 0x210;
// Where a block's shared memory begins: the first KiB is the system's.
inline constexpr uint32_t kSharedBase = 0x400;

class GlobalMemory {
 public:
  explicit GlobalMemory(const Launch& launch);

  struct Region {
    Allocation allocation;
    GlobalShadow shadow;
  };
  // The allocation around `bytes` bytes; throws Fault (misaligned, out_of_bounds).
  Region& find(uint64_t address, uint32_t bytes);

  std::vector<Region>& regions() { return regions_; }

 private:
  std::vector<Region> regions_;
  Region* last_ = nullptr;
};

struct SharedMemory {
  SharedMemory(uint32_t bytes, uint32_t poison);
  // The address as an index into `data`; throws Fault.
  uint32_t find(uint64_t address, uint32_t bytes) const;
  // Beside each byte its bits that come from registers that nobody wrote.
  std::vector<uint8_t> data, undefined;
  SharedShadow shadow;
};

// Bank 0 as a launch fills it.
std::vector<uint8_t> constant_bank(const Program& program, const Launch& launch);

}  // namespace gpu_emulator
