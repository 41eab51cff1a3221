// SPDX-License-Identifier: Apache-2.0
// Control flow, the fetch of operands, and the check that what decides was written. Arithmetic is in arithmetic.cpp,
// memory in memory_instructions.cpp.
#include "executor.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace gpu_emulator {

Executor::Executor(const Program& program, const Launch& launch, const Options& options)
    : program_(program),
      launch_(launch),
      options_(options),
      constants_(constant_bank(program, launch)),
      memory_(launch) {}

void Executor::locate(Fault& fault, const Warp& warp, int32_t index, uint32_t lanes) const {
  const uint32_t thread = warp.first_thread + (lanes == 0 ? 0 : static_cast<uint32_t>(std::countr_zero(lanes)));
  fault.block = warp.block->index;
  fault.thread = {thread % launch_.block.x, thread / launch_.block.x % launch_.block.y,
                  thread / launch_.block.x / launch_.block.y};
  fault.at(program_, static_cast<uint32_t>(index));
}

void Executor::fail(const char* kind, const std::string& detail, uint32_t lanes) const {
  Fault fault(kind, detail);
  locate(fault, *warp_, warp_->pc, lanes);
  throw fault;
}

void Executor::report_stuck(Block& block) const {
  for (const bool lanes : {true, false}) {
    for (const auto& warp : block.warps) {
      if (warp->done() || warp->waits_for_lanes() != lanes) continue;
      Fault fault(lanes ? "warp_mask" : "barrier", lanes ? "lanes wait for others of their warp, which never come"
                                                         : "threads wait at a barrier that others never reach");
      locate(fault, *warp, warp->waiting_index(), warp->live);
      throw fault;
    }
  }
  throw Fault("barrier", "a block does not go on");
}

void Executor::release_barrier(Block& block) {
  if (block.live == 0 || block.arrived < block.live) return;
  int32_t index = -1;
  for (const auto& warp : block.warps) {
    for (uint32_t left = warp->at_barrier() & warp->live; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      if (index < 0) index = warp->barrier_index(lane);
      if (warp->barrier_index(lane) == index) continue;
      Fault fault("barrier", "threads of a block meet at different barriers");
      locate(fault, *warp, warp->barrier_index(lane), 1u << lane);
      throw fault;
    }
  }
  const Instruction& ins = program_.code[static_cast<size_t>(std::max(index, 0))];
  block.reduced = ins.has(Modifier::kPOPC)  ? block.votes
                  : ins.has(Modifier::kAND) ? block.votes == block.arrived
                                            : block.votes != 0;
  block.arrived = 0;
  block.votes = 0;
  block.block_sync = ++block.clock;
  ++barriers;
  for (const auto& warp : block.warps) {
    if (!warp->done()) warp->released();
  }
}

const uint32_t* Executor::values(const Operand& operand, Row& buffer) const {
  const uint32_t* source = buffer;
  switch (operand.kind) {
    case Operand::kRegister:
      source = warp_->rows[operand.index];
      break;
    case Operand::kConstant:
      if (operand.index == kRZ && operand.uniform_index == kURZ) {
        const uint32_t value = constant(static_cast<int32_t>(operand.value), 4, 0);
        for (uint32_t& each : buffer) each = value;
      } else {
        for (uint32_t left = mask_; left != 0; left &= left - 1) {
          const auto lane = static_cast<uint32_t>(std::countr_zero(left));
          const int64_t offset = static_cast<int32_t>(operand.value) +
                                 int64_t{static_cast<int32_t>(warp_->rows[operand.index][lane])} +
                                 static_cast<int32_t>(warp_->rows[operand.uniform_index][lane]);
          buffer[lane] = constant(offset, 4, lane);
        }
      }
      break;
    case Operand::kImmediate:
      for (uint32_t& each : buffer) each = operand.value;
      break;
    default:
      fail("unknown_instruction", "an operand that is no value", mask_);
  }
  if (operand.plain()) return source;
  if (operand.half >= 4) {
    for (int lane = 0; lane < 32; ++lane) buffer[lane] = source[lane] >> 8 * (operand.half - 4) & 255;
  } else if (operand.half >= 0) {
    const int shift = 16 * operand.half;
    for (int lane = 0; lane < 32; ++lane) buffer[lane] = (source[lane] >> shift & 0xffff) * 0x10001u;
  } else {
    for (int lane = 0; lane < 32; ++lane) buffer[lane] = source[lane];
  }
  const uint32_t keep = operand.keep, flip = operand.flip, plus = operand.plus;
  for (uint32_t& each : buffer) each = ((each & keep) ^ flip) + plus;
  return buffer;
}

