// SPDX-License-Identifier: Apache-2.0
// Gradient of multi-level RoIAlign for any strides, element by element. It is gathered, without atomics, zero fill or a
// wider copy of the gradient.
//
// Note [Tiles of RoIs]
// A block owns a tile of pixels of one map of one image, by some channels. It adds the gradients of the RoIs that read
// the tile (roi_lists.cuh) in their order, and writes each pixel once, zero where no RoI reads. As in the forward pass
// a thread has a line: kRoiRun pixels along a column of the tile. For each bin that reads its line, it sums the
// gradient across the line first and then adds that to each pixel. The weights of a batch of RoIs are computed
// together, in tables of kRoiBatchBins bins by kRoiTile pixels. A RoI with more bins on a tile takes several rounds.
// Many RoIs may share a tile of a small map. Its tiles have fewer lines, and several threads share a line: each adds
// every n-th RoI.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"
#include "roi_lists.cuh"
#include "roi_taps.cuh"
#include "roi_weights.cuh"

namespace fpn_fast {

// Allows 80 registers: 24 warps on a multiprocessor.
constexpr int kStridedBlocks = 3;
// A map with fewer blocks takes smaller tiles: two blocks for each of an H100's 132 multiprocessors.
constexpr int64_t kStridedSpread = 264;

// The tiles of one map. Coarse maps come first, because many RoIs share their tiles.
struct StridedTiling {
  unsigned first_block;
  unsigned line_tiles, run_tiles;
  int lines;   // per tile
  int slices;  // threads that share a run
};

template <class T>
struct RoiAlignStridedGathering {
  RoiLists<acc_type<T>> lists;
  FeatureMap<const T> grad;  // [count, channels, pooled_height, pooled_width]
  FeatureMap<T> sum[kMaxRoiLevels];
  StridedTiling tiling[kMaxRoiLevels];
  int levels;
  int lanes;                // threads along the channels
  unsigned channel_groups;  // blocks along the channels
};

template <class T>
LaunchConfig strided_launch(RoiAlignStridedGathering<T>& gathering) {
  const int64_t chunks = ceil_div(gathering.sum[0].channels, kVec<T>);
  // A block divided by two runs of eight columns.
  gathering.channel_groups = static_cast<unsigned>(ceil_div(chunks, kRoiReaders / (kRoiRuns * kRoiTile)));
  gathering.lanes = static_cast<int>(ceil_div(chunks, gathering.channel_groups));
  const int teams = kRoiReaders / (gathering.lanes * kRoiRuns);
  // Lines are neighbours in memory, and a store of fewer than four is too short.
  constexpr int kFewestLines = 4;
  int64_t blocks = 0;
  for (int level = gathering.levels - 1; level >= 0; --level) {
    const FeatureMap<T>& map = gathering.sum[level];
    StridedTiling& tiling = gathering.tiling[level];
    tiling.run_tiles = static_cast<unsigned>(ceil_div(map.height, kRoiTile));
    for (tiling.lines = kRoiTile;; tiling.lines /= 2) {
      tiling.line_tiles = static_cast<unsigned>(ceil_div(map.width, int64_t{tiling.lines}));
      const int64_t level_blocks = map.batch * tiling.line_tiles * tiling.run_tiles * gathering.channel_groups;
      if (tiling.lines <= teams && (tiling.lines == kFewestLines || level_blocks >= kStridedSpread)) {
        tiling.first_block = static_cast<unsigned>(blocks);
        tiling.slices = std::min(teams / tiling.lines, kRoiBatch);
        blocks += level_blocks;
        break;
      }
    }
  }
  return {blocks, kRoiReaders};
}

// A block's tile: its map, its first row and column, and its columns. It is in shared memory to save registers.
struct StridedTile {
  int64_t image;
  int level, left, top, lines, slices;
  unsigned channel_group;
};

template <class T>
struct StridedBlock {
  using acc_t = acc_type<T>;
  StridedTile tile;
  RoiWeights<acc_t> across, along;  // of the tile's columns, and of its rows
  // The bins of this round that read a line or a run.
  Range lines[kRoiBatch][kRoiTile], runs[kRoiBatch][kRoiRuns];
  unsigned votes[32];
  uint16_t hits[kRoiRound];  // RoIs that read the tile
  acc_t partial[kRoiReaders][kVec<T>];
};

// threadIdx.x, opaque to the compiler, which otherwise keeps values derived from it in registers across the loops over
// RoIs.
__device__ __forceinline__ unsigned thread_in_block() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Computes the weights of one round of a batch's bins, with one thread per bin of each RoI along each axis.
template <class T>
__device__ __forceinline__ void weigh_batch(const RoiAlignStridedGathering<T>& gathering, int first_roi,
                                            const uint16_t* hits, int batched, int across_round, int along_round,
                                            StridedBlock<T>& block) {
  using acc_t = acc_type<T>;
  static_assert(2 * kRoiBatch * kRoiBatchBins == kRoiReaders);
  const unsigned thread = thread_in_block();
  const int entry = thread / (2 * kRoiBatchBins), slot = thread % kRoiBatchBins;
  const bool is_across = thread / kRoiBatchBins % 2 == 0;
  if (entry >= batched) return;
  const int k = first_roi + hits[entry];
  const ListedRoi<acc_t>& roi = gathering.lists.rois[k];
  const FeatureMap<const T>& grad = gathering.grad;
  const RoiAxis<acc_t> axis = is_across ? roi.cols : roi.rows;
  RoiWeights<acc_t>& table = is_across ? block.across : block.along;
  const int first = is_across ? block.tile.left : block.tile.top;
  const int pixels = is_across ? block.tile.lines : kRoiTile;
  const Range bins = bins_between(axis, is_across ? grad.width : grad.height, first - 1, first + pixels);
  const int begin = bins.begin + (is_across ? across_round : along_round) * kRoiBatchBins;
  if (slot == 0) {
    table.bins[entry] = bins.end - bins.begin;
    table.offset[entry] = begin * (is_across ? grad.stride_w : grad.stride_h) + (is_across ? k * grad.stride_n : 0);
  }
  const acc_t scale = is_across ? roi.scale : acc_t(1);
  if (begin + slot < bins.end) weigh_pixels(axis, begin + slot, first, scale, table.weight[entry][slot]);
}

template <class T>
__device__ __forceinline__ void find_reading_bins(int batched, int across_round, int along_round,
                                                  StridedBlock<T>& block) {
  constexpr int kItems = kRoiTile + kRoiRuns;
#pragma unroll 1
  for (int item = thread_in_block(); item < batched * kItems; item += kRoiReaders) {
    const int entry = item / kItems, i = item % kItems, run = i - kRoiTile;
    if (i < kRoiTile) {
      block.lines[entry][i] = reading_bins<1>(block.across, entry, across_round, i);
    } else {
      block.runs[entry][run] = reading_bins<kRoiRun>(block.along, entry, along_round, run * kRoiRun);
    }
  }
}

// A thread's part of the tile. It has up to kVec<T> channels, or none.
struct StridedRun {
  int line, run, slice, channels;
  int64_t first_channel;
};

template <class T>
__device__ __forceinline__ void add_batch(const StridedBlock<T>& block, int batched, const StridedRun& own,
                                          const FeatureMap<const T>& grad, acc_type<T> (&sum)[kRoiRun][kVec<T>]) {
  using acc_t = acc_type<T>;
  const StridedChannels<T> access{grad.stride_c, 0, own.channels};
#pragma unroll 1
  for (int entry = own.slice; entry < batched; entry += block.tile.slices) {
    const Range across = block.lines[entry][own.line], along = block.runs[entry][own.run];
    if (across.begin >= across.end) continue;
    const T* source = whole(grad.data + own.first_channel * grad.stride_c + block.across.offset[entry] +
                            block.along.offset[entry] + across.begin * grad.stride_w + along.begin * grad.stride_h);
#pragma unroll 1
    for (int bin = along.begin; bin < along.end; ++bin, source += grad.stride_h) {
      acc_t values[kVec<T>] = {};
      const T* next = source;
      const auto source_at = [&](int i) -> WeightedSource<T> {
        const T* address = next;
        next += grad.stride_w;
        return {address, block.across.weight[entry][across.begin + i][own.line]};
      };
      access.add_sources(across.end - across.begin, source_at, values);
      const auto weights =
          *reinterpret_cast<const RunWeights<acc_t>*>(&block.along.weight[entry][bin][own.run * kRoiRun]);
#pragma unroll
      for (int i = 0; i < kRoiRun; ++i) {
        // Only the pixels that a bin reads receive its NaN.
        if (weights.weight[i] != 0) add_weighted(weights.weight[i], values, sum[i]);
      }
    }
  }
}

// Adds the sums of the threads that share a run, in order, to the first of them.
template <class T>
__device__ __forceinline__ void add_slices(int slice, int threads_apart, StridedBlock<T>& block,
                                           acc_type<T> (&sum)[kRoiRun][kVec<T>]) {
#pragma unroll
  for (int i = 0; i < kRoiRun; ++i) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) block.partial[threadIdx.x][j] = sum[i][j];
    __syncthreads();
    if (slice > 0) continue;
#pragma unroll 1
    for (int other = 1; other < block.tile.slices; ++other) {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[i][j] += block.partial[threadIdx.x + other * threads_apart][j];
    }
  }
}

