// SPDX-License-Identifier: Apache-2.0
// Reads the resources of each kernel. fpn_fast/_library.py calls it with ctypes and repeats the struct.
#include <cuda_runtime.h>

#include <cstdio>

#include "kernel_table.h"

namespace fpn_fast {

KernelTable& kernel_table() {
  static KernelTable table;
  return table;
}

}  // namespace fpn_fast

extern "C" {

struct KernelAttributes {
  char name[128];
  int threads;       // per block
  int registers;     // per thread
  int shared_bytes;  // static, per block
  int local_bytes;   // per thread; above 0: spills or a stack
  double occupancy;  // resident threads divided by the most that a multiprocessor holds
};

// The attributes of kernel `index` on the current device. Returns 0, -1 past the last kernel, or a cudaError_t.
__attribute__((visibility("default"))) int fpn_fast_kernel_attributes(int index, KernelAttributes* out) {
  const auto& entries = fpn_fast::kernel_table().entries;
  if (index < 0 || index >= static_cast<int>(entries.size())) return -1;
  const auto& entry = entries[index];
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
}
