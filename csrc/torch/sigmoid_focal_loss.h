// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of the focal loss, the same on every device.
#pragma once

#include <cstdint>

#include "../common/sigmoid_focal_loss.h"
#include "tensors.h"

namespace fpn_fast {

struct FocalOutputs {
  Tensor parts, gradient;
};

// Sums of each tile, in float or double; the gradient [M, C] of logits' type, or [0] where it is not asked for.
inline FocalOutputs empty_focal_outputs(const Tensor& logits, const Tensor& labels, const Tensor& weights,
                                        bool with_gradient) {
  constexpr const char* kOp = "sigmoid_focal_loss";
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) <= INT32_MAX / 2, kOp,
                  " takes contiguous logits [M, C]");
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const auto of_anchors = [&](const Tensor& tensor) {
    return tensor.dim() == 1 && tensor.size(0) == logits.size(0) && tensor.is_contiguous() &&
           on_device_of(tensor, logits);
  };
  STD_TORCH_CHECK(of_anchors(labels) && labels.scalar_type() == ScalarType::Long, kOp,
                  " takes int64 labels [M] on the logits' device");
  const ScalarType accumulate = wide ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(of_anchors(weights) && weights.scalar_type() == accumulate, kOp,
                  " takes weights [M] on the logits' device, float64 of float64 logits, else float32");
  const int64_t tiles = focal_tiles(logits.numel());
  return {empty_like(logits, {tiles}, accumulate),
          with_gradient ? empty_like(logits, {logits.size(0), logits.size(1)}, logits.scalar_type())
                        : empty_like(logits, {0}, logits.scalar_type())};
}

}  // namespace fpn_fast
