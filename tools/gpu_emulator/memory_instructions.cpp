// SPDX-License-Identifier: Apache-2.0
// Loads, stores, atomics and the exchange of matrices.
#include <algorithm>
#include <bit>
#include <cstring>

#include "executor.h"

namespace gpu_emulator {
namespace {

using M = Modifier;

template <class T>
T changed(const Instruction& ins, T old, T operand, T compare) {
  if (ins.has(M::kMIN)) return std::min(old, operand);
  if (ins.has(M::kMAX)) return std::max(old, operand);
  if (ins.has(M::kAND)) return old & operand;
  if (ins.has(M::kOR)) return old | operand;
  if (ins.has(M::kXOR)) return old ^ operand;
  if (ins.has(M::kEXCH)) return operand;
  if (ins.has(M::kCAS)) return old == compare ? operand : old;
  if (ins.has(M::kPOPC)) return old + 1;
  if (ins.has(M::kADD)) return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + operand);
  throw Fault("unknown_instruction", "an atomic of no kind");
}

template <class T>
void change(const Instruction& ins, uint8_t* at, const uint32_t* operand, const uint32_t* compare) {
  T old, by, with;
  std::memcpy(&old, at, sizeof(T));
  std::memcpy(&by, operand, sizeof(T));
  std::memcpy(&with, compare, sizeof(T));
  old = changed(ins, old, by, with);
  std::memcpy(at, &old, sizeof(T));
}

}  // namespace

bool Executor::memory_instruction(const Instruction& ins) {
  switch (ins.op) {
    case Opcode::kLDG:
    case Opcode::kLDS:
    case Opcode::kLDL:
      load(ins);
      return true;
    case Opcode::kLDC:
      load_constant(ins);
      return true;
    case Opcode::kSTG:
    case Opcode::kSTS:
    case Opcode::kSTL:
      store(ins);
      return true;
    case Opcode::kATOMG:
    case Opcode::kATOMS:
    case Opcode::kRED:
    case Opcode::kREDG:
      atomic(ins);
      return true;
    case Opcode::kLDSM:
    case Opcode::kSTSM:
      matrices(ins);
      return true;
    default:
      return false;
  }
}

void Executor::addresses(const Instruction& ins, const Operand& operand, bool global) {
  check_defined(operand, mask_, "an address");
  const Row *base = &warp_->rows[operand.index], *uniform = &warp_->rows[operand.uniform_index];
  const bool wide = operand.wide && operand.index != kRZ, wide_uniform = global && operand.uniform_index != kURZ;
  const auto offset = static_cast<int32_t>(operand.value);
  for (int lane = 0; lane < 32; ++lane) {
    uint64_t address = base[0][lane];
    if (wide) address |= uint64_t{base[1][lane]} << 32;
    address += uniform[0][lane];
    if (wide_uniform) address += uint64_t{uniform[1][lane]} << 32;
    address += static_cast<uint64_t>(int64_t{offset});
    access_.address[lane] = global ? address : static_cast<uint32_t>(address);
  }
  access_.mask = mask_;
  access_.bytes = ins.bytes;
}

SharedShadow::Access Executor::shared_access(uint32_t lane, bool is_atomic) const {
  const Block& block = *warp_->block;
  return {warp_->first_thread + lane, block.clock, block.block_sync, warp_->warp_sync, is_atomic};
}

// The host's bytes behind an address, those beside them that say which bits are undefined (none for global memory),
// and the offset that the shadow counts in.
uint8_t* Executor::locate_bytes(uint64_t address, uint32_t bytes, uint32_t lane, uint8_t*& undefined,
                                uint64_t& offset) {
  undefined = nullptr;
  if (access_.space == MemoryAccess::kGlobal) {
    region_ = &memory_.find(address, bytes);
    offset = address - region_->allocation.address;
    return reinterpret_cast<uint8_t*>(address);
  }
  if (access_.space == MemoryAccess::kShared) {
    SharedMemory& shared = warp_->block->shared;
    offset = shared.find(address, bytes);
    undefined = &shared.undefined[offset];
    return &shared.data[offset];
  }
  if (address % bytes != 0) throw Fault("misaligned", "local memory at byte " + std::to_string(address));
  if (address + bytes > program_.local_bytes) {
    throw Fault("out_of_bounds",
                "local memory at byte " + std::to_string(address) + " of " + std::to_string(program_.local_bytes));
  }
  offset = size_t{lane} * program_.local_bytes + address;
  undefined = &warp_->local_undefined[offset];
  return &warp_->local[offset];
}

