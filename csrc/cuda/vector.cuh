// SPDX-License-Identifier: Apache-2.0
// 16-byte global accesses of storage types, and scalar accesses where the alignment does not allow them.
#pragma once

#include <type_traits>

#include "../common/feature_map.h"
#include "../common/scalar.h"

namespace fpn_fast {

// The elements of one 16-byte access. Two bfloat16 are widened together, because the upper one alone takes three
// instructions.
template <class T>
__device__ __forceinline__ void widen(uint4 raw, acc_type<T> (&values)[kVec<T>]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = float_from_bits(words[i] << 16);
      values[2 * i + 1] = float_from_bits(words[i] & 0xffff0000u);
    }
  } else {
    T elements[kVec<T>];
    memcpy(elements, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) values[i] = to_acc(elements[i]);
  }
}

// Loads `kVec` elements that are `stride` apart. Beyond `count` they read as zero.
template <class T>
__device__ __forceinline__ void load(const T* source, int64_t stride, int count, bool vectorised,
                                     acc_type<T> (&values)[kVec<T>]) {
  if (vectorised) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    widen<T>(raw, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) values[i] = i < count ? to_acc(source[i * stride]) : acc_type<T>(0);
  }
}

// Rounds two values at once: alone each takes a conversion on a pipe of an eighth of the rate.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    memcpy(&pair, &both, sizeof pair);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(&pair, &both, sizeof pair);
  }
  return pair;
}

// The compiler would merge a plain assignment with a branch of scalar stores, into scalar stores.
__device__ __forceinline__ void store_raw(void* target, uint4 raw) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

template <class T>
__device__ __forceinline__ void store(T* target, int64_t stride, int count, bool vectorised,
                                      const acc_type<T> (&values)[kVec<T>]) {
  if (vectorised) {
    uint4 raw;
    if constexpr (sizeof(T) == 2) {
      raw = {rounded_pair<T>(values[0], values[1]), rounded_pair<T>(values[2], values[3]),
             rounded_pair<T>(values[4], values[5]), rounded_pair<T>(values[6], values[7])};
    } else {
      memcpy(&raw, values, sizeof raw);
    }
    store_raw(target, raw);
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) {
      if (i < count) target[i * stride] = Rounded<T>::from(values[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ acc_type<T> round_to(acc_type<T> value) {
  return to_acc(Rounded<T>::from(value));
}

}  // namespace fpn_fast
