// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks functions that the CPU library and the CUDA kernels share.
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
