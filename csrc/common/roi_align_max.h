// SPDX-License-Identifier: Apache-2.0
// RoIAlign with the largest sample per bin: mmcv's pool_mode "max".
//
// Note [Winners]
// Samples are compared row by row, and a sample replaces the winner only if it is larger. So the first of equal samples
// wins, and a NaN never wins. A sample outside the map is zero and has no gradient. For a grid far larger than the map,
// only samples_near_map is compared. Where this range omits samples, they are outside the map, and so are some of those
// that remain on that side.
// The gradient goes to the pixels of the winner alone. The forward pass therefore stores the low 15 bits of the
// winner's row and column in the bin. samples_near_map has fewer than 2^15 samples along an axis, so the low bits
// identify one.
// The comparisons decide where gradients go. So values are computed in one order and without fused multiply-adds on
// every backend.
#pragma once

#include <limits>

#include "exact.h"
#include "host_device.h"
#include "roi_align.h"

namespace fpn_fast {

constexpr int kWinnerMask = (1 << 15) - 1;
constexpr int kNoWinner = -1;

// Largest map, in pixels along an axis. Samples are more than half a pixel apart wherever their number exceeds the
// margins.
constexpr int kMaxWinnerSize = 16000;
static_assert(2 * (kMaxWinnerSize + 1) + 2 * kSampleMargin < kWinnerMask);

HOST_DEVICE int winner_at(int row, int col) { return (row & kWinnerMask) << 16 | (col & kWinnerMask); }

// The winner's sample along one axis of `bin`. Pass `winner` for the columns and `winner >> 16` for the rows.
template <class acc_t>
HOST_DEVICE int winning_sample(const RoiAxis<acc_t>& axis, int bin, int winner) {
  const int first = samples_near_map(axis, bin).begin;
  return first + ((winner - first) & kWinnerMask);
}

// The sample between the pixels a, b (above) and c, d (below).
template <class acc_t>
HOST_DEVICE acc_t bilinear_value(const Taps<acc_t>& y, const Taps<acc_t>& x, acc_t a, acc_t b, acc_t c, acc_t d) {
  const acc_t above = add(multiply(x.weight_lo, a), multiply(x.weight_hi, b));
  const acc_t below = add(multiply(x.weight_lo, c), multiply(x.weight_hi, d));
  return add(multiply(y.weight_lo, above), multiply(y.weight_hi, below));
}

template <class acc_t>
struct LargestSample {
  acc_t value;
  int winner;
};

// The largest sample of bin (ph, pw). `pixel(y, x)` returns a pixel. The value is zero where no sample wins: there is
// none, or all are NaN or -inf.
template <class acc_t, class Pixel>
HOST_DEVICE LargestSample<acc_t> largest_sample(const RoiAxis<acc_t>& rows, const RoiAxis<acc_t>& cols, int ph, int pw,
                                                const Pixel& pixel) {
  constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  LargestSample<acc_t> largest{kLowest, kNoWinner};
  const Range row_samples = samples_near_map(rows, ph), col_samples = samples_near_map(cols, pw);
  for (int row = row_samples.begin; row < row_samples.end; ++row) {
    Taps<acc_t> y{};
    const bool row_on_map = sample_taps(rows, ph, row, y);
    for (int col = col_samples.begin; col < col_samples.end; ++col) {
      Taps<acc_t> x{};
      const bool on_map = row_on_map && sample_taps(cols, pw, col, x);
      acc_t value = 0;
      if (on_map) {
        value = bilinear_value(y, x, pixel(y.lo, x.lo), pixel(y.lo, x.hi), pixel(y.hi, x.lo), pixel(y.hi, x.hi));
      }
      if (value > largest.value) largest = {value, on_map ? winner_at(row, col) : kNoWinner};
    }
  }
  if (largest.value == kLowest) largest.value = 0;
  return largest;
}

// A range with all bins that have samples that read `pixel`.
template <class acc_t>
HOST_DEVICE Range bins_near_pixel(const RoiAxis<acc_t>& axis, int pooled, int pixel) {
  if (!(axis.bin > 0)) return {0, pooled};
  // A sample reads pixels less than one pixel away. Its coordinate is a sum of these terms, each rounded to 24 bits.
  const acc_t magnitude = (axis.start < 0 ? -axis.start : axis.start) + axis.bin * static_cast<acc_t>(pooled) + 1;
  const acc_t margin = 1 + magnitude * acc_t(0x1p-20);
  const auto clamped = [&](acc_t bin) { return bin > 0 ? (bin < pooled ? static_cast<int>(bin) : pooled) : 0; };
  // 2^-10 bins cover the rounding of the quotient, which is at most 1024.
  return {clamped((pixel - margin - axis.start) / axis.bin - acc_t(0x1p-10)),
          clamped((pixel + margin - axis.start) / axis.bin + 1 + acc_t(0x1p-10))};
}

// The weight with which the winner reads `pixel`, along one axis.
template <class acc_t>
HOST_DEVICE acc_t winner_weight(const RoiAxis<acc_t>& axis, int bin, int winner, int pixel) {
  Taps<acc_t> taps;
  if (!sample_taps(axis, bin, winning_sample(axis, bin, winner), taps)) return 0;
  // Beyond the border both taps are the same pixel, and the weight of the second is 0.
  return taps.lo == pixel ? taps.weight_lo : taps.hi == pixel ? taps.weight_hi : acc_t(0);
}

}  // namespace fpn_fast
