// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/select_detections.h"
#include "kernel_table.h"
#include "select_box_detections.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class acc_t>
  static void run(const BoxHeads<acc_t>& heads, acc_t score_thresh, std::optional<int64_t> class_top_n,
                  double nms_thresh, const Detections& detections) {
    if (heads.batch == 0) return;
    STD_TORCH_CHECK(heads.room * heads.classes <= 1 << 30,
                    "select_box_detections takes at most 2^30 pairs of a box and a class per image on a GPU, got ",
                    heads.room * heads.classes);
    const auto tables = detections.tables<acc_t>();
    run_planned(
        detections.boxes,
        [&](Scratch& scratch) {
          return plan_boxes(scratch, heads, score_thresh, class_top_n,
                            make_overlap_rule<acc_t>(nms_thresh, NmsConvention::kDivision), tables.room);
        },
        [&](const BoxPlan<acc_t>& plan, const auto& launch) { detect_in_launches(plan, tables, launch); });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_box_types([&]<class T>(const std::string& type) {
    table.add("box_probabilities_kernel<" + type + ">", &box_probabilities_kernel<T>, kBoxThreads);
    table.add("decode_boxes_kernel<" + type + ">", &decode_boxes_kernel<T>, kMergeThreads);
    table.add("keep_boxes_kernel<" + type + ">", &keep_boxes_kernel<T>, kBoxThreads);
    table.add("box_detections_kernel<" + type + ">", &box_detections_kernel<T>, kMergeThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("select_box_detections", TORCH_BOX(&select_box_detections<Cuda>));
}

}  // namespace fpn_fast
