// SPDX-License-Identifier: Apache-2.0
// Note [Halving pathways] for channels_last: a thread takes 16 bytes of the channels of one pixel of the third map, or
// of the coarsest before, and the tree of pixels under it. The four threads whose pixels have the same one of the
// fourth map all read that; its gradient they add up through shared memory.
#pragma once

#include "top_down_halving.cuh"

namespace fpn_fast {
// Blocks are small, so that the last ones to start are a small share: an image has 525 of twice as many threads, and an
// H100 holds 396 of these at once.
constexpr int kTreeThreads = 128;

template <class T, int kLevels>
struct PixelTree {
  using Values = Run<T, kVec<T>>;
  static constexpr int kRoot = kLevels < 3 ? kLevels - 1 : 2;  // the level of its root
  static constexpr int kSiblings = kLevels > 3 ? 4 : 1;        // threads that share a pixel of the coarsest level

  const HalvingSizes& sizes;
  unsigned image;
  int y, x;  // of the root
  unsigned channel;

  // Pixel (i, j) of those under the root.
  __device__ __forceinline__ bool has(int level, int i = 0, int j = 0) const {
    return (y << (kRoot - level)) + i < sizes.height[level] && (x << (kRoot - level)) + j < sizes.width[level];
  }
  __device__ __forceinline__ int64_t offset(int level, int row, int column) const {
    const int64_t rows = int64_t{image} * sizes.height[level] + row;
    return (rows * sizes.width[level] + column) * sizes.channels + channel;
  }
  // Of the first pixel under the root, and from there to pixel (i, j): the same for all threads.
  __device__ __forceinline__ int64_t first(int level) const {
    return offset(level, y << (kRoot - level), x << (kRoot - level));
  }
  __device__ __forceinline__ int step(int level, int i, int j) const {
    return (i * sizes.width[level] + j) * static_cast<int>(sizes.channels);
  }
  // Of the pixel that siblings share.
  __device__ __forceinline__ int64_t shared_offset() const { return offset(kRoot + 1, y / 2, x / 2); }

