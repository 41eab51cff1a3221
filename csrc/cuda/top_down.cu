// SPDX-License-Identifier: Apache-2.0
// Launches of the top-down merge and its gradient. The kernels are in the two .cuh files beside this one.
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/top_down.h"
#include "kernel_table.h"
#include "top_down.cuh"
#include "top_down_backward.cuh"

namespace fpn_fast {
namespace {

// The maps' common layout decides how threads map to elements; any other strides are correct, and slower.
bool along_channels(const std::vector<Tensor>& maps) { return is_channels_last(maps[0]); }

template <class T>
std::vector<FeatureMap<T>> marked_maps(const std::vector<Tensor>& tensors, bool channels_last) {
  auto maps = to_feature_maps<T>(tensors);
  for (auto& map : maps) mark_vectorised(map, channels_last);
  return maps;
}

template <class T, bool kChannelsLast>
void merge(const std::vector<Tensor>& laterals, const std::vector<Tensor>& merged, Resample mode, bool average) {
  const cudaStream_t stream = current_stream(laterals[0]);
  merge_in_launches<T, kChannelsLast>(marked_maps<const T>(laterals, kChannelsLast),
                                      marked_maps<T>(merged, kChannelsLast), mode, average,
                                      [&](auto kernel, const LaunchConfig& config, const Pathway<T>& pathway) {
                                        launch(kernel, config, stream, pathway);
                                      });
}

std::vector<Tensor> top_down_cuda(std::vector<Tensor> laterals, int64_t mode, bool average) {
  std::vector<Tensor> merged = empty_merged(laterals, mode);
  if (merged.empty() || laterals[0].numel() == 0) return merged;
  const torch::stable::accelerator::DeviceGuard guard(laterals[0].get_device_index());
  dispatch_floating(laterals[0].scalar_type(), "top_down", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto resample = static_cast<Resample>(mode);
    along_channels(laterals) ? merge<T, true>(laterals, merged, resample, average)
                             : merge<T, false>(laterals, merged, resample, average);
  });
  return merged;
}

template <class T, bool kChannelsLast>
void gather(const std::vector<Tensor>& grads, const std::vector<Tensor>& sums, Resample mode, bool average) {
  const cudaStream_t stream = current_stream(grads[0]);
  gather_in_launches<T, kChannelsLast>(marked_maps<const T>(grads, kChannelsLast), marked_maps<T>(sums, kChannelsLast),
                                       mode, average,
                                       [&](auto kernel, const LaunchConfig& config, const GradientPathway<T>& pathway) {
                                         launch(kernel, config, stream, pathway);
                                       });
}

std::vector<Tensor> top_down_backward_cuda(std::vector<Tensor> grads, int64_t coarse_height, int64_t coarse_width,
                                           int64_t mode, bool average) {
  std::vector<Tensor> sums = empty_lateral_grads(grads, coarse_height, coarse_width, mode);
  if (grads[0].numel() == 0) return sums;
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  dispatch_floating(grads[0].scalar_type(), "top_down_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto resample = static_cast<Resample>(mode);
    along_channels(grads) ? gather<T, true>(grads, sums, resample, average)
                          : gather<T, false>(grads, sums, resample, average);
  });
  return sums;
}

template <class T, bool kChannelsLast, bool kBilinear>
void add_entries(std::vector<KernelEntry>& entries, const std::string& type) {
  const std::string suffix = "<" + type + (kChannelsLast ? ", channels_last" : ", channels_first") +
                             (kBilinear ? ", bilinear>" : ", nearest>");
  entries.push_back({"top_down_kernel" + suffix,
                     reinterpret_cast<const void*>(&top_down_kernel<T, kChannelsLast, kBilinear>), kTopDownThreads});
  entries.push_back({"top_down_backward_kernel" + suffix,
                     reinterpret_cast<const void*>(&top_down_backward_kernel<T, kChannelsLast, kBilinear>),
                     kTopDownThreads});
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    add_entries<T, false, false>(all, type), add_entries<T, true, false>(all, type);
    add_entries<T, false, true>(all, type), add_entries<T, true, true>(all, type);
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  add(TypeTag<Half>{}, "float16"), add(TypeTag<BFloat16>{}, "bfloat16");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("top_down", TORCH_BOX(&top_down_cuda));
  library.impl("top_down_backward", TORCH_BOX(&top_down_backward_cuda));
}

}  // namespace fpn_fast
