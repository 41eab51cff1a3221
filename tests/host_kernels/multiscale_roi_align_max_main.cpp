// SPDX-License-Identifier: Apache-2.0
// Runs multi-level RoIAlign in max mode or its gradient: multiscale_roi_align_max_main forward|backward CASE_FILE.
// Numbers: type, channels_last, sampling_ratio, aligned. Tensors: RoIs [K, 5], scales and thresholds in float64, then
// the maps finest first, the pooled RoIs and the winners; or the RoIs' gradient, the winners and the maps' gradients.
#include <span>

#include "../../csrc/cuda/multiscale_roi_align_max.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using Tensors = std::span<const host_cuda::HostTensor>;

template <class acc_t>
RoiAlignArguments<acc_t> arguments_of(const host_cuda::CaseFile& file, const host_cuda::HostTensor& pooled,
                                      const host_cuda::HostTensor& map) {
  const auto &rois = file.tensors.at(0), &scales = file.tensors.at(1), &thresholds = file.tensors.at(2);
  RoiAlignArguments<acc_t> arguments{};
  arguments.rois = rois.data<const acc_t>();
  arguments.count = rois.sizes[0], arguments.batch = map.sizes[0], arguments.channels = map.sizes[1];
  arguments.pooled_height = static_cast<int>(pooled.sizes[2]);
  arguments.pooled_width = static_cast<int>(pooled.sizes[3]);
  arguments.sampling_ratio = static_cast<int>(file.numbers.at(2)), arguments.aligned = file.numbers.at(3);
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

template <class T>
std::vector<FeatureMap<T>> maps_of(Tensors tensors) {
  std::vector<FeatureMap<T>> maps;
  for (const auto& tensor : tensors) maps.push_back(tensor.map<T>());
  return maps;
}

template <class T>
void run(bool backward, const host_cuda::CaseFile& file) {
  const Tensors maps = Tensors(file.tensors).subspan(3);
  const bool channels_last = file.numbers.at(1);
  const auto launch = [](auto kernel, const LaunchConfig& config, const auto& argument) {
    if (config.blocks == 0) return;
    host_cuda::launch({static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)},
                      [&] { kernel(argument); });
  };
  if (backward) {
    const auto arguments = arguments_of<acc_type<T>>(file, maps[0], maps[2]);
    const host_cuda::Storage scratch(
        roi_lists_bytes<acc_type<T>>(arguments.count, arguments.batch * (maps.size() - 2)));
    gather_max_in_launches<T>(arguments, maps[0].map<const T>(), maps[1].map<const int>(), maps_of<T>(maps.subspan(2)),
                              channels_last, scratch.data(), launch);
  } else {
    const auto &pooled = maps[maps.size() - 2], &winners = maps[maps.size() - 1];
    pool_max_in_launch<T>(arguments_of<acc_type<T>>(file, pooled, maps[0]),
                          maps_of<const T>(maps.first(maps.size() - 2)), pooled.map<T>(), winners.map<int>(),
                          channels_last, launch);
  }
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  if (count != 3) host_cuda::fail("usage: multiscale_roi_align_max_main forward|backward CASE_FILE");
  const host_cuda::CaseFile file(arguments[2]);
  host_cuda::dispatch_floating(file.numbers.at(0),
                               [&]<class T>() { fpn_fast::run<T>(arguments[1] == std::string("backward"), file); });
  file.write();
}
