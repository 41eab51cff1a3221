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

}  // namespace fpn_fast
