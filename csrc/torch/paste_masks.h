// SPDX-License-Identifier: Apache-2.0
// `paste_masks` on every device: checks and output.
#pragma once

#include <cstdint>
#include <optional>

#include "checks.h"

namespace fpn_fast {

// `Device::run<T>` writes the images [K, 1, height, width]. They are of the masks' type, or bool if there is a
// threshold.
template <class Device>
Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, int64_t padding,
                   std::optional<double> threshold) {
  constexpr const char* kOp = "paste_masks";
  STD_TORCH_CHECK(masks.dim() == 4 && masks.size(1) == 1 && masks.size(2) == masks.size(3) && masks.size(3) > 0 &&
                      masks.size(3) <= 4096 && masks.is_contiguous(),
                  kOp, " takes contiguous masks [K, 1, M, M], M from 1 to 4096, got ", shape_of(masks));
  STD_TORCH_CHECK(is_box_type(boxes.scalar_type()) && matches(boxes, {masks.size(0), 4}, boxes.scalar_type(), masks),
                  kOp, " takes contiguous boxes [K, 4] of float32 or float64 on the masks' device, K is ",
                  masks.size(0), ", got ", shape_of(boxes));
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height <= 1 << 29 && width <= 1 << 29, kOp,
                  " takes an image's size of 0 to 2^29 pixels along each axis, got ", height, " x ", width);
  STD_TORCH_CHECK(padding >= 0 && padding <= 4096, kOp, " takes a padding of 0 to 4096, got ", padding);
  const Tensor out = empty_like(masks, {masks.size(0), 1, height, width},
                                threshold.has_value() ? ScalarType::Bool : masks.scalar_type());
  if (out.numel() == 0) return out;
  dispatch_floating(masks.scalar_type(), kOp, [&](auto tag) {
    Device::template run<typename decltype(tag)::type>(masks, boxes, static_cast<int>(padding), threshold, out);
  });
  return out;
}

}  // namespace fpn_fast
