// SPDX-License-Identifier: Apache-2.0
// Anchors computed from their position, and boxes decoded from anchors and a head's deltas. Where torchvision,
// detectron2 and mmdetection differ, the difference is data (cell anchors, strides, offset, weights) or a switch of
// `BoxCoding`.
#pragma once

#include <cstdint>

#include "boxes.h"
#include "exact.h"
#include "exponential.h"
#include "host_device.h"

namespace fpn_fast {

template <class acc_t>
struct BoxCoding {
  acc_t weight[4], mean[4], std[4];  // delta / weight * std + mean
  acc_t scale_clamp;                 // largest log of a change of size
  bool symmetric_clamp;              // the log is also clamped at -scale_clamp
  bool mean_center;                  // (x1 + x2) / 2 instead of x1 + width / 2, which rounds differently
  acc_t center_clamp;                // largest move of the centre, in pixels; may be infinite
  acc_t center_offset;               // position of the first anchor, in strides
};

// The anchor at position (y, x) of the head's map. `cell` is centred at the origin.
template <class acc_t>
HOST_DEVICE Box<acc_t> anchor_at(const BoxCoding<acc_t>& coding, const Box<acc_t>& cell, int64_t y, int64_t x,
                                 acc_t stride_y, acc_t stride_x) {
  const acc_t shift_y = multiply(add(static_cast<acc_t>(y), coding.center_offset), stride_y);
  const acc_t shift_x = multiply(add(static_cast<acc_t>(x), coding.center_offset), stride_x);
  return {add(shift_x, cell.x1), add(shift_y, cell.y1), add(shift_x, cell.x2), add(shift_y, cell.y2)};
}

template <class acc_t>
struct Side {
  acc_t lo, hi;
};

template <class acc_t>
HOST_DEVICE Side<acc_t> decode_side(const BoxCoding<acc_t>& coding, acc_t lo, acc_t hi, acc_t move, acc_t scale) {
  const acc_t half = acc_t(0.5);
  const acc_t size = subtract(hi, lo);
  const acc_t center = coding.mean_center ? multiply(add(lo, hi), half) : add(lo, multiply(half, size));
  scale = scale < coding.scale_clamp ? scale : coding.scale_clamp;
  if (coding.symmetric_clamp) scale = scale > -coding.scale_clamp ? scale : -coding.scale_clamp;
  acc_t shift = multiply(move, size);
  shift = shift < coding.center_clamp ? shift : coding.center_clamp;
  shift = shift > -coding.center_clamp ? shift : -coding.center_clamp;
  const acc_t moved = add(shift, center);
  const acc_t reach = multiply(half, multiply(exponential(scale), size));
  return {subtract(moved, reach), add(moved, reach)};
}

// `deltas` are (dx, dy, dw, dh) and finite.
template <class acc_t>
HOST_DEVICE Box<acc_t> decode(const BoxCoding<acc_t>& coding, const Box<acc_t>& anchor, const acc_t* deltas) {
  acc_t code[4];
  for (int i = 0; i < 4; ++i) {
    code[i] = add(multiply(divide(deltas[i], coding.weight[i]), coding.std[i]), coding.mean[i]);
  }
  const Side<acc_t> across = decode_side(coding, anchor.x1, anchor.x2, code[0], code[2]);
  const Side<acc_t> down = decode_side(coding, anchor.y1, anchor.y2, code[1], code[3]);
  return {across.lo, down.lo, across.hi, down.hi};
}

// `distances` are (left, top, right, bottom) from the anchor's centre, in units of its sides, and finite. Source:
// torchvision's BoxLinearCoder.
template <class acc_t>
HOST_DEVICE Box<acc_t> decode_distances(const Box<acc_t>& anchor, const acc_t* distances) {
  const acc_t half = acc_t(0.5);
  const acc_t x = multiply(half, add(anchor.x1, anchor.x2)), y = multiply(half, add(anchor.y1, anchor.y2));
  const acc_t width = subtract(anchor.x2, anchor.x1), height = subtract(anchor.y2, anchor.y1);
  return {subtract(x, multiply(distances[0], width)), subtract(y, multiply(distances[1], height)),
          add(x, multiply(distances[2], width)), add(y, multiply(distances[3], height))};
}

template <class acc_t>
HOST_DEVICE acc_t clamp(acc_t value, acc_t largest) {
  value = value > 0 ? value : acc_t(0);
  return value < largest ? value : largest;
}

template <class acc_t>
HOST_DEVICE Box<acc_t> clip(const Box<acc_t>& box, acc_t height, acc_t width) {
  return {clamp(box.x1, width), clamp(box.y1, height), clamp(box.x2, width), clamp(box.y2, height)};
}

template <class acc_t>
HOST_DEVICE bool is_large_enough(const Box<acc_t>& box, acc_t min_size, bool strict) {
  const acc_t width = subtract(box.x2, box.x1), height = subtract(box.y2, box.y1);
  return strict ? width > min_size && height > min_size : width >= min_size && height >= min_size;
}

}  // namespace fpn_fast