void Executor::load(const Instruction& ins) {
  access_.space = ins.op == Opcode::kLDG   ? MemoryAccess::kGlobal
                  : ins.op == Opcode::kLDS ? MemoryAccess::kShared
                                           : MemoryAccess::kLocal;
  access_.kind = MemoryAccess::kLoad;
  addresses(ins, ins.sources[0], ins.op == Opcode::kLDG);
  const int words = ins.result.count;
  const bool sink = ins.result.index == kRZ;
  const auto block = static_cast<uint32_t>(warp_->block->number + 1);
  for (uint32_t left = mask_; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    uint32_t value[4] = {}, bad[4] = {};
    try {
      uint8_t* undefined;
      uint64_t offset;
      const uint8_t* data = locate_bytes(access_.address[lane], ins.bytes, lane, undefined, offset);
      if (access_.space == MemoryAccess::kGlobal) {
        region_->shadow.read(offset, ins.bytes, block);
      } else if (access_.space == MemoryAccess::kShared) {
        if (!warp_->block->shared.shadow.read(static_cast<uint32_t>(offset), ins.bytes, shared_access(lane))) {
          throw Fault("unwritten_shared",
                      "byte " + std::to_string(offset - kSharedBase) + " of shared memory is read unwritten");
        }
      }
      std::memcpy(value, data, ins.bytes);
      if (undefined != nullptr) std::memcpy(bad, undefined, ins.bytes);
    } catch (Fault& fault) {
      locate(fault, *warp_, warp_->pc, 1u << lane);
      throw;
    }
    if (ins.has(M::kS8)) value[0] = sign_extend(value[0], 8, false);
    if (ins.has(M::kS16)) value[0] = sign_extend(value[0], 16, false);
    for (int k = 0; k < words && !sink; ++k) {
      const int row = ins.result.index + k;
      warp_->rows[row][lane] = value[k];
      warp_->undefined_bits[row][lane] = bad[k];
      uint32_t& lanes = warp_->undefined[row];
      lanes = bad[k] != 0 ? lanes | 1u << lane : lanes & ~(1u << lane);
    }
  }
}

void Executor::load_constant(const Instruction& ins) {
  const Operand& source = ins.sources[0];
  check_defined(source, mask_, "an address");
  Row out[2] = {};
  for (uint32_t left = mask_; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    const int64_t offset = static_cast<int32_t>(source.value) +
                           int64_t{static_cast<int32_t>(warp_->rows[source.index][lane])} +
                           static_cast<int32_t>(warp_->rows[source.uniform_index][lane]);
    if (offset % ins.bytes != 0) fail("misaligned", "constant memory at byte " + std::to_string(offset), 1u << lane);
    out[0][lane] = constant(offset, std::min<uint32_t>(ins.bytes, 4), lane);
    if (ins.bytes == 8) out[1][lane] = constant(offset + 4, 4, lane);
    if (ins.has(M::kS8)) out[0][lane] = sign_extend(out[0][lane], 8, false);
    if (ins.has(M::kS16)) out[0][lane] = sign_extend(out[0][lane], 16, false);
  }
  const uint32_t lanes = ins.result.index >= kUniform ? ~0u : mask_;
  for (int k = 0; k < ins.result.count; ++k) {
    if (ins.result.index == kRZ || ins.result.index == kURZ) return;
    write(ins.result, out[k], k);
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) warp_->undefined_bits[ins.result.index + k][lane] = 0;
    }
    warp_->undefined[ins.result.index + k] &= ~lanes;
  }
}

void Executor::store(const Instruction& ins) {
  access_.space = ins.op == Opcode::kSTG   ? MemoryAccess::kGlobal
                  : ins.op == Opcode::kSTS ? MemoryAccess::kShared
                                           : MemoryAccess::kLocal;
  access_.kind = MemoryAccess::kStore;
  addresses(ins, ins.sources[0], ins.op == Opcode::kSTG);
  const Operand& source = ins.sources[1];
  const bool zero = source.index == kRZ || source.index == kURZ;
  const auto block = static_cast<uint32_t>(warp_->block->number + 1);
  for (uint32_t left = mask_; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    uint32_t value[4] = {}, bad[4] = {};
    for (int k = 0; k < source.count && !zero; ++k) {
      const int row = source.index + k;
      value[k] = warp_->rows[row][lane];
      if (warp_->undefined[row] >> lane & 1) bad[k] = warp_->undefined_bits[row][lane];
    }
    try {
      uint8_t* undefined;
      uint64_t offset;
      uint8_t* data = locate_bytes(access_.address[lane], ins.bytes, lane, undefined, offset);
      if (access_.space == MemoryAccess::kGlobal) {
        const uint8_t clean[16] = {};
        if (std::memcmp(bad, clean, ins.bytes) != 0) {
          throw Fault("unwritten_register", "what is stored comes from a register that nobody wrote");
        }
        region_->shadow.write(offset, ins.bytes, block, std::memcmp(data, value, ins.bytes) == 0);
      } else {
        if (access_.space == MemoryAccess::kShared) {
          warp_->block->shared.shadow.write(static_cast<uint32_t>(offset), ins.bytes, shared_access(lane),
                                            std::memcmp(data, value, ins.bytes) == 0);
        }
        std::memcpy(undefined, bad, ins.bytes);
      }
      std::memcpy(data, value, ins.bytes);
    } catch (Fault& fault) {
      locate(fault, *warp_, warp_->pc, 1u << lane);
      throw;
    }
  }
}

