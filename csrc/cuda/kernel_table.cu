// SPDX-License-Identifier: Apache-2.0
// Reads each kernel's resources, for ctypes: fpn_fast/_library.py.
#include <cuda_runtime.h>

#include <cstdio>

#include "kernel_attributes.h"
#include "kernel_table.h"

namespace fpn_fast {

std::vector<KernelEntry>& kernel_table() {
  static std::vector<KernelEntry> table;
  return table;
}

}  // namespace fpn_fast

extern "C" __attribute__((visibility("default"))) int fpn_fast_kernel_attributes(int index, KernelAttributes* out) {
  const auto& table = fpn_fast::kernel_table();
  if (index < 0 || index >= static_cast<int>(table.size())) return -1;
  const auto& entry = table[index];
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, entry.function)) return error;
  int blocks = 0;
  if (const cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry.function, entry.threads, 0)) {
    return error;
  }
  int device = 0, threads_per_multiprocessor = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  std::snprintf(out->name, sizeof out->name, "%s", entry.name.c_str());
  out->threads = entry.threads;
  out->registers = attributes.numRegs;
  out->shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  out->local_bytes = static_cast<int>(attributes.localSizeBytes);
  out->occupancy = static_cast<double>(blocks) * entry.threads / threads_per_multiprocessor;
  return 0;
}
