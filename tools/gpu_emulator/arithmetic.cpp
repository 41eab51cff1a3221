// SPDX-License-Identifier: Apache-2.0
// What instructions compute from registers, 32 lanes at a time.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "executor.h"

namespace gpu_emulator {
namespace {

using M = Modifier;

Rounding rounding_of(const Instruction& ins) {
  if (ins.has(M::kRM) || ins.has(M::kFLOOR)) return Rounding::kDown;
  if (ins.has(M::kRP) || ins.has(M::kCEIL)) return Rounding::kUp;
  if (ins.has(M::kRZ) || ins.has(M::kTRUNC)) return Rounding::kZero;
  return Rounding::kNearest;
}

Comparison comparison_of(const Instruction& ins) {
  constexpr M kOrder[] = {M::kEQ,  M::kNE,  M::kLT,  M::kLE,  M::kGT,  M::kGE,  M::kEQU,
                          M::kNEU, M::kLTU, M::kLEU, M::kGTU, M::kGEU, M::kNAN, M::kNUM};
  for (int k = 0; k < 14; ++k) {
    if (ins.has(kOrder[k])) return static_cast<Comparison>(k);
  }
  throw Fault("unknown_instruction", "a comparison of no kind");
}

// 32 truths of a byte each as a mask.
uint32_t packed(const uint8_t (&truth)[32]) {
  uint32_t mask = 0;
  for (int k = 0; k < 4; ++k) {
    uint64_t eight;
    std::memcpy(&eight, truth + 8 * k, 8);
    mask |= static_cast<uint32_t>((eight * 0x0102040810204080u) >> 56) << 8 * k;
  }
  return mask;
}

template <Comparison kComparison, class T>
uint32_t compared(const T* a, const T* b) {
  uint8_t truth[32];
  for (int lane = 0; lane < 32; ++lane) truth[lane] = compare(kComparison, a[lane], b[lane]);
  return packed(truth);
}

template <class T, size_t... kAll>
uint32_t compare_all(Comparison comparison, const T* a, const T* b, std::index_sequence<kAll...>) {
  uint32_t mask = 0;
  // One loop for each kind of comparison.
  (void)((comparison == static_cast<Comparison>(kAll) &&
          (mask = compared<static_cast<Comparison>(kAll)>(a, b), true)) ||
         ...);
  return mask;
}

template <class T>
uint32_t compare_all(Comparison comparison, const T* a, const T* b) {
  return compare_all(comparison, a, b, std::make_index_sequence<std::is_integral_v<T> ? 6 : 14>());
}

// A comparison's truth with a predicate.
uint32_t combined(const Instruction& ins, uint32_t truth, uint32_t with) {
  return ins.has(M::kOR) ? truth | with : ins.has(M::kXOR) ? truth ^ with : truth & with;
}

// A number in [-1, 1] that a seed and the source decide.
double movement(uint64_t seed, uint32_t source) {
  uint64_t z = seed * 0x9e3779b97f4a7c15u + source;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return static_cast<double>(static_cast<int64_t>(z ^ z >> 31)) * 0x1p-63;
}

}  // namespace

// result = f(source 0, ...).
template <int kSources, class F>
void Executor::map(const Instruction& ins, F f) {
  alignas(64) Row a_buffer, b_buffer, c_buffer, out;
  const uint32_t* __restrict a = values(ins.sources[0], a_buffer);
  const uint32_t* __restrict b = kSources > 1 ? values(ins.sources[1], b_buffer) : a;
  const uint32_t* __restrict c = kSources > 2 ? values(ins.sources[2], c_buffer) : a;
  for (int lane = 0; lane < 32; ++lane) {
    if constexpr (kSources == 1) out[lane] = f(a[lane]);
    if constexpr (kSources == 2) out[lane] = f(a[lane], b[lane]);
    if constexpr (kSources == 3) out[lane] = f(a[lane], b[lane], c[lane]);
  }
  write(ins.result, out);
}

template <class F>
void Executor::map_double(const Instruction& ins, F f) {
  uint64_t sources[3][32] = {}, out[32];
  for (int k = 0; k < ins.source_count; ++k) wide_values(ins.sources[k], sources[k]);
  const RoundingScope scope(rounding_of(ins));
  for (int lane = 0; lane < 32; ++lane) {
    out[lane] = bits_of(f(std::bit_cast<double>(sources[0][lane]), std::bit_cast<double>(sources[1][lane]),
                          std::bit_cast<double>(sources[2][lane])));
  }
  write_wide(ins.result, out);
}

// Of both halves, as floats.
template <class F>
void Executor::map_halves(const Instruction& ins, F f) {
  const bool bfloat16 = ins.has(M::kBF16_V2);
  Row buffers[3], out;
  const uint32_t* sources[3] = {buffers[0], buffers[1], buffers[2]};
  for (int k = 0; k < ins.source_count; ++k) sources[k] = values(ins.sources[k], buffers[k]);
  for (int lane = 0; lane < 32; ++lane) {
    out[lane] = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      float x[3] = {};
      for (int k = 0; k < ins.source_count; ++k) {
        const uint32_t half = sources[k][lane] >> shift & 0xffff;
        x[k] = bfloat16 ? from_bfloat16(half) : from_half(half);
      }
      const float y = f(x[0], x[1], x[2]);
      out[lane] |= (bfloat16 ? to_bfloat16(y) : to_half(y)) << shift;
    }
  }
  write(ins.result, out);
}

