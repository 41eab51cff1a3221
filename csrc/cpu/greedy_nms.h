// SPDX-License-Identifier: Apache-2.0
// The kept boxes of a greedy suppression, against which each further box is tested, many at a time.
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
  // Empty, with room for `capacity` boxes.
  void reset(int64_t capacity) {
    size_ = 0;
    const int64_t rounded = (capacity + kChunk - 1) / kChunk * kChunk;
    if (rounded > capacity_) {
      capacity_ = rounded;
      values_.resize(5 * capacity_);
    }
    // A place not taken yet holds a box that meets nothing.
    std::fill(x1(), x1() + rounded, std::numeric_limits<acc_t>::infinity());
    std::fill(y1(), y1() + rounded, std::numeric_limits<acc_t>::infinity());
    std::fill(x2(), x2() + rounded, -std::numeric_limits<acc_t>::infinity());
    std::fill(y2(), y2() + rounded, -std::numeric_limits<acc_t>::infinity());
    std::fill(area(), area() + rounded, acc_t(0));
  }

  int64_t size() const { return size_; }

  HOST_DEVICE void push(const Box<acc_t>& box) {
    x1()[size_] = box.x1, y1()[size_] = box.y1, x2()[size_] = box.x2, y2()[size_] = box.y2;
    area()[size_] = fpn_fast::area(box);
    ++size_;
  }

  // Whether `box` overlaps one of the kept boxes [begin, end); those just before `begin` may be looked at too.
  HOST_DEVICE bool overlaps_one(const OverlapRule<acc_t>& rule, const Box<acc_t>& box, int64_t begin,
                                int64_t end) const {
    using Mask = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;
    const acc_t own = fpn_fast::area(box);
    for (int64_t first = begin / kChunk * kChunk; first < end; first += kChunk) {
      const acc_t *left = x1() + first, *top = y1() + first, *right = x2() + first, *bottom = y2() + first;
      const acc_t* areas = area() + first;
      Mask any = 0;
      FPN_FAST_IVDEP
      for (int i = 0; i < kChunk; ++i) {
        const acc_t shared = intersection(Box<acc_t>{left[i], top[i], right[i], bottom[i]}, box);
        any |= may_overlap(rule, shared, areas[i] + own - shared) ? Mask(1) : Mask(0);
      }
      if (any == 0) continue;
      for (int64_t i = first; i < std::min<int64_t>(first + kChunk, end); ++i) {
        const acc_t shared = intersection(Box<acc_t>{x1()[i], y1()[i], x2()[i], y2()[i]}, box);
        if (overlaps(rule, shared, area()[i] + own - shared)) return true;
      }
    }
    return false;
  }

 private:
  // Two vectors of AVX2 floats between branches.
  static constexpr int kChunk = 16;

  acc_t* x1() { return values_.data(); }
  acc_t* y1() { return values_.data() + capacity_; }
  acc_t* x2() { return values_.data() + 2 * capacity_; }
  acc_t* y2() { return values_.data() + 3 * capacity_; }
  acc_t* area() { return values_.data() + 4 * capacity_; }
  const acc_t* x1() const { return values_.data(); }
  const acc_t* y1() const { return values_.data() + capacity_; }
  const acc_t* x2() const { return values_.data() + 2 * capacity_; }
  const acc_t* y2() const { return values_.data() + 3 * capacity_; }
  const acc_t* area() const { return values_.data() + 4 * capacity_; }

  int64_t size_ = 0, capacity_ = 0;
  std::vector<acc_t> values_;
};

}  // namespace fpn_fast
