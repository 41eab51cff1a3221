// SPDX-License-Identifier: Apache-2.0
#include "decoder.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "emulator.h"
#include "lanes.h"

namespace gpu_emulator {
namespace {

// Which of the operands are results.
enum class Form : uint8_t {
  // Predicates, a register and predicates, in this order, before the first other operand.
  kValue,
  kNothing,
  kOnePredicate,
  kTwoPredicates,
  // All but the last.
  kVote,
};

// What a source's minus sign and bars mean.
enum class Type : uint8_t { kInteger, kFloat, kDouble, kHalf };

struct Entry {
  const char* name;
  Opcode op;
  Pipe pipe;
  Form form;
  Type type;
  // The modifiers that are understood.
  const char* modifiers;
};

constexpr const char* kComparisons = "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM MIN MAX AND OR XOR ";
constexpr const char* kMemory = "E 16 32 64 128 U8 S8 U16 S16 STRONG GPU SYS SC CTA CONSTANT LU ";

#define OP(name, pipe, form, type, modifiers) \
  Entry { #name, Opcode::k##name, Pipe::pipe, Form::form, Type::type, modifiers }
const Entry kTable[] = {
    OP(ATOMG, kLsu, kValue, kInteger,
       "E ADD MIN MAX AND OR XOR EXCH CAS 32 64 S32 S64 F32x4 FTZ RN STRONG GPU SYS CTA"),
    OP(ATOMS, kLsu, kValue, kInteger, "ADD MIN MAX AND OR XOR EXCH CAS POPC INC 32 64 S32 S64"),
    OP(B2R, kLsu, kValue, kInteger, "RESULT"),
    OP(BAR, kControl, kNothing, kInteger, "SYNC RED OR AND POPC DEFER_BLOCKING"),
    OP(BRA, kControl, kNothing, kInteger, "DIV U"),
    OP(BREAK, kControl, kNothing, kInteger, ""),
    OP(BREV, kXu, kValue, kInteger, ""),
    OP(BSSY, kControl, kNothing, kInteger, ""),
    OP(BSYNC, kControl, kNothing, kInteger, ""),
    OP(CALL, kControl, kNothing, kInteger, "REL ABS NOINC"),
    OP(CCTL, kLsu, kNothing, kInteger, "IVALL"),
    OP(CGAERRBAR, kControl, kNothing, kInteger, ""),
    OP(CS2R, kAlu, kValue, kInteger, "32"),
    OP(DADD, kFp64, kValue, kDouble, "RM RP RZ"),
    OP(DFMA, kFp64, kValue, kDouble, "RM RP RZ"),
    OP(DMUL, kFp64, kValue, kDouble, "RM RP RZ"),
    OP(DSETP, kFp64, kTwoPredicates, kDouble, kComparisons),
    OP(ENDCOLLECTIVE, kControl, kNothing, kInteger, ""),
    OP(ERRBAR, kControl, kNothing, kInteger, ""),
    OP(EXIT, kControl, kNothing, kInteger, ""),
    OP(F2F, kXu, kValue, kFloat, "F16 BF16 F32 F64 FTZ"),
    OP(F2FP, kAlu, kValue, kFloat, "F16 BF16 F32 PACK_AB"),
    OP(F2I, kXu, kValue, kFloat, "S64 U64 U32 F64 FTZ NTZ TRUNC CEIL FLOOR"),
    OP(FADD, kFma, kValue, kFloat, "FTZ RM RP RZ"),
    OP(FCHK, kXu, kOnePredicate, kFloat, ""),
    OP(FFMA, kFma, kValue, kFloat, "FTZ RM RP RZ"),
    OP(FLO, kXu, kValue, kInteger, "U32 SH"),
    OP(FMNMX, kAlu, kValue, kFloat, "NAN FTZ"),
    OP(FMUL, kFma, kValue, kFloat, "FTZ RM RP RZ"),
    OP(FRND, kXu, kValue, kFloat, "F64 FTZ FLOOR CEIL TRUNC"),
    OP(FSEL, kAlu, kValue, kFloat, ""),
    OP(FSET, kAlu, kValue, kFloat, "BF EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM AND OR XOR FTZ"),
    OP(FSETP, kAlu, kTwoPredicates, kFloat, "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM AND OR XOR FTZ"),
    OP(HADD2, kFma, kValue, kHalf, "F32 BF16_V2"),
    OP(HFMA2, kFma, kValue, kHalf, "MMA BF16_V2"),
    OP(HMUL2, kFma, kValue, kHalf, "BF16_V2"),
    OP(HSETP2, kAlu, kTwoPredicates, kHalf, "BF16_V2 EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN NUM AND OR XOR"),
    OP(I2F, kXu, kValue, kInteger, "F64 S64 U64 U32 U16 S16 U8 S8 RP RM RZ"),
    OP(I2FP, kAlu, kValue, kInteger, "F32 S32 U32"),
    OP(IABS, kAlu, kValue, kInteger, ""),
    OP(IADD3, kAlu, kValue, kInteger, "X"),
    OP(IMAD, kFmaHeavy, kValue, kInteger, "HI IADD MOV SHL U32 WIDE X"),
    OP(ISETP, kAlu, kTwoPredicates, kInteger, "EQ NE LT LE GT GE AND OR XOR U32 EX"),
    OP(LDC, kLsu, kValue, kInteger, "64 U8 S8 U16 S16"),
    OP(LDG, kLsu, kValue, kInteger, kMemory),
    OP(LDL, kLsu, kValue, kInteger, kMemory),
    OP(LDS, kLsu, kValue, kInteger, kMemory),
    OP(LDSM, kLsu, kValue, kInteger, "16 M88 2 4"),
    OP(LEA, kAlu, kValue, kInteger, "HI X SX32"),
    OP(LOP3, kAlu, kValue, kInteger, "LUT"),
    OP(MATCH, kXu, kValue, kInteger, "ANY ALL U64"),
    OP(MEMBAR, kLsu, kNothing, kInteger, "ALL SC GPU SYS CTA"),
    OP(MOV, kAlu, kValue, kInteger, ""),
    OP(MUFU, kXu, kValue, kFloat, "RCP RSQ SQRT EX2 LG2 SIN COS TANH RCP64H RSQ64H"),
    OP(NOP, kControl, kNothing, kInteger, ""),
    OP(P2R, kAlu, kValue, kInteger, ""),
    OP(PLOP3, kAlu, kTwoPredicates, kInteger, "LUT"),
    OP(POPC, kXu, kValue, kInteger, ""),
    OP(PRMT, kAlu, kValue, kInteger, ""),
    OP(R2UR, kLsu, kValue, kInteger, ""),
    OP(RED, kLsu, kNothing, kInteger, "E ADD MIN MAX AND OR XOR 32 64 S32 S64 STRONG GPU SYS CTA"),
    OP(REDG, kLsu, kNothing, kInteger, "E ADD MIN MAX AND OR XOR 32 64 S32 S64 STRONG GPU SYS CTA"),
    OP(REDUX, kXu, kValue, kInteger, "MIN MAX SUM AND OR XOR S32"),
    OP(RET, kControl, kNothing, kInteger, "REL ABS NODEC"),
    OP(S2R, kLsu, kValue, kInteger, ""),
    OP(S2UR, kUniform, kValue, kInteger, ""),
    OP(SEL, kAlu, kValue, kInteger, ""),
    OP(SGXT, kAlu, kValue, kInteger, "U32"),
    OP(SHF, kAlu, kValue, kInteger, "L R W HI U32 S32 U64 S64"),
    OP(SHFL, kLsu, kValue, kInteger, "BFLY IDX UP DOWN"),
    OP(STG, kLsu, kNothing, kInteger, kMemory),
    OP(STL, kLsu, kNothing, kInteger, kMemory),
    OP(STS, kLsu, kNothing, kInteger, kMemory),
    OP(STSM, kLsu, kNothing, kInteger, "16 M88 2 4"),
    OP(VIADD, kAlu, kValue, kInteger, "16x2"),
    OP(VIADDMNMX, kAlu, kValue, kInteger, "U32"),
    OP(VIMNMX, kAlu, kValue, kInteger, "U32"),
    OP(VIMNMX3, kAlu, kValue, kInteger, "U32"),
    OP(VOTE, kAlu, kVote, kInteger, "ANY ALL EQ"),
    OP(WARPSYNC, kControl, kNothing, kInteger, "ALL COLLECTIVE"),
    OP(YIELD, kControl, kNothing, kInteger, ""),
};
#undef OP

#define GPU_EMULATOR_TEXT(name) #name,
constexpr const char* kOpcodeNames[] = {GPU_EMULATOR_OPCODES(GPU_EMULATOR_TEXT)};
constexpr const char* kModifierNames[] = {GPU_EMULATOR_MODIFIERS(GPU_EMULATOR_TEXT)};
#undef GPU_EMULATOR_TEXT

constexpr struct {
  const char* name;
  Special value;
} kSpecials[] = {{"SR_TID.X", Special::kTidX},
                 {"SR_TID.Y", Special::kTidY},
                 {"SR_TID.Z", Special::kTidZ},
                 {"SR_CTAID.X", Special::kCtaX},
                 {"SR_CTAID.Y", Special::kCtaY},
                 {"SR_CTAID.Z", Special::kCtaZ},
                 {"SR_LANEID", Special::kLane},
                 {"SR_LTMASK", Special::kLtMask},
                 {"SRZ", Special::kZero},
                 // Without clusters a block is the first of its own.
                 {"SR_CgaCtaId", Special::kZero}};

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t");
  return begin == text.npos ? "" : std::string(text.substr(begin, text.find_last_not_of(" \t") - begin + 1));
}

// At separators outside of brackets.
std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size() && text[i] == '[') ++depth;
    if (i < text.size() && text[i] == ']') --depth;
    if (i == text.size() || (text[i] == separator && depth == 0)) {
      if (std::string part = trimmed(text.substr(begin, i - begin)); !part.empty()) parts.push_back(part);
      begin = i + 1;
    }
  }
  return parts;
}

