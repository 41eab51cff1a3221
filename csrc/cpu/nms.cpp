// SPDX-License-Identifier: Apache-2.0
// The entry point of non-maximum suppression on the CPU.
#include "../torch/nms.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "segmented_nms.h"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor> segmented_nms_cpu(Tensor boxes, Tensor scores, std::optional<Tensor> groups,
                                             std::optional<Tensor> counts, double iou_threshold, int64_t max_output,
                                             int64_t convention) {
  const NmsConvention rule = check_nms(boxes, scores, groups, counts, max_output, convention);
  const int64_t batch = boxes.size(0), room = boxes.size(1);
  Tensor keep = empty_like(boxes, {batch, max_output}, ScalarType::Long);
  Tensor kept = empty_like(boxes, {batch}, ScalarType::Long);
  const auto run = [&](auto tag) {
    using acc_t = typename decltype(tag)::type;
    segmented_nms(static_cast<const Box<acc_t>*>(boxes.data_ptr()), static_cast<const acc_t*>(scores.data_ptr()),
                  optional_data<int64_t>(groups), optional_data<int64_t>(counts), batch, room, iou_threshold,
                  max_output, rule, static_cast<int64_t*>(keep.data_ptr()), static_cast<int64_t*>(kept.data_ptr()));
  };
  boxes.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : run(TypeTag<float>{});
  return {keep, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("segmented_nms", TORCH_BOX(&segmented_nms_cpu)); }

}  // namespace fpn_fast
