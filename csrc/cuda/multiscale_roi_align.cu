// SPDX-License-Identifier: Apache-2.0
// Launches of multi-level RoIAlign and its gradient. The kernels are in the .cuh files beside this one.
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/multiscale_roi_align.h"
#include "kernel_table.h"
#include "multiscale_roi_align.cuh"
#include "multiscale_roi_align_backward.cuh"

namespace fpn_fast {
namespace {

Tensor multiscale_roi_align_cuda(std::vector<Tensor> features, Tensor rois, std::optional<Tensor> levels,
                                 int64_t pooled_height, int64_t pooled_width, std::vector<double> scales,
                                 std::vector<double> thresholds, int64_t sampling_ratio, bool aligned) {
  const Tensor pooled =
      empty_pooled(features, rois, levels, pooled_height, pooled_width, scales, thresholds, sampling_ratio);
  if (pooled.numel() == 0) return pooled;
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  dispatch_floating(features[0].scalar_type(), "multiscale_roi_align", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments =
        roi_align_arguments<acc_type<T>>(rois, levels, features[0].size(0), features[0].size(1), pooled_height,
                                         pooled_width, scales, thresholds, sampling_ratio, aligned);
    pool_in_launch<T>(arguments, to_feature_maps<const T>(features), to_feature_map<T>(pooled), launch_on(pooled));
  });
  return pooled;
}

std::vector<Tensor> multiscale_roi_align_backward_cuda(Tensor grad, Tensor rois, std::optional<Tensor> levels,
                                                       int64_t batch, std::vector<int64_t> sizes,
                                                       std::vector<double> scales, std::vector<double> thresholds,
                                                       int64_t sampling_ratio, bool aligned, bool channels_last) {
  std::vector<Tensor> grads =
      empty_feature_grads(grad, rois, levels, batch, sizes, scales, thresholds, sampling_ratio, channels_last);
  if (batch == 0 || grad.size(1) == 0) return grads;
  STD_TORCH_CHECK(rois.size(0) <= 1 << 30, "multiscale_roi_align_backward takes at most 2^30 RoIs");
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  dispatch_floating(grad.scalar_type(), "multiscale_roi_align_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto arguments = roi_align_arguments<acc_type<T>>(rois, levels, batch, grad.size(1), grad.size(2),
                                                            grad.size(3), scales, thresholds, sampling_ratio, aligned);
    const int64_t maps = batch * static_cast<int64_t>(grads.size());
    const int64_t bytes = roi_lists_bytes<acc_type<T>>(arguments.count, maps);
    const Tensor scratch = empty_like(grad, {bytes}, ScalarType::Byte);
    gather_in_launches<T>(arguments, to_feature_map<const T>(grad), to_feature_maps<T>(grads),
                          static_cast<char*>(scratch.data_ptr()), launch_on(grad));
  });
  return grads;
}

template <class T, bool kChannelsLast>
void add_entries(std::vector<KernelEntry>& entries, const std::string& type) {
  const std::string suffix = "<" + type + (kChannelsLast ? ", channels_last>" : ", channels_first>");
  entries.push_back({"multiscale_roi_align_kernel" + suffix,
                     reinterpret_cast<const void*>(&multiscale_roi_align_kernel<T, kChannelsLast>), kRoiAlignThreads});
  entries.push_back({"multiscale_roi_align_backward_kernel" + suffix,
                     reinterpret_cast<const void*>(&multiscale_roi_align_backward_kernel<T, kChannelsLast>),
                     kGatherThreads});
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    add_entries<T, false>(all, type), add_entries<T, true>(all, type);
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  add(TypeTag<Half>{}, "float16"), add(TypeTag<BFloat16>{}, "bfloat16");
  all.push_back(
      {"roi_lists_kernel<float64>", reinterpret_cast<const void*>(&roi_lists_kernel<double>), kRoiListThreads});
  all.push_back(
      {"roi_lists_kernel<float32>", reinterpret_cast<const void*>(&roi_lists_kernel<float>), kRoiListThreads});
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align_cuda));
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward_cuda));
}

}  // namespace fpn_fast
