// SPDX-License-Identifier: Apache-2.0
// The focal loss of independent classes with gamma = 2.
//
// Note [Focal loss]
// For a class that is not the anchor's label, the loss is p^2 log(1 / (1 - p)) with p = sigmoid(x). For the label it is
// the same with -x. Everything is computed from e = exp(-|x|), which is at most 1, so nothing overflows and nothing
// cancels. exp and log(1 + e) are short series that compilers vectorise; a maths library's functions are called per
// element. The derivative shares nearly all terms with the loss, so the forward pass computes and keeps it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"
#include "scalar.h"

namespace fpn_fast {

// Elements per partial sum, on every backend.
constexpr int kFocalTile = 4096;
constexpr int64_t focal_tiles(int64_t elements) { return (elements + kFocalTile - 1) / kFocalTile; }

// 1 + r / kTerm (1 + r / (kTerm + 1) (...)), up to kLast.
template <int kTerm, int kLast, class T>
HOST_DEVICE T exponential_series(T r) {
  if constexpr (kTerm > kLast) {
    return T(1);
  } else {
    return T(1) + r * T(1.0 / kTerm) * exponential_series<kTerm + 1, kLast>(r);
  }
}

// exp(x) for x <= 0, within two roundings and not below the smallest normal value. NaN stays NaN.
template <class T>
HOST_DEVICE T exponential_of_negative(T x) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  using Bits = std::conditional_t<kDouble, uint64_t, uint32_t>;
  constexpr int kMantissa = kDouble ? 52 : 23, kBias = kDouble ? 1023 : 127;
  // Values of this size are whole, so adding it rounds to an integer.
  constexpr T kWhole = kDouble ? T(6755399441055744.0) : T(12582912.0);
  // ln 2 in two parts. The first has so few digits that its multiples are exact.
  constexpr T kLn2High = kDouble ? T(6.93147180369123816490e-01) : T(0.693359375);
  constexpr T kLn2Low = kDouble ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
  constexpr T kLowest = kDouble ? T(-708) : T(-87);
  x = x < kLowest ? kLowest : x;
  const T shifted = x * T(1.4426950408889634) + kWhole;
  const T powers = shifted - kWhole;
  const T r = (x - powers * kLn2High) - powers * kLn2Low;
  // The lowest bits of `shifted` are the exponent.
  Bits bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + kBias) << kMantissa;
  T power;
  memcpy(&power, &bits, sizeof power);
  // |r| is at most ln(2) / 2. The first omitted term is below half a rounding.
  return exponential_series<1, kDouble ? 13 : 7>(r) * power;
}

// 1 + z / 3 + z^2 / 5 + ..., the powers kTerm to kLast.
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
  // log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3. One division serves both.
  const T reciprocal = T(1) / ((T(1) + e) * (T(2) + e));
  const T larger = reciprocal * (T(2) + e), smaller = e * larger, tangent = e * (T(1) + e) * reciprocal;
  const T p = x < 0 ? smaller : larger, q = x < 0 ? larger : smaller;
  const T series = inverse_tangent_series<0, std::is_same_v<T, double> ? 16 : 7>(tangent * tangent);
  const T cross_entropy = (x > 0 ? x : T(0)) + T(2) * tangent * series;
  const T square = p * p;
  return {square * cross_entropy, square * (p + T(2) * q * cross_entropy)};
}

// The same with alpha and signs. `own`: the class is the anchor's label.
template <class T>
HOST_DEVICE FocalTerm<T> focal_term(T x, bool own, T alpha) {
  const FocalTerm<T> term = focal_term(own ? -x : x);
  const T share = own ? alpha : T(1) - alpha;
  return {share * term.loss, (own ? -share : share) * term.slope};
}

template <class T>
struct FocalLoss {
  const T* logits;  // [M, classes], `elements` in all
  const int64_t* labels;
  const acc_type<T>* weights;
  int64_t elements;
  int classes;
  acc_type<T> alpha;
  acc_type<T>* parts;  // a sum per tile
  T* gradient;         // [M, classes], or null
  bool aligned;        // logits start at a multiple of 16 bytes
};

}  // namespace fpn_fast