bool remove(std::string& text, const std::string& part) {
  const size_t at = text.find(part);
  if (at == std::string::npos) return false;
  text.erase(at, part.size());
  return true;
}

struct Decoder {
  const Line& line;
  const std::unordered_map<uint32_t, int32_t>& index_of;
  Instruction out;
  const Entry* entry = nullptr;

  [[noreturn]] void fail(const std::string& what) const {
    throw Fault("unknown_instruction", what + " in \"" + line.text + "\"");
  }

  const Entry* find_entry(const std::string& name) {
    // The one whose name has the U at its end.
    if (name == "VOTEU") {
      const Entry* vote = find_entry("VOTE");
      out.uniform = true;
      return vote;
    }
    for (const bool uniform : {false, true}) {
      if (uniform && name[0] != 'U') break;
      for (const Entry& each : kTable) {
        if (name.substr(uniform) == each.name) {
          out.uniform = uniform || each.op == Opcode::kS2UR || each.op == Opcode::kR2UR || each.op == Opcode::kREDUX;
          return &each;
        }
      }
    }
    fail("unknown opcode " + name);
  }

  void read_opcode(const std::string& word) {
    const std::vector<std::string> parts = split(word, '.');
    entry = find_entry(parts[0]);
    out.op = entry->op;
    out.pipe = out.uniform && entry->op != Opcode::kREDUX && entry->op != Opcode::kR2UR ? Pipe::kUniform : entry->pipe;
    const std::string allowed = std::string(" ") + entry->modifiers + " ";
    for (size_t k = 1; k < parts.size(); ++k) {
      if (allowed.find(" " + parts[k] + " ") == std::string::npos) fail("unknown modifier ." + parts[k]);
      for (int m = 0; m < static_cast<int>(Modifier::kCount); ++m) {
        if (parts[k] == kModifierNames[m]) out.modifiers.set(m);
      }
    }
  }

