// SPDX-License-Identifier: Apache-2.0
// The frozen batch norm, its gradient and the sums for weight and bias on every device: checks and outputs.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "../common/frozen_batch_norm.h"
#include "checks.h"

namespace fpn_fast {

// Whether maps are channels_last; throws unless all of them are dense in the format of the first and of its shape.
inline bool check_dense_maps(const std::vector<const Tensor*>& maps, const char* op) {
  const Tensor& first = *maps[0];
  STD_TORCH_CHECK(first.dim() == 4, op, " takes maps [N, C, H, W], got ", shape_of(first));
  const bool last = is_channels_last(first);
  const int64_t c = first.size(1), h = first.size(2), w = first.size(3);
  const int64_t strides[4] = {c * h * w, last ? 1 : h * w, last ? w * c : w, last ? c : 1};
  for (const Tensor* map : maps) {
    bool dense = map->dim() == 4 && on_device_of(*map, first);
    for (int axis = 0; dense && axis < 4; ++axis) {
      dense = map->size(axis) == first.size(axis) &&
              (map->stride(axis) == strides[axis] || map->size(axis) == 1 || first.numel() == 0);
    }
    STD_TORCH_CHECK(dense, op, " takes dense maps of one shape, memory format and device, ", shape_of(first), ", got ",
                    shape_of(*map));
  }
  return last;
}

// The types that maps beside one of type `type` may have: that one and its accumulator. Returns whether it is wide.
inline bool is_wide(ScalarType type, ScalarType like, const char* op) {
  STD_TORCH_CHECK(type == like || type == accumulate_type(like), op,
                  " takes maps of one type, and float32 ones beside float16 or bfloat16");
  return type != like;
}

inline Norm to_norm(const std::vector<Tensor>& vectors, const Tensor& like, ScalarType type, const char* op) {
  if (vectors.empty()) return {};
  STD_TORCH_CHECK(vectors.size() == 4, op, " takes weight, bias, mean and variance of a norm, got ", vectors.size(),
                  " tensors");
  const ScalarType own = vectors[0].scalar_type();
  for (const Tensor& vector : vectors) {
    STD_TORCH_CHECK(matches(vector, {like.size(1)}, own, like), op,
                    " takes contiguous vectors [C] of one type on the maps' device, C is ", like.size(1), ", got ",
                    shape_of(vector));
  }
  constexpr ScalarType kTypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  const int code = static_cast<int>(std::find(kTypes, kTypes + 4, own) - kTypes);
  STD_TORCH_CHECK(code < 4 && (code > 0 || type == ScalarType::Double), op,
                  " takes floating-point vectors, float64 ones for float64 maps only");
  bool aligned = true;
  for (const Tensor& vector : vectors) aligned &= reinterpret_cast<uintptr_t>(vector.data_ptr()) % 16 == 0;
  return {data<void>(vectors[0]), data<void>(vectors[1]),        data<void>(vectors[2]),
          data<void>(vectors[3]), static_cast<VectorType>(code), aligned};
}

inline ScalarType type_of_code(int64_t code, const char* op) {
  constexpr ScalarType kTypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  STD_TORCH_CHECK(code >= 0 && code < 4, op, " does not know type ", code);
  return kTypes[code];
}

// Sizes, norms and whether the kernels may use 16-byte accesses.
template <class T>
NormMaps norm_maps(const Tensor& like, bool channels_last, const std::vector<Tensor>& norm,
                   const std::vector<Tensor>& residual_norm, double eps, int64_t rule,
                   const std::vector<const void*>& pointers, const char* op) {
  const ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  NormMaps maps{};
  maps.elements = like.numel(), maps.channels = like.size(1), maps.plane = like.size(2) * like.size(3);
  maps.norm = to_norm(norm, like, type, op), maps.residual_norm = to_norm(residual_norm, like, type, op);
  STD_TORCH_CHECK(rule >= 0 && rule <= static_cast<int>(NormRule::kContracted), op, " does not know rule ", rule);
  maps.eps = eps, maps.rule = static_cast<NormRule>(rule);
  maps.vectorised = channels_last ? maps.channels % kVec<T> == 0 : maps.plane >= kVec<T> && maps.plane < INT32_MAX / 2;
  for (const void* pointer : pointers) maps.vectorised &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return maps;
}

inline Tensor empty_dense(const Tensor& like, bool channels_last, ScalarType type) {
  const int64_t c = std::max<int64_t>(like.size(1), 1), h = like.size(2), w = like.size(3);
  const int64_t sizes[4] = {like.size(0), like.size(1), h, w};
  const int64_t first[4] = {c * h * w, h * w, w, 1}, last[4] = {c * h * w, 1, w * c, c};
  return empty_strided(like, 4, sizes, channels_last ? last : first, static_cast<int32_t>(type));
}

// `Device::forward<T, kWideResidual, kWideOutput>` writes y: in float32 if `widen`, otherwise in the type of x.
template <class Device>
Tensor frozen_batch_norm(Tensor x, std::vector<Tensor> norm, double eps, std::optional<Tensor> residual,
                         std::vector<Tensor> residual_norm, bool relu, int64_t rule, bool widen) {
  constexpr const char* kOp = "frozen_batch_norm";
  std::vector<const Tensor*> given{&x};
  if (residual.has_value()) given.push_back(&*residual);
  const bool last = check_dense_maps(given, kOp);
  STD_TORCH_CHECK(!norm.empty(), kOp, " takes weight, bias, mean and variance of a norm, got none");
  const ScalarType type = x.scalar_type();
  const bool wide_residual = residual.has_value() && is_wide(residual->scalar_type(), type, kOp);
  const Tensor y = empty_dense(x, last, widen ? accumulate_type(type) : type);
  if (x.numel() == 0) return y;
  dispatch_floating(type, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    NormForward<T> pass{};
    pass.x = data<const T>(x), pass.y = y.data_ptr();
    if (residual.has_value()) pass.residual = residual->data_ptr();
    pass.floor = relu ? acc_type<T>(0) : -std::numeric_limits<acc_type<T>>::infinity();
    pass.maps = norm_maps<T>(x, last, norm, residual_norm, eps, rule, {pass.x, pass.residual, pass.y}, kOp);
    if constexpr (std::is_same_v<T, acc_type<T>>) {
      Device::template forward<T, false, false>(pass, last, x);
    } else if (wide_residual) {
      widen ? Device::template forward<T, true, true>(pass, last, x)
            : Device::template forward<T, true, false>(pass, last, x);
    } else {
      widen ? Device::template forward<T, false, true>(pass, last, x)
            : Device::template forward<T, false, false>(pass, last, x);
    }
  });
  return y;
}

