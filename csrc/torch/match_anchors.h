// SPDX-License-Identifier: Apache-2.0
// Checks and outputs of anchor matching, the same on every device.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/matching.h"
#include "tensors.h"

namespace fpn_fast {

struct MatchOutputs {
  Tensor matches, ious;
};

// A pyramid of anchors that are not stored. cells: cell anchors of each level, in `cell_anchors` one after the other;
// sizes: (H, W) of each; strides: (down, right).
inline std::vector<AnchorLevel> anchor_levels(const std::vector<double>& cell_anchors,
                                              const std::vector<int64_t>& cells, const std::vector<int64_t>& sizes,
                                              const std::vector<int64_t>& strides) {
  constexpr const char* kOp = "match_anchors";
  STD_TORCH_CHECK(sizes.size() == 2 * cells.size() && strides.size() == 2 * cells.size(), kOp,
                  " takes H and W and two strides of each level");
  std::vector<AnchorLevel> levels;
  int64_t first = 0, first_cell = 0;
  for (size_t i = 0; i < cells.size(); ++i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    STD_TORCH_CHECK(
        cells[i] > 0 && cells[i] <= INT32_MAX && height >= 0 && height <= INT32_MAX && width >= 0 && width <= INT32_MAX,
        kOp, " takes levels of a size");
    levels.push_back(
        {first, first_cell, static_cast<int>(cells[i]), height, width, strides[2 * i], strides[2 * i + 1]});
    first += cells[i] * height * width, first_cell += cells[i];
  }
  STD_TORCH_CHECK(static_cast<int64_t>(cell_anchors.size()) == 4 * first_cell, kOp,
                  " takes four numbers for each cell anchor");
  return levels;
}

inline int64_t anchor_count(const std::optional<Tensor>& anchors, const std::vector<AnchorLevel>& levels) {
  if (anchors.has_value()) return anchors->size(anchors->dim() - 2);
  if (levels.empty()) return 0;
  const AnchorLevel& last = levels.back();
  return last.first + last.cells * last.height * last.width;
}

inline void check_match_anchors(const Tensor& gt_boxes, const Tensor& gt_counts, const std::optional<Tensor>& anchors,
                                const std::optional<Tensor>& anchor_counts) {
  constexpr const char* kOp = "match_anchors";
  const ScalarType type = gt_boxes.scalar_type();
  const auto counts_images = [&](const Tensor& counts) {
    return counts.dim() == 1 && counts.size(0) == gt_boxes.size(0) && counts.is_contiguous() &&
           counts.scalar_type() == ScalarType::Long && on_device_of(counts, gt_boxes);
  };
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp, " takes float32 or float64 boxes");
  STD_TORCH_CHECK(gt_boxes.dim() == 3 && gt_boxes.size(2) == 4 && gt_boxes.is_contiguous(), kOp,
                  " takes contiguous gt_boxes [N, G, 4]");
  STD_TORCH_CHECK(gt_boxes.size(1) <= INT32_MAX, kOp, " takes at most 2^31 - 1 ground truths of an image");
  STD_TORCH_CHECK(counts_images(gt_counts), kOp, " takes int64 gt_counts [N] on the boxes' device");
  STD_TORCH_CHECK(!anchor_counts.has_value() || counts_images(*anchor_counts), kOp,
                  " takes int64 anchor_counts [N] on the boxes' device");
  if (!anchors.has_value()) return;
  const bool shaped = anchors->dim() == 2 || (anchors->dim() == 3 && anchors->size(0) == gt_boxes.size(0));
  STD_TORCH_CHECK(shaped && anchors->size(anchors->dim() - 1) == 4 && anchors->is_contiguous() &&
                      anchors->scalar_type() == type && on_device_of(*anchors, gt_boxes),
                  kOp, " takes contiguous anchors [M, 4] or [N, M, 4] of the boxes' type and device");
}

inline MatchOutputs empty_matches(const Tensor& gt_boxes, int64_t anchors) {
  const std::vector<int64_t> sizes{gt_boxes.size(0), anchors};
  return {empty_like(gt_boxes, sizes, ScalarType::Long), empty_like(gt_boxes, sizes, gt_boxes.scalar_type())};
}

}  // namespace fpn_fast
