// SPDX-License-Identifier: Apache-2.0
// Boxes from a dense head's maps of deltas. Anchors are computed, not stored.
#pragma once

#include <cstdint>
#include <limits>

#include "anchors.h"
#include "boxes.h"
#include "feature_map.h"
#include "host_device.h"
#include "scalar.h"

namespace fpn_fast {

// P2 to P9.
constexpr int kMaxProposalLevels = 8;

template <class T>
struct HeadDecoding {
  using acc_t = acc_type<T>;

  FeatureMap<const T> deltas[kMaxProposalLevels];
  BoxCoding<acc_t> coding;
  bool distances;  // the maps hold distances to the box's sides, not deltas
  acc_t stride_y[kMaxProposalLevels], stride_x[kMaxProposalLevels];
  const Box<acc_t>* cells;   // [levels, anchors]
  const acc_t* image_sizes;  // [N, 2], height and width
  int anchors;
};

// The clipped box of anchor `index` of a level, counted in the order (y, x, anchor). Its x1 is NaN where a delta or a
// corner is not finite.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE Box<acc_t> decoded_box(const HeadDecoding<T>& head, int64_t image, int level, uint32_t index) {
  const FeatureMap<const T>& deltas = head.deltas[level];
  const Box<acc_t> none{std::numeric_limits<acc_t>::quiet_NaN(), 0, 0, 0};
  const uint32_t anchors = head.anchors, width = deltas.width;
  const uint32_t anchor = index % anchors, pixel = index / anchors, x = pixel % width, y = pixel / width;
  acc_t code[4];
  bool finite = true;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
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
