// SPDX-License-Identifier: Apache-2.0
// The kernels in this library, for `python -m fpn_fast info` and the tests.
#pragma once

#include <string>
#include <vector>

namespace fpn_fast {

struct KernelEntry {
  std::string name;
  const void* function;
  int threads;
};

std::vector<KernelEntry>& kernel_table();

// Adds kernels while the library loads: `static const RegisterKernels kernels({...});`
struct RegisterKernels {
  explicit RegisterKernels(const std::vector<KernelEntry>& entries) {
    kernel_table().insert(kernel_table().end(), entries.begin(), entries.end());
  }
};

}  // namespace fpn_fast
