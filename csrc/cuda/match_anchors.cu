// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/match_anchors.h"
#include "kernel_table.h"
#include "match_anchors.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  using Matching = AnchorMatching<T>;

  template <class T>
  static void run(Matching<T>& matching, const std::vector<AnchorLevel>& levels,
                  const std::vector<double>& cell_anchors, const Tensor& gt_boxes) {
    STD_TORCH_CHECK(levels.size() <= kMaxAnchorLevels && cell_anchors.size() <= 4 * kMaxCellAnchors,
                    "match_anchors takes grids of at most ", kMaxAnchorLevels, " levels and ", kMaxCellAnchors,
                    " cell anchors on CUDA, got ", levels.size(), " and ", cell_anchors.size() / 4,
                    "; pass larger ones as boxes");
    if (matching.images * matching.anchors_per_image == 0) return;
    matching.levels = static_cast<int>(levels.size());
    std::copy(levels.begin(), levels.end(), matching.level);
    std::copy(cell_anchors.begin(), cell_anchors.end(), matching.cell_anchor);
    run_on(gt_boxes, [&](const auto& launch) {
      const int64_t gts = matching.images * matching.gts_per_image;
      const Tensor highest = empty_like(gt_boxes, {matching.rule.low_quality ? gts : 0}, gt_boxes.scalar_type());
      matching.highest = data<IouBits<T>>(highest);
      if (highest.numel() > 0) {
        STD_CUDA_CHECK(cudaMemsetAsync(matching.highest, 0, sizeof(T) * gts, current_stream(gt_boxes)));
      }
      match_in_launches(matching, launch);
    });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_box_types([&]<class T>(const std::string& type) {
    table.add("match_anchors_kernel<" + type + ">", &match_anchors_kernel<T>, kMatchThreads);
    table.add("match_anchors_low_quality_kernel<" + type + ">", &match_anchors_low_quality_kernel<T>, kMatchThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("match_anchors", TORCH_BOX(&match_anchors<Cuda>)); }

}  // namespace fpn_fast
