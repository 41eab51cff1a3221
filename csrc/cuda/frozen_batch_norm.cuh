// SPDX-License-Identifier: Apache-2.0
// The frozen batch norm in one launch: Note [Frozen batch norm]. Memory bandwidth limits it. A thread reads two or four
// 16-byte vectors of each map, all before it uses the first, keeps them as the words that were read and computes scale
// and shift itself, from vectors [C] that the first-level cache holds.
//
// channels_last: the vectors of a thread have the same channels, so scale and shift are computed once.
// channels_first: a vector begins in one plane, and may end in the next.
#pragma once

#include "../common/frozen_batch_norm.h"
#include "launch.h"
#include "vector.cuh"
#include "warp.cuh"

namespace fpn_fast {

constexpr int kNormThreads = 256;
// 3 allow 80 registers, of which 16 scales and shifts of each norm and eight vectors take more.
template <class T, bool kChannelsLast>
constexpr int kNormBlocks = kChannelsLast && sizeof(T) == 2 ? 2 : 3;
// Vectors of a thread. Those of a wide map have twice the words, of which more would be spilled.
template <class T, class M>
constexpr int kNormVectors = sizeof(M) == sizeof(T) ? 4 : 2;

template <class T>
constexpr int64_t norm_tile(int vectors) {
  return int64_t{kNormThreads} * vectors * kVec<T>;
}

// kVec<T> adjacent elements of type M, which is T or wider, as they were read.
template <class T, class M>
struct RawVector {
  static constexpr int kWords = sizeof(M) / sizeof(T);
  uint4 words[kWords];

  __device__ __forceinline__ void load(const void* map, int64_t offset) {
    const uint4* source = reinterpret_cast<const uint4*>(static_cast<const M*>(map) + offset);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = source[i];
  }
  __device__ __forceinline__ void get(acc_type<T> (&values)[kVec<T>]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      acc_type<M> part[kVec<M>];
      widen<M>(words[i], part);
#pragma unroll
      for (int k = 0; k < kVec<M>; ++k) values[i * kVec<M> + k] = part[k];
    }
  }
};

template <class T, class M>
__device__ __forceinline__ void store_vector(void* map, int64_t offset, const acc_type<T> (&values)[kVec<T>]) {
  uint4* target = reinterpret_cast<uint4*>(static_cast<M*>(map) + offset);
  if constexpr (sizeof(M) == 2) {
    *target = {rounded_pair<M>(values[0], values[1]), rounded_pair<M>(values[2], values[3]),
               rounded_pair<M>(values[4], values[5]), rounded_pair<M>(values[6], values[7])};
  } else {
#pragma unroll
    for (int i = 0; i < RawVector<T, M>::kWords; ++i) {
      M part[kVec<M>];
#pragma unroll
      for (int k = 0; k < kVec<M>; ++k) part[k] = values[i * kVec<M> + k];
      uint4 word;
      memcpy(&word, part, sizeof word);
      target[i] = word;
    }
  }
}

// One direction: what a thread reads for each vector, and what it makes of it.
template <class T, class R, class O>
struct ForwardVectors {
  using Pass = NormForward<T>;
  static constexpr int kCount = kNormVectors<T, R>;
  RawVector<T, T> x[kCount];
  RawVector<T, R> residual[kCount];

  __device__ __forceinline__ void load(const Pass& pass, int j, int64_t offset) {
    x[j].load(pass.x, offset);
    if (pass.residual != nullptr) residual[j].load(pass.residual, offset);
  }
  __device__ __forceinline__ void finish(const Pass& pass, int j, int64_t offset,
                                         const Affine<acc_type<T>> (&norm)[kVec<T>],
                                         const Affine<acc_type<T>> (&residual_norm)[kVec<T>]) const {
    acc_type<T> values[kVec<T>], added[kVec<T>];
    x[j].get(values);
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) values[k] = transformed(values[k], norm[k]);
    if (pass.residual != nullptr) {
      residual[j].get(added);
#pragma unroll
      for (int k = 0; k < kVec<T>; ++k) values[k] = add(values[k], transformed(added[k], residual_norm[k]));
    }
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) values[k] = clamped(values[k], pass.floor);
    store_vector<T, O>(pass.y, offset, values);
  }
  static __device__ __forceinline__ void element(const Pass& pass, int64_t i, Affine<acc_type<T>> norm,
                                                 Affine<acc_type<T>> residual_norm) {
    acc_type<T> value = transformed(to_acc(pass.x[i]), norm);
    if (pass.residual != nullptr) {
      value = add(value, transformed(to_acc(static_cast<const R*>(pass.residual)[i]), residual_norm));
    }
    static_cast<O*>(pass.y)[i] = Rounded<O>::from(clamped(value, pass.floor));
  }
};