void Executor::atomic(const Instruction& ins) {
  const bool shared = ins.op == Opcode::kATOMS, returns = shared || ins.op == Opcode::kATOMG;
  access_.space = shared ? MemoryAccess::kShared : MemoryAccess::kGlobal;
  access_.kind = MemoryAccess::kAtomic;
  addresses(ins, ins.sources[0], !shared);
  const auto block = static_cast<uint32_t>(warp_->block->number + 1);
  const bool swap = ins.has(M::kCAS);
  const auto words = [&](int source, uint32_t lane, uint32_t (&out)[4]) {
    if (source >= ins.source_count) return;
    const Operand& operand = ins.sources[source];
    for (int k = 0; k < operand.count && operand.index != kRZ && operand.index != kURZ; ++k) {
      Operand word = operand;
      word.index = static_cast<int16_t>(operand.index + k);
      check_defined(word, 1u << lane, "an atomic's operand");
      out[k] = warp_->rows[word.index][lane];
    }
  };
  for (uint32_t left = mask_; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    uint32_t operand[4] = {}, compare[4] = {}, old[4];
    words(swap ? 2 : 1, lane, operand);
    if (swap) words(1, lane, compare);
    try {
      uint8_t* undefined;
      uint64_t offset;
      uint8_t* data = locate_bytes(access_.address[lane], ins.bytes, lane, undefined, offset);
      std::memcpy(old, data, ins.bytes);
      if (shared) {
        SharedShadow& shadow = warp_->block->shared.shadow;
        if (!shadow.written(static_cast<uint32_t>(offset), ins.bytes)) {
          throw Fault("unwritten_shared", "an atomic on shared memory that nobody wrote");
        }
        shadow.write(static_cast<uint32_t>(offset), ins.bytes, shared_access(lane, true), false);
      } else {
        region_->shadow.atomic(offset, ins.bytes, block);
      }
      if (ins.has(M::kF32x4)) {
        for (int k = 0; k < 4; ++k) {
          const float sum = flushed(float_of(old[k])) + flushed(float_of(operand[k]));
          const uint32_t bits = canonical(flushed(sum));
          std::memcpy(data + 4 * k, &bits, 4);
        }
      } else if (ins.bytes == 8) {
        ins.has(M::kS64) ? change<int64_t>(ins, data, operand, compare) : change<uint64_t>(ins, data, operand, compare);
      } else {
        ins.has(M::kS32) ? change<int32_t>(ins, data, operand, compare) : change<uint32_t>(ins, data, operand, compare);
      }
    } catch (Fault& fault) {
      if (fault.kernel.empty()) locate(fault, *warp_, warp_->pc, 1u << lane);
      throw;
    }
    for (int k = 0; returns && ins.result.index != kRZ && k < ins.result.count; ++k) {
      warp_->rows[ins.result.index + k][lane] = old[k];
      warp_->undefined_bits[ins.result.index + k][lane] = 0;
      warp_->undefined[ins.result.index + k] &= ~(1u << lane);
    }
  }
}

// ldmatrix and stmatrix: lane 8 m + r has the address of row r of matrix m, 16 bytes; a lane holds 4 bytes of each.
void Executor::matrices(const Instruction& ins) {
  const bool is_load = ins.op == Opcode::kLDSM;
  access_.space = MemoryAccess::kShared;
  access_.kind = is_load ? MemoryAccess::kLoad : MemoryAccess::kStore;
  if (mask_ != ~0u) fail("warp_mask", "an exchange of matrices without all lanes", mask_);
  addresses(ins, ins.sources[0], false);
  const Operand& registers = is_load ? ins.result : ins.sources[1];
  access_.bytes = 16;
  access_.mask = registers.count == 4 ? ~0u : (1u << 8 * registers.count) - 1;
  SharedMemory& shared = warp_->block->shared;
  for (int k = 0; k < registers.count; ++k) {
    const int row = registers.index + k;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      try {
        const uint32_t from = shared.find(access_.address[8 * k + lane / 4], 16) + lane % 4 * 4;
        uint32_t& value = warp_->rows[row][lane];
        uint32_t& bits = warp_->undefined_bits[row][lane];
        if (is_load) {
          if (!shared.shadow.read(from, 4, shared_access(lane))) {
            throw Fault("unwritten_shared",
                        "byte " + std::to_string(from - kSharedBase) + " of shared memory is read unwritten");
          }
          std::memcpy(&value, &shared.data[from], 4);
          std::memcpy(&bits, &shared.undefined[from], 4);
          uint32_t& lanes = warp_->undefined[row];
          lanes = bits != 0 ? lanes | 1u << lane : lanes & ~(1u << lane);
        } else {
          shared.shadow.write(from, 4, shared_access(lane), std::memcmp(&shared.data[from], &value, 4) == 0);
          const uint32_t bad = warp_->undefined[row] >> lane & 1 ? bits : 0;
          std::memcpy(&shared.data[from], &value, 4);
          std::memcpy(&shared.undefined[from], &bad, 4);
        }
      } catch (Fault& fault) {
        locate(fault, *warp_, warp_->pc, 1u << lane);
        throw;
      }
    }
  }
}

}  // namespace gpu_emulator
