// SPDX-License-Identifier: Apache-2.0
// Note [Fused maps]
// out = activation(sum_k term_k / divide). A term is a resampled map, times its weight or gate. As in a sequence of
// PyTorch's operators every product and quotient is rounded to the storage type; the sum is rounded once, or after each
// addition, and then the quotient and the activation are. Bilinear values are not rounded before their product.
#pragma once

#include <limits>

#include "exponential.h"
#include "resample.h"
#include "scalar.h"

namespace fpn_fast {

// The order of fpn_fast/ops/fuse_maps.py: FORMS and ACTIVATIONS.
enum class Form : int {
  kIdentity,
  kNearest,
  kBilinear,
  kBilinearAlignCorners,
  kMaxPool,
  kMaxPoolSame,
  kMaxPoolSameZero,
  kMaxPool2x2,
  kAdaptiveMax
};
enum class Activation : int { kNone, kRelu, kRelu6, kSilu };

constexpr int kMostFused = 5;    // maps of fuse_maps
constexpr int kMostResized = 8;  // maps of resize_cat

HOST_DEVICE bool is_pooled(Form form) { return form >= Form::kMaxPool; }

HOST_DEVICE Resample resample_of(Form form) {
  return form == Form::kBilinear               ? Resample::kBilinear
         : form == Form::kBilinearAlignCorners ? Resample::kBilinearAlignCorners
                                               : Resample::kNearest;
}

HOST_DEVICE Windows windows_of(Form form, int in, int out) {
  if (form == Form::kMaxPool2x2) return {in, out, 2, 2, 0, false};
  if (form == Form::kAdaptiveMax) return {in, out, 0, 0, 0, false};
  // TensorFlow's SAME puts the odd pixel of padding after the map. An even side needs one pixel, an odd one two.
  const int before = form == Form::kMaxPool ? 1 : in % 2;
  return {in, out, 3, 2, before, form == Form::kMaxPoolSameZero};
}

// The size that a form gives to an axis of `in` pixels; `out` where it gives any.
HOST_DEVICE int64_t resized_extent(Form form, int64_t in, int64_t out) {
  if (form == Form::kIdentity) return in;
  if (form == Form::kMaxPool2x2) return in / 2;
  return is_pooled(form) && form != Form::kAdaptiveMax ? (in + 1) / 2 : out;
}

template <class T>
HOST_DEVICE acc_type<T> rounded(acc_type<T> value) {
  return to_acc(Rounded<T>::from(value));
}

// The greater number; NaN if one is. Of equal ones the first.
template <class acc_t>
HOST_DEVICE acc_t greater(acc_t first, acc_t second) {
  // Without a branch, so that compilers vectorise it.
  return (second > first) | (second != second) ? second : first;
}

template <class acc_t>
struct Factor {
  acc_t multiplier, divisor;
};

// What map k is multiplied by, and what every map is divided by. The rule "fast": effdet/efficientdet.py, FpnCombine.
template <class T>
HOST_DEVICE acc_type<T> multiplier_of(const T* weights, bool fast, int k) {
  const acc_type<T> weight = to_acc(weights[k]);
  return fast && weight <= 0 ? acc_type<T>(0) : weight;
}
template <class T>
HOST_DEVICE acc_type<T> divisor_of(const T* weights, int count, bool fast) {
  if (!fast) return 1;
  acc_type<T> sum = 0;
  for (int k = 0; k < count; ++k) sum = add(sum, multiplier_of(weights, fast, k));
  return rounded<T>(add(rounded<T>(sum), static_cast<acc_type<T>>(1e-4)));
}

// e^x within units of 1e-7. Float32 alone does, because a sigmoid is rounded to it.
HOST_DEVICE float quick_exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  const bool overflows = x > 88.7f;
  x = x < -87.0f ? -87.0f : overflows ? 88.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the last bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
  // A Taylor series: |r| is at most ln(2) / 2.
  float sum = 1.98412698e-4f;
  sum = sum * r + 1.38888889e-3f;
  sum = sum * r + 8.33333333e-3f;
  sum = sum * r + 4.16666667e-2f;
  sum = sum * r + 1.66666667e-1f;
  sum = sum * r + 0.5f;
  sum = sum * (r * r) + r + 1.0f;
  const float power = float_from_bits(bits_of_float(sum) + (bits_of_float(shifted) << 23));
  return overflows ? std::numeric_limits<float>::infinity() : power;
#endif
}
HOST_DEVICE double quick_exponential(double x) { return exponential(x); }

template <Activation kActivation, class acc_t>
HOST_DEVICE acc_t activated(acc_t x) {
  if constexpr (kActivation == Activation::kRelu) return x < 0 ? acc_t(0) : x;
  if constexpr (kActivation == Activation::kRelu6) return x < 0 ? acc_t(0) : x > 6 ? acc_t(6) : x;
  if constexpr (kActivation == Activation::kSilu) return x / (1 + quick_exponential(-x));
  return x;
}

// Note [Fixed order of sums]
// The gradient of a weight is the sum of gradient times resampled map over the whole map. A part of it sums a band of
// rows of one channel, and the caller adds the parts in order, so the result does not depend on the number of threads.
constexpr int kSumRows = 16;

HOST_DEVICE int64_t sum_bands(int64_t height) { return (height + kSumRows - 1) / kSumRows; }

}  // namespace fpn_fast