template <class T, class R, class O>
struct BackwardVectors {
  using Pass = NormBackward<T>;
  static constexpr int kCount = kNormVectors<T, O>;
  RawVector<T, O> grad[kCount], y[kCount];

  __device__ __forceinline__ void load(const Pass& pass, int j, int64_t offset) {
    grad[j].load(pass.grad, offset);
    if (pass.y != nullptr) y[j].load(pass.y, offset);
  }
  __device__ __forceinline__ void finish(const Pass& pass, int j, int64_t offset,
                                         const Affine<acc_type<T>> (&norm)[kVec<T>],
                                         const Affine<acc_type<T>> (&residual_norm)[kVec<T>]) const {
    acc_type<T> values[kVec<T>], scaled[kVec<T>];
    grad[j].get(values);
    if (pass.y != nullptr) {
      y[j].get(scaled);
#pragma unroll
      for (int k = 0; k < kVec<T>; ++k) values[k] = behind_relu(values[k], scaled[k]);
    }
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) scaled[k] = multiply(values[k], norm[k].scale);
    store_vector<T, T>(pass.grad_x, offset, scaled);
    if (pass.grad_residual == nullptr) return;
#pragma unroll
    for (int k = 0; k < kVec<T>; ++k) scaled[k] = multiply(values[k], residual_norm[k].scale);
    store_vector<T, R>(pass.grad_residual, offset, scaled);
  }
  static __device__ __forceinline__ void element(const Pass& pass, int64_t i, Affine<acc_type<T>> norm,
                                                 Affine<acc_type<T>> residual_norm) {
    acc_type<T> value = to_acc(static_cast<const O*>(pass.grad)[i]);
    if (pass.y != nullptr) value = behind_relu(value, to_acc(static_cast<const O*>(pass.y)[i]));
    pass.grad_x[i] = Rounded<T>::from(multiply(value, norm.scale));
    if (pass.grad_residual == nullptr) return;
    static_cast<R*>(pass.grad_residual)[i] = Rounded<R>::from(multiply(value, residual_norm.scale));
  }
};

// Element by element: for maps that do not allow 16-byte accesses, and for what is left of a last tile.
template <class T, class Vectors, bool kChannelsLast>
__device__ __forceinline__ void norm_elements(const typename Vectors::Pass& pass, int64_t begin) {
  const NormMaps& maps = pass.maps;
  const int64_t end = min(begin + norm_tile<T>(Vectors::kCount), maps.elements);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) {
    const int64_t channel = (kChannelsLast ? i : i / maps.plane) % maps.channels;
    Vectors::element(pass, i, affine_of<T>(maps.norm, maps.eps, maps.rule, channel),
                     affine_of<T>(maps.residual_norm, maps.eps, maps.rule, channel));
  }
}

