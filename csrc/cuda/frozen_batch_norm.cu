// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/frozen_batch_norm.h"
#include "frozen_batch_norm.cuh"
#include "kernel_table.h"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T, bool kWideResidual, bool kWideOutput>
  static void forward(const NormForward<T>& pass, bool last, const Tensor& x) {
    run_on(x, [&](const auto& launch) { norm_in_launch<T, kWideResidual, kWideOutput>(pass, last, launch); });
  }

  template <class T, bool kWideGrad, bool kWideResidual>
  static void backward(const NormBackward<T>& pass, bool last, const Tensor& grad) {
    run_on(grad, [&](const auto& launch) { norm_backward_in_launch<T, kWideResidual, kWideGrad>(pass, last, launch); });
  }

  template <class T, bool kWideGrad, bool kWideX>
  static void sums(const NormSums<T>& pass, const Tensor& x) {
    run_on(x, [&](const auto& launch) { norm_sums_in_launch<T, kWideGrad, kWideX>(pass, launch); });
  }
};

template <class T, bool kWideResidual, bool kWideOutput>
void add_kernels(KernelTable& table, const std::string& type) {
  const std::string suffix =
      (kWideResidual ? std::string(", wide residual") : "") + (kWideOutput ? ", wide output>" : ">");
  const auto add_in = [&]<bool kLast>(const std::string& format) {
    const std::string name = "<" + type + format + suffix;
    table.add("frozen_batch_norm_kernel" + name, &frozen_batch_norm_kernel<T, kLast, kWideResidual, kWideOutput>,
              kNormThreads);
    table.add("frozen_batch_norm_backward_kernel" + name,
              &frozen_batch_norm_backward_kernel<T, kLast, kWideResidual, kWideOutput>, kNormThreads);
  };
  add_in.template operator()<false>(", channels_first");
  add_in.template operator()<true>(", channels_last");
  if constexpr (!(kWideResidual && kWideOutput)) {
    const std::string wide = kWideResidual ? ", wide grad>" : kWideOutput ? ", wide x>" : ">";
    table.add("frozen_batch_norm_sums_kernel<" + type + wide,
              &frozen_batch_norm_sums_kernel<T, kWideResidual, kWideOutput>, kNormThreads);
  }
}

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    add_kernels<T, false, false>(table, type);
    if constexpr (!std::is_same_v<T, acc_type<T>>) {
      add_kernels<T, true, false>(table, type), add_kernels<T, false, true>(table, type);
      add_kernels<T, true, true>(table, type);
    }
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm<Cuda>));
  library.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward<Cuda>));
  library.impl("frozen_batch_norm_sums", TORCH_BOX(&frozen_batch_norm_sums<Cuda>));
}

}  // namespace fpn_fast
