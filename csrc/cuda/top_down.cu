// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/top_down.h"
#include "kernel_table.h"
#include "top_down.cuh"
#include "top_down_backward.cuh"

namespace fpn_fast {
namespace {

template <class T>
std::vector<FeatureMap<T>> marked(std::vector<FeatureMap<T>> maps, bool channels_last) {
  for (auto& map : maps) mark_vectorised(map, channels_last);
  return maps;
}

// The memory format of the first map decides how threads map to elements. Maps with other strides give the same result
// more slowly.
struct Cuda {
  template <class T>
  static void merge(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                    Resample mode, bool average, const Tensor& first) {
    run_on(first, [&](const auto& launch) {
      const bool last = is_channels_last(first);
      const auto sources = marked(laterals, last);
      const auto targets = marked(merged, last);
      last ? merge_in_launches<T, true>(sources, targets, mode, average, launch)
           : merge_in_launches<T, false>(sources, targets, mode, average, launch);
    });
  }

  template <class T>
  static void gather(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                     Resample mode, bool average, const Tensor& first) {
    run_on(first, [&](const auto& launch) {
      const bool last = is_channels_last(first);
      const auto sources = marked(grads, last);
      const auto targets = marked(sums, last);
      last ? gather_in_launches<T, true>(sources, targets, mode, average, launch)
           : gather_in_launches<T, false>(sources, targets, mode, average, launch);
    });
  }
};

template <class T, bool kChannelsLast, bool kBilinear>
void add_kernels(KernelTable& table, const std::string& type) {
  const std::string suffix = "<" + type + (kChannelsLast ? ", channels_last" : ", channels_first") +
                             (kBilinear ? ", bilinear>" : ", nearest>");
  table.add("top_down_kernel" + suffix, &top_down_kernel<T, kChannelsLast, kBilinear>, kTopDownThreads);
  table.add("top_down_backward_kernel" + suffix, &top_down_backward_kernel<T, kChannelsLast, kBilinear>,
            kTopDownThreads);
}

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    add_kernels<T, false, false>(table, type), add_kernels<T, true, false>(table, type);
    add_kernels<T, false, true>(table, type), add_kernels<T, true, true>(table, type);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("top_down", TORCH_BOX(&top_down<Cuda>));
  library.impl("top_down_backward", TORCH_BOX(&top_down_backward<Cuda>));
}

}  // namespace fpn_fast
