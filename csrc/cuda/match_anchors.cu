// SPDX-License-Identifier: Apache-2.0
// Launches of anchor matching. The kernels are in the .cuh file beside this one.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/match_anchors.h"
#include "kernel_table.h"
#include "match_anchors.cuh"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor> match_anchors_cuda(Tensor gt_boxes, Tensor gt_counts, std::optional<Tensor> anchors,
                                              std::optional<Tensor> anchor_counts, std::vector<double> cell_anchors,
                                              std::vector<int64_t> cells, std::vector<int64_t> sizes,
                                              std::vector<int64_t> strides, double offset, double high_threshold,
                                              double low_threshold, bool allow_low_quality_matches) {
  check_match_anchors(gt_boxes, gt_counts, anchors, anchor_counts);
  const std::vector<AnchorLevel> levels = anchor_levels(cell_anchors, cells, sizes, strides);
  STD_TORCH_CHECK(levels.size() <= kMaxAnchorLevels && cell_anchors.size() <= 4 * kMaxCellAnchors,
                  "match_anchors takes grids of at most ", kMaxAnchorLevels, " levels and ", kMaxCellAnchors,
                  " cell anchors on CUDA; pass larger ones as boxes");
  const int64_t count = anchor_count(anchors, levels);
  MatchOutputs outputs = empty_matches(gt_boxes, count);
  if (outputs.matches.numel() == 0) return {outputs.matches, outputs.ious};
  const torch::stable::accelerator::DeviceGuard guard(gt_boxes.get_device_index());
  const cudaStream_t stream = current_stream(gt_boxes);
  const int64_t gts = gt_boxes.size(0) * gt_boxes.size(1);
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    AnchorMatching<T> matching{};
    matching.gt_boxes = static_cast<const T*>(gt_boxes.data_ptr());
    matching.gt_counts = static_cast<const int64_t*>(gt_counts.data_ptr());
    matching.anchors = optional_data<T>(anchors);
    matching.anchor_counts = optional_data<int64_t>(anchor_counts);
    matching.images = gt_boxes.size(0), matching.anchors_per_image = count;
    matching.gts_per_image = static_cast<int>(gt_boxes.size(1));
    matching.anchors_differ = anchors.has_value() && anchors->dim() == 3;
    matching.rule = {static_cast<T>(high_threshold), static_cast<T>(low_threshold), allow_low_quality_matches};
    matching.matches = static_cast<int64_t*>(outputs.matches.data_ptr());
    matching.ious = static_cast<T*>(outputs.ious.data_ptr());
    matching.levels = static_cast<int>(levels.size());
    std::copy(levels.begin(), levels.end(), matching.level);
    std::copy(cell_anchors.begin(), cell_anchors.end(), matching.cell_anchor);
    matching.coding.center_offset = static_cast<T>(offset);
    std::optional<Tensor> scratch;
    if (allow_low_quality_matches && gts > 0) {
      scratch = empty_like(gt_boxes, {gts}, gt_boxes.scalar_type());
      matching.highest = static_cast<IouBits<T>*>(scratch->data_ptr());
      STD_CUDA_CHECK(cudaMemsetAsync(matching.highest, 0, sizeof(T) * gts, stream));
    }
    match_in_launches(matching, [&](auto kernel, const LaunchConfig& config, const auto& argument) {
      launch(kernel, config, stream, argument);
    });
  };
  gt_boxes.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : run(TypeTag<float>{});
  return {outputs.matches, outputs.ious};
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    all.push_back(
        {"match_anchors_kernel<" + type + ">", reinterpret_cast<const void*>(&match_anchors_kernel<T>), kMatchThreads});
    all.push_back({"match_anchors_low_quality_kernel<" + type + ">",
                   reinterpret_cast<const void*>(&match_anchors_low_quality_kernel<T>), kMatchThreads});
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("match_anchors", TORCH_BOX(&match_anchors_cuda)); }

}  // namespace fpn_fast
