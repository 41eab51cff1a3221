// SPDX-License-Identifier: Apache-2.0
// Runs the search for keypoints: heatmaps_to_keypoints_main search CASE_FILE. Numbers: type, and whether boxes are
// double. Tensors: heatmaps [R, K, h, w], boxes, keypoints [R, K, 3] and scores [R, K].
#include "../../csrc/cuda/heatmaps_to_keypoints.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
void run(const host_cuda::CaseFile& file) {
  const auto &heatmaps = file.tensors.at(0), &boxes = file.tensors.at(1);
  KeypointSearch<T> search{};
  search.heatmaps = heatmaps.data<const T>(), search.corners = boxes.data<const char>();
  search.double_boxes = file.numbers.at(1);
  search.boxes = heatmaps.sizes[0], search.keypoints = heatmaps.sizes[1];
  search.height = static_cast<int>(heatmaps.sizes[2]), search.width = static_cast<int>(heatmaps.sizes[3]);
  search.points = file.tensors.at(2).data<float>(), search.scores = file.tensors.at(3).data<float>();
  search_in_launch(search, host_cuda::kLaunch);
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto&, const auto& file) { fpn_fast::run<T>(file); });
}
