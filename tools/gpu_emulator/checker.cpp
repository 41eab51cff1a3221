// SPDX-License-Identifier: Apache-2.0
#include "checker.h"

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace gpu_emulator {
namespace {

std::string text_of(Dim3 d) { return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z); }

}  // namespace

Fault::Fault(std::string kind_, std::string detail_)
    : std::runtime_error(detail_), kind(std::move(kind_)), detail(std::move(detail_)), message_(kind + ": " + detail) {}

void Fault::at(const Program& program, uint32_t index) {
  kernel = program.kernel;
  pc = program.code[index].pc;
  instruction = program.text[index];
  source = program.source_line(pc);
  char place[32];
  snprintf(place, sizeof place, "/*%04x*/ ", pc);
  message_ = kind + ": " + detail + "\n  " + place + instruction + (source.empty() ? "" : "\n  " + source) +
             "\n  block (" + text_of(block) + "), thread (" + text_of(thread) + ") of " + kernel;
}

uint32_t registers_of_warp(const Program& program) {
  const uint32_t in_eights = (std::max(program.registers, 1) + 7) / 8 * 8;
  return in_eights * 32;
}

void check_launch(const Program& program, const Launch& launch) {
  const auto refuse = [&](const std::string& why) { throw Fault("launch", why + ", of " + program.kernel); };
  const Dim3 grid = launch.grid, block = launch.block;
  if (grid.count() == 0 || block.count() == 0) refuse("an empty grid or block");
  if (block.count() > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    refuse("blocks of " + text_of(block) + " threads");
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("a grid of " + text_of(grid));
  const uint64_t shared = uint64_t{program.static_shared} + launch.dynamic_shared;
  if (shared > kMaxShared) refuse(std::to_string(shared) + " bytes of shared memory");
  const uint64_t warps = (block.count() + 31) / 32;
  if (warps * registers_of_warp(program) > kRegisterFile) {
    refuse(std::to_string(program.registers) + " registers for each of " + std::to_string(block.count()) + " threads");
  }
  if (program.parameter_bytes >= 0 && static_cast<uint64_t>(program.parameter_bytes) != launch.parameters.size()) {
    refuse(std::to_string(launch.parameters.size()) + " bytes of parameters instead of " +
           std::to_string(program.parameter_bytes));
  }
}

template <class T>
GlobalShadow::Array<T> GlobalShadow::zeros(uint64_t count) {
  return Array<T>(static_cast<T*>(std::calloc(count, sizeof(T))));
}

GlobalShadow::GlobalShadow(const Allocation& allocation)
    : name_(allocation.name),
      address_(allocation.address),
      bytes_(allocation.bytes),
      initialised_(allocation.initialised),
      flags_(zeros<uint8_t>(bytes_)),
      touched_((address_ % kPage + bytes_) / kPage + 1),
      known_(allocation.written) {
  if (known_ != nullptr) {
    for (uint64_t k = 0; k < bytes_; ++k) flags_[k] = known_[k] != 0 ? kInitialised : 0;
  }
  if (allocation.writable) {
    writer_ = zeros<uint32_t>(bytes_);
    reader_ = zeros<uint32_t>(bytes_);
  }
}

void GlobalShadow::conflict(const char* what, uint64_t offset, uint32_t block, uint32_t other) const {
  throw Fault("block_conflict", "byte " + std::to_string(offset) + " of " + name_ + " is " + what + " by block " +
                                    std::to_string(block - 1) + " and by " +
                                    (other == kSeveral ? "several blocks" : "block " + std::to_string(other - 1)));
}

void GlobalShadow::read(uint64_t offset, uint32_t bytes, uint32_t block) {
  uint8_t* flags = &flags_[offset];
  if (!initialised_) {
    for (uint32_t k = 0; k < bytes; ++k) {
      if (!(flags[k] & kInitialised)) {
        throw Fault("unwritten_memory", "byte " + std::to_string(offset + k) + " of " + name_ + " is read unwritten");
      }
    }
  }
  for (uint32_t k = 0; k < bytes; ++k) flags[k] |= kRead;
  touch(offset);
  if (!writer_) return;
  const uint32_t* writer = &writer_[offset];
  uint32_t* reader = &reader_[offset];
  for (uint32_t k = 0; k < bytes; ++k) {
    if (writer[k] != 0 && writer[k] != block) conflict("read", offset + k, block, writer[k]);
    reader[k] = reader[k] == 0 || reader[k] == block ? block : kSeveral;
  }
}

void GlobalShadow::write(uint64_t offset, uint32_t bytes, uint32_t block, bool same_value) {
  if (!writer_) throw Fault("read_only", "byte " + std::to_string(offset) + " of " + name_ + " is written");
  touch(offset);
  for (uint32_t k = 0; k < bytes; ++k) {
    uint8_t& flags = flags_[offset + k];
    uint32_t& writer = writer_[offset + k];
    const uint32_t reader = reader_[offset + k];
    if (!same_value && writer != 0 && writer != block) conflict("written", offset + k, block, writer);
    if (!same_value && reader != 0 && reader != block) conflict("written", offset + k, block, reader);
    writer = block;
    flags = static_cast<uint8_t>((flags & ~kAtomic) | kInitialised | kWritten);
  }
}

void GlobalShadow::atomic(uint64_t offset, uint32_t bytes, uint32_t block) {
  if (!writer_) throw Fault("read_only", "byte " + std::to_string(offset) + " of " + name_ + " is written");
  touch(offset);
  for (uint32_t k = 0; k < bytes; ++k) {
    uint8_t& flags = flags_[offset + k];
    uint32_t& writer = writer_[offset + k];
    const uint32_t reader = reader_[offset + k];
    if (!initialised_ && !(flags & kInitialised)) {
      throw Fault("unwritten_memory",
                  "an atomic on byte " + std::to_string(offset + k) + " of " + name_ + ", which nobody wrote");
    }
    if (writer != 0 && writer != block && !(flags & kAtomic)) conflict("changed", offset + k, block, writer);
    if (reader != 0 && reader != block) conflict("changed", offset + k, block, reader);
    writer = writer == 0 || writer == block ? block : kSeveral;
    flags |= kAtomic | kInitialised | kRead | kWritten;
  }
}

void GlobalShadow::hand_back() const {
  if (known_ == nullptr) return;
  for (uint64_t k = 0; k < bytes_; ++k) known_[k] |= flags_[k] & kInitialised;
}

uint64_t GlobalShadow::unwritten() const {
  if (initialised_) return 0;
  uint64_t count = 0;
  for (uint64_t k = 0; k < bytes_; ++k) count += !(flags_[k] & kInitialised);
  return count;
}

uint64_t GlobalShadow::sectors(uint8_t flag) const {
  uint64_t count = 0;
  for (uint64_t page = 0; page < touched_.size(); ++page) {
    if (!touched_[page]) continue;
    const uint64_t before = address_ % kPage, last = std::min(bytes_, (page + 1) * kPage - before);
    for (uint64_t k = page == 0 ? 0 : page * kPage - before; k < last;) {
      const uint64_t end = std::min(last, k + 32 - (address_ + k) % 32);
      uint8_t any = 0;
      for (; k < end; ++k) any |= flags_[k];
      count += (any & flag) != 0;
    }
  }
  return count;
}

template <class Act>
void SharedShadow::for_cells(uint32_t offset, uint32_t bytes, Act act) {
  if (bytes < 4) {
    const uint32_t word = offset / 4;
    if (!split_[word]) {
      for (int k = 1; k < 4; ++k) cells_[4 * word + k] = cells_[4 * word];
      split_[word] = true;
    }
    for (uint32_t k = 0; k < bytes; ++k) act(cells_[offset + k], offset + k);
    return;
  }
  for (uint32_t at = offset; at < offset + bytes; at += 4) {
    const uint32_t cells = split_[at / 4] ? 4 : 1;
    for (uint32_t k = 0; k < cells; ++k) act(cells_[at + k], at + k);
  }
}

void SharedShadow::after_write(const Cell& cell, uint32_t offset, const Access& access, const char* what) const {
  if (cell.writer == kNobody || cell.writer == access.thread || cell.written_at < access.block_sync) return;
  if (cell.writer / 32u == access.thread / 32 && cell.written_at < access.warp_sync) return;
  if (cell.atomic && access.atomic) return;
  throw Fault("shared_race", "byte " + std::to_string(offset - kSharedBase) + " of shared memory is " + what +
                                 " by thread " + std::to_string(access.thread) + " and written by thread " +
                                 std::to_string(cell.writer) + " with no barrier between");
}

bool SharedShadow::read(uint32_t offset, uint32_t bytes, const Access& access) {
  bool written = true;
  const auto thread = static_cast<uint16_t>(access.thread), warp = static_cast<uint16_t>(kOfWarp | thread / 32);
  for_cells(offset, bytes, [&](Cell& cell, uint32_t at) {
    written &= cell.writer != kNobody;
    after_write(cell, at, access, "read");
    const bool same_warp = cell.reader == warp || (cell.reader < kOfWarp && cell.reader / 32 == thread / 32);
    if (cell.read_at < access.block_sync || cell.reader == kNobody || (same_warp && cell.read_at < access.warp_sync) ||
        cell.reader == thread) {
      cell.reader = thread;
    } else if (cell.reader != kSeveral) {
      cell.reader = same_warp ? warp : kSeveral;
    }
    cell.read_at = access.now;
  });
  return written;
}

bool SharedShadow::written(uint32_t offset, uint32_t bytes) {
  bool all = true;
  for_cells(offset, bytes, [&](const Cell& cell, uint32_t) { all &= cell.writer != kNobody; });
  return all;
}

void SharedShadow::write(uint32_t offset, uint32_t bytes, const Access& access, bool same_value) {
  const auto thread = static_cast<uint16_t>(access.thread), warp = static_cast<uint16_t>(kOfWarp | thread / 32);
  for_cells(offset, bytes, [&](Cell& cell, uint32_t at) {
    if (!same_value) {
      after_write(cell, at, access, "written");
      const bool other = cell.reader != kNobody && cell.reader != thread && cell.read_at >= access.block_sync;
      const bool same_warp = cell.reader == warp || (cell.reader < kOfWarp && cell.reader / 32 == thread / 32);
      if (other && !(same_warp && cell.read_at < access.warp_sync)) {
        throw Fault(
            "shared_race",
            "byte " + std::to_string(at - kSharedBase) + " of shared memory is written by thread " +
                std::to_string(thread) + " and read by " +
                (cell.reader < kOfWarp ? "thread " + std::to_string(cell.reader) : std::string("other threads")) +
                " with no barrier between");
      }
    }
    cell.writer = thread;
    cell.written_at = access.now;
    cell.atomic = access.atomic;
  });
}

}  // namespace gpu_emulator
