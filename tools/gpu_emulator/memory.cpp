// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace gpu_emulator {
namespace {

std::string hex(uint64_t value) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

GlobalMemory::GlobalMemory(const Launch& launch) {
  for (const Allocation& each : launch.allocations) {
    if (each.bytes > 0) regions_.push_back({each, GlobalShadow(each)});
  }
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.allocation.address < b.allocation.address; });
  for (size_t k = 1; k < regions_.size(); ++k) {
    const Allocation& before = regions_[k - 1].allocation;
    if (before.address + before.bytes > regions_[k].allocation.address) {
      throw Fault("launch", "allocations " + before.name + " and " + regions_[k].allocation.name + " overlap");
    }
  }
}

GlobalMemory::Region& GlobalMemory::find(uint64_t address, uint32_t bytes) {
  if (address % bytes != 0) {
    throw Fault("misaligned", std::to_string(bytes) + " bytes of global memory at " + hex(address));
  }
  if (last_ == nullptr || address < last_->allocation.address ||
      address - last_->allocation.address >= last_->allocation.bytes) {
    const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                        [](uint64_t a, const Region& region) { return a < region.allocation.address; });
    if (after == regions_.begin()) throw Fault("out_of_bounds", "global memory at " + hex(address));
    last_ = &*(after - 1);
  }
  const Allocation& in = last_->allocation;
  if (address - in.address + bytes > in.bytes) {
    throw Fault("out_of_bounds", "global memory at " + hex(address) + ", which is " +
                                     std::to_string(address - in.address) + " bytes into " + in.name + " of " +
                                     std::to_string(in.bytes) + " bytes");
  }
  return *last_;
}

SharedMemory::SharedMemory(uint32_t bytes, uint32_t poison)
    : data(kSharedBase + bytes, static_cast<uint8_t>(poison)), undefined(data.size()), shadow(kSharedBase + bytes) {}

uint32_t SharedMemory::find(uint64_t address, uint32_t bytes) const {
  if (address % bytes != 0) {
    throw Fault("misaligned", std::to_string(bytes) + " bytes of shared memory at " + hex(address));
  }
  if (address < kSharedBase || address + bytes > data.size()) {
    throw Fault("out_of_bounds", "shared memory at byte " +
                                     std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " +
                                     std::to_string(data.size() - kSharedBase));
  }
  return static_cast<uint32_t>(address);
}

std::vector<uint8_t> constant_bank(const Program& program, const Launch& launch) {
  std::vector<uint8_t> bank(kParameters + launch.parameters.size());
  const uint32_t sizes[] = {launch.block.x, launch.block.y, launch.block.z,
                            launch.grid.x,  launch.grid.y,  launch.grid.z};
  std::memcpy(bank.data(), sizes, sizeof sizes);
  std::memcpy(&bank[kStackTop], &program.local_bytes, sizeof program.local_bytes);
  if (!launch.parameters.empty()) {
    std::memcpy(&bank[kParameters], launch.parameters.data(), launch.parameters.size());
  }
  return bank;
}

}  // namespace gpu_emulator
