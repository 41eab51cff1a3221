// SPDX-License-Identifier: Apache-2.0
// Eight accumulators as one vector, for sums that live across inner loops, where compilers do not vectorise.
#pragma once

#include <cstring>

#include "../common/scalar.h"
#include "isa.h"

namespace fpn_fast {

constexpr int kPackLanes = 8;

template <class acc_t>
using Pack __attribute__((vector_size(kPackLanes * sizeof(acc_t)))) = acc_t;

template <class T>
HOST_DEVICE void load_pack(const T* source, Pack<acc_type<T>>& pack) {
  acc_type<T> values[kPackLanes];
  for (int i = 0; i < kPackLanes; ++i) values[i] = to_acc(source[i]);
  std::memcpy(&pack, values, sizeof pack);
}

template <class T>
HOST_DEVICE void store_pack(T* target, const Pack<acc_type<T>>& pack) {
  for (int i = 0; i < kPackLanes; ++i) target[i] = Rounded<T>::from(pack[i]);
}

// Interleaves the low or high halves of each 128-bit lane of `a` and `b`, in one instruction.
#define FPN_FAST_INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define FPN_FAST_INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)

template <class acc_t>
HOST_DEVICE void transpose(Pack<acc_t> (&rows)[kPackLanes]) {
  static_assert(kPackLanes == 8);
  Pack<acc_t> pairs[kPackLanes], quads[kPackLanes];
  FPN_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = FPN_FAST_INTERLEAVE_LOW(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = FPN_FAST_INTERLEAVE_HIGH(rows[2 * i], rows[2 * i + 1]);
  }
  FPN_FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    FPN_FAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Pack<acc_t>&a = pairs[4 * half + i], &b = pairs[4 * half + i + 2];
      quads[4 * half + 2 * i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[4 * half + 2 * i + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  FPN_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#undef FPN_FAST_INTERLEAVE_LOW
#undef FPN_FAST_INTERLEAVE_HIGH

}  // namespace fpn_fast