// The two results of a comparison: it and its opposite, each combined with a predicate.
void Executor::set_predicates(const Instruction& ins, uint32_t truth, uint32_t with) {
  write(ins.predicates[0], combined(ins, truth, with));
  write(ins.predicates[1], combined(ins, ~truth, with));
}

void Executor::integer_add(const Instruction& ins) {
  const bool carries = ins.predicates[0].kind == Operand::kPredicate || ins.has(M::kX);
  if (!carries) return map<3>(ins, [](uint32_t a, uint32_t b, uint32_t c) { return a + b + c; });
  uint64_t sum[32] = {};
  for (int k = 0; k < 3; ++k) {
    // The carry of -x is that of ~x + 1.
    Operand operand = ins.sources[k];
    const uint32_t plus = operand.plus;
    operand.plus = 0;
    Row buffer;
    const uint32_t* x = values(operand, buffer);
    for (int lane = 0; lane < 32; ++lane) sum[lane] += uint64_t{x[lane]} + plus;
  }
  for (int k = 3; k < ins.source_count; ++k) {
    const uint32_t carry = predicate(ins.sources[k]);
    for (int lane = 0; lane < 32; ++lane) sum[lane] += carry >> lane & 1;
  }
  Row out;
  uint32_t one = 0, two = 0;
  for (int lane = 0; lane < 32; ++lane) {
    out[lane] = static_cast<uint32_t>(sum[lane]);
    one |= uint32_t{sum[lane] >> 32 >= 1} << lane;
    two |= uint32_t{sum[lane] >> 32 >= 2} << lane;
  }
  write(ins.result, out);
  write(ins.predicates[0], one);
  write(ins.predicates[1], two);
}

void Executor::multiply_add(const Instruction& ins) {
  const bool wide = ins.has(M::kWIDE), high = ins.has(M::kHI);
  if (!wide && !high && !ins.has(M::kX)) {
    return map<3>(ins, [](uint32_t a, uint32_t b, uint32_t c) { return a * b + c; });
  }
  Row a_buffer, b_buffer;
  const uint32_t *a = values(ins.sources[0], a_buffer), *b = values(ins.sources[1], b_buffer);
  const uint32_t carry = ins.has(M::kX) ? predicate(ins.sources[3]) : 0;
  if (!wide && !high) {
    Row c_buffer, out;
    const uint32_t* c = values(ins.sources[2], c_buffer);
    for (int lane = 0; lane < 32; ++lane) out[lane] = a[lane] * b[lane] + c[lane] + (carry >> lane & 1);
    return write(ins.result, out);
  }
  uint64_t c[32], out[32];
  wide_values(ins.sources[2], c);
  uint32_t overflow = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const uint64_t product =
        ins.has(M::kU32)
            ? uint64_t{a[lane]} * b[lane]
            : static_cast<uint64_t>(int64_t{static_cast<int32_t>(a[lane])} * static_cast<int32_t>(b[lane]));
    const unsigned __int128 sum = static_cast<unsigned __int128>(product) + c[lane] + (carry >> lane & 1);
    out[lane] = static_cast<uint64_t>(sum) >> (high ? 32 : 0);
    overflow |= static_cast<uint32_t>(sum >> 64) << lane;
  }
  if (wide) {
    write_wide(ins.result, out);
  } else {
    Row upper;
    for (int lane = 0; lane < 32; ++lane) upper[lane] = static_cast<uint32_t>(out[lane]);
    write(ins.result, upper);
  }
  write(ins.predicates[0], overflow);
}

