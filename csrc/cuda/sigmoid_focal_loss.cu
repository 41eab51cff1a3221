// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/sigmoid_focal_loss.h"
#include "kernel_table.h"
#include "sigmoid_focal_loss.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void run(const FocalLoss<T>& loss, const Tensor& logits) {
    run_on(logits, [&](const auto& launch) { focal_loss_in_launch(loss, launch); });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("sigmoid_focal_loss_kernel<" + type + ">", &sigmoid_focal_loss_kernel<T, false>, kFocalThreads);
    table.add("sigmoid_focal_loss_kernel<" + type + ", gradient>", &sigmoid_focal_loss_kernel<T, true>, kFocalThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss<Cuda>));
}

}  // namespace fpn_fast
