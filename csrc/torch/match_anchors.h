// SPDX-License-Identifier: Apache-2.0
// `match_anchors` on every device: checks, arguments and outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/matching.h"
#include "checks.h"

namespace fpn_fast {

// The levels of a pyramid whose anchors are not stored. `cells` holds the number of cell anchors per level, whose
// corners are consecutive in `cell_anchors`. `sizes` and `strides` hold (H, W) and (y, x) per level.
inline std::vector<AnchorLevel> anchor_levels(const std::vector<double>& cell_anchors,
                                              const std::vector<int64_t>& cells, const std::vector<int64_t>& sizes,
                                              const std::vector<int64_t>& strides) {
  constexpr const char* kOp = "match_anchors";
  STD_TORCH_CHECK(sizes.size() == 2 * cells.size() && strides.size() == 2 * cells.size(), kOp,
                  " takes H and W and two strides of each level, got ", sizes.size(), " sizes and ", strides.size(),
                  " strides for ", cells.size(), " levels");
  std::vector<AnchorLevel> levels;
  int64_t first = 0, first_cell = 0;
  for (size_t i = 0; i < cells.size(); ++i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    STD_TORCH_CHECK(
        cells[i] > 0 && cells[i] <= INT32_MAX && height >= 0 && height <= INT32_MAX && width >= 0 && width <= INT32_MAX,
        kOp, " takes levels of 1 to 2^31 - 1 cell anchors and 0 to 2^31 - 1 rows and columns, got ", cells[i], ", ",
        height, " and ", width, " at level ", i);
    levels.push_back(
        {first, first_cell, static_cast<int>(cells[i]), height, width, strides[2 * i], strides[2 * i + 1]});
    first += cells[i] * height * width, first_cell += cells[i];
  }
  STD_TORCH_CHECK(static_cast<int64_t>(cell_anchors.size()) == 4 * first_cell, kOp,
                  " takes four numbers for each cell anchor, got ", cell_anchors.size(), " for ", first_cell);
  return levels;
}

inline void check_match_anchors(const Tensor& gt_boxes, const Tensor& gt_counts, const std::optional<Tensor>& anchors,
                                const std::optional<Tensor>& anchor_counts) {
  constexpr const char* kOp = "match_anchors";
  const ScalarType type = gt_boxes.scalar_type();
  STD_TORCH_CHECK(is_box_type(type), kOp, " takes float32 or float64 boxes");
  STD_TORCH_CHECK(matches(gt_boxes, {-1, -1, 4}, type, gt_boxes), kOp, " takes contiguous gt_boxes [N, G, 4], got ",
                  shape_of(gt_boxes));
  STD_TORCH_CHECK(gt_boxes.size(1) <= INT32_MAX, kOp, " takes at most 2^31 - 1 ground truths per image, got ",
                  gt_boxes.size(1));
  check_counts(gt_counts, "gt_counts", gt_boxes, kOp);
  check_counts(anchor_counts, "anchor_counts", gt_boxes, kOp);
  STD_TORCH_CHECK(!anchors.has_value() || matches(*anchors, {-1, 4}, type, gt_boxes) ||
                      matches(*anchors, {gt_boxes.size(0), -1, 4}, type, gt_boxes),
                  kOp, " takes contiguous anchors [M, 4] or [N, M, 4] of the boxes' type and device, N is ",
                  gt_boxes.size(0), ", got ", shape_of(*anchors));
}

// `Device::run` computes the matches for a `Device::Matching<T>`, which has the fields that are set here.
template <class Device>
std::tuple<Tensor, Tensor> match_anchors(Tensor gt_boxes, Tensor gt_counts, std::optional<Tensor> anchors,
                                         std::optional<Tensor> anchor_counts, std::vector<double> cell_anchors,
                                         std::vector<int64_t> cells, std::vector<int64_t> sizes,
                                         std::vector<int64_t> strides, double offset, double high_threshold,
                                         double low_threshold, bool allow_low_quality_matches) {
  check_match_anchors(gt_boxes, gt_counts, anchors, anchor_counts);
  const std::vector<AnchorLevel> levels = anchor_levels(cell_anchors, cells, sizes, strides);
  int64_t count = 0;
  if (anchors.has_value()) {
    count = anchors->size(anchors->dim() - 2);
  } else if (!levels.empty()) {
    count = levels.back().first + levels.back().cells * levels.back().height * levels.back().width;
  }
  const Tensor matches = empty_like(gt_boxes, {gt_boxes.size(0), count}, ScalarType::Long);
  const Tensor ious = empty_like(gt_boxes, {gt_boxes.size(0), count}, gt_boxes.scalar_type());
  dispatch_boxes(gt_boxes.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    typename Device::template Matching<T> matching{};
    matching.gt_boxes = data<const T>(gt_boxes), matching.gt_counts = data<const int64_t>(gt_counts);
    matching.anchors = optional_data<T>(anchors), matching.anchor_counts = optional_data<int64_t>(anchor_counts);
    matching.images = gt_boxes.size(0), matching.anchors_per_image = count;
    matching.gts_per_image = static_cast<int>(gt_boxes.size(1));
    matching.anchors_differ = anchors.has_value() && anchors->dim() == 3;
    matching.rule = {static_cast<T>(high_threshold), static_cast<T>(low_threshold), allow_low_quality_matches};
    matching.matches = data<int64_t>(matches), matching.ious = data<T>(ious);
    matching.coding.center_offset = static_cast<T>(offset);
    Device::run(matching, levels, cell_anchors, gt_boxes);
  });
  return {matches, ious};
}

}  // namespace fpn_fast
