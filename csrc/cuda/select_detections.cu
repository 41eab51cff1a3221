// SPDX-License-Identifier: Apache-2.0
// Launches of dense heads' detections. The kernels are in the .cuh files that it includes.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/select_detections.h"
#include "kernel_table.h"
#include "select_detections.cuh"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> select_detections_cuda(
    std::vector<Tensor> logits, std::vector<Tensor> deltas, std::vector<Tensor> centerness,
    std::vector<double> cell_anchors, std::vector<int64_t> strides, Tensor image_sizes, double score_thresh,
    int64_t pre_nms_top_n, double nms_thresh, int64_t max_detections, std::vector<double> weights, double scale_clamp,
    bool distances) {
  check_dense_heads(logits, deltas, centerness, cell_anchors, strides, image_sizes, pre_nms_top_n, max_detections,
                    weights);
  const Detections detections = empty_detections(image_sizes, max_detections);
  const std::tuple<Tensor, Tensor, Tensor, Tensor> results{detections.boxes, detections.scores, detections.labels,
                                                           detections.counts};
  if (logits[0].size(0) == 0) return results;
  const torch::stable::accelerator::DeviceGuard guard(image_sizes.get_device_index());
  dispatch_floating(logits[0].scalar_type(), "select_detections", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    const auto heads = dense_heads<T>(logits, deltas, centerness, cell_anchors, strides, image_sizes, score_thresh,
                                      pre_nms_top_n, nms_thresh, max_detections, weights, scale_clamp, distances);
    int64_t candidates = 0;
    for (int64_t i = 0; i < heads.levels(); ++i) candidates += heads.most(i);
    STD_TORCH_CHECK(candidates <= 1 << 30, "select_detections takes at most 2^30 candidates of an image on a GPU");
    Scratch counting;
    plan_detections(counting, heads);
    const Tensor memory = empty_like(image_sizes, {counting.bytes()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(memory.data_ptr()));
    detect_in_launches(plan_detections(scratch, heads), heads.cells, detection_tables<acc_t>(detections),
                       launch_on(image_sizes));
  });
  return results;
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class Argument>(const std::string& name, void (*kernel)(Argument), int threads) {
    all.push_back({name, reinterpret_cast<const void*>(kernel), threads});
  };
  const auto add_type = [&]<class T>(TypeTag<T>, const std::string& type) {
    add("count_scores_kernel<" + type + ">", &count_scores_kernel<T>, kLogitThreads);
    add("select_scores_kernel<" + type + ">", &select_scores_kernel<T>, kLogitThreads);
    add("decode_candidates_kernel<" + type + ">", &decode_candidates_kernel<T>, kMergeThreads);
  };
  add_type(TypeTag<double>{}, "float64"), add_type(TypeTag<float>{}, "float32");
  add_type(TypeTag<Half>{}, "float16"), add_type(TypeTag<BFloat16>{}, "bfloat16");
  add("gather_detections_kernel<float64>", &gather_detections_kernel<double>, kDetectionThreads);
  add("gather_detections_kernel<float32>", &gather_detections_kernel<float>, kDetectionThreads);
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("select_detections", TORCH_BOX(&select_detections_cuda));
}

}  // namespace fpn_fast