  // "R7" or "UR7" or a zero register, as a row.
  bool read_row(const std::string& name, int16_t& row) const {
    const bool uniform = name[0] == 'U';
    const std::string rest = name.substr(uniform);
    if (rest == "RZ") {
      row = uniform ? kURZ : kRZ;
    } else if (rest.size() > 1 && rest[0] == 'R' && rest.find_first_not_of("0123456789", 1) == std::string::npos) {
      row = static_cast<int16_t>(std::atoi(rest.c_str() + 1) + (uniform ? kUniform : 0));
    } else {
      return false;
    }
    return true;
  }

  bool read_predicate(const std::string& name, int16_t& index) const {
    const bool uniform = name[0] == 'U';
    const std::string rest = name.substr(uniform);
    if (rest.size() != 2 || rest[0] != 'P' || (rest[1] != 'T' && (rest[1] < '0' || rest[1] > '6'))) return false;
    index = static_cast<int16_t>((rest[1] == 'T' ? kPT : rest[1] - '0') + (uniform ? kUniformPredicate : 0));
    return true;
  }

  // "R2.64+UR4+-0x10", inside the brackets of memory or of a constant.
  void read_address(const std::string& text, Operand& operand) const {
    for (std::string part : split(text, '+')) {
      if (remove(part, ".64")) operand.wide = true;
      remove(part, ".U32");
      int16_t row;
      if (read_row(part, row)) {
        (row >= kUniform ? operand.uniform_index : operand.index) = row;
      } else if (part.find("0x") != std::string::npos) {
        operand.value += static_cast<uint32_t>(std::stoll(part, nullptr, 0));
      } else {
        fail("unknown address " + part);
      }
    }
  }

