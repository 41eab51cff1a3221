// SPDX-License-Identifier: Apache-2.0
// Kernels with known results or known faults, which test the harness.
#pragma once

#include <cstdint>

namespace toy {

constexpr int kThreads = 64;

// Sums kThreads values per block. Without the barriers this is a race.
template <bool kBarriers>
__global__ void block_sum_kernel(const float* values, float* sums) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = values[blockIdx.x * kThreads + threadIdx.x];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if constexpr (kBarriers) __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// The same with shuffles: one sum per warp. Threads past `count` add 0.
__global__ void warp_sum_kernel(const float* values, int count, float* sums) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float sum = i < count ? values[i] : 0;
  for (int delta = warpSize / 2; delta > 0; delta /= 2) sum += __shfl_down_sync(~0u, sum, delta);
  if (threadIdx.x % warpSize == 0) sums[i / warpSize] = sum;
}

// Every way to read another lane: votes, and a rotation, a swap and a shift within segments of eight lanes.
__global__ void lanes_kernel(int* out) {
  const int lane = threadIdx.x % warpSize;
  int* row = out + 6 * (blockIdx.x * kThreads + threadIdx.x);
  row[0] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  row[1] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
  row[2] = __shfl_sync(~0u, lane, lane + 1, 8);
  row[3] = __shfl_xor_sync(~0u, lane, 5);
  row[4] = __shfl_up_sync(~0u, lane, 3, 8);
  row[5] = static_cast<int>(__shfl_down_sync(~0u, int64_t{lane} << 33, 3, 8) >> 33);
}

__global__ void histogram_kernel(const float* values, int count, int bins, int* histogram) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    atomicAdd(&histogram[static_cast<int>(values[i] * bins)], 1);
  }
}

// Bit counts of 32 and 64 bits, and one bit per thread in a word of the block.
__global__ void bits_kernel(unsigned long long* out) {
  const unsigned long long value = 5ull << threadIdx.x, low = value & 0xffffffffull;
  unsigned long long* row = out + 7 * (blockIdx.x * kThreads + threadIdx.x);
  row[0] = __popc(low), row[1] = __clz(low), row[2] = __ffs(low);
  row[3] = __popcll(value), row[4] = __clzll(value), row[5] = __ffsll(value - 5);
  atomicOr(&out[7 * blockIdx.x * kThreads + 6], threadIdx.x % 3 == 0 ? 1ull << threadIdx.x : 0);
}

// Odd threads return before the barrier of the even ones.
__global__ void early_return_kernel(float* out) {
  __shared__ float seen[kThreads];
  if (threadIdx.x % 2 == 1) return;
  seen[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = seen[kThreads - 2 - threadIdx.x];
}

// Without the bounds check a thread past `count` writes past the end.
template <bool kChecked>
__global__ void copy_kernel(const float* values, int count, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kChecked && i >= count) return;
  out[i] = i < count ? values[i] : 0;
}

// Overflows with a 32-bit index_t.
template <class index_t>
__global__ void offset_kernel(int stride, float* out) {
  const index_t offset = static_cast<index_t>(threadIdx.x + 1) * stride;
  out[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(offset);
}

// A 16-byte access at `shift` floats past a multiple of 16.
__global__ void vector_copy_kernel(const float* values, int shift, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(values + shift + 4 * threadIdx.x);
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = four;
}

// Every block adds to the result of the previous one, so the order of blocks matters.
__global__ void chained_blocks_kernel(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = 1 + (blockIdx.x > 0 ? out[blockIdx.x - 1] : 0);
}

// Neighbouring blocks write one common element.
__global__ void overlapping_blocks_kernel(float* out) {
  if (threadIdx.x <= 32) out[32 * blockIdx.x + threadIdx.x] = 1;
}

}  // namespace toy
