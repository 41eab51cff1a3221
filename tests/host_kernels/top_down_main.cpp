// SPDX-License-Identifier: Apache-2.0
// Runs the top-down merge or its gradient: top_down_main forward|backward CASE_FILE.
// Numbers: type, Resample, average, channels_last. Tensors: the inputs finest first, then the outputs finest first;
// laterals and merged maps, or gradients of the merged maps and of the laterals but the finest.
#include "../../csrc/cuda/top_down.cuh"
#include "../../csrc/cuda/top_down_backward.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
std::vector<FeatureMap<T>> marked_maps(host_cuda::Tensors tensors, bool channels_last) {
  auto maps = host_cuda::maps_of<T>(tensors);
  for (auto& map : maps) mark_vectorised(map, channels_last);
  return maps;
}

template <class T, bool kChannelsLast>
void run(bool backward, const host_cuda::CaseFile& file) {
  const auto mode = static_cast<Resample>(file.numbers.at(1));
  const bool average = file.numbers.at(2);
  // One merged map fewer than laterals, but as many gradients of laterals as of merged maps.
  const size_t inputs = (file.tensors.size() + !backward) / 2;
  const host_cuda::Tensors all(file.tensors);
  const auto sources = marked_maps<const T>(all.first(inputs), kChannelsLast);
  const auto targets = marked_maps<T>(all.subspan(inputs), kChannelsLast);
  if (backward) {
    gather_in_launches<T, kChannelsLast>(sources, targets, mode, average, host_cuda::kLaunch);
  } else {
    merge_in_launches<T, kChannelsLast>(sources, targets, mode, average,
                                        host_cuda::kLaunchBlocks<host_cuda::Blocks::kUnordered>);
  }
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of_types<host_cuda::AllTypes>(
      count, arguments, []<class T>(const auto& kernel, const auto& file) {
        const bool backward = kernel == "backward";
        file.numbers.at(3) ? fpn_fast::run<T, true>(backward, file) : fpn_fast::run<T, false>(backward, file);
      });
}
