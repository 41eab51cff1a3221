// SPDX-License-Identifier: Apache-2.0
// Matching of anchors to ground truths by IoU.
//
// Note [Matching without the matrix]
// A low-quality match needs, for each ground truth, the highest IoU that it has with any anchor: a maximum over the
// matrix's rows, where the best ground truth of an anchor is one over its columns. Both are found in one pass that
// keeps one number for each row and each column. A second pass finds the anchors that reach a row's maximum. Its
// IoUs are the first's, bit for bit, and an anchor's own best IoU bounds them all, so it looks at few.
// Boxes that do not overlap have an IoU of 0, and nothing but a higher one counts: leaving out ground truths that a
// group of anchors does not reach changes nothing.
#pragma once

#include <cstdint>

#include "boxes.h"
#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

constexpr int64_t kBelowLowThreshold = -1;
constexpr int64_t kBetweenThresholds = -2;

// inter / ((area of a + area of b) - inter), torchvision's operations in its order; NaN where both are empty.
template <class T>
HOST_DEVICE T box_iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T inter = intersection(a, b);
  return divide(inter, subtract(add(area_a, area_b), inter));
}

// Whether boxes `a` and `b` have any area in common.
template <class T>
HOST_DEVICE bool boxes_meet(const Box<T>& a, const Box<T>& b) {
  return a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2;
}

template <class T>
struct MatchRule {
  T high, low;
  bool low_quality;

  HOST_DEVICE int64_t code(T best, int64_t match) const {
    return best < low ? kBelowLowThreshold : best < high ? kBetweenThresholds : match;
  }
};

// One level of a pyramid whose anchors are not stored.
struct AnchorLevel {
  int64_t first;       // of its anchors among all
  int64_t first_cell;  // of its cell anchors among all
  int cells;           // anchors at each position
  int64_t height, width;
  int64_t stride_y, stride_x;
};

}  // namespace fpn_fast