// `Device::backward<T, kWideGrad, kWideResidual>` writes the gradients of x and of the residual, each in its type (the
// codes of VectorType), or [0] for code -1. y is the result of a forward pass with ReLU.
template <class Device>
std::tuple<Tensor, Tensor> frozen_batch_norm_backward(Tensor grad, std::optional<Tensor> y, std::vector<Tensor> norm,
                                                      double eps, std::vector<Tensor> residual_norm, int64_t rule,
                                                      int64_t x_type, int64_t residual_code) {
  constexpr const char* kOp = "frozen_batch_norm_backward";
  std::vector<const Tensor*> given{&grad};
  if (y.has_value()) given.push_back(&*y);
  const bool last = check_dense_maps(given, kOp);
  STD_TORCH_CHECK(!y.has_value() || y->scalar_type() == grad.scalar_type(), kOp, " takes grad and y of one type");
  STD_TORCH_CHECK(!norm.empty(), kOp, " takes weight, bias, mean and variance of a norm, got none");
  const ScalarType type = type_of_code(x_type, kOp);
  const bool wide_grad = is_wide(grad.scalar_type(), type, kOp), has_residual = residual_code >= 0;
  const ScalarType residual_type = has_residual ? type_of_code(residual_code, kOp) : type;
  const bool wide_residual = is_wide(residual_type, type, kOp);
  const Tensor grad_x = empty_dense(grad, last, type);
  const Tensor grad_residual =
      has_residual ? empty_dense(grad, last, residual_type) : empty_like(grad, {0}, residual_type);
  if (grad.numel() == 0) return {grad_x, grad_residual};
  dispatch_floating(type, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    NormBackward<T> pass{};
    pass.grad = grad.data_ptr(), pass.grad_x = data<T>(grad_x);
    if (y.has_value()) pass.y = y->data_ptr();
    if (has_residual) pass.grad_residual = grad_residual.data_ptr();
    pass.maps = norm_maps<T>(grad, last, norm, residual_norm, eps, rule,
                             {pass.grad, pass.y, pass.grad_x, pass.grad_residual}, kOp);
    if constexpr (std::is_same_v<T, acc_type<T>>) {
      Device::template backward<T, false, false>(pass, last, grad);
    } else if (wide_grad) {
      wide_residual ? Device::template backward<T, true, true>(pass, last, grad)
                    : Device::template backward<T, true, false>(pass, last, grad);
    } else {
      wide_residual ? Device::template backward<T, false, true>(pass, last, grad)
                    : Device::template backward<T, false, false>(pass, last, grad);
    }
  });
  return {grad_x, grad_residual};
}

