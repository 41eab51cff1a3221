// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/top_down.h"
#include "kernel_table.h"
#include "top_down.cuh"
#include "top_down_backward.cuh"

namespace fpn_fast {
namespace {

template <class T>
std::vector<FeatureMap<T>> marked_maps(const std::vector<Tensor>& tensors, bool channels_last) {
  auto maps = to_feature_maps<T>(tensors);
  for (auto& map : maps) mark_vectorised(map, channels_last);
  return maps;
}

// Calls `body.template operator()<T, kChannelsLast>(launch)` on the maps' device. The memory format of the first map
// decides how threads map to elements. Maps with other strides give the same result more slowly.
template <class Body>
void dispatch_maps(const std::vector<Tensor>& maps, const char* op, const Body& body) {
  run_on(maps[0], [&](const auto& launch) {
    dispatch_floating(maps[0].scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      is_channels_last(maps[0]) ? body.template operator()<T, true>(launch)
                                : body.template operator()<T, false>(launch);
    });
  });
}

std::vector<Tensor> top_down_cuda(std::vector<Tensor> laterals, int64_t mode, bool average) {
  std::vector<Tensor> merged = empty_merged(laterals, mode);
  if (merged.empty() || laterals[0].numel() == 0) return merged;
  dispatch_maps(laterals, "top_down", [&]<class T, bool kChannelsLast>(const auto& launch) {
    merge_in_launches<T, kChannelsLast>(marked_maps<const T>(laterals, kChannelsLast),
                                        marked_maps<T>(merged, kChannelsLast), static_cast<Resample>(mode), average,
                                        launch);
  });
  return merged;
}

std::vector<Tensor> top_down_backward_cuda(std::vector<Tensor> grads, int64_t coarse_height, int64_t coarse_width,
                                           int64_t mode, bool average) {
  std::vector<Tensor> sums = empty_lateral_grads(grads, coarse_height, coarse_width, mode);
  if (grads[0].numel() == 0) return sums;
  dispatch_maps(grads, "top_down_backward", [&]<class T, bool kChannelsLast>(const auto& launch) {
    gather_in_launches<T, kChannelsLast>(marked_maps<const T>(grads, kChannelsLast),
                                         marked_maps<T>(sums, kChannelsLast), static_cast<Resample>(mode), average,
                                         launch);
  });
  return sums;
}

template <class T, bool kChannelsLast, bool kBilinear>
void add_kernels(KernelTable& table, const std::string& type) {
  const std::string suffix = "<" + type + (kChannelsLast ? ", channels_last" : ", channels_first") +
                             (kBilinear ? ", bilinear>" : ", nearest>");
  table.add("top_down_kernel" + suffix, &top_down_kernel<T, kChannelsLast, kBilinear>, kTopDownThreads);
  table.add("top_down_backward_kernel" + suffix, &top_down_backward_kernel<T, kChannelsLast, kBilinear>,
            kTopDownThreads);
}

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    add_kernels<T, false, false>(table, type), add_kernels<T, true, false>(table, type);
    add_kernels<T, false, true>(table, type), add_kernels<T, true, true>(table, type);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("top_down", TORCH_BOX(&top_down_cuda));
  library.impl("top_down_backward", TORCH_BOX(&top_down_backward_cuda));
}

}  // namespace fpn_fast
