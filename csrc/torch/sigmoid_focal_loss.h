// SPDX-License-Identifier: Apache-2.0
// `sigmoid_focal_loss` on every device: checks, arguments and outputs.
#pragma once

#include <cstdint>
#include <tuple>

#include "../common/sigmoid_focal_loss.h"
#include "checks.h"

namespace fpn_fast {

// `Device::run<T>` writes a sum per tile, in float or double, and the gradient: [M, C], or [0] if it is not wanted.
template <class Device>
std::tuple<Tensor, Tensor> sigmoid_focal_loss(Tensor logits, Tensor labels, Tensor weights, double alpha,
                                              bool with_gradient) {
  constexpr const char* kOp = "sigmoid_focal_loss";
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) <= INT32_MAX / 2, kOp,
                  " takes contiguous logits [M, C], C below 2^30, got ", shape_of(logits));
  const int64_t anchors = logits.size(0);
  STD_TORCH_CHECK(matches(labels, {anchors}, ScalarType::Long, logits), kOp,
                  " takes contiguous int64 labels [M] on the logits' device, M is ", anchors, ", got ",
                  shape_of(labels));
  const ScalarType accumulate = accumulate_type(logits.scalar_type());
  STD_TORCH_CHECK(matches(weights, {anchors}, accumulate, logits), kOp,
                  " takes contiguous weights [M] on the logits' device, float64 for float64 logits and float32 "
                  "otherwise, M is ",
                  anchors, ", got ", shape_of(weights));
  const Tensor parts = empty_like(logits, {focal_tiles(logits.numel())}, accumulate);
  const Tensor gradient = with_gradient ? empty_like(logits, {anchors, logits.size(1)}, logits.scalar_type())
                                        : empty_like(logits, {0}, logits.scalar_type());
  if (logits.numel() == 0) return {parts, gradient};
  dispatch_floating(logits.scalar_type(), kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    FocalLoss<T> loss{};
    loss.logits = data<const T>(logits), loss.labels = data<const int64_t>(labels);
    loss.weights = data<const acc_t>(weights), loss.parts = data<acc_t>(parts);
    loss.elements = logits.numel(), loss.classes = static_cast<int>(logits.size(1));
    loss.alpha = static_cast<acc_t>(alpha);
    if (with_gradient) loss.gradient = data<T>(gradient);
    loss.aligned = reinterpret_cast<uintptr_t>(loss.logits) % 16 == 0;
    Device::run(loss, logits);
  });
  return {parts, gradient};
}

}  // namespace fpn_fast
