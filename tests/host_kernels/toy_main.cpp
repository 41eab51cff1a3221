// SPDX-License-Identifier: Apache-2.0
// Runs one toy kernel: toy_main KERNEL CASE_FILE. Numbers: blocks, then the kernel's own. Tensors: values, out.
#include "case_file.h"
#include "toy_kernels.cuh"

int main(int count, char** arguments) {
  if (count != 3) host_cuda::fail("usage: toy_main KERNEL CASE_FILE");
  const std::string kernel = arguments[1];
  const host_cuda::CaseFile file(arguments[2]);
  const auto number = [&](size_t i) { return static_cast<int>(file.numbers.at(i)); };
  const float* values = file.tensors.at(0).data<float>();
  float* out = file.tensors.at(1).data<float>();
  int* counts = file.tensors.at(1).data<int>();
  const auto launch = [&](const auto& body, host_cuda::Blocks order = host_cuda::Blocks::kOneByOne) {
    host_cuda::launch({unsigned(number(0))}, {toy::kThreads}, body, order);
  };

  if (kernel == "block_sum") {
    launch([&] { toy::block_sum_kernel<true>(values, out); });
  } else if (kernel == "block_sum_without_barriers") {
    launch([&] { toy::block_sum_kernel<false>(values, out); });
  } else if (kernel == "warp_sum") {
    launch([&] { toy::warp_sum_kernel(values, number(1), out); });
  } else if (kernel == "lanes") {
    launch([&] { toy::lanes_kernel(counts); });
  } else if (kernel == "histogram") {
    launch([&] { toy::histogram_kernel(values, number(1), number(2), counts); });
  } else if (kernel == "bits") {
    launch([&] { toy::bits_kernel(file.tensors.at(1).data<unsigned long long>()); });
  } else if (kernel == "early_return") {
    launch([&] { toy::early_return_kernel(out); });
  } else if (kernel == "copy") {
    launch([&] { toy::copy_kernel<true>(values, number(1), out); });
  } else if (kernel == "copy_out_of_bounds") {
    launch([&] { toy::copy_kernel<false>(values, number(1), out); });
  } else if (kernel == "offset") {
    launch([&] { toy::offset_kernel<int64_t>(number(1), out); });
  } else if (kernel == "offset_overflow") {
    launch([&] { toy::offset_kernel<int>(number(1), out); });
  } else if (kernel == "vector_copy") {
    launch([&] { toy::vector_copy_kernel(values, number(1), out); });
  } else if (kernel == "chained_blocks") {
    launch([&] { toy::chained_blocks_kernel(out); });
  } else if (kernel == "overlapping_blocks") {
    launch([&] { toy::overlapping_blocks_kernel(out); }, host_cuda::Blocks::kUnordered);
  } else if (kernel == "unordered_barrier") {
    launch([&] { toy::early_return_kernel(out); }, host_cuda::Blocks::kUnordered);
  } else if (kernel == "empty_grid") {
    host_cuda::launch({0}, {toy::kThreads}, [] {});
  } else if (kernel == "tall_grid") {
    host_cuda::launch({1, 70000}, {toy::kThreads}, [] {});
  } else if (kernel == "large_block") {
    host_cuda::launch({1}, {32, 33}, [] {});
  } else if (kernel == "partial_mask") {
    launch([&] { __shfl_sync(0xffffu, 0, 0); });
  } else {
    host_cuda::fail("unknown kernel");
  }
  file.write();
}
