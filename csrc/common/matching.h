// SPDX-License-Identifier: Apache-2.0
// Matching of anchors to ground truths by IoU.
//
// Note [Matching without the matrix]
// A low-quality match needs the highest IoU of each ground truth with any anchor: a maximum over the rows of the IoU
// matrix. The best ground truth of an anchor is a maximum over its columns. One pass finds both and keeps one value per
// row and column. A second pass finds the anchors that reach a row's maximum: it recomputes the same IoUs bit for bit.
// An anchor's own best IoU bounds all of its IoUs, so this pass skips the ground truths whose maximum is higher.
// Boxes that do not overlap have an IoU of 0, and only a higher IoU changes a match. So a group of anchors can skip the
// ground truths that it does not reach.
//
// Note [Ground truths that are not finite]
// torchvision's IoU with a NaN is NaN, and its maximum counts a NaN as the highest. So every anchor of the image
// matches the first such ground truth, whose coordinates make the loss NaN: bad data shows. Kernels do the same for an
// infinite ground truth, whose IoUs in torchvision are 0 or NaN.
#pragma once

#include <cstdint>

#include "boxes.h"
#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

constexpr int64_t kBelowLowThreshold = -1;
constexpr int64_t kBetweenThresholds = -2;

// inter / ((area of a + area of b) - inter) in torchvision's order of operations. NaN where both areas are 0.
template <class T>
HOST_DEVICE T box_iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T inter = intersection(a, b);
  return divide(inter, subtract(add(area_a, area_b), inter));
}

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

// One level of a pyramid. Its anchors are not stored.
struct AnchorLevel {
  int64_t first;       // index of its first anchor
  int64_t first_cell;  // index of its first cell anchor
  int cells;           // anchors per position
  int64_t height, width;
  int64_t stride_y, stride_x;
};

}  // namespace fpn_fast
