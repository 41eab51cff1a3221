// SPDX-License-Identifier: Apache-2.0
// RoIAlign along one axis.
//
// Note [RoIAlign is separable]
// A bin is the mean over a grid of bilinear samples. The weights, the border and the rule for samples outside the map
// act on each axis separately. So out = Wy F Wx^T / count, and the gradient is dF = Wy^T G Wx / count. A row of Wy
// holds the summed weights with which one bin reads each row of the map. This file computes those weights.
#pragma once

#include <cmath>
#include <cstdint>

#include "exact.h"
#include "host_device.h"
#include "resample.h"

namespace fpn_fast {

// An adaptive grid has one sample per pixel of a bin. A bin larger than this has no samples: almost all of its samples
// would lie outside the map, and their mean is zero up to rounding.
constexpr int kMaxAdaptiveSamples = 1 << 20;

// The largest distance, in samples, between the first or last sample on the map and its estimate. Coordinates of a bin
// below 2^20 pixels have an error below two pixels, and samples are more than half a pixel apart.
constexpr int kSampleMargin = 8;

template <class acc_t>
struct RoiAxis {
  acc_t start, bin;  // of the RoI's first bin, and the length of a bin, in pixels of the map
  int samples;       // per bin
  int size;          // of the map, in pixels
};

// [lo, hi] is in image pixels; `scale` is map pixels per image pixel; `size` is the map's.
template <class acc_t>
HOST_DEVICE RoiAxis<acc_t> make_roi_axis(acc_t lo, acc_t hi, acc_t scale, int size, int pooled, int sampling_ratio,
                                         bool aligned) {
  const acc_t offset = aligned ? acc_t(0.5) : acc_t(0);
  RoiAxis<acc_t> axis{subtract(multiply(lo, scale), offset), 0, sampling_ratio, size};
  acc_t extent = subtract(subtract(multiply(hi, scale), offset), axis.start);
  if (!aligned) extent = extent > 1 ? extent : acc_t(1);
  axis.bin = divide(extent, static_cast<acc_t>(pooled));
  if (sampling_ratio <= 0) {
    axis.samples = axis.bin > 0 && axis.bin <= kMaxAdaptiveSamples ? static_cast<int>(ceil(axis.bin)) : 0;
  }
  return axis;
}

template <class acc_t>
HOST_DEVICE acc_t inverse_count(const RoiAxis<acc_t>& rows, const RoiAxis<acc_t>& cols) {
  const acc_t count = static_cast<acc_t>(rows.samples) * static_cast<acc_t>(cols.samples);
  return 1 / (count > 1 ? count : acc_t(1));
}

template <class acc_t>
HOST_DEVICE acc_t sample_coordinate(const RoiAxis<acc_t>& axis, int bin, int sample) {
  const acc_t within = divide(multiply(sample + acc_t(0.5), axis.bin), static_cast<acc_t>(axis.samples));
  return add(add(axis.start, multiply(static_cast<acc_t>(bin), axis.bin)), within);
}

// Sets the pixels that a sample reads; false if it is outside the map. A sample up to one pixel outside reads the
// border.
template <class acc_t>
HOST_DEVICE bool sample_taps(const RoiAxis<acc_t>& axis, int bin, int sample, Taps<acc_t>& taps) {
  acc_t coordinate = sample_coordinate(axis, bin, sample);
  // A NaN fails this test.
  if (!(coordinate >= -1 && coordinate <= axis.size)) return false;
  coordinate = coordinate > 0 ? coordinate : acc_t(0);
  const int floor = static_cast<int>(coordinate);
  if (floor >= axis.size - 1) {
    taps = {axis.size - 1, axis.size - 1, 1, 0};
  } else {
    const acc_t weight_hi = coordinate - floor;
    taps = {floor, floor + 1, 1 - weight_hi, weight_hi};
  }
  return true;
}

// A range with all samples of `bin` that lie in [lo, hi]. For a small grid it is the whole grid.
template <class acc_t>
HOST_DEVICE Range samples_between(const RoiAxis<acc_t>& axis, int bin, int lo, int hi) {
  if (axis.samples <= 2 * kSampleMargin || !(axis.bin > 0)) return {0, axis.samples};
  const acc_t base = add(axis.start, multiply(static_cast<acc_t>(bin), axis.bin));
  const acc_t per_pixel = divide(static_cast<acc_t>(axis.samples), axis.bin);
  const auto estimate = [&](int pixel, int margin) {
    return add(multiply(subtract(static_cast<acc_t>(pixel), base), per_pixel), static_cast<acc_t>(margin));
  };
  const auto clamped = [&](acc_t sample) {
    return sample > 0 ? (sample < axis.samples ? static_cast<int>(sample) : axis.samples) : 0;
  };
  return {clamped(estimate(lo, -kSampleMargin)), clamped(estimate(hi, kSampleMargin))};
}

// A range with all samples of `bin` that lie on the map. An adaptive grid can be far larger.
template <class acc_t>
HOST_DEVICE Range samples_near_map(const RoiAxis<acc_t>& axis, int bin) {
  return samples_between(axis, bin, -1, axis.size);
}

}  // namespace fpn_fast
