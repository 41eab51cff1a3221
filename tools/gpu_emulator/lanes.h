// SPDX-License-Identifier: Apache-2.0
// What one lane computes, where C++ has no operator for it. NVIDIA's arithmetic differs from the host's in its one NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>

namespace gpu_emulator {

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline double double_of(uint32_t low, uint32_t high) { return std::bit_cast<double>(uint64_t{high} << 32 | low); }
inline uint64_t bits_of(double value) { return std::bit_cast<uint64_t>(value); }

// A NaN that single precision computes is always this one.
inline constexpr uint32_t kNaN = 0x7fffffff;
inline uint32_t canonical(float value) { return value != value ? kNaN : bits_of(value); }
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

inline float from_half(uint32_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits)));
}
inline uint32_t to_half(float value) {
  return value != value ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}
inline float from_bfloat16(uint32_t bits) { return float_of(bits << 16); }
inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// a * b + c of halves, as a float that rounds to the same half as the exact result: the product is exact, the sum and
// then the float are rounded to odd.
inline float half_fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c, back = sum - product;
  const double lost = (product - (sum - back)) + (c - back);
  uint64_t bits = bits_of(sum);
  if (lost != 0 && std::isfinite(sum) && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : -1;
  const double odd = std::bit_cast<double>(bits);
  float result = static_cast<float>(odd);
  if (result != odd && std::isfinite(result)) {
    // Towards zero, then odd.
    if (std::fabs(static_cast<double>(result)) > std::fabs(odd)) result = std::nextafter(result, 0.0f);
    result = float_of(bits_of(result) | 1);
  }
  return result;
}

enum class Comparison : uint8_t { kEQ, kNE, kLT, kLE, kGT, kGE, kEQU, kNEU, kLTU, kLEU, kGTU, kGEU, kNAN, kNUM };

template <class T>
bool compare(Comparison comparison, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case Comparison::kEQ:
      return a == b;
    case Comparison::kNE:
      return !unordered && a != b;
    case Comparison::kLT:
      return a < b;
    case Comparison::kLE:
      return a <= b;
    case Comparison::kGT:
      return a > b;
    case Comparison::kGE:
      return a >= b;
    case Comparison::kEQU:
      return unordered || a == b;
    case Comparison::kNEU:
      return a != b;
    case Comparison::kLTU:
      return !(a >= b);
    case Comparison::kLEU:
      return !(a > b);
    case Comparison::kGTU:
      return !(a <= b);
    case Comparison::kGEU:
      return !(a < b);
    case Comparison::kNAN:
      return unordered;
    case Comparison::kNUM:
      return !unordered;
  }
  return false;
}

// -0 is less than 0. Without `propagate` a NaN loses against a number.
inline uint32_t float_min_max(uint32_t a, uint32_t b, bool minimum, bool propagate) {
  const float x = float_of(a), y = float_of(b);
  if (x != x || y != y) return propagate || (x != x && y != y) ? kNaN : x != x ? b : a;
  const bool a_less = x < y || (x == y && a >> 31 > b >> 31);
  return a_less == minimum ? a : b;
}

inline uint32_t shift_left(uint32_t value, uint32_t by) { return by >= 32 ? 0 : value << by; }

// The funnel shift: `high` is the upper word. Amounts are clamped, never taken modulo 32.
inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t by, bool left, bool upper, bool is_signed,
                             bool wide) {
  const uint64_t value = uint64_t{high} << 32 | low;
  if (!wide && by > 32) by = 32;
  if (left) {
    const uint64_t shifted = by >= 64 ? 0 : value << by;
    return upper ? static_cast<uint32_t>(shifted >> 32) : static_cast<uint32_t>(shifted);
  }
  const uint32_t most = by > 63 ? 63 : by;
  const uint64_t shifted = is_signed  ? static_cast<uint64_t>(static_cast<int64_t>(value) >> most)
                           : by >= 64 ? 0
                                      : value >> by;
  return upper ? static_cast<uint32_t>(shifted >> 32) : static_cast<uint32_t>(shifted);
}

inline uint32_t permute(uint32_t a, uint32_t selector, uint32_t b) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = selector >> 4 * k & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (pick & 7)) & 255;
    // The upper bit asks for the byte's sign instead.
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  return result;
}

inline uint32_t lookup(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int k = 0; k < 8; ++k) {
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return result;
}

inline uint32_t sign_extend(uint32_t value, uint32_t bits, bool is_unsigned) {
  if (bits >= 32) return value;
  if (bits == 0) return 0;
  if (is_unsigned) return value & ((1u << bits) - 1);
  return static_cast<uint32_t>(static_cast<int32_t>(value << (32 - bits)) >> (32 - bits));
}

enum class Rounding : uint8_t { kNearest, kDown, kUp, kZero };

