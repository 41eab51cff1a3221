// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../torch/cuda.h"
#include "../torch/generate_proposals.h"
#include "generate_proposals.cuh"
#include "kernel_table.h"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T, class acc_t = acc_type<T>>
  static void run(const ProposalArguments<T>& arguments, Box<acc_t>* boxes, acc_t* scores, int64_t* counts,
                  const Tensor& image_sizes) {
    if (image_sizes.size(0) == 0) return;
    run_planned(
        image_sizes,
        [&](Scratch& scratch) {
          const auto plan = plan_proposals(scratch, arguments);
          STD_TORCH_CHECK(plan.decoding.runs.limit <= 1 << 30,
                          "generate_proposals takes a pre_nms_top_n of at most 2^30 on a GPU, got ",
                          arguments.pre_nms_top_n);
          return plan;
        },
        [&](const ProposalPlan<T>& plan, const auto& launch) {
          propose_in_launches(plan, arguments.cells, boxes, scores, counts, launch);
        });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("count_logits_kernel<" + type + ">", &count_logits_kernel<T>, kLogitThreads);
    table.add("select_logits_kernel<" + type + ">", &select_logits_kernel<T>, kLogitThreads);
    table.add("decode_proposals_kernel<" + type + ">", &decode_proposals_kernel<T>, kMergeThreads);
  });
  for_box_types([&]<class T>(const std::string& type) {
    table.add("head_setup_kernel<" + type + ">", &head_setup_kernel<T>, kHeadThreads);
    table.add("merge_proposals_kernel<" + type + ">", &merge_proposals_kernel<T>, kProposalThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("generate_proposals", TORCH_BOX(&generate_proposals<Cuda>));
}

}  // namespace fpn_fast