  // A floating-point number: from the encoding, or, where a text has none, from its decimal digits.
  uint32_t float_bits(const std::string& text) const {
    if (line.low != 0) return static_cast<uint32_t>(line.low >> 32);
    double number = 0;
    if (text.find("NAN") != std::string::npos) {
      return entry->type == Type::kDouble ? 0x7ff80000u : 0x7fffffffu;
    } else if (text.find("INF") != std::string::npos) {
      number = text[0] == '-' ? -HUGE_VAL : HUGE_VAL;
    } else {
      char* end;
      number = std::strtod(text.c_str(), &end);
      if (*end != '\0' || end == text.c_str()) fail("unknown operand " + text);
    }
    if (entry->type == Type::kDouble) return static_cast<uint32_t>(bits_of(number) >> 32);
    if (entry->type == Type::kHalf) {
      const float value = static_cast<float>(number);
      return out.has(Modifier::kBF16_V2) ? to_bfloat16(value) : to_half(value);
    }
    return bits_of(static_cast<float>(number));
  }

  Operand read_operand(std::string text) const {
    Operand operand;
    remove(text, ".reuse");
    if (text.rfind("desc[", 0) == 0) text = text.substr(text.find(']') + 1);
    if (text[0] == '[') {
      operand.kind = Operand::kMemory;
      read_address(text.substr(1, text.size() - 2), operand);
      return operand;
    }
    const bool opposite = text[0] == '!', complement = text[0] == '~';
    const bool negative = text[0] == '-' && text.size() > 1 && std::strchr("RU|c", text[1]) != nullptr;
    if (opposite || complement || negative) text = text.substr(1);
    const bool absolute = text[0] == '|';
    while (remove(text, "|")) {
    }
    for (int half = 0; half < 2; ++half) {
      const std::string digit = std::to_string(half);
      if (remove(text, ".H" + digit + "_H" + digit) || remove(text, ".H" + digit)) {
        operand.half = static_cast<int8_t>(half);
      }
    }
    for (int byte = 0; byte < 4; ++byte) {
      if (remove(text, ".B" + std::to_string(byte))) operand.half = static_cast<int8_t>(4 + byte);
    }
    const bool wide = remove(text, ".64");
    if (read_row(text, operand.index)) {
      operand.kind = Operand::kRegister;
      operand.wide = wide;
    } else if (read_predicate(text, operand.index)) {
      operand.kind = Operand::kPredicate;
      operand.inverted = opposite;
    } else if (text.rfind("c[0x0][", 0) == 0) {
      operand.kind = Operand::kConstant;
      read_address(text.substr(7, text.size() - 8), operand);
    } else if (text == "PR") {
      operand.kind = Operand::kAll;
    } else if (text[0] == 'B' && text.size() > 1 && text.find_first_not_of("0123456789", 1) == std::string::npos) {
      operand.kind = Operand::kBarrier;
      operand.index = static_cast<int16_t>(std::atoi(text.c_str() + 1));
    } else if (text.rfind("SR", 0) == 0) {
      operand.kind = Operand::kSpecial;
      bool known = false;
      for (const auto& each : kSpecials) {
        if (text == each.name) operand.index = static_cast<int16_t>(each.value), known = true;
      }
      if (!known) fail("unknown special register " + text);
    } else {
      operand.kind = Operand::kImmediate;
      const bool hexadecimal = text.find("0x") != std::string::npos;
      operand.value = hexadecimal ? static_cast<uint32_t>(std::stoll(text, nullptr, 0)) : float_bits(text);
    }
    if (entry->type == Type::kInteger) {
      if (complement || negative) operand.flip = ~0u;
      if (negative) operand.plus = 1;
      if (absolute) fail("bars around an integer");
    } else {
      const uint32_t sign = entry->type == Type::kHalf ? 0x80008000u : 0x80000000u;
      if (absolute) operand.keep = ~sign;
      if (negative) operand.flip = sign;
    }
    return operand;
  }

