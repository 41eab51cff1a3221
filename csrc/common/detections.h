// SPDX-License-Identifier: Apache-2.0
// The padded detections that kernels write.
#pragma once

#include <cstdint>

#include "boxes.h"
#include "host_device.h"

namespace fpn_fast {

template <class acc_t>
struct DetectionTables {
  Box<acc_t>* boxes;  // [N, room]
  acc_t* scores;      // [N, room]
  int64_t* labels;    // [N, room]
  int64_t* counts;    // [N]
  int64_t room;

  HOST_DEVICE void write(int64_t image, int64_t place, const Box<acc_t>& box, acc_t score, int64_t label) const {
    const int64_t i = image * room + place;
    boxes[i] = box, scores[i] = score, labels[i] = label;
  }
  HOST_DEVICE void clear(int64_t image, int64_t place) const { write(image, place, {0, 0, 0, 0}, 0, 0); }
};

}  // namespace fpn_fast
