// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/heatmaps_to_keypoints.h"
#include "heatmaps_to_keypoints.cuh"
#include "kernel_table.h"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void run(const Tensor& heatmaps, const Tensor& boxes, float* points, float* scores) {
    KeypointSearch<T> search{};
    search.heatmaps = data<const T>(heatmaps), search.corners = boxes.data_ptr();
    search.double_boxes = boxes.scalar_type() == ScalarType::Double;
    search.boxes = heatmaps.size(0), search.keypoints = heatmaps.size(1);
    search.height = static_cast<int>(heatmaps.size(2)), search.width = static_cast<int>(heatmaps.size(3));
    search.points = points, search.scores = scores;
    run_planned(
        heatmaps,
        [&](Scratch& scratch) {
          search.peaks = scratch.take<Peak<acc_type<T>>>(search.boxes * search.keypoints * kKeypointSplits);
          return search;
        },
        [](const KeypointSearch<T>& planned, const auto& launch) { search_in_launches(planned, launch); });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("heatmaps_to_keypoints_kernel<" + type + ">", &heatmaps_to_keypoints_kernel<T>, kKeypointThreads);
    table.add("write_keypoints_kernel<" + type + ">", &write_keypoints_kernel<T>, kKeypointThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("heatmaps_to_keypoints", TORCH_BOX(&heatmaps_to_keypoints<Cuda>));
}

}  // namespace fpn_fast
