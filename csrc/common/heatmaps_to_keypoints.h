// SPDX-License-Identifier: Apache-2.0
// A heatmap resized to its box, and its peak. Every backend uses this order of operations and rounds after each, so
// that all find the same position: fpn_fast/reference/heatmaps_to_keypoints.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

// A box with a longer side gives zeros. This keeps positions in 32 bits and bounds the time of a box.
constexpr int kLongestSide = 8192;

// One side of a box and the number of pixels that cover it. There are none if the side is too long or not finite.
template <class T>
struct BoxSide {
  T lo, step;  // start of the side, and length of a pixel
  int pixels;

  HOST_DEVICE BoxSide(T begin, T end) : lo(begin), step(0), pixels(0) {
    const T extent = subtract(end, begin);
    const T length = extent > 1 ? extent : T(1);
    // A NaN fails this test.
    constexpr T kLargest = std::numeric_limits<T>::max();
    if (!(std::fabs(begin) <= kLargest && std::fabs(end) <= kLargest && length <= kLongestSide)) return;
    pixels = static_cast<int>(length);
    pixels += static_cast<T>(pixels) < length;
    step = divide(length, static_cast<T>(pixels));
  }

  HOST_DEVICE T centre_of(int pixel) const { return add(multiply(add(static_cast<T>(pixel), T(0.5)), step), lo); }
};

template <class T>
struct KeypointBox {
  BoxSide<T> x, y;

  HOST_DEVICE explicit KeypointBox(const T* corners) : x(corners[0], corners[2]), y(corners[1], corners[3]) {}
  HOST_DEVICE bool empty() const { return x.pixels == 0 || y.pixels == 0; }

  HOST_DEVICE void keypoint(int position, float* point) const {
    point[0] = static_cast<float>(x.centre_of(position % x.pixels));
    point[1] = static_cast<float>(y.centre_of(position / x.pixels));
    point[2] = 1;
  }
};

// The four source pixels of a resized pixel, from `first` on, and their weights.
template <class acc_t>
struct CubicTaps {
  int first;
  acc_t weights[4];
};

// Keys' cubic kernel with a = -0.75: up to a distance of one pixel, and from one to two.
template <class acc_t>
HOST_DEVICE acc_t cubic_near(acc_t x) {
  const acc_t inner = subtract(multiply(acc_t(1.25), x), acc_t(2.25));
  return add(multiply(multiply(inner, x), x), acc_t(1));
}

template <class acc_t>
HOST_DEVICE acc_t cubic_far(acc_t x) {
  const acc_t inner = subtract(multiply(add(multiply(acc_t(-0.75), x), acc_t(3.75)), x), acc_t(6));
  return add(multiply(inner, x), acc_t(3));
}

// The taps of pixel `pixel`; scale = size / pixels of the box. Clamp taps outside [0, size) with `clamp_tap`.
template <class acc_t>
HOST_DEVICE CubicTaps<acc_t> cubic_taps(int pixel, acc_t scale, int size) {
  const acc_t source = subtract(multiply(scale, add(static_cast<acc_t>(pixel), acc_t(0.5))), acc_t(0.5));
  const acc_t last = static_cast<acc_t>(size - 1), below = std::floor(source);
  const acc_t second = below < last ? below : last;
  acc_t t = subtract(source, second);
  t = t < 1 ? t : acc_t(1);
  const acc_t rest = subtract(acc_t(1), t);
  return {static_cast<int>(second) - 1,
          {cubic_far(add(t, acc_t(1))), cubic_near(t), cubic_near(rest), cubic_far(add(rest, acc_t(1)))}};
}

HOST_DEVICE int clamp_tap(int tap, int size) {
  tap = tap > 0 ? tap : 0;
  return tap < size ? tap : size - 1;
}

template <class acc_t>
HOST_DEVICE acc_t blend(const acc_t (&weights)[4], acc_t a, acc_t b, acc_t c, acc_t d) {
  const acc_t two = add(multiply(weights[0], a), multiply(weights[1], b));
  return add(add(two, multiply(weights[2], c)), multiply(weights[3], d));
}

template <class acc_t>
struct Peak {
  acc_t value;
  int position;

  // A NaN ranks above every value. Of equal values the first ranks higher.
  HOST_DEVICE bool is_below(const Peak& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan || other_nan) return other_nan && (!nan || other.position < position);
    return value < other.value || (value == other.value && other.position < position);
  }
};

// The start of a search. `first` is the result where every value is -inf.
template <class acc_t>
HOST_DEVICE Peak<acc_t> no_peak(int first = 0) {
  return {-std::numeric_limits<acc_t>::infinity(), first};
}

}  // namespace fpn_fast