template <class T>
__device__ __forceinline__ StridedTile locate_tile(const RoiAlignStridedGathering<T>& gathering) {
  StridedTile tile;
  tile.level = 0;
  while (blockIdx.x < gathering.tiling[tile.level].first_block) ++tile.level;
  const StridedTiling& tiling = gathering.tiling[tile.level];
  unsigned index = blockIdx.x - tiling.first_block;
  tile.channel_group = index % gathering.channel_groups;
  index /= gathering.channel_groups;
  tile.top = index % tiling.run_tiles * kRoiTile;
  index /= tiling.run_tiles;
  tile.left = index % tiling.line_tiles * tiling.lines;
  tile.image = index / tiling.line_tiles;
  tile.lines = tiling.lines, tile.slices = tiling.slices;
  return tile;
}

template <class T>
__device__ __forceinline__ StridedRun locate_run(const RoiAlignStridedGathering<T>& gathering,
                                                 const StridedTile& tile) {
  const int thread = thread_in_block(), lanes = gathering.lanes;
  const int lane = thread / tile.lines % lanes, team = thread / (lanes * tile.lines);
  StridedRun own;
  own.line = thread % tile.lines;
  own.run = team % kRoiRuns, own.slice = team / kRoiRuns;
  own.first_channel = (int64_t{tile.channel_group} * lanes + lane) * kVec<T>;
  own.channels = static_cast<int>(min(gathering.grad.channels - own.first_channel, int64_t{kVec<T>}));
  if (own.slice >= tile.slices) own.channels = 0;
  return own;
}

