// SPDX-License-Identifier: Apache-2.0
// Reads what cuobjdump prints.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gpu_emulator {

struct Line {
  uint32_t pc;
  std::string text;
  // The encoding: immediates are in the upper half of `low`, the control word in `high`. Zero where the text has none.
  uint64_t low, high;
};

struct Disassembly {
  std::vector<Line> lines;
  int registers = 255;
  uint32_t shared = 0, local = 0;
  int64_t constant_bytes = -1;
};

// Of one kernel, from the text of several; throws Fault where it is not among them.
Disassembly read_disassembly(const std::string& text, const std::string& kernel);

// What a command prints to its standard output.
std::string output_of(const std::vector<std::string>& command);
std::string read_file(const std::string& path);

// "file:line" at `pc`, by nvdisasm beside `cuobjdump`; empty where the code has no line information.
std::string find_source_line(const std::string& path, const std::string& kernel, const std::string& cuobjdump,
                             uint32_t pc);

}  // namespace gpu_emulator
