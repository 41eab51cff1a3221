// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/multiscale_roi_align_max.h"
#include "kernel_table.h"
#include "multiscale_roi_align_max.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void pool(const RoiAlignArguments<acc_type<T>>& arguments, const std::vector<FeatureMap<const T>>& features,
                   const FeatureMap<T>& pooled, const FeatureMap<int>& winners, bool channels_last,
                   const Tensor& like) {
    run_on(like, [&](const auto& launch) {
      pool_max_in_launch<T>(arguments, features, pooled, winners, channels_last, launch);
    });
  }

  template <class T>
  static void gather(const RoiAlignArguments<acc_type<T>>& arguments, const FeatureMap<const T>& grad,
                     const FeatureMap<const int>& winners, const std::vector<FeatureMap<T>>& sums, bool channels_last,
                     const Tensor& like) {
    STD_TORCH_CHECK(arguments.count <= 1 << 30,
                    "multiscale_roi_align_max_backward takes at most 2^30 RoIs on a GPU, got ", arguments.count);
    run_planned(
        like, [&](Scratch& scratch) { return plan_roi_lists(scratch, arguments); },
        [&](const auto& lists, const auto& launch) {
          gather_max_in_launches<T>(arguments, grad, winners, sums, channels_last, lists, launch);
        });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("multiscale_roi_align_max_kernel<" + type + ">", &multiscale_roi_align_max_kernel<T>,
              kRoiAlignMaxThreads);
    table.add("multiscale_roi_align_max_backward_kernel<" + type + ">", &multiscale_roi_align_max_backward_kernel<T>,
              kRoiReaders);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("multiscale_roi_align_max", TORCH_BOX(&multiscale_roi_align_max<Cuda>));
  library.impl("multiscale_roi_align_max_backward", TORCH_BOX(&multiscale_roi_align_max_backward<Cuda>));
}

}  // namespace fpn_fast
