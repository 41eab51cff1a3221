// SPDX-License-Identifier: Apache-2.0
// Checks and output of mask pasting, the same on every device.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fpn_fast {

// The images [K, 1, height, width], unwritten: of masks' type, or bool.
inline Tensor empty_pasted(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, int64_t padding,
                           bool as_bool) {
  constexpr const char* kOp = "paste_masks";
  const ScalarType box_type = boxes.scalar_type();
  STD_TORCH_CHECK(masks.dim() == 4 && masks.size(1) == 1 && masks.size(2) == masks.size(3) && masks.size(3) > 0 &&
                      masks.size(3) <= 4096 && masks.is_contiguous(),
                  kOp, " takes contiguous masks [K, 1, M, M], M from 1 to 4096");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4 && boxes.is_contiguous() &&
                      (box_type == ScalarType::Float || box_type == ScalarType::Double) && on_device_of(boxes, masks),
                  kOp, " takes contiguous boxes [K, 4] of float32 or float64 on the masks' device");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height <= 1 << 29 && width <= 1 << 29, kOp, " takes an image's size");
  STD_TORCH_CHECK(padding >= 0 && padding <= 4096, kOp, " takes a padding of 0 to 4096");
  return empty_like(masks, {masks.size(0), 1, height, width}, as_bool ? ScalarType::Bool : masks.scalar_type());
}

}  // namespace fpn_fast
