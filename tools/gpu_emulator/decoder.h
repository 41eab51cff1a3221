// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unordered_map>

#include "disassembly.h"
#include "instruction.h"

namespace gpu_emulator {

// Throws Fault (unknown_instruction) for an opcode, a modifier or an operand that is not known here. `index_of` gives
// an instruction's index for its address.
Instruction decode(const Line& line, const std::unordered_map<uint32_t, int32_t>& index_of);

const char* name_of(Opcode op);

}  // namespace gpu_emulator
