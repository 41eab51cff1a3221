// SPDX-License-Identifier: Apache-2.0
// Runs multi-level RoIAlign or its gradient: multiscale_roi_align_main forward|backward CASE_FILE.
// Numbers: type, sampling_ratio, aligned, whether levels are given. Tensors: RoIs [K, 5, 1, 1] and
// scales and thresholds in float64, levels, then the maps finest first and the pooled RoIs, or the RoIs' gradient and
// the maps'. One of `levels` and `thresholds` is empty.
#include <span>

#include "../../csrc/cuda/multiscale_roi_align.cuh"
#include "../../csrc/cuda/multiscale_roi_align_backward.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using Tensors = std::span<const host_cuda::HostTensor>;

template <class T>
std::vector<FeatureMap<T>> to_maps(Tensors tensors) {
  std::vector<FeatureMap<T>> maps;
  for (const auto& tensor : tensors) maps.push_back(tensor.map<T>());
  return maps;
}

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
  if (config.blocks == 0) return;
  host_cuda::launch({static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)},
                    [&] { kernel(argument); });
}

// The lists whole, whichever block of the launch after them is run alone: it needs them.
template <class acc_t>
void launch(void (*kernel)(RoiListing<acc_t>), const LaunchConfig& config, const RoiListing<acc_t>& argument) {
  if (config.blocks == 0) return;
  constexpr const char* kOnlyBlock = "HOST_CUDA_ONLY_BLOCK";
  const char* setting = std::getenv(kOnlyBlock);
  const std::string block = setting != nullptr ? setting : "";
  unsetenv(kOnlyBlock);
  host_cuda::launch({static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)},
                    [&] { kernel(argument); });
  if (!block.empty()) setenv(kOnlyBlock, block.c_str(), 1);
}

template <class T>
void run(bool backward, const host_cuda::CaseFile& file) {
  const Tensors maps = Tensors(file.tensors).subspan(4);
  const auto launch_one = [](auto kernel, const LaunchConfig& config, const auto& argument) {
    launch(kernel, config, argument);
  };
  if (backward) {
    const auto arguments = arguments_of<acc_type<T>>(file, maps.front(), maps.back());
    const host_cuda::Storage scratch(
        roi_lists_bytes<acc_type<T>>(arguments.count, arguments.batch * (maps.size() - 1)));
    std::memset(scratch.data(), 0xff, scratch.bytes());
    gather_in_launches<T>(arguments, maps.front().map<const T>(), to_maps<T>(maps.subspan(1)), scratch.data(),
                          launch_one);
  } else {
    const auto arguments = arguments_of<acc_type<T>>(file, maps.back(), maps.front());
    if (arguments.count == 0) return;
    pool_in_launch<T>(arguments, to_maps<const T>(maps.first(maps.size() - 1)), maps.back().map<T>(), launch_one);
  }
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  if (count != 3) host_cuda::fail("usage: multiscale_roi_align_main forward|backward CASE_FILE");
  const host_cuda::CaseFile file(arguments[2]);
  const bool backward = arguments[1] == std::string("backward");
  host_cuda::dispatch_floating(file.numbers.at(0), [&]<class T>() { fpn_fast::run<T>(backward, file); });
  file.write();
}
