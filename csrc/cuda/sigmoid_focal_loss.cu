// SPDX-License-Identifier: Apache-2.0
// The launch of the focal loss. The kernel is in the .cuh file beside this one.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../torch/cuda.h"
#include "../torch/sigmoid_focal_loss.h"
#include "kernel_table.h"
#include "sigmoid_focal_loss.cuh"

namespace fpn_fast {
namespace {

std::tuple<Tensor, Tensor> sigmoid_focal_loss_cuda(Tensor logits, Tensor labels, Tensor weights, double alpha,
                                                   bool with_gradient) {
  FocalOutputs outputs = empty_focal_outputs(logits, labels, weights, with_gradient);
  if (logits.numel() == 0) return {outputs.parts, outputs.gradient};
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating(logits.scalar_type(), "sigmoid_focal_loss", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    FocalLoss<T> loss{};
    loss.logits = static_cast<const T*>(logits.data_ptr());
    loss.labels = static_cast<const int64_t*>(labels.data_ptr());
    loss.weights = static_cast<const acc_t*>(weights.data_ptr());
    loss.elements = logits.numel(), loss.classes = static_cast<int>(logits.size(1));
    loss.alpha = static_cast<acc_t>(alpha);
    loss.parts = static_cast<acc_t*>(outputs.parts.data_ptr());
    if (with_gradient) loss.gradient = static_cast<T*>(outputs.gradient.data_ptr());
    loss.aligned = reinterpret_cast<uintptr_t>(loss.logits) % 16 == 0;
    focal_loss_in_launch(loss, [&](auto kernel, const LaunchConfig& config, const auto& argument) {
      launch(kernel, config, stream, argument);
    });
  });
  return {outputs.parts, outputs.gradient};
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    all.push_back({"sigmoid_focal_loss_kernel<" + type + ">",
                   reinterpret_cast<const void*>(&sigmoid_focal_loss_kernel<T, false>), kFocalThreads});
    all.push_back({"sigmoid_focal_loss_kernel<" + type + ", gradient>",
                   reinterpret_cast<const void*>(&sigmoid_focal_loss_kernel<T, true>), kFocalThreads});
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  add(TypeTag<Half>{}, "float16"), add(TypeTag<BFloat16>{}, "bfloat16");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) {
  library.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
}

}  // namespace fpn_fast