// A pair of registers or constants; a double that is an immediate has its upper word alone.
void Executor::wide_values(const Operand& operand, uint64_t (&out)[32]) const {
  if (operand.kind == Operand::kRegister) {
    const bool zero = operand.index == kRZ || operand.index == kURZ;
    const uint32_t *low = warp_->rows[operand.index], *high = warp_->rows[operand.index + (zero ? 0 : 1)];
    for (int lane = 0; lane < 32; ++lane) out[lane] = uint64_t{high[lane]} << 32 | low[lane];
  } else if (operand.kind == Operand::kConstant) {
    const auto at = static_cast<int32_t>(operand.value);
    const uint64_t value = uint64_t{constant(at + 4, 4, 0)} << 32 | constant(at, 4, 0);
    for (uint64_t& each : out) each = value;
  } else {
    const bool is_double = operand.kind == Operand::kImmediate && program_.code[warp_->pc].pipe == Pipe::kFp64;
    const auto value =
        is_double ? uint64_t{operand.value} << 32 : static_cast<uint64_t>(int64_t{static_cast<int32_t>(operand.value)});
    for (uint64_t& each : out) each = value;
  }
  const bool integer = operand.flip == ~0u;
  const uint64_t keep = uint64_t{operand.keep} << 32 | 0xffffffffu;
  const uint64_t flip = uint64_t{operand.flip} << 32 | (integer ? 0xffffffffu : 0);
  const uint64_t plus = operand.plus;
  for (uint64_t& each : out) each = ((each & keep) ^ flip) + plus;
}

uint32_t Executor::predicate(const Operand& operand) const {
  const uint32_t truth = warp_->predicates[operand.index];
  return operand.inverted ? ~truth : truth;
}

void Executor::write(const Operand& result, const uint32_t* values, int offset) {
  if (result.kind != Operand::kRegister || result.index == kRZ || result.index == kURZ || mask_ == 0) return;
  const int index = result.index + offset;
  uint32_t* row = warp_->rows[index];
  if (index >= kUniform) {
    const uint32_t value = values[std::countr_zero(mask_)];
    for (int lane = 0; lane < 32; ++lane) row[lane] = value;
  } else if (mask_ == ~0u) {
    std::memcpy(row, values, sizeof(Row));
  } else {
    const uint32_t mask = mask_;
    for (int lane = 0; lane < 32; ++lane) row[lane] = mask >> lane & 1 ? values[lane] : row[lane];
  }
}

void Executor::write_wide(const Operand& result, const uint64_t* values) {
  Row low, high;
  for (int lane = 0; lane < 32; ++lane) {
    low[lane] = static_cast<uint32_t>(values[lane]);
    high[lane] = static_cast<uint32_t>(values[lane] >> 32);
  }
  write(result, low);
  write(result, high, 1);
}

void Executor::write(const Operand& result, uint32_t truth) {
  if (result.kind != Operand::kPredicate || result.index == kPT || result.index == kUPT || mask_ == 0) return;
  uint32_t& predicate = warp_->predicates[result.index];
  if (result.index >= kUniformPredicate) {
    predicate = truth >> std::countr_zero(mask_) & 1 ? ~0u : 0;
  } else {
    predicate = (predicate & ~mask_) | (truth & mask_);
  }
}

