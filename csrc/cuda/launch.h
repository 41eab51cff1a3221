// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fpn_fast {

// One-dimensional on purpose: the grid's x axis alone is long enough (2^31 - 1 blocks) for every level of every image.
struct LaunchConfig {
  int64_t blocks;
  int threads;
};

}  // namespace fpn_fast
