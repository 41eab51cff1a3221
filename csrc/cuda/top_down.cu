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

// Levels [first, last] of a pathway in one launch.
template <class T, bool kChannelsLast, bool kBilinear>
void launch_merge(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                  size_t first, size_t last, Resample mode, bool average, cudaStream_t stream) {
  Pathway<T> pathway{};
  pathway.levels = static_cast<int>(last - first) + 1;
  pathway.average = average;
  for (size_t level = first; level <= last; ++level) {
    const size_t i = level - first;
    // A launch that is not the pathway's first starts from the map that the one before it merged.
    pathway.lateral[i] = level == last && last < merged.size() ? read_only(merged[last]) : laterals[level];
    if (level == last) continue;
    pathway.merged[i] = merged[level];
    pathway.rows[i] = make_axis<acc_type<T>>(laterals[level + 1].height, laterals[level].height, mode);
    pathway.cols[i] = make_axis<acc_type<T>>(laterals[level + 1].width, laterals[level].width, mode);
  }
  const LaunchConfig config = top_down_launch<T, kChannelsLast>(pathway);
  launch(top_down_kernel<T, kChannelsLast, kBilinear>, config, stream, pathway);
}

template <class T, bool kChannelsLast>
void merge(const std::vector<Tensor>& laterals, const std::vector<Tensor>& merged, Resample mode, bool average) {
  auto lateral_maps = to_feature_maps<const T>(laterals);
  auto merged_maps = to_feature_maps<T>(merged);
  for (auto& map : lateral_maps) mark_vectorised(map, kChannelsLast);
  for (auto& map : merged_maps) mark_vectorised(map, kChannelsLast);
  const cudaStream_t stream = current_stream(laterals[0]);
  const size_t step = mode == Resample::kNearest ? kMaxLevels - 1 : 1;
  for (size_t last = merged.size(); last > 0;) {
    const size_t first = last > step ? last - step : 0;
    if (mode == Resample::kNearest) {
      launch_merge<T, kChannelsLast, false>(lateral_maps, merged_maps, first, last, mode, average, stream);
    } else {
      launch_merge<T, kChannelsLast, true>(lateral_maps, merged_maps, first, last, mode, average, stream);
    }
    last = first;
  }
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

// Gradients of laterals first + 1 to last from that of lateral `first`, in one launch.
template <class T, bool kChannelsLast, bool kBilinear>
void launch_gather(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums, size_t first,
                   size_t last, Resample mode, bool average, cudaStream_t stream) {
  GradientPathway<T> pathway{};
  pathway.levels = static_cast<int>(last - first) + 1;
  pathway.grads = pathway.levels - (last == grads.size());
  pathway.average = average;
  for (size_t level = first; level <= last; ++level) {
    const size_t i = level - first;
    if (level < grads.size()) pathway.grad[i] = i == 0 && first > 0 ? read_only(sums[first - 1]) : grads[level];
    if (i == 0) continue;
    pathway.sum[i] = sums[level - 1];
    const FeatureMap<const T> fine = level == 1 ? grads[0] : read_only(sums[level - 2]);
    pathway.rows[i - 1] = make_axis<acc_type<T>>(pathway.sum[i].height, fine.height, mode);
    pathway.cols[i - 1] = make_axis<acc_type<T>>(pathway.sum[i].width, fine.width, mode);
  }
  const LaunchConfig config = top_down_backward_launch<T, kChannelsLast>(pathway);
  launch(top_down_backward_kernel<T, kChannelsLast, kBilinear>, config, stream, pathway);
}

template <class T, bool kChannelsLast>
void gather(const std::vector<Tensor>& grads, const std::vector<Tensor>& sums, Resample mode, bool average) {
  auto grad_maps = to_feature_maps<const T>(grads);
  auto sum_maps = to_feature_maps<T>(sums);
  for (auto& map : grad_maps) mark_vectorised(map, kChannelsLast);
  for (auto& map : sum_maps) mark_vectorised(map, kChannelsLast);
  const cudaStream_t stream = current_stream(grads[0]);
  const size_t step = mode == Resample::kNearest ? kMaxLevels - 1 : 1;
  for (size_t first = 0; first < sums.size();) {
    const size_t last = std::min(first + step, sums.size());
    if (mode == Resample::kNearest) {
      launch_gather<T, kChannelsLast, false>(grad_maps, sum_maps, first, last, mode, average, stream);
    } else {
      launch_gather<T, kChannelsLast, true>(grad_maps, sum_maps, first, last, mode, average, stream);
    }
    first = last;
  }
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