uint32_t Executor::constant(int64_t offset, uint32_t bytes, uint32_t lane) const {
  if (offset < 0 || offset + bytes > static_cast<int64_t>(constants_.size())) {
    // The descriptor of global memory is there on a GPU, and means nothing here.
    if (offset >= 0 && offset < kParameters) return 0;
    fail("out_of_bounds",
         "constant memory at byte " + std::to_string(offset - kParameters) + " of " +
             std::to_string(constants_.size() - kParameters) + " bytes of parameters",
         1u << lane);
  }
  uint32_t value = 0;
  std::memcpy(&value, &constants_[static_cast<size_t>(offset)], bytes);
  return value;
}

void Executor::check_defined(const Operand& operand, uint32_t lanes, const char* use) const {
  const auto check = [&](int row) {
    if (const uint32_t bad = warp_->undefined[row] & lanes) {
      fail("unwritten_register", std::string(use) + " comes from a register that nobody wrote", bad);
    }
  };
  if (operand.kind == Operand::kPredicate) {
    if (const uint32_t bad = warp_->undefined_predicates[operand.index] & lanes) {
      fail("unwritten_register", std::string(use) + " comes from a predicate that nobody wrote", bad);
    }
  } else if (operand.kind == Operand::kMemory || operand.kind == Operand::kConstant) {
    check(operand.index);
    if (operand.wide && operand.index != kRZ) check(operand.index + 1);
    check(operand.uniform_index);
  } else if (operand.kind == Operand::kRegister) {
    check(operand.index);
  }
}

void Executor::step(Warp& warp) {
  warp_ = &warp;
  const int32_t index = warp.pc;
  const Instruction& ins = program_.code[static_cast<size_t>(index)];
  access_.space = MemoryAccess::kNowhere;
  mask_ = warp.active;
  if (ins.guard != kPT) {
    const uint32_t truth = warp.predicates[ins.guard];
    mask_ &= ins.guard_inverted ? ~truth : truth;
    if (const uint32_t bad = warp.undefined_predicates[ins.guard] & warp.active) {
      fail("unwritten_register", "the guard is a predicate that nobody wrote", bad);
    }
  } else if (ins.guard_inverted) {
    mask_ = 0;
  }
  try {
    if (control(ins)) return;
    if (mask_ != 0 && !memory_instruction(ins)) {
      uint32_t undefined = 0;
      for (int k = 0; k < ins.rows_read_count; ++k) undefined |= warp.undefined[ins.rows_read[k]];
      for (int k = 0; k < ins.predicates_read_count; ++k) {
        undefined |= warp.undefined_predicates[ins.predicates_read[k]];
      }
      if (undefined != 0) {
        compute_with_undefined(ins);
      } else {
        compute(ins);
        // A uniform result is the same for all lanes.
        const uint32_t lanes = ins.result.index >= kUniform ? ~0u : mask_;
        if (ins.result.kind == Operand::kRegister) {
          for (int k = 0; k < ins.result.count; ++k) {
            uint32_t& still = warp.undefined[ins.result.index + k];
            if (still & ~lanes) {
              for (int lane = 0; lane < 32; ++lane) {
                if (lanes >> lane & 1) warp.undefined_bits[ins.result.index + k][lane] = 0;
              }
            }
            still &= ~lanes;
          }
        }
        for (const Operand& each : ins.predicates) {
          if (each.kind == Operand::kPredicate) {
            warp.undefined_predicates[each.index] &= each.index >= kUniformPredicate ? 0 : ~mask_;
          }
        }
      }
    }
  } catch (Fault& fault) {
    if (fault.kernel.empty()) locate(fault, warp, index, mask_);
    throw;
  }
  warp.pc = index + 1;
}

