// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace fpn_fast {

// One-dimensional: the x axis of a grid holds 2^31 - 1 blocks, enough for every level of every image.
// Functions named ..._in_launch and ..._in_launches call `launch(kernel, config, argument)`, which csrc/torch/cuda.h
// supplies.
struct LaunchConfig {
  int64_t blocks;
  int threads;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fpn_fast
