// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fpn_fast {

// Combines the values of a warp's threads, and returns the result to each. `combine` must be associative and
// commutative.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value = combine(value, __shfl_xor_sync(~0u, value, delta));
  return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <class T>
__device__ __forceinline__ T warp_maximum(T value) {
  return warp_reduce(value, [](T a, T b) { return b > a ? b : a; });
}

// Sets `before` to the sum of the values of lower lanes. Returns the sum of all.
__device__ __forceinline__ int warp_prefix(int value, int& before) {
  const unsigned lane = threadIdx.x % 32;
  int sum = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += other;
  }
  before = sum - value;
  return __shfl_sync(~0u, sum, 31);
}

}  // namespace fpn_fast
