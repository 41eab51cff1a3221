// SPDX-License-Identifier: Apache-2.0
// Runs segmented NMS, or its sorts alone, after which keep are the indices of the candidates in the order of
// suppression: segmented_nms_main nms|sort CASE_FILE. Numbers: type, whether there are groups, whether
// there are counts, convention. Tensors: the threshold in float64, boxes [N, B, 4], scores [N, B], groups [N, B],
// counts [N], keep [N, M], kept [N].
#include "../../csrc/cuda/segmented_nms.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class acc_t>
void run(bool only_sorts, const host_cuda::CaseFile& file) {
  const auto& tensors = file.tensors;
  const auto convention = static_cast<NmsConvention>(file.numbers.at(3));
  NmsInput<acc_t> input{};
  input.boxes = tensors.at(1).data<const Box<acc_t>>(), input.scores = tensors.at(2).data<const acc_t>();
  input.groups = file.numbers.at(1) ? tensors.at(3).data<const int64_t>() : nullptr;
  input.counts = file.numbers.at(2) ? tensors.at(4).data<const int64_t>() : nullptr;
  input.batch = tensors.at(1).sizes[0], input.room = tensors.at(1).sizes[1];
  input.offset = convention == NmsConvention::kOffset;
  const auto rule = make_overlap_rule<acc_t>(*tensors.at(0).data<const double>(), convention);
  int64_t *keep = tensors.at(5).data<int64_t>(), *kept = tensors.at(6).data<int64_t>();
  const auto plan = [&](Scratch& scratch) { return plan_nms(scratch, input, rule); };
  host_cuda::run_planned(0xff, plan, [&](const NmsPlan<acc_t>& plan) {
    if (!only_sorts) return nms_in_launches(plan, tensors.at(5).sizes[1], keep, kept, host_cuda::kLaunch);
    sort_in_launches(plan, host_cuda::kLaunch);
    const Candidates<acc_t>& candidates = plan.first.candidates;
    for (int64_t n = 0; n < input.batch; ++n) {
      const int *order = plan.first.order + n * candidates.room, *ranks = candidates.ranks;
      kept[n] = candidates.counts[n];
      for (int i = 0; i < kept[n]; ++i) {
        keep[n * input.room + i] = order[ranks != nullptr ? ranks[n * candidates.room + i] : i];
      }
    }
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of<host_cuda::WideTypes>(count, arguments, []<class T>(const auto& kernel, const auto& file) {
    fpn_fast::run<T>(kernel == "sort", file);
  });
}
