// SPDX-License-Identifier: Apache-2.0
// Launches of segmented NMS. The kernels are in the .cuh files that it includes.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "../torch/cuda.h"
#include "../torch/nms.h"
#include "kernel_table.h"
#include "segmented_nms.cuh"

namespace fpn_fast {
namespace {

template <class acc_t>
NmsInput<acc_t> nms_input(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
                          const std::optional<Tensor>& counts, NmsConvention convention) {
  return {static_cast<const Box<acc_t>*>(boxes.data_ptr()),
          static_cast<const acc_t*>(scores.data_ptr()),
          optional_data<int64_t>(groups),
          optional_data<int64_t>(counts),
          boxes.size(0),
          boxes.size(1),
          convention == NmsConvention::kOffset};
}

std::tuple<Tensor, Tensor> segmented_nms_cuda(Tensor boxes, Tensor scores, std::optional<Tensor> groups,
                                              std::optional<Tensor> counts, double iou_threshold, int64_t max_output,
                                              int64_t convention) {
  const NmsConvention rule = check_nms(boxes, scores, groups, counts, max_output, convention);
  const int64_t batch = boxes.size(0);
  STD_TORCH_CHECK(boxes.size(1) <= 1 << 30, "segmented_nms takes at most 2^30 boxes of an image on a GPU");
  const Tensor keep = empty_like(boxes, {batch, max_output}, ScalarType::Long);
  const Tensor kept = empty_like(boxes, {batch}, ScalarType::Long);
  if (batch == 0) return {keep, kept};
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const auto run = [&](auto tag) {
    using acc_t = typename decltype(tag)::type;
    const auto input = nms_input<acc_t>(boxes, scores, groups, counts, rule);
    const auto overlap = make_overlap_rule<acc_t>(iou_threshold, rule);
    Scratch counting;
    plan_nms(counting, input, overlap);
    const Tensor memory = empty_like(boxes, {counting.bytes()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(memory.data_ptr()));
    nms_in_launches(plan_nms(scratch, input, overlap), max_output, static_cast<int64_t*>(keep.data_ptr()),
                    static_cast<int64_t*>(kept.data_ptr()), launch_on(boxes));
  };
  boxes.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : run(TypeTag<float>{});
  return {keep, kept};
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class Argument>(const std::string& name, void (*kernel)(Argument), int threads) {
    all.push_back({name, reinterpret_cast<const void*>(kernel), threads});
  };
  const auto add_type = [&]<class T>(TypeTag<T>, const std::string& type) {
    add("nms_scores_kernel<" + type + ">", &nms_scores_kernel<T>, kSortThreads);
    add("nms_order_kernel<" + type + ">", &nms_order_kernel<T>, kMergeThreads);
    add("nms_groups_kernel<" + type + ">", &nms_groups_kernel<T>, kSortThreads);
    add("nms_candidates_kernel<" + type + ">", &nms_candidates_kernel<T>, kMergeThreads);
    add("greedy_nms_kernel<" + type + ">", &greedy_nms_kernel<T>, kNmsThreads);
    add("nms_pairs_kernel<" + type + ">", &nms_pairs_kernel<T>, kNmsThreads);
    add("nms_region_kernel<" + type + ">", &nms_region_kernel<T>, kNmsThreads);
  };
  add_type(TypeTag<double>{}, "float64"), add_type(TypeTag<float>{}, "float32");
  add("merge_runs_kernel<uint64>", &merge_runs_kernel<uint64_t>, kMergeThreads);
  add("merge_runs_kernel<uint128>", &merge_runs_kernel<unsigned __int128>, kMergeThreads);
  add("nms_output_kernel<int64>", &nms_output_kernel<int64_t>, kNmsThreads);
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("segmented_nms", TORCH_BOX(&segmented_nms_cuda)); }

}  // namespace fpn_fast
