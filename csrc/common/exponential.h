// SPDX-License-Identifier: Apache-2.0
// An exponential that gives the same bits on every machine. Maths libraries differ in the last bit, and that bit can
// decide whether a box is kept. It is computed in double; rounded to float it is correctly rounded except for about one
// argument in 2^28.
#pragma once

#include <cstdint>
#include <cstring>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

HOST_DEVICE double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// `x` must not be NaN.
HOST_DEVICE double exponential(double x) {
  // Beyond this range the result is infinite or zero in both types.
  x = x > -746 ? (x < 710 ? x : 710.0) : -746.0;
  constexpr double kLog2E = 1.4426950408889634;
  // ln 2 in two parts. The first has so few digits that its multiples are exact.
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  const double nearest = add(multiply(x, kLog2E), x < 0 ? -0.5 : 0.5);
  const int n = static_cast<int>(nearest);
  const double powers = n;
  const double r = subtract(subtract(x, multiply(powers, kLn2High)), multiply(powers, kLn2Low));
  // A Taylor series: |r| is at most ln(2) / 2, and the first omitted term is below 2^-55.
  double sum = 1.0 / 6227020800.0;
  constexpr double kInverseFactorials[] = {
      1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
      1.0 / 120.0,       1.0 / 24.0,       1.0 / 6.0,       1.0 / 2.0,      1.0,           1.0};
  for (const double term : kInverseFactorials) sum = add(multiply(sum, r), term);
  // Two factors, so that a subnormal result is rounded once.
  const int half = n / 2;
  return multiply(multiply(sum, power_of_two(half)), power_of_two(n - half));
}

HOST_DEVICE float exponential(float x) { return static_cast<float>(exponential(static_cast<double>(x))); }

// 1 / (1 + exp(-x)), rounded after each step like PyTorch's.
template <class acc_t>
HOST_DEVICE acc_t logistic(acc_t x) {
  return divide(acc_t(1), add(acc_t(1), exponential(-x)));
}

}  // namespace fpn_fast
