// SPDX-License-Identifier: Apache-2.0
// Floating-point values as integers in the same order, for sorting and selecting. Zero and minus zero are equal.
#pragma once

#include <cstdint>
#include <cstring>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

HOST_DEVICE uint32_t ordered_bits(float value) {
  uint32_t bits;
  value = add(value, 0.0f);
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

HOST_DEVICE uint64_t ordered_bits(double value) {
  uint64_t bits;
  value = add(value, 0.0);
  memcpy(&bits, &value, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

HOST_DEVICE float from_ordered_bits(uint32_t bits) {
  bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOST_DEVICE double from_ordered_bits(uint64_t bits) {
  bits = bits >> 63 ? bits ^ (uint64_t{1} << 63) : ~bits;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class acc_t>
using OrderedBits = decltype(ordered_bits(acc_t{}));

template <class acc_t>
struct RankKeyType {
  using type = uint64_t;
};
template <>
struct RankKeyType<double> {
  using type = unsigned __int128;
};

// A value and its index as one integer. Larger keys come first: higher values, then lower indices. The key of a finite
// value is not zero.
template <class acc_t>
using RankKey = typename RankKeyType<acc_t>::type;

template <class acc_t>
HOST_DEVICE RankKey<acc_t> rank_key(acc_t number, uint32_t index) {
  return RankKey<acc_t>{ordered_bits(number)} << 32 | static_cast<uint32_t>(~index);
}

template <class Key>
HOST_DEVICE uint32_t index_of_key(Key key) {
  return ~static_cast<uint32_t>(key);
}

template <class acc_t>
HOST_DEVICE acc_t number_of_key(RankKey<acc_t> key) {
  return from_ordered_bits(static_cast<OrderedBits<acc_t>>(key >> 32));
}

}  // namespace fpn_fast