// (a << shift) + b, or its upper word of (c:a << shift), to which b is added.
void Executor::load_effective_address(const Instruction& ins) {
  const bool high = ins.has(M::kHI), extend = ins.has(M::kSX32), three = high && !extend;
  Row a_buffer, b_buffer, c_buffer, out;
  const uint32_t* a = values(ins.sources[0], a_buffer);
  Operand added = ins.sources[1];
  const uint32_t plus = added.plus;
  added.plus = 0;
  const uint32_t* b = values(added, b_buffer);
  const uint32_t* c = three ? values(ins.sources[2], c_buffer) : c_buffer;
  const int at = three ? 3 : 2;
  const uint32_t shift = ins.sources[at].value & 31;
  const uint32_t carry = ins.has(M::kX) ? predicate(ins.sources[at + 1]) : 0;
  uint32_t overflow = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const uint64_t value = extend ? static_cast<uint64_t>(int64_t{static_cast<int32_t>(a[lane])})
                                  : uint64_t{three ? c[lane] : 0} << 32 | a[lane];
    const auto shifted = static_cast<uint32_t>(high ? value << shift >> 32 : value << shift);
    const uint64_t sum = uint64_t{shifted} + b[lane] + plus + (carry >> lane & 1);
    out[lane] = static_cast<uint32_t>(sum);
    overflow |= static_cast<uint32_t>(sum >> 32 != 0) << lane;
  }
  write(ins.result, out);
  write(ins.predicates[0], overflow);
}

void Executor::integer_compare(const Instruction& ins) {
  Row a_buffer, b_buffer;
  const uint32_t *a = values(ins.sources[0], a_buffer), *b = values(ins.sources[1], b_buffer);
  const auto test = [&](Comparison comparison) {
    return ins.has(M::kU32)
               ? compare_all(comparison, a, b)
               : compare_all(comparison, reinterpret_cast<const int32_t*>(a), reinterpret_cast<const int32_t*>(b));
  };
  const Comparison comparison = comparison_of(ins);
  uint32_t truth = test(comparison);
  if (ins.has(M::kEX)) {
    // Upper words; where they are equal, the comparison of the lower ones decides.
    const uint32_t equal = test(Comparison::kEQ), lower = predicate(ins.sources[3]);
    const bool less = comparison == Comparison::kLT || comparison == Comparison::kLE;
    const bool greater = comparison == Comparison::kGT || comparison == Comparison::kGE;
    if (less) truth = test(Comparison::kLT);
    if (greater) truth = test(Comparison::kGT);
    truth = comparison == Comparison::kEQ ? truth & lower : truth | (equal & lower);
  }
  set_predicates(ins, truth, predicate(ins.sources[2]));
}

void Executor::double_compare(const Instruction& ins) {
  uint64_t a[32], b[32];
  wide_values(ins.sources[0], a);
  wide_values(ins.sources[1], b);
  if (!ins.has(M::kMAX) && !ins.has(M::kMIN)) {
    const auto* x = reinterpret_cast<const double*>(a);
    const uint32_t truth = compare_all(comparison_of(ins), x, reinterpret_cast<const double*>(b));
    return set_predicates(ins, truth, predicate(ins.sources[2]));
  }
  // Whether the first is the maximum or minimum, and whether both are NaN.
  uint32_t first = 0, neither = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const double x = std::bit_cast<double>(a[lane]), y = std::bit_cast<double>(b[lane]);
    const bool less = x < y || (x == y && a[lane] >> 63 > b[lane] >> 63);
    const bool greater = x > y || (x == y && a[lane] >> 63 < b[lane] >> 63);
    first |= static_cast<uint32_t>(x == x && (y != y || (ins.has(M::kMAX) ? greater : less))) << lane;
    neither |= static_cast<uint32_t>(x != x && y != y) << lane;
  }
  const uint32_t with = predicate(ins.sources[2]);
  write(ins.predicates[0], first & with);
  write(ins.predicates[1], neither & with);
}

