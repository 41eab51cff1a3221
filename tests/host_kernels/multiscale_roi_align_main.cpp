// SPDX-License-Identifier: Apache-2.0
// Runs multi-level RoIAlign or its gradient, of averages or of maxima:
// multiscale_roi_align_main forward|backward|forward_max|backward_max CASE_FILE.
// Numbers: type, sampling_ratio, aligned, whether levels are given, channels_last. Tensors: RoIs [K, 5] and scales and
// thresholds in float64, levels, then the maps finest first and the pooled RoIs (and winners), or the RoIs' gradient
// (and the winners) and the maps'. One of `levels` and `thresholds` is empty.
#include "../../csrc/cuda/multiscale_roi_align.cuh"
#include "../../csrc/cuda/multiscale_roi_align_backward.cuh"
#include "../../csrc/cuda/multiscale_roi_align_max.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using host_cuda::maps_of, host_cuda::Tensors;

template <class acc_t>
RoiAlignArguments<acc_t> arguments_of(const host_cuda::CaseFile& file, const host_cuda::HostTensor& pooled,
                                      const host_cuda::HostTensor& map) {
  const auto& rois = file.tensors.at(0);
  const auto &scales = file.tensors.at(1), &thresholds = file.tensors.at(2), &levels = file.tensors.at(3);
  RoiAlignArguments<acc_t> arguments{};
  arguments.rois = rois.data<const acc_t>();
  arguments.levels = file.numbers.at(3) ? levels.data<const int64_t>() : nullptr;
  arguments.count = rois.sizes[0], arguments.batch = map.sizes[0], arguments.channels = map.sizes[1];
  arguments.pooled_height = static_cast<int>(pooled.sizes[2]);
  arguments.pooled_width = static_cast<int>(pooled.sizes[3]);
  arguments.sampling_ratio = static_cast<int>(file.numbers.at(1)), arguments.aligned = file.numbers.at(2);
  arguments.rule.levels = static_cast<int>(scales.sizes[0]);
  arguments.rule.thresholds = static_cast<int>(thresholds.sizes[0]);
  for (int i = 0; i < arguments.rule.levels; ++i) {
    arguments.scale[i] = static_cast<acc_t>(scales.data<const double>()[i]);
  }
  for (int i = 0; i < arguments.rule.thresholds; ++i) {
    arguments.rule.threshold[i] = static_cast<float>(thresholds.data<const double>()[i]);
  }
  return arguments;
}

template <class Argument>
void launch(void (*kernel)(Argument), const LaunchConfig& config, const Argument& argument) {
  host_cuda::kLaunch(kernel, config, argument);
}

// Always runs all blocks of the launch that fills the lists. With HOST_CUDA_ONLY_BLOCK the next launch still needs
// them.
template <class acc_t>
void launch(void (*kernel)(RoiListing<acc_t>), const LaunchConfig& config, const RoiListing<acc_t>& argument) {
  constexpr const char* kOnlyBlock = "HOST_CUDA_ONLY_BLOCK";
  const char* setting = std::getenv(kOnlyBlock);
  const std::string block = setting != nullptr ? setting : "";
  unsetenv(kOnlyBlock);
  host_cuda::kLaunch(kernel, config, argument);
  if (!block.empty()) setenv(kOnlyBlock, block.c_str(), 1);
}

template <class T>
void run(const std::string& kernel, const host_cuda::CaseFile& file) {
  const bool backward = kernel.starts_with("backward"), max = kernel.ends_with("max"), last = file.numbers.at(4);
  const Tensors all = Tensors(file.tensors).subspan(4);
  // What is pooled, with its winners, comes after the maps or, as a gradient, before them.
  const size_t count = all.size() - 1 - max;
  const Tensors maps = backward ? all.last(count) : all.first(count), pooled = backward ? all : all.subspan(count);
  const auto arguments = arguments_of<acc_type<T>>(file, pooled[0], maps[0]);
  const auto launch_one = [](auto kernel, const LaunchConfig& config, const auto& argument) {
    launch(kernel, config, argument);
  };
  if (!backward && max) {
    return pool_max_in_launch<T>(arguments, maps_of<const T>(maps), pooled[0].map<T>(), pooled[1].map<int>(), last,
                                 launch_one);
  }
  if (!backward) {
    if (arguments.count > 0) pool_in_launch<T>(arguments, maps_of<const T>(maps), pooled[0].map<T>(), launch_one);
    return;
  }
  const auto make_plan = [&](Scratch& scratch) { return plan_roi_lists(scratch, arguments); };
  host_cuda::run_planned(0xff, make_plan, [&](const auto& lists) {
    if (max) {
      gather_max_in_launches<T>(arguments, pooled[0].map<const T>(), pooled[1].map<const int>(), maps_of<T>(maps), last,
                                lists, launch_one);
    } else {
      gather_in_launches<T>(arguments, pooled[0].map<const T>(), maps_of<T>(maps), lists, launch_one);
    }
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of_types<host_cuda::AllTypes>(
      count, arguments, []<class T>(const auto& kernel, const auto& file) { fpn_fast::run<T>(kernel, file); });
}
