// SPDX-License-Identifier: Apache-2.0
// The launch of the search for keypoints. The kernel is in the .cuh file beside this one.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../torch/cuda.h"
#include "../torch/heatmaps_to_keypoints.h"
#include "heatmaps_to_keypoints.cuh"
#include "kernel_table.h"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor> heatmaps_to_keypoints_cuda(Tensor heatmaps, Tensor boxes) {
  auto [keypoints, scores] = empty_keypoints(heatmaps, boxes);
  if (scores.numel() == 0) return {keypoints, scores};
  const torch::stable::accelerator::DeviceGuard guard(heatmaps.get_device_index());
  float *points = static_cast<float*>(keypoints.data_ptr()), *highest = static_cast<float*>(scores.data_ptr());
  dispatch_floating(heatmaps.scalar_type(), "heatmaps_to_keypoints", [&](auto tag) {
    using T = typename decltype(tag)::type;
    KeypointSearch<T> search{};
    search.heatmaps = static_cast<const T*>(heatmaps.data_ptr()), search.corners = boxes.data_ptr();
    search.double_boxes = boxes.scalar_type() == ScalarType::Double;
    search.boxes = heatmaps.size(0), search.keypoints = heatmaps.size(1);
    search.height = static_cast<int>(heatmaps.size(2)), search.width = static_cast<int>(heatmaps.size(3));
    search.points = points, search.scores = highest;
    search_in_launch(search, launch_on(heatmaps));
  });
  return {keypoints, scores};
}

template <class T>
KernelEntry entry(const std::string& type) {
  return {"heatmaps_to_keypoints_kernel<" + type + ">", reinterpret_cast<const void*>(&heatmaps_to_keypoints_kernel<T>),
          kKeypointThreads};
}

const RegisterKernels kernels({entry<double>("float64"), entry<float>("float32"), entry<Half>("float16"),
                               entry<BFloat16>("bfloat16")});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("heatmaps_to_keypoints", TORCH_BOX(&heatmaps_to_keypoints_cuda));
}

}  // namespace fpn_fast
