// SPDX-License-Identifier: Apache-2.0
// Launches on a tensor's device and its current stream; CUDA errors become exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/launch.h"
#include "../cuda/scratch.h"
#include "tensors.h"

namespace fpn_fast {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class Argument>
void launch(void (*kernel)(Argument), const LaunchConfig& config, cudaStream_t stream, const Argument& argument) {
  if (config.blocks == 0) return;
  STD_TORCH_CHECK(config.blocks <= INT32_MAX, "a grid has at most 2^31 - 1 blocks, got ", config.blocks,
                  "; split the batch");
  kernel<<<static_cast<unsigned>(config.blocks), config.threads, 0, stream>>>(argument);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls `run(launch)` with the tensor's device current. `launch(kernel, config, argument)` uses that device's current
// stream.
template <class Run>
void run_on(const Tensor& tensor, const Run& run) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const cudaStream_t stream = current_stream(tensor);
  run([&](auto kernel, const LaunchConfig& config, const auto& argument) { launch(kernel, config, stream, argument); });
}

// Calls `run(plan, launch)` like run_on, with `plan = make_plan(scratch)`. The scratch memory has the size that the
// plan takes.
template <class MakePlan, class Run>
void run_planned(const Tensor& tensor, const MakePlan& make_plan, const Run& run) {
  run_on(tensor, [&](const auto& launch) {
    Scratch counting;
    const auto plan = make_plan(counting);
    if (counting.bytes() == 0) return run(plan, launch);
    const Tensor memory = empty_like(tensor, {counting.bytes()}, ScalarType::Byte);
    Scratch scratch(static_cast<char*>(memory.data_ptr()));
    run(make_plan(scratch), launch);
  });
}

}  // namespace fpn_fast