// `Device::sums<T, kWideGrad, kWideX>` writes the parts [P, 2, C]: Note [Sums for weight and bias].
template <class Device>
Tensor frozen_batch_norm_sums(Tensor grad, std::optional<Tensor> y, Tensor x, Tensor mean) {
  constexpr const char* kOp = "frozen_batch_norm_sums";
  std::vector<const Tensor*> given{&grad, &x};
  if (y.has_value()) given.push_back(&*y);
  const bool last = check_dense_maps(given, kOp);
  STD_TORCH_CHECK(!y.has_value() || y->scalar_type() == grad.scalar_type(), kOp, " takes grad and y of one type");
  const bool narrow_x = accumulate_type(x.scalar_type()) != x.scalar_type();
  const ScalarType type = narrow_x ? x.scalar_type() : grad.scalar_type();
  const bool wide_grad = is_wide(grad.scalar_type(), type, kOp), wide_x = is_wide(x.scalar_type(), type, kOp);
  const ScalarType sum_type = accumulate_type(type);
  STD_TORCH_CHECK(matches(mean, {x.size(1)}, sum_type, x), kOp,
                  " takes a contiguous mean [C] on the maps' device, float64 for float64 maps and float32 otherwise, C "
                  "is ",
                  x.size(1), ", got ", shape_of(mean));
  const int64_t positions = x.size(1) == 0 ? 0 : x.size(0) * x.size(2) * x.size(3);
  const Tensor parts = empty_like(x, {norm_parts(positions), 2, x.size(1)}, sum_type);
  if (x.numel() == 0) return parts;
  dispatch_floating(type, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    NormSums<T> sums{};
    sums.positions = positions, sums.channels = x.size(1), sums.plane = x.size(2) * x.size(3);
    sums.grad = grad.data_ptr(), sums.x = x.data_ptr(), sums.mean = data<const acc_type<T>>(mean);
    sums.parts = data<acc_type<T>>(parts), sums.channels_last = last;
    if (y.has_value()) sums.y = y->data_ptr();
    if constexpr (std::is_same_v<T, acc_type<T>>) {
      Device::template sums<T, false, false>(sums, x);
    } else if (wide_grad) {
      Device::template sums<T, true, false>(sums, x);
    } else {
      wide_x ? Device::template sums<T, false, true>(sums, x) : Device::template sums<T, false, false>(sums, x);
    }
  });
  return parts;
}

}  // namespace fpn_fast
