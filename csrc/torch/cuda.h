// SPDX-License-Identifier: Apache-2.0
// What a CUDA entry point needs of torch: the tensor's device, its current stream, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/launch.h"
#include "tensors.h"

namespace fpn_fast {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches `kernel(argument)`. The device must be current already.
template <class Argument>
void launch(void (*kernel)(Argument), const LaunchConfig& config, cudaStream_t stream, const Argument& argument) {
  if (config.blocks == 0) return;
  STD_TORCH_CHECK(config.blocks <= INT32_MAX, "a launch of ", config.blocks, " blocks is longer than a grid can be");
  kernel<<<static_cast<unsigned>(config.blocks), config.threads, 0, stream>>>(argument);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// `launch(kernel, config, argument)` on the stream of `tensor`.
inline auto launch_on(const Tensor& tensor) {
  return [stream = current_stream(tensor)](auto kernel, const LaunchConfig& config, const auto& argument) {
    launch(kernel, config, stream, argument);
  };
}

}  // namespace fpn_fast
