// SPDX-License-Identifier: Apache-2.0
// Numbers as integers in the same order, for sorting and selecting. Zero and minus zero are one number.
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

}  // namespace fpn_fast
