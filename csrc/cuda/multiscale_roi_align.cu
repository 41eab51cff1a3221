// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/multiscale_roi_align.h"
#include "kernel_table.h"
#include "multiscale_roi_align.cuh"
#include "multiscale_roi_align_backward.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void pool(const RoiAlignArguments<acc_type<T>>& arguments, const std::vector<FeatureMap<const T>>& features,
                   const FeatureMap<T>& pooled, const Tensor& like) {
    run_planned(
        like, [&](Scratch& scratch) { return plan_pool<T>(scratch, arguments, features, pooled); },
        [&](const auto& pool, const auto& launch) { pool_in_launches<T>(arguments, pool, launch); });
  }

  template <class T>
  static void gather(const RoiAlignArguments<acc_type<T>>& arguments, const FeatureMap<const T>& grad,
                     const std::vector<FeatureMap<T>>& sums, bool, const Tensor& like) {
    STD_TORCH_CHECK(arguments.count <= 1 << 30, "multiscale_roi_align_backward takes at most 2^30 RoIs on a GPU, got ",
                    arguments.count);
    run_planned(
        like, [&](Scratch& scratch) { return plan_gather<T>(scratch, arguments, grad, sums); },
        [&](const auto& gather, const auto& launch) { gather_in_launches<T>(arguments, gather, launch); });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("multiscale_roi_align_kernel<" + type + ", channels_first>", &multiscale_roi_align_kernel<T, false>,
              kRoiAlignThreads);
    table.add("multiscale_roi_align_kernel<" + type + ", channels_last>", &multiscale_roi_align_kernel<T, true>,
              kRoiAlignThreads);
    table.add("multiscale_roi_align_backward_kernel<" + type + ">", &multiscale_roi_align_backward_kernel<T>,
              kRoiReaders);
    table.add("multiscale_roi_align_backward_strided_kernel<" + type + ">",
              &multiscale_roi_align_backward_strided_kernel<T>, kRoiReaders);
    table.add("roi_parts_kernel<" + type + ">", &roi_parts_kernel<T>, kRoiReaders);
    table.add("transpose_maps_kernel<" + type + ", to_planes>", &transpose_maps_kernel<T, false>, kTransposeThreads);
    table.add("transpose_maps_kernel<" + type + ", to_rows>", &transpose_maps_kernel<T, true>, kTransposeThreads);
  });
  for_box_types([&]<class T>(const std::string& type) {
    table.add("roi_lists_kernel<" + type + ">", &roi_lists_kernel<T>, kRoiListThreads);
    table.add("roi_tiles_kernel<" + type + ">", &roi_tiles_kernel<T>, kRoiReaders);
    table.add("roi_plan_kernel<" + type + ">", &roi_plan_kernel<T>, kPlanThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align<Cuda>));
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward<Cuda>));
}

}  // namespace fpn_fast