template <class T>
__global__ void __launch_bounds__(kRoiReaders, kStridedBlocks)
    multiscale_roi_align_backward_strided_kernel(const __grid_constant__ RoiAlignStridedGathering<T> gathering) {
  using acc_t = acc_type<T>;
  __shared__ StridedBlock<T> block;
  if (threadIdx.x == 0) block.tile = locate_tile(gathering);
  __syncthreads();
  acc_t sum[kRoiRun][kVec<T>] = {};
  StridedRun own = locate_run(gathering, block.tile);
#pragma unroll 1
  for (int first = 0; first < gathering.lists.count; first += kRoiRound) {
    const StridedTile& tile = block.tile;
    vote(gathering.lists, first,
         MapArea{static_cast<int>(tile.image) * gathering.levels + tile.level,
                 {tile.top, tile.top + kRoiTile, tile.left, tile.left + tile.lines}},
         block.votes);
    const int hits = list_hits(block.votes, 0, 0, kRoiRound, block.hits);
#pragma unroll 1
    for (int batch = 0; batch < hits; batch += kRoiBatch) {
      const int batched = min(hits - batch, kRoiBatch);
      int round = 0;
      do {
        const int along_rounds = round == 0 ? 1 : count_rounds(block.along, batched);
        const int across_round = round / along_rounds, along_round = round % along_rounds;
        __syncthreads();
        weigh_batch(gathering, first, block.hits + batch, batched, across_round, along_round, block);
        __syncthreads();
        find_reading_bins<T>(batched, across_round, along_round, block);
        __syncthreads();
        if (own.channels > 0) add_batch(block, batched, own, gathering.grad, sum);
      } while (++round < count_rounds(block.across, batched) * count_rounds(block.along, batched));
    }
  }
  // Computed again to save registers.
  const StridedTile tile = block.tile;
  own = locate_run(gathering, tile);
  if (tile.slices > 1) add_slices<T>(own.slice, gathering.lanes * tile.lines * kRoiRuns, block, sum);
  if (own.channels <= 0 || own.slice > 0) return;
  const FeatureMap<T>& map = gathering.sum[tile.level];
  const StridedChannels<T> access{0, map.stride_c, own.channels};
#pragma unroll
  for (int i = 0; i < kRoiRun; ++i) {
    const int y = tile.top + own.run * kRoiRun + i, x = tile.left + own.line;
    if (y < map.height && x < map.width) access.put(map.at(tile.image, own.first_channel, y, x), sum[i]);
  }
}

template <class T, class Launch, class acc_t = acc_type<T>>
void gather_strided_in_launch(const FeatureMap<const T>& grad, const std::vector<FeatureMap<T>>& sums,
                              const RoiLists<acc_t>& lists, const Launch& launch) {
  RoiAlignStridedGathering<T> gathering{};
  gathering.lists = lists, gathering.grad = grad, gathering.levels = static_cast<int>(sums.size());
  std::copy(sums.begin(), sums.end(), gathering.sum);
  const LaunchConfig config = strided_launch(gathering);
  launch(multiscale_roi_align_backward_strided_kernel<T>, config, gathering);
}

}  // namespace fpn_fast
