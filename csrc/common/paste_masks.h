// SPDX-License-Identifier: Apache-2.0
// The position of a mask in its image, along one axis.
#pragma once

#include <cmath>
#include <cstdint>

#include "exact.h"
#include "host_device.h"
#include "resample.h"

namespace fpn_fast {

// A corner farther from the image's origin gives an empty mask. This keeps sizes in 32 bits.
constexpr double kFarthestCorner = 1 << 29;

// The first and last pixel of a side, grown about its centre and truncated to integers. False: a corner is too far away
// or not finite.
template <class T>
HOST_DEVICE bool grow_axis(T lo, T hi, T scale, int& first, int& last) {
  const T half = multiply(multiply(subtract(hi, lo), T(0.5)), scale);
  const T centre = multiply(add(hi, lo), T(0.5));
  const T begin = subtract(centre, half), end = add(centre, half);
  // A NaN fails this test.
  if (!(fabs(begin) <= kFarthestCorner && fabs(end) <= kFarthestCorner)) return false;
  first = static_cast<int>(begin), last = static_cast<int>(end);
  return true;
}

// The first and last pixel of a grown box along each axis. An invalid box is empty: 0 to -1.
struct GrownBox {
  int left = 0, right = -1, top = 0, bottom = -1;
};

template <class T>
HOST_DEVICE GrownBox grow_box(const T* corners, T scale) {
  GrownBox box;
  const bool found = grow_axis(corners[0], corners[2], scale, box.left, box.right) &&
                     grow_axis(corners[1], corners[3], scale, box.top, box.bottom);
  return found ? box : GrownBox{};
}

// The part of the image that the box covers, and the mask of `size` pixels resized to it.
template <class acc_t>
struct PasteAxis {
  int origin;  // the box's first pixel, which may lie outside the image
  Range pixels;
  Axis<acc_t> axis;

  HOST_DEVICE PasteAxis(int first, int last, int extent, int size) : origin(first) {
    pixels.begin = first > 0 ? first : 0;
    pixels.end = last + 1 < extent ? last + 1 : extent;
    if (pixels.end < pixels.begin) pixels.begin = pixels.end = 0;
    const int resized = last - first + 1;
    axis = make_axis<acc_t>(size, resized > 1 ? resized : 1, Resample::kBilinear);
  }

  HOST_DEVICE Taps<acc_t> taps(int pixel) const { return bilinear_source(axis, pixel - origin); }
};

}  // namespace fpn_fast
