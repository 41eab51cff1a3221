// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/nms.h"
#include "kernel_table.h"
#include "segmented_nms.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class acc_t>
  static void run(const NmsInput<acc_t>& input, const OverlapRule<acc_t>& rule, int64_t max_output, int64_t* keep,
                  int64_t* kept, const Tensor& boxes) {
    STD_TORCH_CHECK(input.room <= 1 << 30, "segmented_nms takes at most 2^30 boxes per image on a GPU, got ",
                    input.room);
    if (input.batch == 0) return;
    run_planned(
        boxes, [&](Scratch& scratch) { return plan_nms(scratch, input, rule); },
        [&](const NmsPlan<acc_t>& plan, const auto& launch) {
          const NmsOutput<int64_t> output{nms_in_launches(plan, launch), max_output, keep, kept};
          launch(nms_output_kernel<int64_t>, LaunchConfig{input.batch, kNmsThreads}, output);
        });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_box_types([&]<class T>(const std::string& type) {
    table.add("nms_scores_kernel<" + type + ">", &nms_scores_kernel<T>, kSortThreads);
    table.add("nms_order_kernel<" + type + ">", &nms_order_kernel<T>, kMergeThreads);
    table.add("nms_groups_kernel<" + type + ">", &nms_groups_kernel<T>, kSortThreads);
    table.add("nms_candidates_kernel<" + type + ">", &nms_candidates_kernel<T>, kMergeThreads);
    table.add("greedy_nms_kernel<" + type + ">", &greedy_nms_kernel<T>, kNmsThreads);
    table.add("nms_pairs_kernel<" + type + ">", &nms_pairs_kernel<T>, kNmsThreads);
    table.add("nms_suppress_kernel<" + type + ">", &nms_suppress_kernel<T>, kNmsThreads);
    table.add("nms_decide_kernel<" + type + ">", &nms_decide_kernel<T>, kDecideThreads);
  });
  table.add("merge_runs_kernel<uint64>", &merge_runs_kernel<uint64_t>, kMergeThreads);
  table.add("merge_runs_kernel<uint128>", &merge_runs_kernel<unsigned __int128>, kMergeThreads);
  table.add("nms_output_kernel<int64>", &nms_output_kernel<int64_t>, kNmsThreads);
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("segmented_nms", TORCH_BOX(&segmented_nms<Cuda>)); }

}  // namespace fpn_fast
