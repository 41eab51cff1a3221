// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "boxes.h"
#include "host_device.h"

namespace fpn_fast {

// The boxes that segmented NMS is given. A box suppresses only boxes of its own group.
template <class acc_t>
struct NmsInput {
  const Box<acc_t>* boxes;  // [batch, room]
  const acc_t* scores;      // [batch, room]
  const int64_t* groups;    // [batch, room], or null: one group
  const int64_t* counts;    // [batch], or null: `room` boxes per image
  int64_t batch, room;
  bool offset;  // groups are told apart by moving their boxes

  HOST_DEVICE bool labelled() const { return groups != nullptr && !offset; }
};

}  // namespace fpn_fast
