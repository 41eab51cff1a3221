// SPDX-License-Identifier: Apache-2.0
// Launches of multi-level RoIAlign in max mode and its gradient. The kernels are in the .cuh file beside this one.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../torch/cuda.h"
#include "../torch/multiscale_roi_align_max.h"
#include "kernel_table.h"
#include "multiscale_roi_align_max.cuh"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor> multiscale_roi_align_max_cuda(std::vector<Tensor> features, Tensor rois,
                                                         std::optional<Tensor> levels, int64_t pooled_height,
                                                         int64_t pooled_width, std::vector<double> scales,
                                                         std::vector<double> thresholds, int64_t sampling_ratio,
                                                         bool aligned) {
  const std::pair<Tensor, Tensor> outputs =
      empty_pooled_max(features, rois, levels, pooled_height, pooled_width, scales, thresholds, sampling_ratio);
  const Tensor &pooled = outputs.first, &winners = outputs.second;
  if (pooled.numel() == 0) return {pooled, winners};
  const torch::stable::accelerator::DeviceGuard guard(pooled.get_device_index());
  const cudaStream_t stream = current_stream(pooled);
  dispatch_floating(pooled.scalar_type(), "multiscale_roi_align_max", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments =
        roi_align_arguments<acc_type<T>>(rois, levels, features[0].size(0), features[0].size(1), pooled_height,
                                         pooled_width, scales, thresholds, sampling_ratio, aligned);
    pool_max_in_launch<T>(arguments, to_feature_maps<const T>(features), to_feature_map<T>(pooled),
                          to_feature_map<int>(winners), is_channels_last(pooled),
                          [&](auto kernel, const LaunchConfig& config, const auto& argument) {
                            launch(kernel, config, stream, argument);
                          });
  });
  return {pooled, winners};
}

std::vector<Tensor> multiscale_roi_align_max_backward_cuda(Tensor grad, Tensor winners, Tensor rois,
                                                           std::optional<Tensor> levels, int64_t batch,
                                                           std::vector<int64_t> sizes, std::vector<double> scales,
                                                           std::vector<double> thresholds, int64_t sampling_ratio,
                                                           bool aligned, bool channels_last) {
  std::vector<Tensor> grads =
      empty_feature_grads(grad, rois, levels, batch, sizes, scales, thresholds, sampling_ratio, channels_last);
  check_winners(winners, grad, sizes);
  if (batch == 0 || grad.size(1) == 0) return grads;
  STD_TORCH_CHECK(rois.size(0) <= INT32_MAX, "multiscale_roi_align_max_backward takes at most 2^31 - 1 RoIs");
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  dispatch_floating(grad.scalar_type(), "multiscale_roi_align_max_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments = roi_align_arguments<acc_type<T>>(rois, levels, batch, grad.size(1), grad.size(2),
                                                            grad.size(3), scales, thresholds, sampling_ratio, aligned);
    const int64_t bytes = roi_lists_bytes<acc_type<T>>(arguments.count, batch * static_cast<int64_t>(grads.size()));
    const Tensor scratch = empty_like(grad, {bytes}, ScalarType::Byte);
    gather_max_in_launches<T>(arguments, to_feature_map<const T>(grad), to_feature_map<const int>(winners),
                              to_feature_maps<T>(grads), channels_last, static_cast<char*>(scratch.data_ptr()),
                              [&](auto kernel, const LaunchConfig& config, const auto& argument) {
                                launch(kernel, config, stream, argument);
                              });
  });
  return grads;
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    all.push_back({"multiscale_roi_align_max_kernel<" + type + ">",
                   reinterpret_cast<const void*>(&multiscale_roi_align_max_kernel<T>), kRoiAlignMaxThreads});
    all.push_back({"multiscale_roi_align_max_backward_kernel<" + type + ">",
                   reinterpret_cast<const void*>(&multiscale_roi_align_max_backward_kernel<T>), kRoiAlignMaxThreads});
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  add(TypeTag<Half>{}, "float16"), add(TypeTag<BFloat16>{}, "bfloat16");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("multiscale_roi_align_max", TORCH_BOX(&multiscale_roi_align_max_cuda));
  library.impl("multiscale_roi_align_max_backward", TORCH_BOX(&multiscale_roi_align_max_backward_cuda));
}

}  // namespace fpn_fast