  // Zero where there is no pixel.
  __device__ __forceinline__ Values load(const T* map, int level, int i = 0, int j = 0) const {
    Values values = {};
    if (has(level, i, j)) values = load_run<kVec<T>>(map + first(level) + step(level, i, j));
    return values;
  }
  __device__ __forceinline__ void store(T* map, int level, int i, int j, const Values& values) const {
    if (has(level, i, j)) store_run(map + first(level) + step(level, i, j), values);
  }
};

// The tree of a thread, and whether there is one.
template <class T, int kLevels, class Argument>
__device__ __forceinline__ bool find_tree(const Argument& argument, PixelTree<T, kLevels>& tree) {
  using Tree = PixelTree<T, kLevels>;
  constexpr int kSiblings = Tree::kSiblings;
  const HalvingSizes& sizes = argument.sizes;
  const unsigned slot = threadIdx.x >> argument.lane_bits;
  const unsigned lane = threadIdx.x - (slot << argument.lane_bits);
  const unsigned task = blockIdx.x * ((kTreeThreads / kSiblings) >> argument.lane_bits) + slot / kSiblings;
  const unsigned pixel = task / argument.groups, group = task - pixel * argument.groups;
  const unsigned width = sizes.width[kLevels - 1], height = sizes.height[kLevels - 1];
  const unsigned row = pixel / width, column = pixel - row * width;
  tree.image = row / height;
  tree.y = row - tree.image * height, tree.x = column;
  if constexpr (kSiblings > 1) {
    tree.y = 2 * tree.y + slot / 2 % 2, tree.x = 2 * tree.x + slot % 2;
  }
  tree.channel = ((group << argument.lane_bits) + lane) * kVec<T>;
  return task < sizes.tasks && tree.channel < sizes.channels && tree.has(Tree::kRoot);
}

template <class T, int kLevels>
__global__ void __launch_bounds__(kTreeThreads)
    top_down_trees_kernel(const __grid_constant__ HalvingPathway<T> pathway) {
  using Tree = PixelTree<T, kLevels>;
  using Values = typename Tree::Values;
  constexpr int kRoot = Tree::kRoot, kSide = 1 << (kRoot - 1);
  Tree tree{pathway.sizes};
  if (!find_tree(pathway, tree)) return;
  Values root = tree.load(pathway.lateral[kRoot], kRoot), coarsest;
  if constexpr (kLevels > 3) coarsest = load_run<kVec<T>>(pathway.lateral[3] + tree.shared_offset());
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    Values middle[kSide], fine[kSide][4];
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      if constexpr (kRoot == 2) middle[j] = tree.load(pathway.lateral[1], 1, i, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) fine[j][k] = tree.load(pathway.lateral[0], 0, 2 * i + k / 2, 2 * j + k % 2);
    }
    if constexpr (kLevels > 3) {
      if (i == 0) {
        root = fused(root, coarsest, pathway.average);
        tree.store(pathway.merged[kRoot], kRoot, 0, 0, root);
      }
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      Values top = root;
      if constexpr (kRoot == 2) {
        top = fused(middle[j], root, pathway.average);
        tree.store(pathway.merged[1], 1, i, j, top);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        tree.store(pathway.merged[0], 0, 2 * i + k / 2, 2 * j + k % 2, fused(fine[j][k], top, pathway.average));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void add_run(const Run<T, kVec<T>>& run, acc_type<T> (&sum)[kVec<T>]) {
  acc_type<T> values[kVec<T>];
  widen_run(run, values);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum[i] += values[i];
}

// (a + b) + (c + d).
template <class T>
__device__ __forceinline__ void sum_of_four(const Run<T, kVec<T>>& a, const Run<T, kVec<T>>& b,
                                            const Run<T, kVec<T>>& c, const Run<T, kVec<T>>& d,
                                            acc_type<T> (&sum)[kVec<T>]) {
  acc_type<T> below[kVec<T>];
  widen_run(a, sum), add_run(b, sum);
  widen_run(c, below), add_run(d, below);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum[i] += below[i];
}

// Writes the sums of a tree and returns its root's, rounded.
template <class T, int kLevels>
__device__ __forceinline__ Run<T, kVec<T>> gather_tree(const HalvingGradients<T>& gradients,
                                                       const PixelTree<T, kLevels>& tree) {
  using Values = Run<T, kVec<T>>;
  constexpr int kRoot = PixelTree<T, kLevels>::kRoot, kSide = 1 << (kRoot - 1);
  Values own;
  if constexpr (kLevels > 3) own = tree.load(gradients.grad[kRoot], kRoot);
  acc_type<T> sum[kVec<T>];
  Values quads[kSide * kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    Values middle[kSide], fine[kSide][4];
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      if constexpr (kRoot == 2) middle[j] = tree.load(gradients.grad[1], 1, i, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) fine[j][k] = tree.load(gradients.grad[0], 0, 2 * i + k / 2, 2 * j + k % 2);
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      sum_of_four(fine[j][0], fine[j][1], fine[j][2], fine[j][3], sum);
      if constexpr (kRoot == 2) {
        quads[kSide * i + j] = with_own(sum, middle[j], gradients.average);
        tree.store(gradients.sum[0], 1, i, j, quads[kSide * i + j]);
      }
    }
  }
  if constexpr (kRoot == 2) sum_of_four(quads[0], quads[1], quads[2], quads[3], sum);
  Values root;
  if constexpr (kLevels > 3) {
    root = with_own(sum, own, gradients.average);
  } else {
    root = round_to_run<T>(sum);
  }
  tree.store(gradients.sum[kRoot - 1], kRoot, 0, 0, root);
  return root;
}

template <class T, int kLevels>
__global__ void __launch_bounds__(kTreeThreads)
    top_down_trees_backward_kernel(const __grid_constant__ HalvingGradients<T> gradients) {
  PixelTree<T, kLevels> tree{gradients.sizes};
  const bool found = find_tree(gradients, tree);
  if constexpr (kLevels < 4) {
    if (found) gather_tree(gradients, tree);
  } else {
    __shared__ Run<T, kVec<T>> roots[kTreeThreads];
    roots[threadIdx.x] = found ? gather_tree(gradients, tree) : Run<T, kVec<T>>{};
    __syncthreads();
    const unsigned lanes = 1u << gradients.lane_bits;
    // The first of the siblings always has a tree, if any has.
    if (!found || (threadIdx.x >> gradients.lane_bits) % 4 != 0) return;
    const auto* root = roots + threadIdx.x;
    acc_type<T> sum[kVec<T>];
    sum_of_four(root[0], root[lanes], root[2 * lanes], root[3 * lanes], sum);
    store_run(gradients.sum[2] + tree.shared_offset(), round_to_run<T>(sum));
  }
}

// Groups of so many threads cover the channels of a pixel, in 16-byte vectors, that fewest idle.
inline unsigned lane_bits_of(int64_t vectors) {
  unsigned best = 5;  // siblings fill a block
  // Accesses of eight threads fill a line.
  for (unsigned bits = best; 1 << bits >= std::min<int64_t>(vectors, 8); --bits) {
    if (ceil_div(vectors, 1 << bits) << bits < ceil_div(vectors, 1 << best) << best) best = bits;
    if (bits == 0) break;
  }
  return best;
}

// Whether a pixel is 16-byte vectors, and 32 bits hold where the pixels of a tree are from its first.
template <class T>
bool has_trees(const FeatureMap<const T>& finest) {
  return finest.channels % kVec<T> == 0 && 4 * (int64_t{finest.width} + 1) * finest.channels <= INT32_MAX;
}

// Completes the argument.
template <class Argument>
LaunchConfig tree_launch(Argument& argument, int levels, int64_t batch, int vector) {
  HalvingSizes& sizes = argument.sizes;
  const int64_t vectors = sizes.channels / vector;
  argument.lane_bits = lane_bits_of(vectors);
  argument.groups = static_cast<unsigned>(ceil_div(vectors, 1 << argument.lane_bits));
  const int64_t tasks = batch * sizes.height[levels - 1] * sizes.width[levels - 1] * argument.groups;
  sizes.tasks = static_cast<unsigned>(tasks);
  const int siblings = levels > 3 ? 4 : 1;
  return {ceil_div(tasks, (kTreeThreads / siblings) >> argument.lane_bits), kTreeThreads};
}

// These return whether they launched.
template <class T, class Launch>
bool merge_trees_in_launch(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                           bool average, const Launch& launch) {
  HalvingPathway<T> pathway{};
  if (!has_trees(laterals[0]) || !fill_halving(pathway, laterals, merged, average, true)) return false;
  const int levels = static_cast<int>(laterals.size());
  const LaunchConfig config = tree_launch(pathway, levels, laterals[0].batch, kVec<T>);
  if (levels == 2) launch(top_down_trees_kernel<T, 2>, config, pathway);
  if (levels == 3) launch(top_down_trees_kernel<T, 3>, config, pathway);
  if (levels == 4) launch(top_down_trees_kernel<T, 4>, config, pathway);
  return true;
}

template <class T, class Launch>
bool gather_trees_in_launch(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                            bool average, const Launch& launch) {
  HalvingGradients<T> gradients{};
  if (!has_trees(grads[0]) || !fill_halving(gradients, grads, sums, average, true)) return false;
  const int levels = static_cast<int>(sums.size()) + 1;
  const LaunchConfig config = tree_launch(gradients, levels, grads[0].batch, kVec<T>);
  if (levels == 2) launch(top_down_trees_backward_kernel<T, 2>, config, gradients);
  if (levels == 3) launch(top_down_trees_backward_kernel<T, 3>, config, gradients);
  if (levels == 4) launch(top_down_trees_backward_kernel<T, 4>, config, gradients);
  return true;
}

}  // namespace fpn_fast