// Scale and shift of kVec<T> channels. Single loads would take the first-level cache as long as the maps take memory.
template <class T>
__device__ __forceinline__ void affines_of(const NormMaps& maps, const Norm& norm, int64_t channel,
                                           Affine<acc_type<T>> (&affines)[kVec<T>]) {
  if constexpr (!std::is_same_v<T, double>) {
    if (norm.weight != nullptr && norm.type == VectorType::kFloat && norm.aligned) {
#pragma unroll
      for (int i = 0; i < kVec<T>; i += 4) {
        const auto four = [&](const void* vector) {
          return *reinterpret_cast<const float4*>(static_cast<const float*>(vector) + channel + i);
        };
        const float4 weight = four(norm.weight), bias = four(norm.bias), mean = four(norm.mean),
                     variance = four(norm.variance);
        const auto affine = [&](float w, float b, float m, float v) {
          return rounded_affine<T>(affine_of(w, b, m, v, maps.eps, maps.rule), maps.rule);
        };
        affines[i] = affine(weight.x, bias.x, mean.x, variance.x);
        affines[i + 1] = affine(weight.y, bias.y, mean.y, variance.y);
        affines[i + 2] = affine(weight.z, bias.z, mean.z, variance.z);
        affines[i + 3] = affine(weight.w, bias.w, mean.w, variance.w);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kVec<T>; ++k) affines[k] = affine_of<T>(norm, maps.eps, maps.rule, channel + k);
}

// The vectors of one group of channels at `kCount` pixels, which lie apart so that a warp's accesses are adjacent.
template <class T, class Vectors>
__device__ __forceinline__ void norm_pixels(const typename Vectors::Pass& pass) {
  const NormMaps& maps = pass.maps;
  const int64_t chunks = maps.channels / kVec<T>, pixels = maps.elements / maps.channels;
  const int64_t groups = ceil_div(pixels, Vectors::kCount);
  const int64_t first = int64_t{blockIdx.x} * kNormThreads;
  // 32-bit divisions where a block's threads differ.
  const int64_t first_group = first / chunks;
  const unsigned place = static_cast<unsigned>(first - first_group * chunks) + threadIdx.x;
  const unsigned row = place / static_cast<unsigned>(chunks);
  const int64_t group = first_group + row;
  if (group >= groups) return;
  const int64_t channel = int64_t{place - row * static_cast<unsigned>(chunks)} * kVec<T>;
  Vectors vectors;
#pragma unroll
  for (int j = 0; j < Vectors::kCount; ++j) {
    const int64_t pixel = group + j * groups;
    if (pixel < pixels) vectors.load(pass, j, pixel * maps.channels + channel);
  }
  Affine<acc_type<T>> norm[kVec<T>], residual_norm[kVec<T>];
  affines_of<T>(maps, maps.norm, channel, norm);
  affines_of<T>(maps, maps.residual_norm, channel, residual_norm);
#pragma unroll
  for (int j = 0; j < Vectors::kCount; ++j) {
    const int64_t pixel = group + j * groups;
    if (pixel < pixels) vectors.finish(pass, j, pixel * maps.channels + channel, norm, residual_norm);
  }
}

// A whole tile of adjacent elements.
template <class T, class Vectors>
__device__ __forceinline__ void norm_planes(const typename Vectors::Pass& pass, int64_t begin) {
  const NormMaps& maps = pass.maps;
  Vectors vectors;
#pragma unroll
  for (int j = 0; j < Vectors::kCount; ++j) {
    vectors.load(pass, j, begin + (j * kNormThreads + static_cast<int>(threadIdx.x)) * kVec<T>);
  }
  const int64_t first_plane = begin / maps.plane;
  const unsigned plane = static_cast<unsigned>(maps.plane), channels = static_cast<unsigned>(maps.channels);
  const unsigned first_place = static_cast<unsigned>(begin - first_plane * maps.plane);
  const unsigned first_channel = static_cast<unsigned>(first_plane % maps.channels);
#pragma unroll
  for (int j = 0; j < Vectors::kCount; ++j) {
    const int at = (j * kNormThreads + static_cast<int>(threadIdx.x)) * kVec<T>;
    const unsigned place = first_place + at, planes = place / plane;
    const unsigned channel = (first_channel + planes) % channels, within = place - planes * plane;
    Affine<acc_type<T>> norm[kVec<T>], residual_norm[kVec<T>];
    norm[0] = affine_of<T>(maps.norm, maps.eps, maps.rule, channel);
    residual_norm[0] = affine_of<T>(maps.residual_norm, maps.eps, maps.rule, channel);
    Affine<acc_type<T>> next = norm[0], residual_next = residual_norm[0];
    if (within + kVec<T> > plane) {
      const unsigned after = channel + 1 == channels ? 0 : channel + 1;
      next = affine_of<T>(maps.norm, maps.eps, maps.rule, after);
      residual_next = affine_of<T>(maps.residual_norm, maps.eps, maps.rule, after);
    }
#pragma unroll
    for (int k = 1; k < kVec<T>; ++k) {
      const bool own = within + k < plane;
      norm[k] = own ? norm[0] : next;
      residual_norm[k] = own ? residual_norm[0] : residual_next;
    }
    vectors.finish(pass, j, begin + at, norm, residual_norm);
  }
}

template <class T, class Vectors, bool kChannelsLast>
__device__ __forceinline__ void norm_block(const typename Vectors::Pass& pass) {
  constexpr int64_t kTile = norm_tile<T>(Vectors::kCount);
  const int64_t begin = blockIdx.x * kTile;
  if (kChannelsLast && pass.maps.vectorised) {
    norm_pixels<T, Vectors>(pass);
  } else if (pass.maps.vectorised && begin + kTile <= pass.maps.elements) {
    norm_planes<T, Vectors>(pass, begin);
  } else {
    norm_elements<T, Vectors, kChannelsLast>(pass, begin);
  }
}

template <class T, bool kWideResidual, bool kWideOutput>
using ForwardOf = ForwardVectors<T, MapType<kWideResidual, T>, MapType<kWideOutput, T>>;
template <class T, bool kWideResidual, bool kWideGrad>
using BackwardOf = BackwardVectors<T, MapType<kWideResidual, T>, MapType<kWideGrad, T>>;

template <class T, bool kChannelsLast, bool kWideResidual, bool kWideOutput>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<T, kChannelsLast>)
    frozen_batch_norm_kernel(const __grid_constant__ NormForward<T> pass) {
  norm_block<T, ForwardOf<T, kWideResidual, kWideOutput>, kChannelsLast>(pass);
}

template <class T, bool kChannelsLast, bool kWideResidual, bool kWideGrad>
__global__ void __launch_bounds__(kNormThreads, 3)
    frozen_batch_norm_backward_kernel(const __grid_constant__ NormBackward<T> pass) {
  norm_block<T, BackwardOf<T, kWideResidual, kWideGrad>, kChannelsLast>(pass);
}

template <class T>
LaunchConfig norm_launch(const NormMaps& maps, bool channels_last, int vectors) {
  if (!channels_last || !maps.vectorised) return {ceil_div(maps.elements, norm_tile<T>(vectors)), kNormThreads};
  const int64_t groups = ceil_div(maps.elements / maps.channels, vectors);
  return {ceil_div(groups * (maps.channels / kVec<T>), kNormThreads), kNormThreads};
}

template <class T, bool kWideResidual, bool kWideOutput, class Launch>
void norm_in_launch(const NormForward<T>& pass, bool last, const Launch& launch) {
  launch(last ? frozen_batch_norm_kernel<T, true, kWideResidual, kWideOutput>
              : frozen_batch_norm_kernel<T, false, kWideResidual, kWideOutput>,
         norm_launch<T>(pass.maps, last, ForwardOf<T, kWideResidual, kWideOutput>::kCount), pass);
}

template <class T, bool kWideResidual, bool kWideGrad, class Launch>
void norm_backward_in_launch(const NormBackward<T>& pass, bool last, const Launch& launch) {
  launch(last ? frozen_batch_norm_backward_kernel<T, true, kWideResidual, kWideGrad>
              : frozen_batch_norm_backward_kernel<T, false, kWideResidual, kWideGrad>,
         norm_launch<T>(pass.maps, last, BackwardOf<T, kWideResidual, kWideGrad>::kCount), pass);
}

// Channels of a block's sums in channels_last, whose elements a warp reads together. In channels_first a block sums
// one.
constexpr int kSumChannels = 32;

// Note [Sums for weight and bias]. Threads of a block take positions in turns, and their sums are added in a tree.
template <class T, bool kWideGrad, bool kWideX>
__global__ void __launch_bounds__(kNormThreads)
    frozen_batch_norm_sums_kernel(const __grid_constant__ NormSums<T> pass) {
  using acc_t = acc_type<T>;
  __shared__ acc_t sums[2][kNormThreads];
  const auto *grad = static_cast<const MapType<kWideGrad, T>*>(pass.grad),
             *y = static_cast<const MapType<kWideGrad, T>*>(pass.y);
  const auto* x = static_cast<const MapType<kWideX, T>*>(pass.x);
  const int lanes = pass.channels_last ? kSumChannels : 1, rows = kNormThreads / lanes;
  const int64_t groups = (pass.channels + lanes - 1) / lanes;
  const int64_t part = blockIdx.x / groups;
  const int64_t channel = (blockIdx.x - part * groups) * lanes + threadIdx.x % lanes;
  const int64_t end = min((part + 1) * kNormPart, pass.positions);
  acc_t sum = 0, product = 0;
  if (channel < pass.channels) {
    const acc_t mean = pass.mean[channel];
#pragma unroll 4
    for (int64_t position = part * kNormPart + threadIdx.x / lanes; position < end; position += rows) {
      const int64_t at = pass.offset(position, channel);
      acc_t g = to_acc(grad[at]);
      if (y != nullptr) g = behind_relu(g, to_acc(y[at]));
      sum += g;
      product += g * (to_acc(x[at]) - mean);
    }
  }
  sums[0][threadIdx.x] = sum, sums[1][threadIdx.x] = product;
  for (int step = kNormThreads / 2; step >= lanes; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) {
      sums[0][threadIdx.x] += sums[0][threadIdx.x + step];
      sums[1][threadIdx.x] += sums[1][threadIdx.x + step];
    }
  }
  if (static_cast<int>(threadIdx.x) >= lanes || channel >= pass.channels) return;
  pass.parts[part * 2 * pass.channels + channel] = sums[0][threadIdx.x];
  pass.parts[(part * 2 + 1) * pass.channels + channel] = sums[1][threadIdx.x];
}

template <class T, bool kWideGrad, bool kWideX, class Launch>
void norm_sums_in_launch(const NormSums<T>& pass, const Launch& launch) {
  const int64_t groups = ceil_div(pass.channels, pass.channels_last ? kSumChannels : 1);
  launch(frozen_batch_norm_sums_kernel<T, kWideGrad, kWideX>,
         LaunchConfig{norm_parts(pass.positions) * groups, kNormThreads}, pass);
}

}  // namespace fpn_fast