  // Registers in a row, of the result and of the sources.
  void set_counts() {
    using M = Modifier;
    const auto words = static_cast<uint8_t>(out.bytes <= 4 ? 1 : out.bytes / 4);
    const bool two = out.has(M::kS64) || out.has(M::kU64);
    switch (out.op) {
      case Opcode::kDADD:
      case Opcode::kDMUL:
      case Opcode::kDFMA:
      case Opcode::kDSETP:
        out.result.count = 2;
        for (int k = 0; k < out.source_count; ++k) {
          if (out.sources[k].kind == Operand::kRegister || out.sources[k].kind == Operand::kConstant) {
            out.sources[k].count = 2;
          }
        }
        break;
      case Opcode::kIMAD:
        if (out.has(M::kWIDE)) out.result.count = 2;
        if (out.has(M::kWIDE) || out.has(M::kHI)) out.sources[2].count = 2;
        break;
      case Opcode::kCS2R:
        out.result.count = out.has(M::k32) ? 1 : 2;
        break;
      case Opcode::kF2I:
        if (two) out.result.count = 2;
        if (out.has(M::kF64)) out.sources[0].count = 2;
        break;
      case Opcode::kI2F:
        if (two) out.sources[0].count = 2;
        if (out.has(M::kF64)) out.result.count = 2;
        break;
      case Opcode::kFRND:
        if (out.has(M::kF64)) out.result.count = out.sources[0].count = 2;
        break;
      case Opcode::kF2F:
        break;  // By the order of its types, in decode().
      case Opcode::kMATCH:
        out.sources[0].count = out.has(M::kU64) ? 2 : 1;
        break;
      case Opcode::kRET:
        out.sources[0].count = 2;
        break;
      case Opcode::kLDC:
      case Opcode::kLDG:
      case Opcode::kLDS:
      case Opcode::kLDL:
        out.result.count = words;
        break;
      case Opcode::kSTG:
      case Opcode::kSTS:
      case Opcode::kSTL:
      case Opcode::kRED:
      case Opcode::kREDG:
        out.sources[1].count = words;
        break;
      case Opcode::kATOMG:
      case Opcode::kATOMS:
        out.result.count = words;
        for (int k = 1; k < out.source_count; ++k) out.sources[k].count = words;
        break;
      case Opcode::kLDSM:
        out.result.count = matrices();
        break;
      case Opcode::kSTSM:
        out.sources[1].count = matrices();
        break;
      default:
        break;
    }
  }

  uint8_t matrices() const { return out.has(Modifier::k4) ? 4 : out.has(Modifier::k2) ? 2 : 1; }

  void list_what_is_read() {
    const auto row = [&](int index, int count) {
      for (int k = 0; k < count && index != kRZ && index != kURZ; ++k) {
        out.rows_read[out.rows_read_count++] = static_cast<int16_t>(index + k);
      }
    };
    for (int k = 0; k < out.source_count; ++k) {
      const Operand& source = out.sources[k];
      if (source.kind == Operand::kRegister) row(source.index, source.count);
      if (source.kind == Operand::kMemory || source.kind == Operand::kConstant) {
        const bool global = source.wide || out.op == Opcode::kLDG;
        row(source.index, source.wide ? 2 : 1);
        row(source.uniform_index, global && source.kind == Operand::kMemory ? 2 : 1);
      }
      if (source.kind == Operand::kPredicate && source.index != kPT && source.index != kUPT) {
        out.predicates_read[out.predicates_read_count++] = static_cast<int8_t>(source.index);
      }
    }
  }

