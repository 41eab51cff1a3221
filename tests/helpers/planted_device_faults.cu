// SPDX-License-Identifier: Apache-2.0
// Kernels that tests/test_gpu_emulator.py runs in the emulator of machine code: a fault in each but the last ones, at
// the line that says so.
#include <cstdint>

extern "C" __global__ void out_of_bounds(int* out) {
  out[threadIdx.x + 1] = 1;  // here
}

extern "C" __global__ void misaligned(int* out) {
  *reinterpret_cast<int4*>(out + 1) = make_int4(1, 2, 3, 4);  // here
}

extern "C" __global__ void read_only(const int* out) {
  const_cast<int*>(out)[threadIdx.x] = 1;  // here
}

extern "C" __global__ void unwritten_memory(int* out) {
  out[threadIdx.x] += 1;  // here
}

extern "C" __global__ void unwritten_shared(int* out) {
  __shared__ int values[64];
  if (threadIdx.x < 32) values[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];  // here
}

extern "C" __global__ void shared_race(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = out[threadIdx.x] + 1;   // here
  out[threadIdx.x] = values[threadIdx.x ^ 32];  // here
}

extern "C" __global__ void shared_race_in_a_warp(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = out[threadIdx.x] + 1;
  out[threadIdx.x] = values[threadIdx.x ^ 1];  // here
}

extern "C" __global__ void shared_race_of_reads(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  const int other = values[threadIdx.x ^ 32];  // here
  values[threadIdx.x] = other + 1;             // here
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void block_conflict(int* out) {
  out[threadIdx.x] = static_cast<int>(blockIdx.x);  // here
}

extern "C" __global__ void barrier(int* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1;
    __syncthreads();  // here
    out[threadIdx.x + 32] = 2;
  } else {
    __syncthreads();  // here
    out[threadIdx.x - 32] = 3;
  }
}

extern "C" __global__ void warp_mask_of_a_shuffle(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffff, out[threadIdx.x], 20);  // here
}

// What is right: divisions, roots, divergence, exchanges and atomics, whose results the test knows.
extern "C" __global__ void arithmetic(const float* a, const float* b, float* f, double* d, int64_t* i) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  f[3 * t] = a[t] / b[t];
  f[3 * t + 1] = sqrtf(fabsf(a[t]));
  f[3 * t + 2] = floorf(a[t]) + rintf(b[t]);
  d[2 * t] = static_cast<double>(a[t]) / static_cast<double>(b[t]);
  d[2 * t + 1] = sqrt(fabs(static_cast<double>(b[t])));
  const int64_t x = static_cast<int64_t>(__float_as_int(a[t])) * 1000003, y = __float_as_int(b[t]) | 1;
  i[2 * t] = x / y;
  i[2 * t + 1] = x % y;
}

extern "C" __global__ void exchange(const int* in, int* out, int* sums, unsigned long long* most) {
  __shared__ int counts[32];
  __shared__ int values[64];
  const int t = static_cast<int>(threadIdx.x), lane = t & 31;
  if (t < 32) counts[t] = 0;
  __syncthreads();
  const int value = in[blockIdx.x * blockDim.x + t];
  int steps = 0;
  for (int left = value; left > 1; left = left & 1 ? 3 * left + 1 : left / 2) ++steps;
  values[t] = steps;
  __syncwarp();
  const int neighbour = values[t ^ 1];
  atomicAdd(&counts[steps & 31], 1);
  __syncthreads();
  int sum = steps;
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (lane == 0) atomicAdd(sums, sum);
  atomicMax(most, static_cast<unsigned long long>(steps));
  const unsigned even = __ballot_sync(~0u, steps % 2 == 0);
  out[blockIdx.x * blockDim.x + t] = neighbour + 1000 * counts[lane] + 1000000 * __popc(even);
}
