// SPDX-License-Identifier: Apache-2.0
// What `generate_proposals` and `select_detections` have in common: a head's maps, cell anchors and box coding.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../common/head_decoding.h"
#include "checks.h"

namespace fpn_fast {

inline void check_like(const std::vector<Tensor>& maps, int64_t channels, const char* name,
                       const std::vector<Tensor>& first_maps, const char* op) {
  check_maps(maps, op);
  STD_TORCH_CHECK(maps.size() == first_maps.size(), op, " takes 1 to ", kMaxProposalLevels, " maps and as many of ",
                  name, ", got ", first_maps.size(), " and ", maps.size());
  const Tensor& first = first_maps[0];
  STD_TORCH_CHECK(maps[0].scalar_type() == first.scalar_type() && on_device_of(maps[0], first), op, " takes ", name,
                  " of the first maps' type and device");
  for (size_t i = 0; i < maps.size(); ++i) {
    STD_TORCH_CHECK(maps[i].size(0) == first.size(0) && maps[i].size(1) == channels &&
                        maps[i].size(2) == first_maps[i].size(2) && maps[i].size(3) == first_maps[i].size(3),
                    op, " takes ", name, " of ", channels,
                    " channels and the first maps' batch, height and width, got ", shape_of(maps[i]), " for ",
                    shape_of(first_maps[i]), " at level ", i);
  }
}

// Checks the maps that are ranked, the strides, the image sizes, and `numbers`: limits of boxes.
inline void check_head(const std::vector<Tensor>& maps, const std::vector<int64_t>& strides, const Tensor& image_sizes,
                       const std::vector<int64_t>& numbers, const char* op) {
  check_maps(maps, op);
  STD_TORCH_CHECK(maps.size() <= kMaxProposalLevels, op, " takes 1 to ", kMaxProposalLevels, " levels, got ",
                  maps.size());
  for (const Tensor& map : maps) {
    STD_TORCH_CHECK(map.size(1) * map.size(2) * map.size(3) <= INT32_MAX, op,
                    " takes at most 2^31 - 1 elements per image and level, got ", shape_of(map));
  }
  STD_TORCH_CHECK(strides.size() == 2 * maps.size(), op, " takes strides along y and x for each level, got ",
                  strides.size(), " for ", maps.size(), " levels");
  check_image_sizes(image_sizes, maps[0], op);
  for (const int64_t number : numbers) {
    STD_TORCH_CHECK(number >= 0, op, " takes numbers of boxes of 0 or more, got ", number);
  }
}

template <class acc_t>
std::vector<Box<acc_t>> cell_boxes(const std::vector<double>& corners) {
  std::vector<Box<acc_t>> cells;
  for (size_t i = 0; i < corners.size(); i += 4) {
    cells.push_back({static_cast<acc_t>(corners[i]), static_cast<acc_t>(corners[i + 1]),
                     static_cast<acc_t>(corners[i + 2]), static_cast<acc_t>(corners[i + 3])});
  }
  return cells;
}

// torchvision's BoxCoder.
template <class acc_t>
BoxCoding<acc_t> plain_box_coding(const std::vector<double>& weights, double scale_clamp) {
  BoxCoding<acc_t> coding{};
  for (int i = 0; i < 4; ++i) coding.weight[i] = static_cast<acc_t>(weights[i]), coding.std[i] = 1;
  coding.scale_clamp = static_cast<acc_t>(scale_clamp);
  coding.center_clamp = std::numeric_limits<acc_t>::infinity();
  return coding;
}

// The caller sets `cells`.
template <class T, class acc_t = acc_type<T>>
HeadDecoding<T> head_decoding(const std::vector<Tensor>& deltas, const std::vector<int64_t>& strides,
                              const Tensor& image_sizes, const BoxCoding<acc_t>& coding) {
  HeadDecoding<T> head{};
  for (size_t i = 0; i < deltas.size(); ++i) {
    head.deltas[i] = to_feature_map<const T>(deltas[i]);
    head.stride_y[i] = static_cast<acc_t>(strides[2 * i]), head.stride_x[i] = static_cast<acc_t>(strides[2 * i + 1]);
  }
  head.coding = coding, head.image_sizes = data<const acc_t>(image_sizes);
  head.anchors = static_cast<int>(deltas[0].size(1) / 4);
  return head;
}

}  // namespace fpn_fast
