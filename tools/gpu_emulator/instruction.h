// SPDX-License-Identifier: Apache-2.0
// An instruction as it is executed: everything that its text says, as numbers.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>

namespace gpu_emulator {

// clang-format off
// Names as the disassembler prints them; those of the uniform datapath have a U before.
#define GPU_EMULATOR_OPCODES(EACH) \
  EACH(ATOMG) EACH(ATOMS) EACH(B2R) EACH(BAR) EACH(BRA) EACH(BREAK) EACH(BREV) EACH(BSSY) EACH(BSYNC) EACH(CALL) \
  EACH(CCTL) EACH(CGAERRBAR) EACH(CS2R) EACH(DADD) EACH(DFMA) EACH(DMUL) EACH(DSETP) EACH(ENDCOLLECTIVE) EACH(ERRBAR) \
  EACH(EXIT) EACH(F2F) EACH(F2FP) EACH(F2I) EACH(FADD) EACH(FCHK) EACH(FFMA) EACH(FLO) EACH(FMNMX) EACH(FMUL) \
  EACH(FRND) EACH(FSEL) EACH(FSET) EACH(FSETP) EACH(HADD2) EACH(HFMA2) EACH(HMUL2) EACH(HSETP2) EACH(I2F) EACH(I2FP) \
  EACH(IABS) EACH(IADD3) EACH(IMAD) EACH(ISETP) EACH(LDC) EACH(LDG) EACH(LDL) EACH(LDS) EACH(LDSM) EACH(LEA) \
  EACH(LOP3) EACH(MATCH) EACH(MEMBAR) EACH(MOV) EACH(MUFU) EACH(NOP) EACH(P2R) EACH(PLOP3) EACH(POPC) EACH(PRMT) \
  EACH(R2UR) EACH(RED) EACH(REDG) EACH(REDUX) EACH(RET) EACH(S2R) EACH(S2UR) EACH(SEL) EACH(SGXT) EACH(SHF) EACH(SHFL) \
  EACH(STG) EACH(STL) EACH(STS) EACH(STSM) EACH(VIADD) EACH(VIADDMNMX) EACH(VIMNMX) EACH(VIMNMX3) EACH(VOTE) \
  EACH(WARPSYNC) EACH(YIELD)

// What follows an opcode after a dot.
#define GPU_EMULATOR_MODIFIERS(EACH) \
  EACH(16) EACH(16x2) EACH(2) EACH(32) EACH(4) EACH(64) EACH(128) EACH(ABS) EACH(ADD) EACH(ALL) EACH(AND) EACH(ANY) \
  EACH(BF) EACH(BF16) EACH(BF16_V2) EACH(BFLY) EACH(CAS) EACH(CEIL) EACH(COLLECTIVE) EACH(CONSTANT) EACH(COS) \
  EACH(CTA) EACH(DEFER_BLOCKING) EACH(DIV) EACH(DOWN) EACH(E) EACH(EQ) EACH(EQU) EACH(EX) EACH(EX2) EACH(EXCH) \
  EACH(F16) EACH(F32) EACH(F32x4) EACH(F64) EACH(FLOOR) EACH(FTZ) EACH(GE) EACH(GEU) EACH(GPU) EACH(GT) EACH(GTU) \
  EACH(HI) EACH(IADD) EACH(IDX) EACH(INC) EACH(IVALL) EACH(L) EACH(LE) EACH(LEU) EACH(LG2) EACH(LT) EACH(LTU) EACH(LU) \
  EACH(LUT) EACH(M88) EACH(MAX) EACH(MIN) EACH(MMA) EACH(MOV) EACH(NAN) EACH(NE) EACH(NEU) EACH(NODEC) EACH(NOINC) \
  EACH(NTZ) EACH(NUM) EACH(OR) EACH(PACK_AB) EACH(POPC) EACH(R) EACH(RCP) EACH(RCP64H) EACH(RED) EACH(REL) \
  EACH(RESULT) EACH(RM) EACH(RN) EACH(RP) EACH(RSQ) EACH(RSQ64H) EACH(RZ) EACH(S16) EACH(S32) EACH(S64) EACH(S8) \
  EACH(SC) EACH(SH) EACH(SHL) EACH(SIN) EACH(SQRT) EACH(STRONG) EACH(SUM) EACH(SX32) EACH(SYNC) EACH(SYS) EACH(TANH) \
  EACH(TRUNC) EACH(U16) EACH(U32) EACH(U64) EACH(U8) EACH(UP) EACH(W) EACH(WIDE) EACH(X) EACH(XOR)
// clang-format on

#define GPU_EMULATOR_NAME(name) k##name,
enum class Opcode : uint8_t { GPU_EMULATOR_OPCODES(GPU_EMULATOR_NAME) kCount };
enum class Modifier : uint8_t { GPU_EMULATOR_MODIFIERS(GPU_EMULATOR_NAME) kCount };
#undef GPU_EMULATOR_NAME

enum class Pipe : uint8_t { kAlu, kFma, kFmaHeavy, kFp64, kXu, kLsu, kControl, kUniform, kCount };
inline constexpr const char* kPipeNames[] = {"alu", "fma", "fma_heavy", "fp64", "xu", "lsu", "control", "uniform"};

enum class Special : uint8_t { kTidX, kTidY, kTidZ, kCtaX, kCtaY, kCtaZ, kLane, kLtMask, kZero };

// Rows of a warp's register file: 255 registers and RZ, then 63 uniform ones and URZ, each as 32 equal lanes.
inline constexpr int kRZ = 255, kUniform = 256, kURZ = kUniform + 63, kRows = kUniform + 64;
// Masks of lanes: P0 to P6 and PT, then UP0 to UP6 and UPT.
inline constexpr int kPT = 7, kUniformPredicate = 8, kUPT = 15, kPredicates = 16;

struct Operand {
  enum Kind : uint8_t { kNone, kRegister, kPredicate, kImmediate, kConstant, kMemory, kSpecial, kBarrier, kAll };
  Kind kind = kNone;
  // Of a predicate.
  bool inverted = false;
  // The base is a pair of registers.
  bool wide = false;
  // Of a pair of halves, the one that both come from: 0 or 1; or -1. Of .B0 to .B3, 4 to 7.
  int8_t half = -1;
  // Row, predicate, special register, barrier; of memory and constants the base, or RZ.
  int16_t index = kRZ;
  // Of memory and constants.
  int16_t uniform_index = kURZ;
  // Registers in a row that are read or written.
  uint8_t count = 1;
  // An immediate, an address or an offset.
  uint32_t value = 0;
  // The value is ((bits & keep) ^ flip) + plus, which is |x|, -x and ~x.
  uint32_t keep = ~0u, flip = 0, plus = 0;
  bool plain() const { return keep == ~0u && flip == 0 && plus == 0 && half < 0; }
};

struct Instruction {
  Opcode op = Opcode::kNOP;
  Pipe pipe = Pipe::kAlu;
  // Executed once for a warp.
  bool uniform = false;
  uint8_t guard = kPT;
  bool guard_inverted = false;
  uint32_t pc = 0;
  Operand result;
  std::array<Operand, 2> predicates;
  std::array<Operand, 6> sources;
  uint8_t source_count = 0;
  std::bitset<static_cast<int>(Modifier::kCount)> modifiers;
  // Of a memory access and lane.
  uint8_t bytes = 4;
  // Index of the instruction to jump to.
  int32_t target = -1;
  // Rows and predicates that are read, for the check that they were written.
  std::array<int16_t, 16> rows_read;
  std::array<int8_t, 8> predicates_read;
  uint8_t rows_read_count = 0, predicates_read_count = 0;
  // The control word: cycles until the next instruction, scoreboards that results and sources are awaited by.
  uint8_t stall = 1, write_scoreboard = 7, read_scoreboard = 7, wait_mask = 0;

  bool has(Modifier modifier) const { return modifiers[static_cast<int>(modifier)]; }
};

}  // namespace gpu_emulator
