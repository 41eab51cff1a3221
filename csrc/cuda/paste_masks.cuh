// SPDX-License-Identifier: Apache-2.0
// Mask pasting, with one launch for all masks. A thread owns 16 bytes of the output, so bool output takes one store per
// 16 pixels. Few threads lie in a box; the others write zeros.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/exact.h"
#include "../common/feature_map.h"
#include "../common/paste_masks.h"
#include "../common/scalar.h"
#include "launch.h"

namespace fpn_fast {

// 8 warps, which share nothing.
constexpr int kPasteThreads = 256;

template <class T>
struct MaskPasting {
  const T* masks;     // [count, size, size]
  const void* boxes;  // [count, 4]
  bool double_boxes;  // the boxes are double, not float
  double box_scale;   // factor by which boxes grow
  int64_t count;
  int size, padding, height, width;
  // One of the two is set, [count, height, width], at a multiple of 16 bytes: the values, or whether they exceed the
  // threshold.
  T* values;
  bool* above;
  acc_type<T> threshold;
};

template <class T>
__device__ __forceinline__ GrownBox grown_box(const MaskPasting<T>& pasting, int64_t k) {
  if (pasting.double_boxes) return grow_box(static_cast<const double*>(pasting.boxes) + 4 * k, pasting.box_scale);
  return grow_box(static_cast<const float*>(pasting.boxes) + 4 * k, static_cast<float>(pasting.box_scale));
}

// Writes elements [begin, end) of `values` that lie in the box. Element i is pixel `x + i` of row `y` of image `k`.
template <bool kAbove, class T, class out_t, int kRun>
__device__ __forceinline__ void paste_in_row(const MaskPasting<T>& pasting, int64_t k, int y, int x, int begin, int end,
                                             out_t (&values)[kRun]) {
  using acc_t = acc_type<T>;
  const int padded = pasting.size + 2 * pasting.padding;
  const GrownBox box = grown_box(pasting, k);
  const PasteAxis<acc_t> across(box.left, box.right, pasting.width, padded);
  const PasteAxis<acc_t> down(box.top, box.bottom, pasting.height, padded);
  if (y < down.pixels.begin || y >= down.pixels.end) return;
  begin = begin > across.pixels.begin - x ? begin : across.pixels.begin - x;
  end = end < across.pixels.end - x ? end : across.pixels.end - x;
  if (begin >= end) return;
  const Taps<acc_t> rows = down.taps(y);
  const T* mask = pasting.masks + k * pasting.size * pasting.size;
  const auto read = [&](int row, int column) {
    row -= pasting.padding, column -= pasting.padding;
    const bool inside = row >= 0 && row < pasting.size && column >= 0 && column < pasting.size;
    return inside ? to_acc(mask[row * pasting.size + column]) : acc_t(0);
  };
  // Rounded step by step, as on the CPU: a threshold may lie between.
  const auto blend = [](const Taps<acc_t>& taps, acc_t lo, acc_t hi) {
    return add(multiply(taps.weight_lo, lo), multiply(taps.weight_hi, hi));
  };
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < begin || i >= end) continue;
    const Taps<acc_t> columns = across.taps(x + i);
    const acc_t upper = blend(columns, read(rows.lo, columns.lo), read(rows.lo, columns.hi));
    const acc_t lower = blend(columns, read(rows.hi, columns.lo), read(rows.hi, columns.hi));
    const acc_t value = blend(rows, upper, lower);
    if constexpr (kAbove) {
      values[i] = value > pasting.threshold;
    } else {
      values[i] = Rounded<T>::from(value);
    }
  }
}

template <class T, bool kAbove>
__global__ void __launch_bounds__(kPasteThreads) paste_masks_kernel(const __grid_constant__ MaskPasting<T> pasting) {
  using out_t = std::conditional_t<kAbove, bool, T>;
  constexpr int kRun = kVec<out_t>;
  const int64_t rows = pasting.count * pasting.height, pixels = rows * pasting.width;
  const int64_t first = (int64_t{blockIdx.x} * kPasteThreads + threadIdx.x) * kRun;
  if (first >= pixels) return;
  int64_t row = first / pasting.width;
  int x = static_cast<int>(first % pasting.width);
  out_t values[kRun] = {};
  // A run continues in the next row, and in a narrow image in several rows.
#pragma unroll 1
  for (int begin = 0; begin < kRun && row < rows; ++row) {
    const int end = begin + min(kRun - begin, pasting.width - x);
    paste_in_row<kAbove>(pasting, row / pasting.height, static_cast<int>(row % pasting.height), x - begin, begin, end,
                         values);
    begin = end, x = 0;
  }
  out_t* target;
  if constexpr (kAbove) {
    target = pasting.above + first;
  } else {
    target = pasting.values + first;
  }
  if (first + kRun <= pixels) {
    uint4 raw;
    memcpy(&raw, values, sizeof raw);
    *reinterpret_cast<uint4*>(target) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (first + i < pixels) target[i] = values[i];
    }
  }
}

template <class T, class Launch>
void paste_in_launch(const MaskPasting<T>& pasting, const Launch& launch) {
  const int64_t bytes =
      pasting.count * pasting.height * pasting.width * static_cast<int64_t>(pasting.above ? sizeof(bool) : sizeof(T));
  const int64_t per_block = 16 * kPasteThreads;
  const LaunchConfig config{(bytes + per_block - 1) / per_block, kPasteThreads};
  pasting.above ? launch(paste_masks_kernel<T, true>, config, pasting)
                : launch(paste_masks_kernel<T, false>, config, pasting);
}

}  // namespace fpn_fast
