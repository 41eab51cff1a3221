// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/feature_map.h"
#include "isa.h"

namespace fpn_fast {

// Fewest elements of a task that pay for waking a second thread.
constexpr int64_t kGrainElements = 32768;

template <class Body>
void parallel_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { run_with_best_isa([&] { body(begin, end); }); });
}

template <class T>
bool channels_adjacent(const FeatureMap<T>& map) {
  return map.stride_c == 1 && map.channels > 1;
}

}  // namespace fpn_fast