// The lower halves decide the first predicate, the upper ones the second.
void Executor::half_compare(const Instruction& ins) {
  Row buffers[2];
  const uint32_t *a = values(ins.sources[0], buffers[0]), *b = values(ins.sources[1], buffers[1]);
  const uint32_t with = predicate(ins.sources[2]);
  for (int half = 0; half < 2; ++half) {
    float x[32], y[32];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t p = a[lane] >> 16 * half & 0xffff, q = b[lane] >> 16 * half & 0xffff;
      x[lane] = ins.has(M::kBF16_V2) ? from_bfloat16(p) : from_half(p);
      y[lane] = ins.has(M::kBF16_V2) ? from_bfloat16(q) : from_half(q);
    }
    const uint32_t truth = compare_all(comparison_of(ins), x, y);
    write(ins.predicates[half], combined(ins, truth, with));
  }
}

void Executor::to_integers(const Instruction& ins) {
  const bool wide = ins.result.count == 2, from_double = ins.has(M::kF64);
  const bool is_unsigned = ins.has(M::kU32) || ins.has(M::kU64);
  uint64_t source[32] = {}, out[32];
  if (from_double) {
    wide_values(ins.sources[0], source);
  } else {
    Row buffer;
    const uint32_t* x = values(ins.sources[0], buffer);
    for (int lane = 0; lane < 32; ++lane) {
      const float value = float_of(x[lane]);
      source[lane] = bits_of(static_cast<double>(ins.has(M::kFTZ) ? flushed(value) : value));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const double value = rounded(std::bit_cast<double>(source[lane]), rounding_of(ins));
    out[lane] = to_integer(value, wide ? 64 : 32, !is_unsigned, from_double);
  }
  if (wide) return write_wide(ins.result, out);
  Row low;
  for (int lane = 0; lane < 32; ++lane) low[lane] = static_cast<uint32_t>(out[lane]);
  write(ins.result, low);
}

void Executor::from_integers(const Instruction& ins) {
  const bool is_signed = !(ins.has(M::kU64) || ins.has(M::kU32) || ins.has(M::kU16) || ins.has(M::kU8));
  const int bits = ins.has(M::kU64) || ins.has(M::kS64)   ? 64
                   : ins.has(M::kU16) || ins.has(M::kS16) ? 16
                   : ins.has(M::kU8) || ins.has(M::kS8)   ? 8
                                                          : 32;
  uint64_t source[32], out[32];
  if (bits == 64) {
    wide_values(ins.sources[0], source);
  } else {
    Row buffer;
    const uint32_t* x = values(ins.sources[0], buffer);
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t value = sign_extend(x[lane], static_cast<uint32_t>(bits), !is_signed);
      source[lane] = is_signed ? static_cast<uint64_t>(int64_t{static_cast<int32_t>(value)}) : value;
    }
  }
  const RoundingScope scope(rounding_of(ins));
  for (int lane = 0; lane < 32; ++lane) {
    const auto as_signed = static_cast<int64_t>(source[lane]);
    if (ins.has(M::kF64)) {
      out[lane] = bits_of(is_signed ? static_cast<double>(as_signed) : static_cast<double>(source[lane]));
    } else {
      out[lane] = bits_of(is_signed ? static_cast<float>(as_signed) : static_cast<float>(source[lane]));
    }
  }
  if (ins.has(M::kF64)) return write_wide(ins.result, out);
  Row low;
  for (int lane = 0; lane < 32; ++lane) low[lane] = static_cast<uint32_t>(out[lane]);
  write(ins.result, low);
}

void Executor::between_floats(const Instruction& ins) {
  if (ins.sources[0].count == 2) {
    uint64_t source[32];
    wide_values(ins.sources[0], source);
    Row out;
    for (int lane = 0; lane < 32; ++lane) {
      out[lane] = canonical(static_cast<float>(std::bit_cast<double>(source[lane])));
    }
    return write(ins.result, out);
  }
  if (ins.result.count == 2) {
    Row buffer;
    const uint32_t* x = values(ins.sources[0], buffer);
    uint64_t out[32];
    for (int lane = 0; lane < 32; ++lane) out[lane] = bits_of(static_cast<double>(float_of(x[lane])));
    return write_wide(ins.result, out);
  }
  if (ins.has(M::kBF16)) return map<1>(ins, [](uint32_t a) { return to_bfloat16(float_of(a)); });
  if (ins.has(M::kF16)) return map<1>(ins, [](uint32_t a) { return to_half(float_of(a)); });
  throw Fault("unknown_instruction", "a conversion of these types");
}

