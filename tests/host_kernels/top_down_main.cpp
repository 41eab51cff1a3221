// SPDX-License-Identifier: Apache-2.0
// Runs the top-down merge or its gradient: top_down_main forward|backward CASE_FILE.
// Numbers: type, Resample, average, channels_last. Tensors: the inputs finest first, then the outputs finest first;
// laterals and merged maps, or gradients of the merged maps and of the laterals but the finest.
#include "../../csrc/cuda/top_down.cuh"

#include <span>

#include "../../csrc/cuda/top_down_backward.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

using Maps = std::span<const host_cuda::HostTensor>;

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
  host_cuda::launch({static_cast<unsigned>(config.blocks)}, {static_cast<unsigned>(config.threads)},
                    [&] { kernel(argument); }, order);
}

template <class T, bool kChannelsLast, bool kBilinear>
void merge(Maps inputs, Maps outputs, Resample mode, bool average) {
  const auto laterals = marked_maps<const T>(inputs, kChannelsLast);
  const auto merged = marked_maps<T>(outputs, kChannelsLast);
  const size_t step = kBilinear ? 1 : kMaxLevels - 1;
  for (size_t last = merged.size(); last > 0; last -= std::min(step, last)) {
    const size_t first = last > step ? last - step : 0;
    Pathway<T> pathway{};
    pathway.levels = static_cast<int>(last - first) + 1;
    pathway.average = average;
    for (size_t level = first; level <= last; ++level) {
      const size_t i = level - first;
      pathway.lateral[i] = level == last && last < merged.size() ? read_only(merged[last]) : laterals[level];
      if (level == last) continue;
      pathway.merged[i] = merged[level];
      pathway.rows[i] = make_axis<acc_type<T>>(laterals[level + 1].height, laterals[level].height, mode);
      pathway.cols[i] = make_axis<acc_type<T>>(laterals[level + 1].width, laterals[level].width, mode);
    }
    const LaunchConfig config = top_down_launch<T, kChannelsLast>(pathway);
    launch(top_down_kernel<T, kChannelsLast, kBilinear>, config, pathway, host_cuda::Blocks::kUnordered);
  }
}

template <class T, bool kChannelsLast, bool kBilinear>
void gather(Maps inputs, Maps outputs, Resample mode, bool average) {
  const auto grads = marked_maps<const T>(inputs, kChannelsLast);
  const auto sums = marked_maps<T>(outputs, kChannelsLast);
  const size_t step = kBilinear ? 1 : kMaxLevels - 1;
  for (size_t first = 0; first < sums.size(); first += step) {
    const size_t last = std::min(first + step, sums.size());
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
    launch(top_down_backward_kernel<T, kChannelsLast, kBilinear>, config, pathway, host_cuda::Blocks::kOneByOne);
  }
}

void run(bool backward, const host_cuda::CaseFile& file) {
  const auto mode = static_cast<Resample>(file.numbers.at(1));
  const bool average = file.numbers.at(2), channels_last = file.numbers.at(3);
  // One merged map fewer than laterals, but as many gradients of laterals as of merged maps.
  const size_t inputs = (file.tensors.size() + !backward) / 2;
  const Maps all(file.tensors), in = all.first(inputs), out = all.subspan(inputs);
  host_cuda::dispatch_floating(file.numbers.at(0), [&]<class T>() {
    const auto with_layout = [&]<bool kChannelsLast>() {
      if (mode == Resample::kNearest) {
        backward ? gather<T, kChannelsLast, false>(in, out, mode, average)
                 : merge<T, kChannelsLast, false>(in, out, mode, average);
      } else {
        backward ? gather<T, kChannelsLast, true>(in, out, mode, average)
                 : merge<T, kChannelsLast, true>(in, out, mode, average);
      }
    };
    channels_last ? with_layout.template operator()<true>() : with_layout.template operator()<false>();
  });
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  if (count != 3) host_cuda::fail("usage: top_down_main forward|backward CASE_FILE");
  const host_cuda::CaseFile file(arguments[2]);
  fpn_fast::run(arguments[1] == std::string("backward"), file);
  file.write();
}
