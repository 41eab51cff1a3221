// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/top_down.h"
#include "kernel_table.h"
#include "top_down.cuh"
#include "top_down_backward.cuh"
#include "top_down_strips.cuh"
#include "top_down_trees.cuh"

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
      is_channels_last(first) ? merge<T, true>(laterals, merged, mode, average, launch)
                              : merge<T, false>(laterals, merged, mode, average, launch);
    });
  }

  template <class T>
  static void gather(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                     Resample mode, bool average, const Tensor& first) {
    run_on(first, [&](const auto& launch) {
      is_channels_last(first) ? gather<T, true>(grads, sums, mode, average, launch)
                              : gather<T, false>(grads, sums, mode, average, launch);
    });
  }

 private:
  template <class T, bool kChannelsLast, class Launch>
  static void merge(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                    Resample mode, bool average, const Launch& launch) {
    if (mode == Resample::kNearest) {
      if constexpr (kChannelsLast) {
        if (merge_trees_in_launch(laterals, merged, average, launch)) return;
      } else {
        if (merge_strips_in_launch(laterals, merged, average, launch)) return;
      }
    }
    merge_in_launches<T, kChannelsLast>(marked(laterals, kChannelsLast), marked(merged, kChannelsLast), mode, average,
                                        launch);
  }

  template <class T, bool kChannelsLast, class Launch>
  static void gather(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                     Resample mode, bool average, const Launch& launch) {
    if (mode == Resample::kNearest) {
      if constexpr (kChannelsLast) {
        if (gather_trees_in_launch(grads, sums, average, launch)) return;
      } else {
        if (gather_strips_in_launch(grads, sums, average, launch)) return;
      }
    }
    gather_in_launches<T, kChannelsLast>(marked(grads, kChannelsLast), marked(sums, kChannelsLast), mode, average,
                                         launch);
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

template <class T, int kLevels>
void add_halving_kernels(KernelTable& table, const std::string& type) {
  const std::string suffix = ", " + std::to_string(kLevels) + " levels>";
  table.add("top_down_trees_kernel<" + type + suffix, &top_down_trees_kernel<T, kLevels>, kTreeThreads);
  table.add("top_down_trees_backward_kernel<" + type + suffix, &top_down_trees_backward_kernel<T, kLevels>,
            kTreeThreads);
  const auto add = [&](const std::string& name, const std::string& strip, auto kernel) {
    table.add(name + "<" + type + strip + suffix, kernel, kStripThreads);
  };
  add("top_down_strips_kernel", ", wide", &top_down_strips_kernel<T, true, kLevels>);
  add("top_down_strips_kernel", ", any", &top_down_strips_kernel<T, false, kLevels>);
  add("top_down_strips_backward_kernel", ", wide", &top_down_strips_backward_kernel<T, true, kLevels>);
  add("top_down_strips_backward_kernel", ", any", &top_down_strips_backward_kernel<T, false, kLevels>);
}

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    add_kernels<T, false, false>(table, type), add_kernels<T, true, false>(table, type);
    add_kernels<T, false, true>(table, type), add_kernels<T, true, true>(table, type);
    add_halving_kernels<T, 2>(table, type), add_halving_kernels<T, 3>(table, type);
    add_halving_kernels<T, 4>(table, type);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("top_down", TORCH_BOX(&top_down<Cuda>));
  library.impl("top_down_backward", TORCH_BOX(&top_down_backward<Cuda>));
}

}  // namespace fpn_fast