void Executor::shuffle(const Instruction& ins) {
  Row a_buffer, b_buffer, c_buffer, out = {};
  const uint32_t *a = values(ins.sources[0], a_buffer), *b = values(ins.sources[1], b_buffer);
  const uint32_t* c = values(ins.sources[2], c_buffer);
  uint32_t inside = 0;
  for (uint32_t left = mask_; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    // As PTX's shfl has it: segments of lanes, and a bound within each.
    const int segment = c[lane] >> 8 & 31, clamp = c[lane] & 31, by = b[lane] & 31;
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int from = ins.has(M::kBFLY)   ? lane ^ by
               : ins.has(M::kUP)   ? lane - by
               : ins.has(M::kDOWN) ? lane + by
                                   : least | (by & ~segment);
    const bool valid = ins.has(M::kUP) ? from >= most : from <= most;
    if (!valid) from = lane;
    if (!(mask_ >> from & 1)) {
      fail("warp_mask", "a shuffle from lane " + std::to_string(from) + ", which does not execute it", 1u << lane);
    }
    out[lane] = a[from];
    inside |= uint32_t{valid} << lane;
  }
  write(ins.result, out);
  write(ins.predicates[0], inside);
}

void Executor::vote(const Instruction& ins) {
  const uint32_t truth = predicate(ins.sources[0]) & mask_;
  Row out;
  for (uint32_t& each : out) each = truth;
  write(ins.result, out);
  const bool answer = ins.has(M::kALL) ? truth == mask_ : ins.has(M::kANY) ? truth != 0 : truth == 0 || truth == mask_;
  write(ins.predicates[0], answer ? ~0u : 0);
}

void Executor::match(const Instruction& ins) {
  uint64_t x[32];
  if (ins.sources[0].count == 2) {
    wide_values(ins.sources[0], x);
  } else {
    Row buffer;
    const uint32_t* narrow = values(ins.sources[0], buffer);
    for (int lane = 0; lane < 32; ++lane) x[lane] = narrow[lane];
  }
  Row out = {};
  bool all = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int other = 0; other < 32; ++other) {
      const bool both = mask_ >> lane & 1 && mask_ >> other & 1;
      if (both && x[lane] == x[other]) out[lane] |= 1u << other;
      if (both && x[lane] != x[other]) all = false;
    }
  }
  if (ins.has(M::kALL)) {
    for (uint32_t& each : out) each = all ? mask_ : 0;
  }
  write(ins.result, out);
  write(ins.predicates[0], all ? ~0u : 0);
}

void Executor::reduce(const Instruction& ins) {
  Row buffer, out;
  const uint32_t* x = values(ins.sources[0], buffer);
  const bool is_signed = ins.has(M::kS32), minimum = ins.has(M::kMIN), maximum = ins.has(M::kMAX);
  uint32_t result = x[std::countr_zero(mask_)];
  for (uint32_t left = mask_ & (mask_ - 1); left != 0; left &= left - 1) {
    const uint32_t y = x[std::countr_zero(left)];
    const bool less = is_signed ? static_cast<int32_t>(y) < static_cast<int32_t>(result) : y < result;
    if (minimum || maximum)
      result = less == minimum ? y : result;
    else if (ins.has(M::kSUM))
      result += y;
    else if (ins.has(M::kAND))
      result &= y;
    else if (ins.has(M::kXOR))
      result ^= y;
    else
      result |= y;
  }
  for (uint32_t& each : out) each = result;
  write(ins.result, out);
}

uint32_t Executor::special(Special which, uint32_t lane) const {
  const Dim3 block = launch_.block, index = warp_->block->index;
  const uint32_t thread = warp_->first_thread + lane;
  switch (which) {
    case Special::kTidX:
      return thread % block.x;
    case Special::kTidY:
      return thread / block.x % block.y;
    case Special::kTidZ:
      return thread / block.x / block.y;
    case Special::kCtaX:
      return index.x;
    case Special::kCtaY:
      return index.y;
    case Special::kCtaZ:
      return index.z;
    case Special::kLane:
      return lane;
    case Special::kLtMask:
      return (1u << lane) - 1;
    default:
      return 0;
  }
}

