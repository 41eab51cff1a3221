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
  const auto& flags = file.numbers;
  const int64_t levels = tensors[1].sizes[0], first_output = 4 + 2 * levels;
  ProposalArguments<acc_t> arguments{};
  arguments.pre_nms_top_n = flags.at(1), arguments.post_nms_top_n = tensors[first_output].sizes[1];
  arguments.strict_size = flags.at(2), arguments.logits_out = flags.at(3);
  arguments.score_thresh = static_cast<acc_t>(scalars[1]), arguments.min_size = static_cast<acc_t>(scalars[2]);
  arguments.rule = make_overlap_rule<acc_t>(scalars[0], static_cast<NmsConvention>(flags.at(6)));
  arguments.coding.scale_clamp = static_cast<acc_t>(scalars[3]);
  arguments.coding.center_offset = static_cast<acc_t>(scalars[4]);
  arguments.coding.center_clamp = static_cast<acc_t>(scalars[5]);
  arguments.coding.symmetric_clamp = flags.at(4), arguments.coding.mean_center = flags.at(5);
  for (int i = 0; i < 4; ++i) {
    arguments.coding.weight[i] = static_cast<acc_t>(scalars[6 + i]);
    arguments.coding.mean[i] = static_cast<acc_t>(scalars[10 + i]);
    arguments.coding.std[i] = static_cast<acc_t>(scalars[14 + i]);
  }
  for (int64_t i = 0; i < levels; ++i) {
    arguments.stride_y[i] = static_cast<acc_t>(tensors[2].data<const int64_t>()[2 * i]);
    arguments.stride_x[i] = static_cast<acc_t>(tensors[2].data<const int64_t>()[2 * i + 1]);
  }
  std::vector<Box<acc_t>> cells;
  const double* cell = tensors[1].data<const double>();
  for (int64_t i = 0; i < levels * tensors[1].sizes[1]; ++i, cell += 4) {
    cells.push_back({static_cast<acc_t>(cell[0]), static_cast<acc_t>(cell[1]), static_cast<acc_t>(cell[2]),
                     static_cast<acc_t>(cell[3])});
  }
  const auto objectness = host_cuda::maps_of<const T>(tensors.subspan(4, levels)),
             deltas = host_cuda::maps_of<const T>(tensors.subspan(4 + levels, levels));
  const auto plan = [&](Scratch& scratch) { return plan_proposals<T>(scratch, arguments, objectness, deltas); };
  host_cuda::run_planned<Scratch>(0xff, plan, [&](const auto& plan) {
    propose_in_launches<T>(plan, cells, tensors[3].data<const acc_t>(), tensors[first_output].data<Box<acc_t>>(),
                           tensors[first_output + 1].data<acc_t>(), tensors[first_output + 2].data<int64_t>(),
                           host_cuda::kLaunch);
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto&, const auto& file) { fpn_fast::run<T>(file); });
}
