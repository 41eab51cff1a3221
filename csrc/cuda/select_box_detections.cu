// SPDX-License-Identifier: Apache-2.0
// Launches of detections of given boxes. The kernels are in the .cuh files that it includes.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../torch/cuda.h"
#include "../torch/select_detections.h"
#include "kernel_table.h"
#include "select_box_detections.cuh"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> select_box_detections_cuda(Tensor logits, Tensor deltas, Tensor boxes,
                                                                      std::optional<Tensor> counts, Tensor image_sizes,
                                                                      double score_thresh, double min_size,
                                                                      std::optional<int64_t> class_top_n,
                                                                      double nms_thresh, int64_t max_detections,
                                                                      std::vector<double> weights, double scale_clamp) {
  check_box_heads(logits, deltas, boxes, counts, image_sizes, class_top_n, max_detections, weights);
  const Detections detections = empty_detections(image_sizes, max_detections);
  const std::tuple<Tensor, Tensor, Tensor, Tensor> results{detections.boxes, detections.scores, detections.labels,
                                                           detections.counts};
  if (boxes.size(0) == 0) return results;
  STD_TORCH_CHECK(boxes.size(1) * logits.size(2) <= 1 << 30,
                  "select_box_detections takes at most 2^30 pairs of a box and a class of an image on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const auto run = [&](auto tag) {
    using acc_t = typename decltype(tag)::type;
    const auto heads = box_heads<acc_t>(logits, deltas, boxes, counts, image_sizes, min_size, weights, scale_clamp);
    const auto rule = make_overlap_rule<acc_t>(nms_thresh, NmsConvention::kDivision);
    const auto plan_with = [&](Scratch& scratch) {
      return plan_boxes(scratch, heads, static_cast<acc_t>(score_thresh), class_top_n, rule, max_detections);
    };
    Scratch counting;
    plan_with(counting);
    const Tensor memory = empty_like(boxes, {counting.bytes()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(memory.data_ptr()));
    detect_in_launches(plan_with(scratch), detection_tables<acc_t>(detections), launch_on(boxes));
  };
  boxes.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : run(TypeTag<float>{});
  return results;
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class Argument>(const std::string& name, void (*kernel)(Argument), int threads) {
    all.push_back({name, reinterpret_cast<const void*>(kernel), threads});
  };
  const auto add_type = [&]<class T>(TypeTag<T>, const std::string& type) {
    add("box_probabilities_kernel<" + type + ">", &box_probabilities_kernel<T>, kBoxThreads);
    add("decode_boxes_kernel<" + type + ">", &decode_boxes_kernel<T>, kMergeThreads);
    add("keep_boxes_kernel<" + type + ">", &keep_boxes_kernel<T>, kBoxThreads);
    add("box_detections_kernel<" + type + ">", &box_detections_kernel<T>, kMergeThreads);
  };
  add_type(TypeTag<double>{}, "float64"), add_type(TypeTag<float>{}, "float32");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("select_box_detections", TORCH_BOX(&select_box_detections_cuda));
}

}  // namespace fpn_fast