// Finds the bits of the results that depend on bits which nobody wrote: those that change when all of the latter do.
// That misses some, and names none without cause.
void Executor::compute_with_undefined(const Instruction& ins) {
  Warp& warp = *warp_;
  const bool has_row = ins.result.kind == Operand::kRegister && ins.result.index != kRZ && ins.result.index != kURZ;
  const int first = ins.result.index, count = has_row ? ins.result.count : 0;
  // Each row once, results last.
  int rows[20], total = 0;
  for (int k = 0; k < ins.rows_read_count + count; ++k) {
    const int row = k < ins.rows_read_count ? ins.rows_read[k] : first + k - ins.rows_read_count;
    if (std::find(rows, rows + total, row) == rows + total) rows[total++] = row;
  }
  Row saved_rows[20], results[4];
  uint32_t saved[kPredicates], found[kPredicates];
  for (int k = 0; k < total; ++k) std::memcpy(saved_rows[k], warp.rows[rows[k]], sizeof(Row));
  std::memcpy(saved, warp.predicates, sizeof saved);
  compute(ins);
  for (int k = 0; k < count; ++k) std::memcpy(results[k], warp.rows[first + k], sizeof(Row));
  std::memcpy(found, warp.predicates, sizeof found);

  for (int k = 0; k < total; ++k) {
    const int row = rows[k];
    const uint32_t bad = std::find(ins.rows_read.begin(), ins.rows_read.begin() + ins.rows_read_count, row) !=
                                 ins.rows_read.begin() + ins.rows_read_count
                             ? warp.undefined[row]
                             : 0;
    for (int lane = 0; lane < 32; ++lane) {
      warp.rows[row][lane] = saved_rows[k][lane] ^ (bad >> lane & 1 ? warp.undefined_bits[row][lane] : 0);
    }
  }
  std::memcpy(warp.predicates, saved, sizeof saved);
  for (int k = 0; k < kPredicates; ++k) {
    const auto read = ins.predicates_read.begin(), end = read + ins.predicates_read_count;
    if (std::find(read, end, k) != end) warp.predicates[k] ^= warp.undefined_predicates[k];
  }
  compute(ins);

  const uint32_t lanes = first >= kUniform ? ~0u : mask_;
  Row changed[4];
  for (int k = 0; k < count; ++k) {
    for (int lane = 0; lane < 32; ++lane) changed[k][lane] = results[k][lane] ^ warp.rows[first + k][lane];
  }
  for (int k = 0; k < total; ++k) std::memcpy(warp.rows[rows[k]], saved_rows[k], sizeof(Row));
  for (int k = 0; k < count; ++k) {
    uint32_t& undefined = warp.undefined[first + k];
    std::memcpy(warp.rows[first + k], results[k], sizeof(Row));
    for (int lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      warp.undefined_bits[first + k][lane] = changed[k][lane];
      undefined = (undefined & ~(1u << lane)) | uint32_t{changed[k][lane] != 0} << lane;
    }
  }
  for (const Operand& each : ins.predicates) {
    if (each.kind != Operand::kPredicate || (each.index & 7) == kPT) continue;
    const uint32_t different = found[each.index] ^ warp.predicates[each.index];
    const uint32_t of = each.index >= kUniformPredicate ? ~0u : mask_;
    uint32_t& undefined = warp.undefined_predicates[each.index];
    undefined = (undefined & ~of) | (different & of);
  }
  std::memcpy(warp.predicates, found, sizeof found);
}

