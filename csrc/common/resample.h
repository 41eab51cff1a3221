// SPDX-License-Identifier: Apache-2.0
// Resampling along one axis: forward (the source of a pixel) and inverse (the pixels that read a source).
//
// Note [Axis resampling]
// In both modes the source index never decreases with the destination. So the pixels that read one source form a range,
// and a gradient can be gathered instead of scattered. The ends of the range are estimated and then corrected with
// `source_floor` itself, so forward and inverse agree exactly, whatever the rounding.
// `nearest` is PyTorch's float32 formula min(floor(dst * float32(in / out)), in - 1), whatever the data's type. Integer
// arithmetic gives other indices for sizes such as 26 -> 44. `bilinear` is PyTorch's source coordinate max(scale * (dst
// + offset) - offset, 0), with offset 1/2 (align_corners=False) or 0 (align_corners=True).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

enum class Resample : int { kNearest = 0, kBilinear = 1, kBilinearAlignCorners = 2 };

template <class acc_t>
struct Axis {
  int in, out;
  acc_t scale;    // source pixels per destination pixel
  acc_t inverse;  // destination pixels per source pixel; 0 where scale is 0
  acc_t offset;   // from a pixel's index to its centre
};

struct Range {
  int begin, end;
};

template <class acc_t>
struct Taps {
  int lo, hi;
  acc_t weight_lo, weight_hi;
};

template <class acc_t>
HOST_DEVICE Axis<acc_t> make_axis(int in, int out, Resample mode) {
  Axis<acc_t> axis{in, out, 0, 0, 0};
  if (mode == Resample::kNearest) {
    axis.scale = static_cast<float>(in) / static_cast<float>(out);
  } else if (mode == Resample::kBilinear) {
    axis.scale = static_cast<acc_t>(in) / out;
    axis.offset = static_cast<acc_t>(0.5);
  } else if (out > 1) {
    axis.scale = static_cast<acc_t>(in - 1) / (out - 1);
  }
  if (axis.scale > 0) axis.inverse = 1 / axis.scale;
  return axis;
}

template <class acc_t>
HOST_DEVICE int nearest_source(const Axis<acc_t>& axis, int dst) {
  const int src = static_cast<int>(floorf(static_cast<float>(dst) * static_cast<float>(axis.scale)));
  return src < axis.in - 1 ? src : axis.in - 1;
}

template <class acc_t>
HOST_DEVICE Taps<acc_t> bilinear_source(const Axis<acc_t>& axis, int dst) {
  const acc_t centre = add(static_cast<acc_t>(dst), axis.offset);
  acc_t coordinate = subtract(multiply(axis.scale, centre), axis.offset);
  coordinate = coordinate > 0 ? coordinate : 0;
  const int floor = static_cast<int>(coordinate);
  const int lo = floor < axis.in - 1 ? floor : axis.in - 1;
  acc_t weight_hi = subtract(coordinate, static_cast<acc_t>(lo));
  weight_hi = weight_hi < 1 ? weight_hi : 1;
  return {lo, lo < axis.in - 1 ? lo + 1 : lo, 1 - weight_hi, weight_hi};
}

template <bool kBilinear, class acc_t>
HOST_DEVICE int source_floor(const Axis<acc_t>& axis, int dst) {
  if constexpr (kBilinear) return bilinear_source(axis, dst).lo;
  return nearest_source(axis, dst);
}

// The first destination whose source is at least `src`, or `axis.out`.
template <bool kBilinear, class acc_t>
HOST_DEVICE int first_target(const Axis<acc_t>& axis, int src) {
  if (src <= 0) return 0;
  if (src >= axis.in || axis.inverse == 0) return axis.out;
  const acc_t estimate = (src + axis.offset) * axis.inverse - axis.offset;
  int dst = estimate < axis.out ? static_cast<int>(estimate) : axis.out;
  dst = dst > 0 ? dst : 0;
  while (dst > 0 && source_floor<kBilinear>(axis, dst - 1) >= src) --dst;
  while (dst < axis.out && source_floor<kBilinear>(axis, dst) < src) ++dst;
  return dst;
}

template <bool kBilinear, class acc_t>
HOST_DEVICE Range targets(const Axis<acc_t>& axis, int src) {
  const int first = kBilinear ? src - 1 : src;
  return {first_target<kBilinear>(axis, first), first_target<kBilinear>(axis, src + 1)};
}

// The weight with which `dst` reads `src`. At the border both taps are the same pixel, and their weights add.
template <class acc_t>
HOST_DEVICE acc_t bilinear_weight(const Axis<acc_t>& axis, int dst, int src) {
  const Taps<acc_t> taps = bilinear_source(axis, dst);
  return (taps.lo == src ? taps.weight_lo : 0) + (taps.hi == src ? taps.weight_hi : 0);
}

// Note [Windows]
// Max pooling along one axis. Pixel `dst` of the result is the maximum of the pixels of its window, which may reach
// beyond the map. Both ends of a window never decrease with the destination, so the windows that hold one pixel form a
// range too. Adaptive windows are PyTorch's: from floor(dst * in / out) to ceil((dst + 1) * in / out).
struct Windows {
  int in, out;
  int size, stride, before;  // size 0: adaptive; before: pixels of padding before the map
  bool zeros;                // the padding takes part as zeros, otherwise not at all
};

HOST_DEVICE Range window(const Windows& axis, int dst) {
  if (axis.size == 0) {
    const int64_t in = axis.in;
    return {static_cast<int>(dst * in / axis.out), static_cast<int>(((dst + 1) * in + axis.out - 1) / axis.out)};
  }
  const int begin = dst * axis.stride - axis.before;
  return {begin, begin + axis.size};
}

// The destinations whose windows hold `src`.
HOST_DEVICE Range window_targets(const Windows& axis, int src) {
  if (axis.size == 0) {
    const int64_t out = axis.out;
    return {static_cast<int>(src * out / axis.in), static_cast<int>(((src + 1) * out - 1) / axis.in) + 1};
  }
  const int padded = src + axis.before;
  const int first = padded < axis.size ? 0 : (padded - axis.size) / axis.stride + 1;
  const int end = padded / axis.stride + 1;
  return {first, end < axis.out ? end : axis.out};
}

// The widest window.
HOST_DEVICE int window_size(const Windows& axis) {
  return axis.size > 0 ? axis.size : (axis.in + axis.out - 1) / axis.out + 1;
}

}  // namespace fpn_fast
