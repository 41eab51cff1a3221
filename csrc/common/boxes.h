// SPDX-License-Identifier: Apache-2.0
// Boxes, and the rule by which one suppresses another.
//
// Note [Overlap without division]
// torchvision suppresses a box where `intersection / union > threshold`, divided and compared in the boxes' type. A
// quotient that rounds to more than the threshold was above (1 - eps) of it before rounding. So `intersection >= slope
// * union`, with a slope slightly below the threshold, holds wherever the rule does. Kernels test this first, for many
// boxes at once, and divide only where it holds. A slope slightly above the threshold tells where the rule holds for
// sure, so that GPU kernels hardly ever divide. The decisions equal torchvision's bit for bit.
#pragma once

#include <cmath>
#include <limits>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

// The values are those of fpn_fast/ops/nms.py.
enum class NmsConvention : int { kDivision = 0, kProduct = 1, kOffset = 2 };

template <class acc_t>
struct Box {
  acc_t x1, y1, x2, y2;
};

// `value - value` is zero for finite values only.
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
  const acc_t left = larger(a.x1, b.x1), right = smaller(a.x2, b.x2);
  const acc_t top = larger(a.y1, b.y1), bottom = smaller(a.y2, b.y2);
  return multiply(larger(subtract(right, left), acc_t(0)), larger(subtract(bottom, top), acc_t(0)));
}

template <class acc_t>
struct OverlapRule {
  acc_t threshold;
  acc_t slope, floor;  // Note [Overlap without division]
  acc_t upper_slope, upper_floor;
  bool product;  // mmcv's rule: compares the intersection with threshold * union
};

template <class acc_t>
OverlapRule<acc_t> make_overlap_rule(double threshold, NmsConvention convention) {
  OverlapRule<acc_t> rule{static_cast<acc_t>(threshold), 0, 0, 0, 0, convention == NmsConvention::kProduct};
  // torchvision compares the quotient with a double. The largest value of the boxes' type that is not above that double
  // decides alike.
  if (!rule.product && rule.threshold > threshold) {
    rule.threshold = std::nextafter(rule.threshold, -std::numeric_limits<acc_t>::infinity());
  }
  // With a threshold below zero, boxes that do not touch pass too: their quotient is 0.
  const bool must_touch = rule.threshold >= 0 && !rule.product;
  if (rule.threshold >= 0) rule.slope = rule.threshold * (1 - 16 * std::numeric_limits<acc_t>::epsilon());
  rule.floor = must_touch ? std::numeric_limits<acc_t>::denorm_min() : -std::numeric_limits<acc_t>::infinity();
  // Below the normal numbers, rounding is not a matter of eps.
  constexpr acc_t kNormal = std::numeric_limits<acc_t>::min();
  const bool has_upper = must_touch && rule.threshold >= kNormal;
  rule.upper_slope = has_upper ? rule.threshold * (1 + 16 * std::numeric_limits<acc_t>::epsilon()) : acc_t(0);
  rule.upper_floor = has_upper ? kNormal : std::numeric_limits<acc_t>::infinity();
  return rule;
}

// Whether `overlaps` can be true. True for NaN.
template <class acc_t>
HOST_DEVICE bool may_overlap(const OverlapRule<acc_t>& rule, acc_t shared, acc_t united) {
  return !(shared < larger(multiply(rule.slope, united), rule.floor));
}

// Whether `overlaps` is true for sure. False for NaN.
template <class acc_t>
HOST_DEVICE bool surely_overlaps(const OverlapRule<acc_t>& rule, acc_t shared, acc_t united) {
  return (shared > rule.upper_floor) & (shared > multiply(rule.upper_slope, united));
}

template <class acc_t>
HOST_DEVICE bool overlaps(const OverlapRule<acc_t>& rule, acc_t shared, acc_t united) {
  return rule.product ? shared > multiply(rule.threshold, united) : divide(shared, united) > rule.threshold;
}

}  // namespace fpn_fast