  void decode() {
    out.pc = line.pc;
    std::string text = trimmed(line.text);
    if (text[0] == '@') {
      const size_t space = text.find(' ');
      std::string guard = text.substr(1, space - 1);
      out.guard_inverted = remove(guard, "!");
      int16_t index;
      if (!read_predicate(guard, index)) fail("unknown guard " + guard);
      out.guard = static_cast<uint8_t>(index);
      text = trimmed(text.substr(space));
    }
    const size_t space = text.find(' ');
    const std::string word = text.substr(0, space);
    read_opcode(word);
    using M = Modifier;
    const auto& has = [&](M modifier) { return out.has(modifier); };
    out.bytes = has(M::kF32x4) || has(M::k128)                ? 16
                : has(M::k64) || has(M::kS64) || has(M::kU64) ? 8
                : has(M::kU16) || has(M::kS16)                ? 2
                : has(M::kU8) || has(M::kS8)                  ? 1
                                                              : 4;
    std::vector<std::string> operands = split(space == std::string::npos ? "" : text.substr(space), ',');
    // "RET.REL.NODEC R6 0x0" has no comma.
    if (out.op == Opcode::kRET) operands = {split(operands[0], ' ')[0]};
    place(operands);
    const int barriers = out.op == Opcode::kBSSY ? 2 : out.op == Opcode::kBREAK || out.op == Opcode::kBSYNC ? 1 : 0;
    if (barriers > 0 && out.source_count != barriers) fail("unknown operands");
    set_counts();
    if (out.op == Opcode::kF2F) {
      const bool to_double = word.rfind("F2F.F64", 0) == 0;
      if (to_double) out.result.count = 2;
      if (!to_double && has(M::kF64)) out.sources[0].count = 2;
    }
    list_what_is_read();
    if (out.op == Opcode::kBRA || out.op == Opcode::kCALL || has(M::kCOLLECTIVE)) {
      const auto found = index_of.find(out.sources[out.source_count - 1].value);
      if (found == index_of.end()) fail("jump out of the kernel");
      out.target = found->second;
    }
    out.stall = static_cast<uint8_t>(line.high >> 41 & 15);
    out.write_scoreboard = static_cast<uint8_t>(line.high >> 46 & 7);
    out.read_scoreboard = static_cast<uint8_t>(line.high >> 49 & 7);
    out.wait_mask = static_cast<uint8_t>(line.high >> 52 & 63);
  }

  void place(const std::vector<std::string>& operands) {
    const int count = static_cast<int>(operands.size());
    const int vote_results = count - 1;
    int predicates = 0;
    bool leading = true;
    // Two immediate halves are one operand.
    uint32_t first_half = 0;
    bool half_pending = false;
    for (int k = 0; k < count; ++k) {
      Operand operand = read_operand(operands[k]);
      const bool predicate = operand.kind == Operand::kPredicate;
      const bool has_result = out.result.kind != Operand::kNone;
      switch (entry->form) {
        case Form::kValue:
          leading = leading && (predicate || (operand.kind == Operand::kRegister && !has_result));
          break;
        case Form::kNothing:
          leading = false;
          break;
        case Form::kOnePredicate:
          leading = k < 1;
          break;
        case Form::kTwoPredicates:
          leading = k < 2;
          break;
        case Form::kVote:
          leading = k < vote_results;
          break;
      }
      if (leading) {
        if (predicate && predicates == 2) fail("three predicates as results");
        if (predicate)
          out.predicates[predicates++] = operand;
        else
          out.result = operand;
        continue;
      }
      if (entry->type == Type::kHalf && operand.kind == Operand::kImmediate &&
          operands[k].find("0x") == std::string::npos) {
        if (!half_pending) {
          first_half = operand.value;
          half_pending = true;
          continue;
        }
        // The encoding has both; the text gives the upper one first.
        operand.value = line.low != 0 ? operand.value : first_half << 16 | operand.value;
        half_pending = false;
      }
      if (out.source_count == out.sources.size()) fail("too many operands");
      out.sources[out.source_count++] = operand;
    }
    if (half_pending) fail("one half");
  }
};

}  // namespace

Instruction decode(const Line& line, const std::unordered_map<uint32_t, int32_t>& index_of) {
  Decoder decoder{line, index_of, {}};
  decoder.decode();
  return decoder.out;
}

const char* name_of(Opcode op) { return kOpcodeNames[static_cast<int>(op)]; }

}  // namespace gpu_emulator
