// SPDX-License-Identifier: Apache-2.0
// Mask pasting, with one launch for all masks. A block owns 32 KB of the output, a strip of an image or of several
// small ones, which it writes 16 bytes at a time. Few strips meet the box of their mask. The others are filled with
// zeros.
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
// 16-byte stores of a thread. They share the divisions and the loads that find its place in a mask.
constexpr int kPasteOwn = 8;

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

// The place of mask `k` in its image.
template <class acc_t>
struct PastedMask {
  int64_t k;
  PasteAxis<acc_t> across, down;

  template <class T>
  __device__ __forceinline__ static PastedMask of(const MaskPasting<T>& pasting, int64_t k) {
    const int padded = pasting.size + 2 * pasting.padding;
    const GrownBox box = grown_box(pasting, k);
    return {k, {box.left, box.right, pasting.width, padded}, {box.top, box.bottom, pasting.height, padded}};
  }

  // Whether the mask has pixels in rows [begin, end).
  __device__ __forceinline__ bool meets(int64_t begin, int64_t end) const {
    return across.pixels.begin < across.pixels.end && begin < down.pixels.end && end > down.pixels.begin;
  }
};

// Divisions of 32 bits take a fifth of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return a <= UINT32_MAX && b <= UINT32_MAX ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// Writes elements [begin, end) of `values` that lie in the mask. Element i is pixel `x + i` of row `y`.
template <bool kAbove, class T, class out_t, int kRun>
__device__ __forceinline__ void paste_in_row(const MaskPasting<T>& pasting, const PastedMask<acc_type<T>>& pasted,
                                             int y, int x, int begin, int end, out_t (&values)[kRun]) {
  using acc_t = acc_type<T>;
  const PasteAxis<acc_t>&across = pasted.across, &down = pasted.down;
  if (y < down.pixels.begin || y >= down.pixels.end) return;
  begin = begin > across.pixels.begin - x ? begin : across.pixels.begin - x;
  end = end < across.pixels.end - x ? end : across.pixels.end - x;
  if (begin >= end) return;
  const Taps<acc_t> rows = down.taps(y);
  const T* mask = pasting.masks + pasted.k * pasting.size * pasting.size;
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

// Left to itself ptxas takes 48 registers for sm_80 and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPasteBlocks = 4;
#else
constexpr int kPasteBlocks = 0;
#endif

template <class T, bool kAbove>
__global__ void __launch_bounds__(kPasteThreads, kPasteBlocks)
    paste_masks_kernel(const __grid_constant__ MaskPasting<T> pasting) {
  using out_t = std::conditional_t<kAbove, bool, T>;
  constexpr int kRun = kVec<out_t>, kStep = kPasteThreads * kRun;
  out_t* target;
  if constexpr (kAbove) {
    target = pasting.above;
  } else {
    target = pasting.values;
  }
  const int64_t image = int64_t{pasting.height} * pasting.width, pixels = pasting.count * image;
  const int64_t begin = int64_t{blockIdx.x} * (kStep * kPasteOwn), end = min(begin + kStep * kPasteOwn, pixels);
  int64_t k = quotient(begin, image);
  PastedMask<acc_type<T>> pasted = PastedMask<acc_type<T>>::of(pasting, k);
  const int64_t first_row = quotient(begin - k * image, pasting.width);
  const int64_t last_row = quotient(end - 1 - k * image, pasting.width);
  // With rows of one mask alone, most blocks have no pixel of it.
  if (last_row < pasting.height && end == begin + kStep * kPasteOwn && !pasted.meets(first_row, last_row + 1)) {
#pragma unroll
    for (int i = 0; i < kPasteOwn; ++i) {
      *reinterpret_cast<uint4*>(target + begin + i * kStep + threadIdx.x * kRun) = uint4{0, 0, 0, 0};
    }
    return;
  }
#pragma unroll 1
  for (int64_t first = begin + threadIdx.x * kRun; first < end; first += kStep) {
    out_t values[kRun] = {};
    // A run continues in the next row, and in a narrow image in several rows.
    int64_t place = first;
#pragma unroll 1
    while (place < first + kRun && place < pixels) {
      if (place - pasted.k * image >= image) {
        pasted = PastedMask<acc_type<T>>::of(pasting, quotient(place, image));
      }
      const int64_t local = place - pasted.k * image, y = quotient(local, pasting.width);
      const int x = static_cast<int>(local - y * pasting.width), at = static_cast<int>(place - first);
      const int length = min(kRun - at, pasting.width - x);
      paste_in_row<kAbove>(pasting, pasted, static_cast<int>(y), x - at, at, at + length, values);
      place += length;
    }
    if (first + kRun <= pixels) {
      uint4 raw;
      memcpy(&raw, values, sizeof raw);
      *reinterpret_cast<uint4*>(target + first) = raw;
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first + i < pixels) target[first + i] = values[i];
      }
    }
  }
}

template <class T, class Launch>
void paste_in_launch(const MaskPasting<T>& pasting, const Launch& launch) {
  const int64_t bytes =
      pasting.count * pasting.height * pasting.width * static_cast<int64_t>(pasting.above ? sizeof(bool) : sizeof(T));
  const int64_t per_block = 16 * kPasteThreads * kPasteOwn;
  const LaunchConfig config{(bytes + per_block - 1) / per_block, kPasteThreads};
  pasting.above ? launch(paste_masks_kernel<T, true>, config, pasting)
                : launch(paste_masks_kernel<T, false>, config, pasting);
}

}  // namespace fpn_fast
