// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../torch/cuda.h"
#include "../torch/select_detections.h"
#include "kernel_table.h"
#include "select_detections.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void run(const DenseHeads<T>& heads, const Detections& detections) {
    if (heads.batch() == 0) return;
    int64_t candidates = 0;
    for (int64_t i = 0; i < heads.levels(); ++i) candidates += heads.most(i);
    STD_TORCH_CHECK(candidates <= 1 << 30, "select_detections takes at most 2^30 candidates per image on a GPU, got ",
                    candidates);
    run_planned(
        detections.boxes, [&](Scratch& scratch) { return plan_detections(scratch, heads); },
        [&](const DetectionPlan<T>& plan, const auto& launch) {
          detect_in_launches(plan, heads.cells, detections.tables<acc_type<T>>(), launch);
        });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("count_scores_kernel<" + type + ">", &count_scores_kernel<T>, kLogitThreads);
    table.add("select_scores_kernel<" + type + ">", &select_scores_kernel<T>, kLogitThreads);
    table.add("decode_candidates_kernel<" + type + ">", &decode_candidates_kernel<T>, kMergeThreads);
  });
  for_box_types([&]<class T>(const std::string& type) {
    table.add("gather_detections_kernel<" + type + ">", &gather_detections_kernel<T>, kNmsThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("select_detections", TORCH_BOX(&select_detections<Cuda>));
}

}  // namespace fpn_fast