bool Executor::control(const Instruction& ins) {
  Warp& warp = *warp_;
  const int32_t next = warp.pc + 1;
  using M = Modifier;
  switch (ins.op) {
    case Opcode::kNOP:
    case Opcode::kWARPSYNC: {
      // What the compiler leaves of __syncwarp in code where no lane can be missing is a NOP.
      warp.warp_sync = ++warp.block->clock;
      if (ins.op == Opcode::kNOP || mask_ == 0) {
        warp.pc = next;
        return true;
      }
      uint32_t members = ~0u;
      if (ins.source_count > 0) {
        check_defined(ins.sources[0], mask_, "the mask of lanes");
        Row buffer;
        members = values(ins.sources[0], buffer)[std::countr_zero(mask_)];
      }
      if (mask_ & ~members) fail("warp_mask", "a lane waits for lanes that it is not one of", mask_ & ~members);
      if (ins.has(M::kCOLLECTIVE)) warp.collective_target = ins.target;
      warp.meet(members, next);
      return true;
    }
    case Opcode::kENDCOLLECTIVE:
      warp.pc = warp.collective_target;
      return true;
    case Opcode::kYIELD:
    case Opcode::kCCTL:
    case Opcode::kERRBAR:
    case Opcode::kCGAERRBAR:
    case Opcode::kMEMBAR:
      warp.pc = next;
      return true;
    case Opcode::kEXIT:
      // "@!P1 EXIT P0" has two conditions.
      if (mask_ != 0 && ins.source_count > 0) {
        check_defined(ins.sources[0], mask_, "an exit");
        mask_ &= predicate(ins.sources[0]);
      }
      if (mask_ == 0)
        warp.pc = next;
      else
        warp.leave(mask_, next);
      release_barrier(*warp.block);
      return true;
    case Opcode::kBRA: {
      uint32_t taken = mask_;
      if (ins.has(M::kDIV)) {
        // Where the lanes of the mask are not all here.
        Row buffer;
        const uint32_t wanted = values(ins.sources[0], buffer)[0];
        if ((wanted & warp.live & ~warp.active) == 0) taken = 0;
      } else if (ins.source_count == 2) {
        check_defined(ins.sources[0], mask_, "a branch");
        taken &= predicate(ins.sources[0]);
      }
      warp.split(taken, ins.target, next);
      return true;
    }
    case Opcode::kCALL:
      warp.split(mask_, ins.target, next);
      return true;
    case Opcode::kRET: {
      check_defined(ins.sources[0], mask_, "a return address");
      uint64_t address[32];
      wide_values(ins.sources[0], address);
      if (mask_ == 0) break;
      const uint64_t to = address[std::countr_zero(mask_)];
      for (int lane = 0; lane < 32; ++lane) {
        if (mask_ >> lane & 1 && address[lane] != to) fail("bad_jump", "lanes return to different places", 1u << lane);
      }
      if (to % 16 != 0 || to / 16 >= program_.code.size()) fail("bad_jump", "a return to nowhere", mask_);
      warp.split(mask_, static_cast<int32_t>(to / 16), next);
      return true;
    }
    case Opcode::kBSSY:
      warp.join(ins.sources[0].index, mask_);
      break;
    case Opcode::kBREAK:
      warp.break_out(ins.sources[0].index, mask_);
      break;
    case Opcode::kBSYNC:
      if (mask_ != warp.active) fail("unknown_instruction", "a guarded BSYNC", mask_);
      warp.meet(ins.sources[0].index, next);
      return true;
    case Opcode::kBAR: {
      if (mask_ == 0) break;
      const Operand& barrier = ins.sources[0];
      if (barrier.kind != Operand::kImmediate || barrier.value != 0 || mask_ != warp.active ||
          ins.source_count != (ins.has(M::kRED) ? 2 : 1)) {
        fail("unknown_instruction", "a barrier of a part of the block", mask_);
      }
      if (ins.has(M::kRED)) {
        check_defined(ins.sources[1], mask_, "a vote");
        warp.block->votes += static_cast<uint32_t>(std::popcount(predicate(ins.sources[1]) & mask_));
      }
      warp.block->arrived += static_cast<uint32_t>(std::popcount(mask_));
      warp.wait_for_block(next);
      release_barrier(*warp.block);
      return true;
    }
    default:
      return false;
  }
  warp.pc = next;
  return true;
}

}  // namespace gpu_emulator
