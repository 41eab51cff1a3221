// SPDX-License-Identifier: Apache-2.0
// Runs proposal generation: generate_proposals_main generate_proposals CASE_FILE. Numbers: type, pre_nms_top_n,
// strict_size, logits_out, symmetric_clamp, mean_center, convention. Tensors: nms_thresh, score_thresh, min_size,
// scale_clamp, center_offset, center_clamp, weights, means and stds as one in float64, cell anchors [L, A, 4] in
// float64, strides [L, 2], image sizes [N, 2], L maps of objectness and L of deltas, boxes [N, P, 4], scores [N, P],
// counts [N].
#include "../../csrc/cuda/generate_proposals.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
void run(const host_cuda::CaseFile& file) {
  using acc_t = acc_type<T>;
  const host_cuda::Tensors tensors(file.tensors);
  const double* scalars = tensors[0].data<const double>();
  const int64_t* strides = tensors[2].data<const int64_t>();
  const auto& flags = file.numbers;
  const int64_t levels = tensors[1].sizes[0], first_output = 4 + 2 * levels;
  ProposalArguments<T> arguments{};
  arguments.objectness = host_cuda::maps_of<const T>(tensors.subspan(4, levels));
  arguments.cells = host_cuda::boxes_of<Box<acc_t>>(tensors[1]);
  arguments.pre_nms_top_n = flags.at(1), arguments.post_nms_top_n = tensors[first_output].sizes[1];
  arguments.strict_size = flags.at(2), arguments.logits_out = flags.at(3);
  arguments.score_thresh = static_cast<acc_t>(scalars[1]), arguments.min_size = static_cast<acc_t>(scalars[2]);
  arguments.rule = make_overlap_rule<acc_t>(scalars[0], static_cast<NmsConvention>(flags.at(6)));
  HeadDecoding<T>& head = arguments.head;
  head.image_sizes = tensors[3].data<const acc_t>(), head.anchors = static_cast<int>(tensors[1].sizes[1]);
  head.coding.scale_clamp = static_cast<acc_t>(scalars[3]);
  head.coding.center_offset = static_cast<acc_t>(scalars[4]);
  head.coding.center_clamp = static_cast<acc_t>(scalars[5]);
  head.coding.symmetric_clamp = flags.at(4), head.coding.mean_center = flags.at(5);
  for (int i = 0; i < 4; ++i) {
    head.coding.weight[i] = static_cast<acc_t>(scalars[6 + i]);
    head.coding.mean[i] = static_cast<acc_t>(scalars[10 + i]);
    head.coding.std[i] = static_cast<acc_t>(scalars[14 + i]);
  }
  for (int64_t i = 0; i < levels; ++i) {
    head.deltas[i] = tensors[4 + levels + i].map<const T>();
    head.stride_y[i] = static_cast<acc_t>(strides[2 * i]), head.stride_x[i] = static_cast<acc_t>(strides[2 * i + 1]);
  }
  const auto make_plan = [&](Scratch& scratch) { return plan_proposals(scratch, arguments); };
  host_cuda::run_planned(0xff, make_plan, [&](const auto& plan) {
    propose_in_launches(plan, arguments.cells, tensors[first_output].data<Box<acc_t>>(),
                        tensors[first_output + 1].data<acc_t>(), tensors[first_output + 2].data<int64_t>(),
                        host_cuda::kLaunch);
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto&, const auto& file) { fpn_fast::run<T>(file); });
}
