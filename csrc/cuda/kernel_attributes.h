// SPDX-License-Identifier: Apache-2.0
// The C interface by which fpn_fast/_library.py reads the kernels' resources.
#pragma once

extern "C" {

struct KernelAttributes {
  char name[128];
  int threads;       // per block
  int registers;     // per thread
  int shared_bytes;  // per block, static
  int local_bytes;   // per thread; above 0 means spills or a stack
  double occupancy;  // resident threads over the most that a multiprocessor holds
};

// Attributes of kernel `index` on the current device: 0, -1 past the last kernel, or a cudaError_t.
int fpn_fast_kernel_attributes(int index, KernelAttributes* out);
}
