// SPDX-License-Identifier: Apache-2.0
// The focal loss of independent classes, gamma 2.
//
// Note [Focal loss]
// Of a class that is not an anchor's the loss is p^2 log(1 / (1 - p)), p = sigmoid(x); of the anchor's own class it is
// the same of -x. All of it is made of e = exp(-|x|), which is at most 1: nothing overflows and nothing cancels, and
// exp and log(1 + e) are short series, which a compiler turns into vectors. A library's are called for one element at a
// time. Loss and derivative share nearly all of this, so the derivative is made in the forward, and kept.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace fpn_fast {

// Elements whose losses are added up in one go, on every backend.
constexpr int kFocalTile = 4096;
constexpr int64_t focal_tiles(int64_t elements) { return (elements + kFocalTile - 1) / kFocalTile; }

// 1 + r / kTerm (1 + r / (kTerm + 1) (...)), to kLast.
template <int kTerm, int kLast, class T>
HOST_DEVICE T exponential_series(T r) {
  if constexpr (kTerm > kLast) {
    return T(1);
  } else {
    return T(1) + r * T(1.0 / kTerm) * exponential_series<kTerm + 1, kLast>(r);
  }
}

// exp(x) of an x that is not above 0, to a rounding or two; no smaller than the smallest normal number. NaN stays.
template <class T>
HOST_DEVICE T exponential_of_negative(T x) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  using Bits = std::conditional_t<kDouble, uint64_t, uint32_t>;
  constexpr int kMantissa = kDouble ? 52 : 23, kBias = kDouble ? 1023 : 127;
  // Where numbers are whole: adding it rounds.
  constexpr T kWhole = kDouble ? T(6755399441055744.0) : T(12582912.0);
  // ln 2 in two parts, the first with so few digits that its multiples are exact.
  constexpr T kLn2High = kDouble ? T(6.93147180369123816490e-01) : T(0.693359375);
  constexpr T kLn2Low = kDouble ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
  constexpr T kLowest = kDouble ? T(-708) : T(-87);
  x = x < kLowest ? kLowest : x;
  const T shifted = x * T(1.4426950408889634) + kWhole;
  const T powers = shifted - kWhole;
  const T r = (x - powers * kLn2High) - powers * kLn2Low;
  // The last bits of `shifted` are the power of two.
  Bits bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + kBias) << kMantissa;
  T power;
  memcpy(&power, &bits, sizeof power);
  // |r| is at most ln(2) / 2: the first term left out is below half a rounding.
  return exponential_series<1, kDouble ? 13 : 7>(r) * power;
}

// 1 + z / 3 + z^2 / 5 + ..., the powers from kTerm to kLast.
template <int kTerm, int kLast, class T>
HOST_DEVICE T inverse_tangent_series(T z) {
  constexpr T kCoefficient = T(1.0 / (2 * kTerm + 1));
  if constexpr (kTerm == kLast) {
    return kCoefficient;
  } else {
    return kCoefficient + z * inverse_tangent_series<kTerm + 1, kLast>(z);
  }
}

template <class T>
struct FocalTerm {
  T loss, slope;
};

// p^2 log(1 / (1 - p)) and its derivative, p^2 (p + 2 (1 - p) log(1 / (1 - p))).
template <class T>
HOST_DEVICE FocalTerm<T> focal_term(T x) {
  const T e = exponential_of_negative(x < 0 ? x : -x);
  // log(1 + e) is twice the inverse hyperbolic tangent of e / (2 + e), which is at most 1/3. One division for both.
  const T reciprocal = T(1) / ((T(1) + e) * (T(2) + e));
  const T larger = reciprocal * (T(2) + e), smaller = e * larger, tangent = e * (T(1) + e) * reciprocal;
  const T p = x < 0 ? smaller : larger, q = x < 0 ? larger : smaller;
  const T series = inverse_tangent_series<0, std::is_same_v<T, double> ? 16 : 7>(tangent * tangent);
  const T cross_entropy = (x > 0 ? x : T(0)) + T(2) * tangent * series;
  const T square = p * p;
  return {square * cross_entropy, square * (p + T(2) * q * cross_entropy)};
}

// The same, with alpha and signs, of a class that is (`own`) or is not the anchor's.
template <class T>
HOST_DEVICE FocalTerm<T> focal_term(T x, bool own, T alpha) {
  const FocalTerm<T> term = focal_term(own ? -x : x);
  const T share = own ? alpha : T(1) - alpha;
  return {share * term.loss, (own ? -share : share) * term.slope};
}

}  // namespace fpn_fast
