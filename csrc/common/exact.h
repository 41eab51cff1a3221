// SPDX-License-Identifier: Apache-2.0
// Arithmetic that no compiler contracts to a fused multiply-add. Values that decide something (a level, whether a
// sample is on the map, the number of samples) use it, so that every backend decides alike. The CPU build contracts
// nothing.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fpn_fast {

#ifdef __CUDA_ARCH__
HOST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
HOST_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
HOST_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
HOST_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
HOST_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }
HOST_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
HOST_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
HOST_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
HOST_DEVICE double square_root(double a) { return __dsqrt_rn(a); }
// The second where the first is NaN. Of zeros of two signs they may return either.
HOST_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
HOST_DEVICE double larger(double a, double b) { return fmax(a, b); }
HOST_DEVICE float smaller(float a, float b) { return fminf(a, b); }
HOST_DEVICE double smaller(double a, double b) { return fmin(a, b); }
#else
HOST_DEVICE float multiply(float a, float b) { return a * b; }
HOST_DEVICE double multiply(double a, double b) { return a * b; }
HOST_DEVICE float add(float a, float b) { return a + b; }
HOST_DEVICE double add(double a, double b) { return a + b; }
HOST_DEVICE float subtract(float a, float b) { return a - b; }
HOST_DEVICE double subtract(double a, double b) { return a - b; }
HOST_DEVICE float divide(float a, float b) { return a / b; }
HOST_DEVICE double divide(double a, double b) { return a / b; }
HOST_DEVICE float square_root(float a) { return std::sqrt(a); }
HOST_DEVICE double square_root(double a) { return std::sqrt(a); }
HOST_DEVICE float larger(float a, float b) { return a > b ? a : b; }
HOST_DEVICE double larger(double a, double b) { return a > b ? a : b; }
HOST_DEVICE float smaller(float a, float b) { return a < b ? a : b; }
HOST_DEVICE double smaller(double a, double b) { return a < b ? a : b; }
#endif

}  // namespace fpn_fast
