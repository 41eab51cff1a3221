// SPDX-License-Identifier: Apache-2.0
// Runs anchor matching: match_anchors_main match CASE_FILE. Numbers: type, low_quality, anchors_differ, whether anchors
// are stored, whether they are counted, then cells, height, width and two strides of each level. Tensors: thresholds
// and offset in float64, cell anchors in float64, ground truths, their counts, anchors, their counts, zeros for each
// ground truth, matches and IoUs.
#include "../../csrc/cuda/match_anchors.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
void run(const host_cuda::CaseFile& file) {
  const auto& tensors = file.tensors;
  const auto& numbers = file.numbers;
  const auto& gts = tensors.at(2);
  const double* thresholds = tensors.at(0).data<const double>();
  AnchorMatching<T> matching{};
  matching.gt_boxes = gts.data<const T>(), matching.gt_counts = tensors.at(3).data<const int64_t>();
  if (numbers.at(3)) matching.anchors = tensors.at(4).data<const T>();
  if (numbers.at(4)) matching.anchor_counts = tensors.at(5).data<const int64_t>();
  matching.images = gts.sizes[0], matching.gts_per_image = static_cast<int>(gts.sizes[1]);
  matching.anchors_per_image = tensors.at(7).sizes[1];
  matching.anchors_differ = numbers.at(2);
  matching.rule = {static_cast<T>(thresholds[0]), static_cast<T>(thresholds[1]), numbers.at(1) != 0};
  matching.highest = tensors.at(6).data<IouBits<T>>();
  matching.matches = tensors.at(7).data<int64_t>(), matching.ious = tensors.at(8).data<T>();
  matching.coding.center_offset = static_cast<T>(thresholds[2]);
  int64_t first = 0, first_cell = 0;
  for (size_t i = 5; i < numbers.size(); i += 5) {
    const int64_t cells = numbers[i], height = numbers[i + 1], width = numbers[i + 2];
    if (matching.levels == kMaxAnchorLevels) host_cuda::fail("too many levels");
    matching.level[matching.levels++] = {first, first_cell,     static_cast<int>(cells), height,
                                         width, numbers[i + 3], numbers[i + 4]};
    first += cells * height * width, first_cell += cells;
  }
  const double* corners = tensors.at(1).data<const double>();
  if (first_cell > kMaxCellAnchors) host_cuda::fail("too many cell anchors");
  for (int64_t i = 0; i < 4 * first_cell; ++i) matching.cell_anchor[i] = static_cast<T>(corners[i]);
  match_in_launches(matching, host_cuda::kLaunch);
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of<host_cuda::WideTypes>(
      count, arguments, []<class T>(const auto&, const auto& file) { fpn_fast::run<T>(file); });
}
