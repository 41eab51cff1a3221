// SPDX-License-Identifier: Apache-2.0
// Boxes straight from a head's maps of deltas, with anchors by arithmetic: what proposals and detections have in
// common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/anchors.h"
#include "../common/boxes.h"
#include "../common/feature_map.h"
#include "../common/proposal_arguments.h"
#include "../common/scalar.h"
#include "launch.h"

namespace fpn_fast {

constexpr int kHeadThreads = 256;
// More than an RPN has; of float64 they are half of what a kernel's arguments may take.
constexpr int kSetupCells = 64;

// Cell anchors in arguments: a copy from the host's memory would have to be waited for.
template <class acc_t>
struct HeadSetup {
  Box<acc_t> cells[kSetupCells];
  Box<acc_t>* table;  // where they go, `count` of them
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

// Calls `launch(kernel, config, argument)` once for each kSetupCells: `cells` into `table`, and `bins` to zero.
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
    launch(head_setup_kernel<acc_t>, LaunchConfig{(threads + kHeadThreads - 1) / kHeadThreads, kHeadThreads}, setup);
  }
}

template <class T>
struct HeadDecoding {
  using acc_t = acc_type<T>;

  FeatureMap<const T> deltas[kMaxProposalLevels];
  BoxCoding<acc_t> coding;
  bool distances;  // not deltas
  acc_t stride_y[kMaxProposalLevels], stride_x[kMaxProposalLevels];
  const Box<acc_t>* cells;   // of each level, `anchors` of them
  const acc_t* image_sizes;  // [N, 2], height and width
  int anchors;
};

// The clipped box of anchor `index`, in the order of (y, x, anchor), of a level; one whose x1 is NaN where a number is
// not finite.
template <class T, class acc_t = acc_type<T>>
__device__ __forceinline__ Box<acc_t> decoded_box(const HeadDecoding<T>& head, int64_t image, int level,
                                                  uint32_t index) {
  const FeatureMap<const T>& deltas = head.deltas[level];
  const Box<acc_t> none{std::numeric_limits<acc_t>::quiet_NaN(), 0, 0, 0};
  const uint32_t anchors = head.anchors, width = deltas.width;
  const uint32_t anchor = index % anchors, pixel = index / anchors, x = pixel % width, y = pixel / width;
  acc_t code[4];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    code[i] = to_acc(*deltas.at(image, 4 * int64_t{anchor} + i, y, x));
    finite = finite && is_finite(code[i]);
  }
  if (!finite) return none;
  const Box<acc_t> source = anchor_at(head.coding, head.cells[level * int64_t{anchors} + anchor], y, x,
                                      head.stride_y[level], head.stride_x[level]);
  const Box<acc_t> decoded = head.distances ? decode_distances(source, code) : decode(head.coding, source, code);
  if (!is_finite(decoded)) return none;
  const acc_t* size = head.image_sizes + 2 * image;
  return clip(decoded, size[0], size[1]);
}

}  // namespace fpn_fast
