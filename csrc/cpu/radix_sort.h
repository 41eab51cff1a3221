// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fpn_fast {

template <class Key>
struct Keyed {
  Key key;
  uint32_t value;
};

// Sorts by ascending key. The sort is stable, starts with the least significant digit, and skips digits in which all
// keys agree.
template <class Key>
void radix_sort(std::vector<Keyed<Key>>& items) {
  constexpr int kDigitBits = 11;  // 2048 counters fit into the L1 cache
  constexpr int kDigits = 1 << kDigitBits;
  if (items.empty()) return;
  Key all = items[0].key, any = items[0].key;
  for (const auto& item : items) all &= item.key, any |= item.key;
  const Key varying = all ^ any;
  std::vector<Keyed<Key>> other(items.size());
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += kDigitBits) {
    if (((varying >> shift) & (kDigits - 1)) == 0) continue;
    uint32_t place[kDigits] = {};
    for (const auto& item : items) ++place[(item.key >> shift) & (kDigits - 1)];
    uint32_t sum = 0;
    for (uint32_t& each : place) sum += std::exchange(each, sum);
    for (const auto& item : items) other[place[(item.key >> shift) & (kDigits - 1)]++] = item;
    items.swap(other);
  }
}

}  // namespace fpn_fast
