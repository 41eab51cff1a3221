// SPDX-License-Identifier: Apache-2.0
// Launches of proposal generation. The kernels are in the .cuh files that it includes.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/generate_proposals.h"
#include "generate_proposals.cuh"
#include "kernel_table.h"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> generate_proposals_cuda(
    std::vector<Tensor> objectness, std::vector<Tensor> deltas, std::vector<double> cell_anchors,
    std::vector<int64_t> strides, Tensor image_sizes, int64_t pre_nms_top_n, int64_t post_nms_top_n, double nms_thresh,
    double score_thresh, double min_size, std::vector<double> weights, std::vector<double> means,
    std::vector<double> stds, double scale_clamp, bool symmetric_clamp, bool mean_center, double center_offset,
    double center_clamp, bool strict_size, bool logits_out, int64_t convention) {
  check_proposals(objectness, deltas, cell_anchors, strides, image_sizes, pre_nms_top_n, post_nms_top_n, convention);
  const ScalarType type = image_sizes.scalar_type();
  const int64_t batch = objectness[0].size(0);
  const Tensor boxes = empty_like(image_sizes, {batch, post_nms_top_n, 4}, type);
  const Tensor scores = empty_like(image_sizes, {batch, post_nms_top_n}, type);
  const Tensor counts = empty_like(image_sizes, {batch}, ScalarType::Long);
  if (batch == 0) return {boxes, scores, counts};
  const torch::stable::accelerator::DeviceGuard guard(image_sizes.get_device_index());
  dispatch_floating(objectness[0].scalar_type(), "generate_proposals", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    const auto coding =
        box_coding<acc_t>(weights, means, stds, scale_clamp, symmetric_clamp, mean_center, center_offset, center_clamp);
    const auto arguments = proposal_arguments<acc_t>(strides, pre_nms_top_n, post_nms_top_n, nms_thresh, score_thresh,
                                                     min_size, coding, strict_size, logits_out, convention);
    const auto logits = to_feature_maps<const T>(objectness), codes = to_feature_maps<const T>(deltas);
    Scratch counting;
    const auto plan = plan_proposals<T>(counting, arguments, logits, codes);
    STD_TORCH_CHECK(plan.decoding.runs.limit <= 1 << 30,
                    "generate_proposals takes a pre_nms_top_n of at most 2^30 on a GPU");
    const Tensor memory = empty_like(image_sizes, {counting.bytes()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(memory.data_ptr()));
    propose_in_launches<T>(plan_proposals<T>(scratch, arguments, logits, codes), cell_boxes<acc_t>(cell_anchors),
                           static_cast<const acc_t*>(image_sizes.data_ptr()),
                           static_cast<Box<acc_t>*>(boxes.data_ptr()), static_cast<acc_t*>(scores.data_ptr()),
                           static_cast<int64_t*>(counts.data_ptr()), launch_on(image_sizes));
  });
  return {boxes, scores, counts};
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class Argument>(const std::string& name, void (*kernel)(Argument), int threads) {
    all.push_back({name, reinterpret_cast<const void*>(kernel), threads});
  };
  const auto add_type = [&]<class T>(TypeTag<T>, const std::string& type) {
    add("count_logits_kernel<" + type + ">", &count_logits_kernel<T>, kLogitThreads);
    add("select_logits_kernel<" + type + ">", &select_logits_kernel<T>, kLogitThreads);
    add("decode_proposals_kernel<" + type + ">", &decode_proposals_kernel<T>, kMergeThreads);
  };
  add_type(TypeTag<double>{}, "float64"), add_type(TypeTag<float>{}, "float32");
  add_type(TypeTag<Half>{}, "float16"), add_type(TypeTag<BFloat16>{}, "bfloat16");
  const auto add_sum_type = [&]<class T>(TypeTag<T>, const std::string& type) {
    add("head_setup_kernel<" + type + ">", &head_setup_kernel<T>, kHeadThreads);
    add("merge_proposals_kernel<" + type + ">", &merge_proposals_kernel<T>, kProposalThreads);
  };
  add_sum_type(TypeTag<double>{}, "float64"), add_sum_type(TypeTag<float>{}, "float32");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("generate_proposals", TORCH_BOX(&generate_proposals_cuda));
}

}  // namespace fpn_fast
