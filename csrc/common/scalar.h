// SPDX-License-Identifier: Apache-2.0
// Storage types and their accumulation types. Half and BFloat16 are plain bit patterns, so that the CUDA kernels and
// the CPU library share one source without torch or CUDA headers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"

namespace fpn_fast {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_type = typename AccumulateType<T>::type;

HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOST_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HOST_DEVICE double to_acc(double value) { return value; }
HOST_DEVICE float to_acc(float value) { return value; }

HOST_DEVICE float to_acc(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

HOST_DEVICE float to_acc(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // After the shift the exponent is 112 too small, also for subnormals. One exact multiplication corrects both.
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t scaled = bits_of_float(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : scaled));
#endif
}

// Rounds to nearest even, once. Only `Rounded<T>::from` turns an accumulator into a stored value.
template <class T>
struct Rounded {
  HOST_DEVICE static T from(acc_type<T> value) { return value; }
};

template <>
struct Rounded<BFloat16> {
  HOST_DEVICE static BFloat16 from(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
#endif
  }
};

template <>
struct Rounded<Half> {
  HOST_DEVICE static Half from(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Adding 0.5 aligns the value's last bit with that of a subnormal half, 2^-24, and rounds it.
    const uint32_t subnormal = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
#endif
  }
};

}  // namespace fpn_fast
