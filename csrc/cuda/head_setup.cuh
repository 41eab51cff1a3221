// SPDX-License-Identifier: Apache-2.0
// The first launch of proposals and detections: it writes the cell anchors and clears the histogram.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/boxes.h"
#include "launch.h"

namespace fpn_fast {

constexpr int kHeadThreads = 256;
// More than an RPN has. In float64 they take half of the 4 KB of a kernel's arguments.
constexpr int kSetupCells = 64;

// Cell anchors travel as a kernel argument, because a copy from pageable host memory synchronises with the host.
template <class acc_t>
struct HeadSetup {
  Box<acc_t> cells[kSetupCells];
  Box<acc_t>* table;  // destination of `count` cells
  int count;
  uint32_t* bins;
  int64_t bin_count;
};

template <class acc_t>
__global__ void __launch_bounds__(kHeadThreads) head_setup_kernel(const __grid_constant__ HeadSetup<acc_t> setup) {
  const int64_t thread = int64_t{blockIdx.x} * kHeadThreads + threadIdx.x;
  if (thread < setup.count) setup.table[thread] = setup.cells[thread];
  if (thread < setup.bin_count) setup.bins[thread] = 0;
}

// Copies `cells` to `table`, kSetupCells a launch, and sets `bins` to zero.
template <class acc_t, class Launch>
void set_up_in_launches(Box<acc_t>* table, const std::vector<Box<acc_t>>& cells, uint32_t* bins, int64_t bin_count,
                        const Launch& launch) {
  const int64_t count = static_cast<int64_t>(cells.size());
  for (int64_t first = 0; first == 0 || first < count; first += kSetupCells) {
    HeadSetup<acc_t> setup{};
    setup.table = table + first, setup.count = static_cast<int>(std::min<int64_t>(count - first, kSetupCells));
    std::copy(cells.begin() + first, cells.begin() + first + setup.count, setup.cells);
    setup.bins = bins, setup.bin_count = first == 0 ? bin_count : 0;
    const int64_t threads = std::max<int64_t>(setup.bin_count, kSetupCells);
    launch(head_setup_kernel<acc_t>, LaunchConfig{ceil_div(threads, kHeadThreads), kHeadThreads}, setup);
  }
}

}  // namespace fpn_fast
