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
  search_in_launch(search, [](auto kernel, const LaunchConfig& config, const auto& argument) {
    if (config.blocks == 0) return;
    host_cuda::launch({static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)},
                      [&] { kernel(argument); });
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  if (count != 3) host_cuda::fail("usage: heatmaps_to_keypoints_main search CASE_FILE");
  const host_cuda::CaseFile file(arguments[2]);
  host_cuda::dispatch_floating(file.numbers.at(0), [&]<class T>() { fpn_fast::run<T>(file); });
  file.write();
}
