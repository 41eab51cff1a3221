// SPDX-License-Identifier: Apache-2.0
// Runs the top-down merge or its gradient: top_down_main forward|backward CASE_FILE.
// Numbers: type, Resample, average, channels_last. Tensors: the inputs finest first, then the outputs finest first;
// laterals and merged maps, or gradients of the merged maps and of the laterals but the finest.
#include "../../csrc/cuda/top_down.cuh"
#include "../../csrc/cuda/top_down_backward.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using Maps = host_cuda::Tensors;

template <class T>
std::vector<FeatureMap<T>> marked_maps(Maps tensors, bool channels_last) {
  std::vector<FeatureMap<T>> maps;
  for (const auto& tensor : tensors) {
    maps.push_back(tensor.map<T>());
    mark_vectorised(maps.back(), channels_last);
  }
  return maps;
}

template <class Argument>
void launch(void (*kernel)(Argument), const LaunchConfig& config, const Argument& argument, host_cuda::Blocks order) {
  if (config.blocks == 0) return;
  host_cuda::launch(
      {static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)}, [&] { kernel(argument); },
      order);
}

template <class T, bool kChannelsLast>
void merge(Maps inputs, Maps outputs, Resample mode, bool average) {
  merge_in_launches<T, kChannelsLast>(marked_maps<const T>(inputs, kChannelsLast),
                                      marked_maps<T>(outputs, kChannelsLast), mode, average,
                                      [](auto kernel, const LaunchConfig& config, const Pathway<T>& pathway) {
                                        launch(kernel, config, pathway, host_cuda::Blocks::kUnordered);
                                      });
}

template <class T, bool kChannelsLast>
void gather(Maps inputs, Maps outputs, Resample mode, bool average) {
  gather_in_launches<T, kChannelsLast>(marked_maps<const T>(inputs, kChannelsLast),
                                       marked_maps<T>(outputs, kChannelsLast), mode, average,
                                       [](auto kernel, const LaunchConfig& config, const GradientPathway<T>& pathway) {
                                         launch(kernel, config, pathway, host_cuda::Blocks::kOneByOne);
                                       });
}

template <class T>
void run(bool backward, const host_cuda::CaseFile& file) {
  const auto mode = static_cast<Resample>(file.numbers.at(1));
  const bool average = file.numbers.at(2), channels_last = file.numbers.at(3);
  // One merged map fewer than laterals, but as many gradients of laterals as of merged maps.
  const size_t inputs = (file.tensors.size() + !backward) / 2;
  const Maps all(file.tensors), in = all.first(inputs), out = all.subspan(inputs);
  const auto with_layout = [&]<bool kChannelsLast>() {
    backward ? gather<T, kChannelsLast>(in, out, mode, average) : merge<T, kChannelsLast>(in, out, mode, average);
  };
  channels_last ? with_layout.template operator()<true>() : with_layout.template operator()<false>();
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto& kernel, const auto& file) {
    fpn_fast::run<T>(kernel == "backward", file);
  });
}
