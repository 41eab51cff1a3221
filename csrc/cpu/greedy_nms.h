// SPDX-License-Identifier: Apache-2.0
// The kept boxes of a greedy suppression. A box is tested against many of them at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/boxes.h"
#include "isa.h"

namespace fpn_fast {

template <class acc_t>
class KeptBoxes {
 public:
  void reset(int64_t capacity) {
    size_ = 0;
    const int64_t rounded = (capacity + kChunk - 1) / kChunk * kChunk;
    constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
    // Unused entries hold a box that overlaps nothing.
    x1_.assign(rounded, kInfinity), y1_.assign(rounded, kInfinity);
    x2_.assign(rounded, -kInfinity), y2_.assign(rounded, -kInfinity);
    areas_.assign(rounded, acc_t(0));
  }

  int64_t size() const { return size_; }

  HOST_DEVICE void push(const Box<acc_t>& box) {
    x1_[size_] = box.x1, y1_[size_] = box.y1, x2_[size_] = box.x2, y2_[size_] = box.y2;
    areas_[size_++] = area(box);
  }

  // Whether one of the kept boxes [begin, end) suppresses `box`. It may also test boxes just before `begin`.
  HOST_DEVICE bool overlaps_one(const OverlapRule<acc_t>& rule, const Box<acc_t>& box, int64_t begin,
                                int64_t end) const {
    using Mask = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;
    const acc_t own = area(box);
    for (int64_t first = begin / kChunk * kChunk; first < end; first += kChunk) {
      const acc_t *left = x1_.data() + first, *top = y1_.data() + first;
      const acc_t *right = x2_.data() + first, *bottom = y2_.data() + first, *areas = areas_.data() + first;
      Mask any = 0;
      FPN_FAST_IVDEP
      for (int i = 0; i < kChunk; ++i) {
        const acc_t shared = intersection(Box<acc_t>{left[i], top[i], right[i], bottom[i]}, box);
        any |= may_overlap(rule, shared, areas[i] + own - shared) ? Mask(1) : Mask(0);
      }
      if (any == 0) continue;
      for (int64_t i = first; i < std::min<int64_t>(first + kChunk, end); ++i) {
        const acc_t shared = intersection(Box<acc_t>{x1_[i], y1_[i], x2_[i], y2_[i]}, box);
        if (overlaps(rule, shared, areas_[i] + own - shared)) return true;
      }
    }
    return false;
  }

 private:
  // Two AVX2 vectors of floats between branches.
  static constexpr int kChunk = 16;

  int64_t size_ = 0;
  std::vector<acc_t> x1_, y1_, x2_, y2_, areas_;
};

}  // namespace fpn_fast
