// SPDX-License-Identifier: Apache-2.0
// Boxes, and when two of them overlap too much.
//
// Note [Overlap without division]
// torchvision's rule is `intersection / union > threshold`, divided and compared in the boxes' type. A quotient that is
// rounded to more than the threshold was more than (1 - eps) of it before, so `intersection >= slope * union` with a
// slope a little below the threshold holds wherever the rule does. Kernels test that first, for many boxes at once, and
// divide only where it holds: the decision stays torchvision's, bit for bit.
#pragma once

#include <cmath>
#include <limits>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

// As in fpn_fast/ops/nms.py.
enum class NmsConvention : int { kDivision = 0, kProduct = 1, kOffset = 2 };

template <class acc_t>
struct Box {
  acc_t x1, y1, x2, y2;
};

// Written without isfinite: a difference with itself is zero for finite numbers alone.
template <class acc_t>
HOST_DEVICE bool is_finite(acc_t value) {
  return subtract(value, value) == 0;
}

template <class acc_t>
HOST_DEVICE bool is_finite(const Box<acc_t>& box) {
  return is_finite(box.x1) && is_finite(box.y1) && is_finite(box.x2) && is_finite(box.y2);
}

template <class acc_t>
HOST_DEVICE acc_t area(const Box<acc_t>& box) {
  return multiply(subtract(box.x2, box.x1), subtract(box.y2, box.y1));
}

template <class acc_t>
HOST_DEVICE acc_t intersection(const Box<acc_t>& a, const Box<acc_t>& b) {
  const acc_t left = a.x1 > b.x1 ? a.x1 : b.x1, right = a.x2 < b.x2 ? a.x2 : b.x2;
  const acc_t top = a.y1 > b.y1 ? a.y1 : b.y1, bottom = a.y2 < b.y2 ? a.y2 : b.y2;
  const acc_t width = subtract(right, left), height = subtract(bottom, top);
  return multiply(width > 0 ? width : acc_t(0), height > 0 ? height : acc_t(0));
}

template <class acc_t>
struct OverlapRule {
  acc_t threshold;
  acc_t slope, floor;  // Note [Overlap without division]
  bool product;        // compare intersection with threshold * union: mmcv's rule
};

template <class acc_t>
OverlapRule<acc_t> make_overlap_rule(double threshold, NmsConvention convention) {
  OverlapRule<acc_t> rule{static_cast<acc_t>(threshold), 0, 0, convention == NmsConvention::kProduct};
  // torchvision compares a quotient with a double: with the largest number of the boxes' type that is not above it.
  if (!rule.product && rule.threshold > threshold) {
    rule.threshold = std::nextafter(rule.threshold, -std::numeric_limits<acc_t>::infinity());
  }
  // Boxes that do not touch have a quotient above a threshold below zero, and a product above a union below zero.
  const bool must_touch = rule.threshold >= 0 && !rule.product;
  if (rule.threshold >= 0) rule.slope = rule.threshold * (1 - 16 * std::numeric_limits<acc_t>::epsilon());
  rule.floor = must_touch ? std::numeric_limits<acc_t>::denorm_min() : -std::numeric_limits<acc_t>::infinity();
  return rule;
}

// Whether `overlaps` can hold; NaN says it can.
template <class acc_t>
HOST_DEVICE bool may_overlap(const OverlapRule<acc_t>& rule, acc_t shared, acc_t united) {
  const acc_t bound = multiply(rule.slope, united);
  return !(shared < (bound > rule.floor ? bound : rule.floor));
}

template <class acc_t>
HOST_DEVICE bool overlaps(const OverlapRule<acc_t>& rule, acc_t shared, acc_t united) {
  return rule.product ? shared > multiply(rule.threshold, united) : divide(shared, united) > rule.threshold;
}

}  // namespace fpn_fast
