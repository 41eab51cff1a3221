// SPDX-License-Identifier: Apache-2.0
// Note [Frozen batch norm]
// y = x * scale + shift (+ residual * its scale + its shift), then ReLU, where
//   scale = weight / sqrt(variance + eps), shift = bias - mean * scale.
// Scale and shift are computed in the vectors' precision, at least float32, and the rest in the accumulator. Every
// product and sum is rounded, as in a sequence of PyTorch's operators. The result is rounded once to the output's type.
// On a CPU two products and sums are rounded together where F.batch_norm's are: bias - mean * scale, x * scale + shift.
// Maps are dense and of one memory format, so an element's index gives its channel.
#pragma once

#include <type_traits>

#include "exact.h"
#include "scalar.h"

namespace fpn_fast {

// In the order of fpn_fast/ops/_checks.py: DTYPES.
enum class VectorType : int { kDouble, kFloat, kHalf, kBFloat16 };

// Whose arithmetic is followed: fpn_fast/ops/frozen_batch_norm.py. A GPU's is that of torchvision but for detectron2's
// roundings. kContracted is F.batch_norm's on a CPU with fused multiply-adds.
enum class NormRule : int { kTorchvision, kDetectron2, kBatchNorm, kContracted };

// The vectors [C] of a norm. Without `weight` the norm is the identity.
struct Norm {
  const void *weight, *bias, *mean, *variance;
  VectorType type;
  bool aligned;  // all four allow 16-byte accesses
};

template <class acc_t>
struct Affine {
  acc_t scale, shift;
};

// What forward and backward share. Maps are [N, C, H, W], in elements and not in bytes.
struct NormMaps {
  int64_t elements, channels, plane;  // plane: H * W
  Norm norm, residual_norm;
  double eps;
  NormRule rule;
  bool vectorised;  // all pointers allow 16-byte accesses, and so does the number of channels or of pixels
};

// `residual` and `y` have the type T or its accumulator.
template <class T>
struct NormForward {
  NormMaps maps;
  const T* x;
  const void* residual;  // nullptr without one
  void* y;
  acc_type<T> floor;  // 0 for ReLU, otherwise minus infinity
};

// `grad`, `y` and `grad_residual` have the type T or its accumulator.
template <class T>
struct NormBackward {
  NormMaps maps;
  const void *grad, *y;  // y: nullptr without ReLU
  T* grad_x;             // nullptr if not wanted
  void* grad_residual;   // nullptr if not wanted
};

template <bool kWide, class T>
using MapType = std::conditional_t<kWide, acc_type<T>, T>;

HOST_DEVICE float reciprocal_root(float value) {
#ifdef __CUDA_ARCH__
  return rsqrtf(value);
#else
  return divide(1.0f, square_root(value));
#endif
}
HOST_DEVICE double reciprocal_root(double value) {
#ifdef __CUDA_ARCH__
  return rsqrt(value);
#else
  return divide(1.0, square_root(value));
#endif
}

HOST_DEVICE float vector_element(const void* vector, VectorType type, int64_t channel) {
  if (type == VectorType::kFloat) return static_cast<const float*>(vector)[channel];
  if (type == VectorType::kHalf) return to_acc(static_cast<const Half*>(vector)[channel]);
  return to_acc(static_cast<const BFloat16*>(vector)[channel]);
}

template <class V>
HOST_DEVICE Affine<V> affine_of(V weight, V bias, V mean, V variance, double eps, NormRule rule) {
  const V scale = multiply(weight, reciprocal_root(add(variance, static_cast<V>(eps))));
#ifndef __CUDA_ARCH__
  if (rule == NormRule::kContracted) return {scale, std::fma(-mean, scale, bias)};
#endif
  return {scale, subtract(bias, multiply(mean, scale))};
}

// detectron2 rounds both to the type of the map.
template <class T>
HOST_DEVICE Affine<float> rounded_affine(Affine<float> affine, NormRule rule) {
  if constexpr (sizeof(T) == 2) {
    if (rule == NormRule::kDetectron2)
      return {to_acc(Rounded<T>::from(affine.scale)), to_acc(Rounded<T>::from(affine.shift))};
  }
  return affine;
}

// Scale and shift of `channel` for maps of type T.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE Affine<acc_t> affine_of(const Norm& norm, double eps, NormRule rule, int64_t channel) {
  if (norm.weight == nullptr) return {acc_t(1), acc_t(0)};
  if constexpr (std::is_same_v<T, double>) {
    if (norm.type == VectorType::kDouble) {
      const auto at = [&](const void* vector) { return static_cast<const double*>(vector)[channel]; };
      return affine_of(at(norm.weight), at(norm.bias), at(norm.mean), at(norm.variance), eps, rule);
    }
  }
  const auto at = [&](const void* vector) { return vector_element(vector, norm.type, channel); };
  const Affine<float> found =
      rounded_affine<T>(affine_of(at(norm.weight), at(norm.bias), at(norm.mean), at(norm.variance), eps, rule), rule);
  return {found.scale, found.shift};
}

template <class acc_t>
HOST_DEVICE acc_t transformed(acc_t value, Affine<acc_t> affine) {
  return add(multiply(value, affine.scale), affine.shift);
}

// ReLU keeps NaN, as PyTorch's does.
template <class acc_t>
HOST_DEVICE acc_t clamped(acc_t value, acc_t floor) {
  return value < floor ? floor : value;
}

// The gradient behind ReLU: PyTorch's passes where y is NaN.
template <class acc_t>
HOST_DEVICE acc_t behind_relu(acc_t grad, acc_t y) {
  return y <= acc_t(0) ? acc_t(0) : grad;
}

// Note [Sums for weight and bias]
// The gradients of bias and weight are sums over N and H * W of g and of g * (x - mean), g behind ReLU. A part sums
// `kNormPart` positions of a channel, and the caller adds the parts in order, so the result does not depend on the
// number of threads.
constexpr int kNormPart = 2048;

// Positions are N * H * W. `grad` and `y` have the type of sums or are narrower, and so has `x`.
template <class T>
struct NormSums {
  int64_t positions, channels, plane;
  const void *grad, *y;  // y: nullptr without ReLU
  const void* x;
  const acc_type<T>* mean;  // [C]
  acc_type<T>* parts;       // [parts, 2, C]
  bool channels_last;

  HOST_DEVICE int64_t offset(int64_t position, int64_t channel) const {
    if (channels_last) return position * channels + channel;
    return (position / plane * channels + channel) * plane + position % plane;
  }
};

inline int64_t norm_parts(int64_t positions) { return (positions + kNormPart - 1) / kNormPart; }

}  // namespace fpn_fast