inline double rounded(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kDown:
      return std::floor(value);
    case Rounding::kUp:
      return std::ceil(value);
    case Rounding::kZero:
      return std::trunc(value);
    default:
      return std::nearbyint(value);
  }
}

// An integral value, clamped; NaN as PTX's cvt has it.
inline uint64_t to_integer(double value, int bits, bool is_signed, bool from_double) {
  if (value != value) return bits == 64 || from_double ? uint64_t{1} << (bits - 1) : 0;
  if (is_signed) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (value >= limit) return (uint64_t{1} << (bits - 1)) - 1;
    if (value < -limit) return uint64_t{1} << (bits - 1);
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  }
  if (value <= 0) return 0;
  if (value >= std::ldexp(1.0, bits)) return ~uint64_t{0};
  return static_cast<uint64_t>(value);
}

// Sets the host's rounding for as long as it lives.
class RoundingScope {
 public:
  explicit RoundingScope(Rounding rounding) : set_(rounding != Rounding::kNearest) {
    constexpr int kModes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    if (set_) std::fesetround(kModes[static_cast<int>(rounding)]);
  }
  ~RoundingScope() {
    if (set_) std::fesetround(FE_TONEAREST);
  }

 private:
  bool set_;
};

// An approximation, and by how much it may be off: what the PTX ISA 9.1, "Floating Point Instructions", says of its
// .approx form, in units in the last place, of the result, or absolute. It says nothing of those of double precision,
// which are of the upper word alone: one in the last place of that.
enum class Approximation : uint8_t { kRCP, kRSQ, kSQRT, kEX2, kLG2, kSIN, kCOS, kTANH, kRCP64H, kRSQ64H };
struct LargestError {
  double ulps, relative, absolute;
};
inline constexpr LargestError kLargestError[] = {
    {1, 0, 0},              // rcp
    {0, 0x1.125p-23, 0},    // rsqrt: 2^-22.9
    {0, 0x1p-23, 0},        // sqrt
    {2, 0, 0},              // ex2
    {0, 0x1p-22, 0x1p-22},  // lg2: absolute where the argument is in (0.5, 2) and the result below 1, else relative
    {0, 0, 0x1.6ap-21},     // sin: 2^-20.5 within a turn
    {0, 0, 0x1.6ap-21},     // cos
    {0, 0x1p-11, 0},        // tanh
    {0, 0x1p-20, 0},        // rcp.ftz.f64
    {0, 0x1p-20, 0},        // rsqrt.ftz.f64
};

inline double exactly(Approximation approximation, double x) {
  switch (approximation) {
    case Approximation::kRCP:
    case Approximation::kRCP64H:
      return 1 / x;
    case Approximation::kRSQ:
    case Approximation::kRSQ64H:
      return 1 / std::sqrt(x);
    case Approximation::kSQRT:
      return std::sqrt(x);
    case Approximation::kEX2:
      return std::exp2(x);
    case Approximation::kLG2:
      return std::log2(x);
    // Their argument is in turns, which RRO or a multiplication before has made it.
    case Approximation::kSIN:
      return std::sin(x * 6.283185307179586);
    case Approximation::kCOS:
      return std::cos(x * 6.283185307179586);
    default:
      return std::tanh(x);
  }
}

inline double largest_error(Approximation approximation, double exact) {
  const LargestError of = kLargestError[static_cast<int>(approximation)];
  const double last_place = std::ldexp(1.0, std::ilogb(exact) - 23);
  return std::max({of.ulps * last_place, of.relative * std::fabs(exact), of.absolute});
}

// `move` in [-1, 1] says how far within the largest error the result is off. Subnormals count as zeros.
inline uint32_t approximate(Approximation approximation, uint32_t source, double move) {
  const bool wide = approximation >= Approximation::kRCP64H;
  double x = wide ? double_of(0, source) : flushed(float_of(source));
  if (wide && (source & 0x7ff00000) == 0) x = std::copysign(0.0, x);
  const double exact = exactly(approximation, x);
  double y = exact, error = 0;
  if (move != 0 && std::isfinite(exact) && exact != 0) {
    error = largest_error(approximation, exact);
    y += move * error;
  }
  if (wide) {
    if (y != y) return 0xfff80000;
    const uint32_t upper = static_cast<uint32_t>((bits_of(y) + 0x80000000u) >> 32);
    return (upper & 0x7ff00000) == 0 ? upper & 0x80000000 : upper;
  }
  float result = static_cast<float>(y);
  // Rounding takes no part of the error: what is too far is moved back to the neighbour.
  if (move != 0 && std::fabs(result - exact) > error) result = std::nextafter(result, static_cast<float>(exact));
  return canonical(flushed(result));
}

}  // namespace gpu_emulator
