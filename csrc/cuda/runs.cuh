// SPDX-License-Identifier: Apache-2.0
// Runs of adjacent elements as they lie in memory. Half and BFloat16 stay in pairs: one instruction adds two of them,
// and none widens or rounds them.
#pragma once

#include "../common/exact.h"
#include "vector.cuh"

namespace fpn_fast {

template <class T, int kCount>
struct Run {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  // A single Half or BFloat16 is the lower half of its word.
  alignas(kBytes < 4 ? 4 : kBytes) uint32_t word[(kBytes + 3) / 4];
};

// One aligned access.
template <int kCount, class T>
__device__ __forceinline__ Run<T, kCount> load_run(const T* source) {
  using R = Run<T, kCount>;
  if constexpr (R::kBytes == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    return {raw.x, raw.y, raw.z, raw.w};
  } else if constexpr (R::kBytes == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(source);
    return {raw.x, raw.y};
  } else if constexpr (R::kBytes == 4) {
    return {*reinterpret_cast<const uint32_t*>(source)};
  } else {
    return {*reinterpret_cast<const uint16_t*>(source)};
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_run(T* target, const Run<T, kCount>& run) {
  if constexpr (Run<T, kCount>::kBytes == 16) {
    // The compiler would take a plain vector apart where a branch made its words, and store these one by one.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(run.word[0]), "r"(run.word[1]),
                 "r"(run.word[2]), "r"(run.word[3])
                 : "memory");
  } else if constexpr (Run<T, kCount>::kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(run.word[0]), "r"(run.word[1]) : "memory");
  } else if constexpr (Run<T, kCount>::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = run.word[0];
  } else {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(run.word[0]);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void widen_run(const Run<T, kCount>& run, acc_type<T> (&values)[kCount]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t word = run.word[i / 2];
      if constexpr (std::is_same_v<T, BFloat16>) {
        values[i] = float_from_bits(i % 2 ? word & 0xffff0000u : word << 16);
      } else {
        values[i] = to_acc(Half{static_cast<uint16_t>(i % 2 ? word >> 16 : word)});
      }
    }
  } else {
    memcpy(values, run.word, sizeof values);
  }
}

// Rounds each value once.
template <class T, int kCount>
__device__ __forceinline__ Run<T, kCount> round_to_run(const acc_type<T> (&values)[kCount]) {
  Run<T, kCount> run;
  if constexpr (sizeof(T) > 2) {
    memcpy(run.word, values, sizeof values);
  } else if constexpr (kCount == 1) {
    run.word[0] = Rounded<T>::from(values[0]).bits;
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) run.word[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
  }
  return run;
}

// Every element twice in a row.
template <class T, int kCount>
__device__ __forceinline__ Run<T, 2 * kCount> doubled(const Run<T, kCount>& run) {
  Run<T, 2 * kCount> out;
  if constexpr (Run<T, kCount>::kBytes == 2) {
    out.word[0] = __byte_perm(run.word[0], 0, 0x1010);
  } else {
#pragma unroll
    for (int i = 0; i < Run<T, kCount>::kBytes / 4; ++i) {
      const uint32_t word = run.word[i];
      if constexpr (sizeof(T) == 2) {
        out.word[2 * i] = __byte_perm(word, 0, 0x1010), out.word[2 * i + 1] = __byte_perm(word, 0, 0x3232);
      } else if constexpr (sizeof(T) == 4) {
        out.word[2 * i] = out.word[2 * i + 1] = word;
      } else {
        // Of two words each.
        out.word[4 * (i / 2) + i % 2] = out.word[4 * (i / 2) + 2 + i % 2] = word;
      }
    }
  }
  return out;
}

// Note [Packed sums]
// A sum of two Half or BFloat16 in float32, rounded to its type, equals the sum rounded at once: float32 has 24 bits,
// at least 2 x 11 + 2. A product with a half is exact in float32. So packed instructions give the reference's bits.
// Those with _rn are not contracted: a fused multiply-add of half a subnormal sum would not round that half.
template <class Pair, class Operation>
__device__ __forceinline__ uint32_t of_pairs(uint32_t a, uint32_t b, const Operation& operation) {
  Pair left, right;
  memcpy(&left, &a, sizeof a), memcpy(&right, &b, sizeof b);
  const Pair result = operation(left, right);
  memcpy(&a, &result, sizeof a);
  return a;
}

__device__ __forceinline__ uint32_t packed_add(BFloat16, uint32_t a, uint32_t b) {
  return of_pairs<__nv_bfloat162>(a, b, [](auto x, auto y) { return __hadd2_rn(x, y); });
}
__device__ __forceinline__ uint32_t packed_add(Half, uint32_t a, uint32_t b) {
  return of_pairs<__half2>(a, b, [](auto x, auto y) { return __hadd2_rn(x, y); });
}
__device__ __forceinline__ uint32_t packed_half(BFloat16, uint32_t a) {
  return of_pairs<__nv_bfloat162>(a, 0x3f003f00u, [](auto x, auto half) { return __hmul2_rn(x, half); });
}
__device__ __forceinline__ uint32_t packed_half(Half, uint32_t a) {
  return of_pairs<__half2>(a, 0x38003800u, [](auto x, auto half) { return __hmul2_rn(x, half); });
}

template <class T, int kCount>
__device__ __forceinline__ Run<T, kCount> halved(Run<T, kCount> run) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < (kCount + 1) / 2; ++i) run.word[i] = packed_half(T{}, run.word[i]);
    return run;
  } else {
    T values[kCount];
    widen_run(run, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = multiply(values[i], T(0.5));
    return round_to_run<T>(values);
  }
}

// lateral + top, rounded, and then halved if `average`, rounded again.
template <class T, int kCount>
__device__ __forceinline__ Run<T, kCount> fused(const Run<T, kCount>& lateral, const Run<T, kCount>& top,
                                                bool average) {
  Run<T, kCount> sum;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < (kCount + 1) / 2; ++i) sum.word[i] = packed_add(T{}, lateral.word[i], top.word[i]);
  } else {
    T left[kCount], right[kCount];
    widen_run(lateral, left), widen_run(top, right);
#pragma unroll
    for (int i = 0; i < kCount; ++i) left[i] = add(left[i], right[i]);
    sum = round_to_run<T>(left);
  }
  return average ? halved(sum) : sum;
}

}  // namespace fpn_fast
