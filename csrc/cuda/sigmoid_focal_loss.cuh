// SPDX-License-Identifier: Apache-2.0
// The focal loss in one launch: Note [Focal loss]. A block owns a tile of consecutive elements, across rows, and sums
// their losses. Elements are read and written 16 bytes at a time.
#pragma once

#include "../common/sigmoid_focal_loss.h"
#include "launch.h"
#include "vector.cuh"
#include "warp.cuh"

namespace fpn_fast {

constexpr int kFocalThreads = 256, kFocalWarps = kFocalThreads / 32;

template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T sums[kFocalWarps];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int warp = 0; warp < kFocalWarps; ++warp) sum += sums[warp];
  return sum;
}

template <class T, bool kGradient>
__global__ void __launch_bounds__(kFocalThreads) sigmoid_focal_loss_kernel(const __grid_constant__ FocalLoss<T> loss) {
  using acc_t = acc_type<T>;
  const int64_t begin = int64_t{blockIdx.x} * kFocalTile;
  const uint32_t classes = loss.classes;
  const int64_t first_row = begin / classes;
  const uint32_t first_column = static_cast<uint32_t>(begin % classes);
  acc_t sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x * kVec<T>; i < kFocalTile; i += kFocalThreads * kVec<T>) {
    if (begin + i >= loss.elements) break;
    const int count = static_cast<int>(min(int64_t{kVec<T>}, loss.elements - begin - i));
    const bool vectorised = loss.aligned && count == kVec<T>;
    acc_t values[kVec<T>];
    load(loss.logits + begin + i, 1, count, vectorised, values);
    const uint32_t place = first_column + i;
    int64_t row = first_row + place / classes;
    uint32_t column = place % classes;
    int64_t label = loss.labels[row];
    acc_t weight = loss.weights[row];
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) {
      if (k >= count) continue;
      if (column == classes) {
        column = 0, ++row;
        label = loss.labels[row], weight = loss.weights[row];
      }
      const FocalTerm<acc_t> term = focal_term(values[k], label == column, loss.alpha);
      sum += weight * term.loss;
      values[k] = weight * term.slope;
      ++column;
    }
    if constexpr (kGradient) store(loss.gradient + begin + i, 1, count, vectorised, values);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) loss.parts[blockIdx.x] = sum;
}

template <class T, class Launch>
void focal_loss_in_launch(const FocalLoss<T>& loss, const Launch& launch) {
  const LaunchConfig config{focal_tiles(loss.elements), kFocalThreads};
  loss.gradient != nullptr ? launch(sigmoid_focal_loss_kernel<T, true>, config, loss)
                           : launch(sigmoid_focal_loss_kernel<T, false>, config, loss);
}

}  // namespace fpn_fast