void Executor::compute(const Instruction& ins) {
  const auto f32 = [&](auto count, auto f) {
    const RoundingScope scope(rounding_of(ins));
    if (ins.has(M::kFTZ)) {
      map<decltype(count)::value>(ins, [f](auto... x) { return canonical(flushed(f(flushed(float_of(x))...))); });
    } else {
      map<decltype(count)::value>(ins, [f](auto... x) { return canonical(f(float_of(x)...)); });
    }
  };
  const auto select = [&](auto f) {
    Row a_buffer, b_buffer, out;
    const uint32_t *a = values(ins.sources[0], a_buffer), *b = values(ins.sources[1], b_buffer);
    const uint32_t first = predicate(ins.sources[ins.source_count - 1]);
    for (int lane = 0; lane < 32; ++lane) out[lane] = f(a[lane], b[lane], (first >> lane & 1) != 0);
    write(ins.result, out);
  };
  const bool is_unsigned = ins.has(M::kU32);
  const auto min_max = [is_unsigned](uint32_t a, uint32_t b, bool minimum) {
    const bool less = is_unsigned ? a < b : static_cast<int32_t>(a) < static_cast<int32_t>(b);
    return less == minimum ? a : b;
  };
  switch (ins.op) {
    case Opcode::kMOV:
      return map<1>(ins, [](uint32_t a) { return a; });
    case Opcode::kR2UR:
      return map<1>(ins, [](uint32_t a) { return a; });
    case Opcode::kVIADD:
      if (ins.has(M::k16x2)) {
        if (ins.sources[0].plus + ins.sources[1].plus > 0) fail("unknown_instruction", "a negative pair", mask_);
        return map<2>(ins,
                      [](uint32_t a, uint32_t b) { return ((a & ~0xffffu) + (b & ~0xffffu)) | ((a + b) & 0xffff); });
      }
      return map<2>(ins, [](uint32_t a, uint32_t b) { return a + b; });
    case Opcode::kIADD3:
      return integer_add(ins);
    case Opcode::kIMAD:
      return multiply_add(ins);
    case Opcode::kLEA:
      return load_effective_address(ins);
    case Opcode::kIABS:
      return map<1>(ins, [](uint32_t a) { return a >> 31 ? 0u - a : a; });
    case Opcode::kVIMNMX:
      return select(min_max);
    case Opcode::kVIADDMNMX:
    case Opcode::kVIMNMX3: {
      Row buffers[3], out;
      const uint32_t* x[3];
      for (int k = 0; k < 3; ++k) x[k] = values(ins.sources[k], buffers[k]);
      const uint32_t minimum = predicate(ins.sources[3]);
      for (int lane = 0; lane < 32; ++lane) {
        const bool least = (minimum >> lane & 1) != 0;
        const uint32_t first =
            ins.op == Opcode::kVIADDMNMX ? x[0][lane] + x[1][lane] : min_max(x[0][lane], x[1][lane], least);
        out[lane] = min_max(first, x[2][lane], least);
      }
      return write(ins.result, out);
    }
    case Opcode::kLOP3: {
      const uint32_t table = ins.sources[3].value;
      Row buffers[3], out;
      const uint32_t* x[3];
      for (int k = 0; k < 3; ++k) x[k] = values(ins.sources[k], buffers[k]);
      const uint32_t* __restrict a = x[0], * __restrict b = x[1], * __restrict c = x[2];
      if (table == 0xc0) {
        for (int lane = 0; lane < 32; ++lane) out[lane] = a[lane] & b[lane];
      } else if (table == 0xfc) {
        for (int lane = 0; lane < 32; ++lane) out[lane] = a[lane] | b[lane];
      } else {
        for (int lane = 0; lane < 32; ++lane) out[lane] = lookup(table, a[lane], b[lane], c[lane]);
      }
      write(ins.result, out);
      if (ins.predicates[0].kind == Operand::kPredicate) {
        uint8_t truth[32];
        for (int lane = 0; lane < 32; ++lane) truth[lane] = out[lane] != 0;
        write(ins.predicates[0], packed(truth) | predicate(ins.sources[4]));
      }
      return;
    }
    case Opcode::kPLOP3: {
      const uint32_t a = predicate(ins.sources[0]), b = predicate(ins.sources[1]), c = predicate(ins.sources[2]);
      write(ins.predicates[0], lookup(ins.sources[3].value, a, b, c));
      return write(ins.predicates[1], lookup(ins.sources[4].value, a, b, c));
    }
    case Opcode::kPRMT:
      return map<3>(ins, permute);
    case Opcode::kSHF: {
      const bool left = ins.has(M::kL), upper = ins.has(M::kHI), wide = ins.has(M::kU64) || ins.has(M::kS64);
      const bool is_signed = ins.has(M::kS32) || ins.has(M::kS64);
      // With .W the amount wraps around; otherwise larger ones shift everything out.
      const uint32_t mask = !ins.has(M::kW) ? ~0u : wide ? 63 : 31;
      return map<3>(ins, [=](uint32_t low, uint32_t by, uint32_t high) {
        return funnel_shift(low, high, by & mask, left, upper, is_signed, wide);
      });
    }
    case Opcode::kSGXT:
      return map<2>(ins, [is_unsigned](uint32_t a, uint32_t bits) { return sign_extend(a, bits, is_unsigned); });
    case Opcode::kPOPC:
      return map<1>(ins, [](uint32_t a) { return static_cast<uint32_t>(std::popcount(a)); });
    case Opcode::kBREV:
      return map<1>(ins, [](uint32_t a) {
        uint32_t out = 0;
        for (int k = 0; k < 32; ++k) out |= (a >> k & 1) << (31 - k);
        return out;
      });
    case Opcode::kFLO: {
      const bool shift = ins.has(M::kSH);
      return map<1>(ins, [shift](uint32_t a) {
        const auto zeros = static_cast<uint32_t>(std::countl_zero(a));
        return a == 0 ? ~0u : shift ? zeros : 31 - zeros;
      });
    }
    case Opcode::kSEL:
    case Opcode::kFSEL:
      return select([](uint32_t a, uint32_t b, bool first) { return first ? a : b; });
    case Opcode::kISETP:
      return integer_compare(ins);
    case Opcode::kDSETP:
      return double_compare(ins);
    case Opcode::kHSETP2:
      return half_compare(ins);
    case Opcode::kFSET:
    case Opcode::kFSETP: {
      Row a_buffer, b_buffer;
      float a[32], b[32];
      std::memcpy(a, values(ins.sources[0], a_buffer), sizeof a);
      std::memcpy(b, values(ins.sources[1], b_buffer), sizeof b);
      if (ins.has(M::kFTZ)) {
        for (int lane = 0; lane < 32; ++lane) a[lane] = flushed(a[lane]), b[lane] = flushed(b[lane]);
      }
      const uint32_t truth = compare_all(comparison_of(ins), a, b), with = predicate(ins.sources[2]);
      if (ins.op == Opcode::kFSETP) return set_predicates(ins, truth, with);
      const uint32_t mask = combined(ins, truth, with), one = ins.has(M::kBF) ? bits_of(1.0f) : ~0u;
      Row out;
      for (int lane = 0; lane < 32; ++lane) out[lane] = mask >> lane & 1 ? one : 0;
      return write(ins.result, out);
    }
    case Opcode::kFCHK: {
      // Whether a quotient needs the slow way: exponents at an end or too far apart.
      Row a_buffer, b_buffer;
      const uint32_t *a = values(ins.sources[0], a_buffer), *b = values(ins.sources[1], b_buffer);
      uint32_t slow = 0;
      for (int lane = 0; lane < 32; ++lane) {
        const int p = static_cast<int>(a[lane] >> 23 & 255), q = static_cast<int>(b[lane] >> 23 & 255);
        // A dividend of zero too: the fast way would lose its sign.
        const bool far = std::abs(p - q) > 120, small = p < 24;
        slow |= static_cast<uint32_t>(q == 0 || q >= 253 || p == 255 || far || small) << lane;
      }
      return write(ins.predicates[0], slow);
    }
    case Opcode::kFADD:
      return f32(std::integral_constant<int, 2>(), [](float a, float b) { return a + b; });
    case Opcode::kFMUL:
      return f32(std::integral_constant<int, 2>(), [](float a, float b) { return a * b; });
    case Opcode::kFFMA:
      return f32(std::integral_constant<int, 3>(), [](float a, float b, float c) { return std::fma(a, b, c); });
    case Opcode::kFMNMX: {
      const bool propagate = ins.has(M::kNAN), flush = ins.has(M::kFTZ);
      return select([=](uint32_t a, uint32_t b, bool minimum) {
        if (flush) a = bits_of(flushed(float_of(a))), b = bits_of(flushed(float_of(b)));
        return float_min_max(a, b, minimum, propagate);
      });
    }
    case Opcode::kDADD:
      return map_double(ins, [](double a, double b, double) { return a + b; });
    case Opcode::kDMUL:
      return map_double(ins, [](double a, double b, double) { return a * b; });
    case Opcode::kDFMA:
      return map_double(ins, [](double a, double b, double c) { return std::fma(a, b, c); });
    case Opcode::kHFMA2:
      return map_halves(ins, half_fma);
    case Opcode::kHMUL2:
      return map_halves(ins, [](float a, float b, float) { return a * b; });
    case Opcode::kHADD2:
      if (!ins.has(M::kF32)) return map_halves(ins, [](float a, float b, float) { return half_fma(a, 1, b); });
      return map<2>(ins,
                    [](uint32_t a, uint32_t b) { return canonical(from_half(a & 0xffff) + from_half(b & 0xffff)); });
    case Opcode::kF2FP: {
      if (ins.has(M::kBF16)) {
        return map<2>(ins,
                      [](uint32_t a, uint32_t b) { return to_bfloat16(float_of(a)) << 16 | to_bfloat16(float_of(b)); });
      }
      return map<2>(ins, [](uint32_t a, uint32_t b) { return to_half(float_of(a)) << 16 | to_half(float_of(b)); });
    }
    case Opcode::kF2F:
      return between_floats(ins);
    case Opcode::kF2I:
      return to_integers(ins);
    case Opcode::kI2F:
    case Opcode::kI2FP:
      return from_integers(ins);
    case Opcode::kFRND: {
      const Rounding rounding = rounding_of(ins);
      if (ins.has(M::kF64)) {
        uint64_t x[32];
        wide_values(ins.sources[0], x);
        for (uint64_t& each : x) each = bits_of(rounded(std::bit_cast<double>(each), rounding));
        return write_wide(ins.result, x);
      }
      const bool flush = ins.has(M::kFTZ);
      return map<1>(ins, [=](uint32_t a) {
        const float value = flush ? flushed(float_of(a)) : float_of(a);
        return canonical(static_cast<float>(rounded(static_cast<double>(value), rounding)));
      });
    }
    case Opcode::kMUFU: {
      constexpr M kOrder[] = {M::kRCP, M::kRSQ, M::kSQRT, M::kEX2,    M::kLG2,
                              M::kSIN, M::kCOS, M::kTANH, M::kRCP64H, M::kRSQ64H};
      const auto kind =
          static_cast<Approximation>(std::find_if(kOrder, kOrder + 9, [&](M each) { return ins.has(each); }) - kOrder);
      const bool exact = options_.mufu == Options::kExact;
      const uint64_t seed = options_.seed * 16 + static_cast<uint64_t>(kind);
      return map<1>(ins, [=](uint32_t a) { return approximate(kind, a, exact ? 0 : movement(seed, a)); });
    }
    case Opcode::kCS2R: {
      const uint64_t zeros[32] = {};
      if (ins.sources[0].index != static_cast<int>(Special::kZero)) fail("unknown_instruction", "a clock", mask_);
      return ins.result.count == 2 ? write_wide(ins.result, zeros) : write(ins.result, warp_->rows[kRZ]);
    }
    case Opcode::kS2R:
    case Opcode::kS2UR: {
      Row out;
      for (uint32_t lane = 0; lane < 32; ++lane) {
        out[lane] = special(static_cast<Special>(ins.sources[0].index), lane);
      }
      return write(ins.result, out);
    }
    case Opcode::kP2R: {
      Row buffer, out;
      const uint32_t* old = values(ins.sources[1], buffer);
      const uint32_t keep = ins.sources[2].value;
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t all = 0;
        for (int k = 0; k < kPT; ++k) all |= (warp_->predicates[k] >> lane & 1) << k;
        out[lane] = (all & keep) | (old[lane] & ~keep);
      }
      return write(ins.result, out);
    }
    case Opcode::kB2R: {
      Row out;
      for (uint32_t& each : out) each = warp_->block->reduced;
      write(ins.result, out);
      return write(ins.predicates[0], warp_->block->reduced != 0 ? ~0u : 0);
    }
    case Opcode::kSHFL:
      return shuffle(ins);
    case Opcode::kVOTE:
      return vote(ins);
    case Opcode::kMATCH:
      return match(ins);
    case Opcode::kREDUX:
      return reduce(ins);
    default:
      fail("unknown_instruction", "an opcode that is decoded and not executed", mask_);
  }
}

}  // namespace gpu_emulator
