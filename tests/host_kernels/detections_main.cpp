// SPDX-License-Identifier: Apache-2.0
// Runs a head's last step: detections_main maps|boxes CASE_FILE; both end with boxes [N, D, 4], scores [N, D], labels
// [N, D] and counts [N].
// maps: numbers: type, pre_nms_top_n, whether there is centerness, distances. Tensors: score_thresh, nms_thresh,
// scale_clamp and weights as one in float64, cell anchors [L, A, 4] in float64, strides [L, 2], image sizes [N, 2], L
// maps of logits, L of deltas, and L of centerness or none.
// boxes: numbers: type, whether there are counts, class_top_n or -1. Tensors: score_thresh, nms_thresh, scale_clamp,
// weights and min_size as one in float64, logits, deltas, boxes, counts and image sizes.
#include "../../csrc/cuda/select_box_detections.cuh"
#include "../../csrc/cuda/select_detections.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using host_cuda::maps_of, host_cuda::Tensors;

template <class acc_t>
DetectionTables<acc_t> tables_of(Tensors tensors) {
  const Tensors last = tensors.last(4);
  return {last[0].data<Box<acc_t>>(), last[1].data<acc_t>(), last[2].data<int64_t>(), last[3].data<int64_t>(),
          last[1].sizes[1]};
}

template <class acc_t>
BoxCoding<acc_t> coding_of(const double* scalars) {
  BoxCoding<acc_t> coding{};
  coding.scale_clamp = static_cast<acc_t>(scalars[2]), coding.center_clamp = std::numeric_limits<acc_t>::infinity();
  for (int i = 0; i < 4; ++i) coding.weight[i] = static_cast<acc_t>(scalars[3 + i]), coding.std[i] = 1;
  return coding;
}

// A finite value, because the kernels mark missing boxes by NaN.
constexpr int kUnwritten = 0x7f;

template <class T>
void run_maps(const std::vector<int64_t>& numbers, Tensors tensors) {
  using acc_t = acc_type<T>;
  const double* scalars = tensors[0].data<const double>();
  const int64_t levels = tensors[1].sizes[0];
  const acc_t threshold = static_cast<acc_t>(scalars[0]);
  DenseHeads<T> heads{};
  heads.logits = maps_of<const T>(tensors.subspan(4, levels));
  if (numbers.at(2)) heads.centerness = maps_of<const T>(tensors.subspan(4 + 2 * levels, levels));
  heads.cells = host_cuda::boxes_of<Box<acc_t>>(tensors[1]);
  HeadDecoding<T>& head = heads.head;
  head.image_sizes = tensors[3].data<const acc_t>(), head.anchors = static_cast<int>(tensors[1].sizes[1]);
  head.coding = coding_of<acc_t>(scalars), head.distances = numbers.at(3);
  for (int64_t i = 0; i < levels; ++i) {
    head.deltas[i] = tensors[4 + levels + i].map<const T>();
    head.stride_y[i] = static_cast<acc_t>(tensors[2].data<const int64_t>()[2 * i]);
    head.stride_x[i] = static_cast<acc_t>(tensors[2].data<const int64_t>()[2 * i + 1]);
  }
  heads.classes = heads.logits[0].channels / head.anchors, heads.nms_thresh = scalars[1];
  heads.pre_nms_top_n = numbers.at(1), heads.max_detections = tensors.last(4)[1].sizes[1];
  heads.lowest = numbers.at(2) ? std::nextafter(threshold, std::numeric_limits<acc_t>::infinity())
                               : lowest_passing_logit(threshold);
  const auto plan = [&](Scratch& scratch) { return plan_detections(scratch, heads); };
  host_cuda::run_planned(kUnwritten, plan, [&](const auto& plan) {
    detect_in_launches(plan, heads.cells, tables_of<acc_t>(tensors), host_cuda::kLaunch);
  });
}

template <class acc_t>
void run_boxes(const std::vector<int64_t>& numbers, Tensors tensors) {
  const double* scalars = tensors[0].data<const double>();
  BoxHeads<acc_t> heads{};
  heads.logits = tensors[1].data<const acc_t>(), heads.deltas = tensors[2].data<const acc_t>();
  heads.boxes = tensors[3].data<const Box<acc_t>>();
  heads.counts = numbers.at(1) ? tensors[4].data<const int64_t>() : nullptr;
  heads.image_sizes = tensors[5].data<const acc_t>();
  heads.batch = tensors[1].sizes[0], heads.room = tensors[1].sizes[1], heads.classes = tensors[1].sizes[2];
  heads.own_deltas = tensors[2].sizes[2] != 4;
  heads.min_size = static_cast<acc_t>(scalars[7]), heads.coding = coding_of<acc_t>(scalars);
  const auto limit = numbers.at(2) < 0 ? std::nullopt : std::optional(numbers.at(2));
  const auto tables = tables_of<acc_t>(tensors);
  const auto plan = [&](Scratch& scratch) {
    return plan_boxes(scratch, heads, static_cast<acc_t>(scalars[0]), limit,
                      make_overlap_rule<acc_t>(scalars[1], NmsConvention::kDivision), tables.room);
  };
  host_cuda::run_planned(kUnwritten, plan,
                         [&](const auto& plan) { detect_in_launches(plan, tables, host_cuda::kLaunch); });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto& kernel, const auto& file) {
    if (kernel == "maps") return fpn_fast::run_maps<T>(file.numbers, file.tensors);
    // Boxes are float or double.
    if constexpr (sizeof(T) >= sizeof(float)) fpn_fast::run_boxes<T>(file.numbers, file.tensors);
  });
}
