// SPDX-License-Identifier: Apache-2.0
// A box head's predictions for given boxes: class logits and deltas.
#pragma once

#include <cstdint>
#include <limits>

#include "anchors.h"
#include "boxes.h"
#include "host_device.h"

namespace fpn_fast {

template <class acc_t>
struct BoxHeads {
  const acc_t *logits, *deltas;  // [batch, room, classes]; [batch, room, 4] or [batch, room, 4 * classes]
  const Box<acc_t>* boxes;       // [batch, room]
  const int64_t* counts;         // [batch], or null: `room` boxes per image
  const acc_t* image_sizes;      // [batch, 2], height and width
  int64_t batch, room, classes;
  bool own_deltas;  // one set of deltas per class
  acc_t min_size;
  BoxCoding<acc_t> coding;

  HOST_DEVICE int64_t count(int64_t image) const {
    const int64_t wanted = counts == nullptr ? room : counts[image];
    return wanted < 0 ? 0 : wanted < room ? wanted : room;
  }
};

// The clipped box of a class. Its x1 is NaN where a value is not finite or a side is shorter than min_size.
template <class acc_t>
HOST_DEVICE Box<acc_t> decoded_box(const BoxHeads<acc_t>& heads, int64_t image, int64_t box, int64_t label) {
  const Box<acc_t> none{std::numeric_limits<acc_t>::quiet_NaN(), 0, 0, 0};
  const int64_t row = image * heads.room + box;
  const acc_t* code = heads.deltas + 4 * (heads.own_deltas ? row * heads.classes + label : row);
  const Box<acc_t> source = heads.boxes[row];
  if (!is_finite(source) || !is_finite(Box<acc_t>{code[0], code[1], code[2], code[3]})) return none;
  const Box<acc_t> decoded = decode(heads.coding, source, code);
  if (!is_finite(decoded)) return none;
  const acc_t* size = heads.image_sizes + 2 * image;
  const Box<acc_t> clipped = clip(decoded, size[0], size[1]);
  return is_large_enough(clipped, heads.min_size, false) ? clipped : none;
}

}  // namespace fpn_fast
