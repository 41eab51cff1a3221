// SPDX-License-Identifier: Apache-2.0
// Gradient of multi-level RoIAlign. It is gathered, without atomics, zero fill or a wider copy of the gradient.
//
// Note [Tiles of RoIs]
// A block owns a tile of pixels of one map of one image, by some channels. It adds the gradients of the RoIs on that
// map's list (roi_lists.cuh) in their order, and writes each pixel once, zero where no RoI reads. As in the forward
// pass a thread has a line: kRoiRun pixels along a row of the tile (channels_last) or a column (channels_first). For
// each bin that reads its line, it sums the gradient across the line first and then adds that to each pixel. The
// weights of a batch of RoIs are computed together, in tables of kRoiBatchBins bins by kRoiTile pixels. A RoI with more
// bins on a tile takes several rounds.
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

constexpr int kGatherThreads = kRoiListThreads;
// Allows 80 registers: 24 warps on a multiprocessor.
constexpr int kGatherBlocks = 3;
// 16-byte loads in flight per thread. More bins seldom read one line of pixels.
constexpr int kGatherLoads = 2;
// RoIs that each thread tests before those that touch the tile are added.
constexpr int kRoiScanRounds = 4;
constexpr int kRoiHits = kRoiScanRounds * kGatherThreads;

// A map with fewer blocks takes smaller tiles: two blocks for each of an H100's 132 multiprocessors.
constexpr int64_t kGatherSpread = 264;

// The tiles of one map. Coarse maps come first, because many RoIs share their tiles.
struct RoiTiling {
  unsigned first_block;
  unsigned line_tiles, run_tiles;
  int lines;   // per tile
  int slices;  // threads that share a run
};

template <class T>
struct RoiAlignGathering {
  RoiLists<acc_type<T>> lists;
  FeatureMap<const T> grad;  // [count, channels, pooled_height, pooled_width]
  FeatureMap<T> sum[kMaxRoiLevels];
  RoiTiling tiling[kMaxRoiLevels];
  int levels;
  int lanes;                // threads along the channels
  unsigned channel_groups;  // blocks along the channels
};

template <class T, bool kChannelsLast>
LaunchConfig roi_align_backward_launch(RoiAlignGathering<T>& gathering) {
  const int64_t chunks = ceil_div(gathering.sum[0].channels, kVec<T>);
  // channels_first: a block divided by two runs of eight columns.
  const int64_t most_lanes = kChannelsLast ? 32 : kGatherThreads / (kRoiRuns * kRoiTile);
  gathering.channel_groups = static_cast<unsigned>(ceil_div(chunks, most_lanes));
  gathering.lanes = static_cast<int>(ceil_div(chunks, gathering.channel_groups));
  const int teams = kGatherThreads / (gathering.lanes * kRoiRuns);
  // channels_first: lines are neighbours in memory, and a store of fewer than four is too short.
  const int fewest_lines = kChannelsLast ? 1 : 4;
  int64_t blocks = 0;
  for (int level = gathering.levels - 1; level >= 0; --level) {
    const FeatureMap<T>& map = gathering.sum[level];
    RoiTiling& tiling = gathering.tiling[level];
    tiling.run_tiles = static_cast<unsigned>(ceil_div(kChannelsLast ? map.width : map.height, kRoiTile));
    for (tiling.lines = kRoiTile;; tiling.lines /= 2) {
      tiling.line_tiles =
          static_cast<unsigned>(ceil_div(kChannelsLast ? map.height : map.width, int64_t{tiling.lines}));
      const int64_t level_blocks = map.batch * tiling.line_tiles * tiling.run_tiles * gathering.channel_groups;
      if (tiling.lines <= teams && (tiling.lines == fewest_lines || level_blocks >= kGatherSpread)) {
        tiling.first_block = static_cast<unsigned>(blocks);
        tiling.slices = std::min(teams / tiling.lines, kRoiBatch);
        blocks += level_blocks;
        break;
      }
    }
  }
  return {blocks, kGatherThreads};
}

// A block's tile: its map, its first pixel across and along the lines, its lines, and the RoIs on the map's list. It is
// in shared memory to save registers.
struct RoiTile {
  int64_t image;
  int level, across, along, lines, slices;
  unsigned channel_group;
  Range list;
};

template <class T>
struct GatherBlock {
  using acc_t = acc_type<T>;
  RoiTile tile;
  RoiWeights<acc_t> across, along;  // of the tile's lines, and of its runs
  // The bins of this round that read a line or a run.
  Range lines[kRoiBatch][kRoiTile], runs[kRoiBatch][kRoiRuns];
  int hits[kRoiHits];  // RoIs that touch the tile
  int counts[kRoiScanRounds][kRoiListWarps];
  acc_t partial[kGatherThreads][kVec<T>];
};

// threadIdx.x, opaque to the compiler, which otherwise keeps values derived from it in registers across the loops over
// RoIs.
__device__ __forceinline__ unsigned thread_in_block() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Lists those of RoIs [first, first + kRoiHits) that touch the tile. Returns their number.
template <class T, bool kChannelsLast>
__device__ __forceinline__ int find_hits(const RoiAlignGathering<T>& gathering, int first, GatherBlock<T>& block) {
  const RoiTile tile = block.tile;
  const unsigned thread = thread_in_block();
  bool keep[kRoiScanRounds];
  int position[kRoiScanRounds];
#pragma unroll
  for (int round = 0; round < kRoiScanRounds; ++round) {
    const int roi = first + round * kGatherThreads + thread;
    keep[round] = false;
    if (roi < tile.list.end) {
      const PixelBox box = gathering.lists.boxes[roi];
      const Range rows{box.top, box.bottom}, cols{box.left, box.right};
      const Range across = kChannelsLast ? rows : cols, along = kChannelsLast ? cols : rows;
      keep[round] = across.begin < tile.across + tile.lines && across.end > tile.across &&
                    along.begin < tile.along + kRoiTile && along.end > tile.along;
    }
  }
  const int hits = number_kept(keep, position, block.counts);
#pragma unroll
  for (int round = 0; round < kRoiScanRounds; ++round) {
    if (keep[round]) block.hits[position[round]] = first + round * kGatherThreads + thread;
  }
  return hits;
}

// Computes the weights of one round of a batch's bins, with one thread per bin of each RoI along each axis.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void weigh_batch(const RoiAlignGathering<T>& gathering, const int* hits, int batched,
                                            int across_round, int along_round, GatherBlock<T>& block) {
  using acc_t = acc_type<T>;
  static_assert(2 * kRoiBatch * kRoiBatchBins == kGatherThreads);
  const unsigned thread = thread_in_block();
  const int entry = thread / (2 * kRoiBatchBins), slot = thread % kRoiBatchBins;
  const bool is_across = thread / kRoiBatchBins % 2 == 0;
  if (entry >= batched) return;
  const ListedRoi<acc_t>& roi = gathering.lists.rois[hits[entry]];
  const FeatureMap<const T>& grad = gathering.grad;
  const bool is_row = is_across == kChannelsLast;
  const RoiAxis<acc_t> axis = is_row ? roi.rows : roi.cols;
  RoiWeights<acc_t>& table = is_across ? block.across : block.along;
  const int first = is_across ? block.tile.across : block.tile.along;
  const int pixels = is_across ? block.tile.lines : kRoiTile;
  const Range bins = bins_between(axis, is_row ? grad.height : grad.width, first - 1, first + pixels);
  const int begin = bins.begin + (is_across ? across_round : along_round) * kRoiBatchBins;
  if (slot == 0) {
    table.bins[entry] = bins.end - bins.begin;
    table.offset[entry] = begin * (is_row ? grad.stride_h : grad.stride_w) + (is_across ? roi.roi * grad.stride_n : 0);
  }
  const acc_t scale = is_across ? roi.scale : acc_t(1);
  if (begin + slot < bins.end) weigh_pixels(axis, begin + slot, first, scale, table.weight[entry][slot]);
}

template <class T>
__device__ __forceinline__ void find_reading_bins(int batched, int across_round, int along_round,
                                                  GatherBlock<T>& block) {
  constexpr int kItems = kRoiTile + kRoiRuns;
#pragma unroll 1
  for (int item = thread_in_block(); item < batched * kItems; item += kGatherThreads) {
    const int entry = item / kItems, i = item % kItems, run = i - kRoiTile;
    if (i < kRoiTile) {
      block.lines[entry][i] = reading_bins<1>(block.across, entry, across_round, i);
    } else {
      block.runs[entry][run] = reading_bins<kRoiRun>(block.along, entry, along_round, run * kRoiRun);
    }
  }
}

// A thread's part of the tile. It has up to kVec<T> channels, or none.
struct GatherRun {
  int line, run, slice, channels;
  int64_t first_channel;
};

template <class T, class Access>
__device__ __forceinline__ void add_batch(const GatherBlock<T>& block, int batched, const GatherRun& own, const T* grad,
                                          int64_t across_stride, int64_t along_stride, const Access& access,
                                          acc_type<T> (&sum)[kRoiRun][kVec<T>]) {
  using acc_t = acc_type<T>;
#pragma unroll 1
  for (int entry = own.slice; entry < batched; entry += block.tile.slices) {
    const Range across = block.lines[entry][own.line], along = block.runs[entry][own.run];
    if (across.begin >= across.end) continue;
    const T* source = whole(grad + block.across.offset[entry] + block.along.offset[entry] +
                            across.begin * across_stride + along.begin * along_stride);
#pragma unroll 1
    for (int bin = along.begin; bin < along.end; ++bin, source += along_stride) {
      acc_t values[kVec<T>] = {};
      const T* next = source;
      const auto source_at = [&](int i) -> WeightedSource<T> {
        const T* address = next;
        next += across_stride;
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
__device__ __forceinline__ void add_slices(int slice, int threads_apart, GatherBlock<T>& block,
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
__device__ __forceinline__ RoiTile locate_tile(const RoiAlignGathering<T>& gathering) {
  RoiTile tile;
  tile.level = 0;
  while (blockIdx.x < gathering.tiling[tile.level].first_block) ++tile.level;
  const RoiTiling& tiling = gathering.tiling[tile.level];
  unsigned index = blockIdx.x - tiling.first_block;
  tile.channel_group = index % gathering.channel_groups;
  index /= gathering.channel_groups;
  tile.along = index % tiling.run_tiles * kRoiTile;
  index /= tiling.run_tiles;
  tile.across = index % tiling.line_tiles * tiling.lines;
  tile.image = index / tiling.line_tiles;
  tile.lines = tiling.lines, tile.slices = tiling.slices;
  tile.list = gathering.lists.ranges[tile.image * gathering.levels + tile.level];
  return tile;
}

template <class T, bool kChannelsLast>
__device__ __forceinline__ GatherRun locate_run(const RoiAlignGathering<T>& gathering, const RoiTile& tile) {
  const int thread = thread_in_block(), lanes = gathering.lanes;
  const int lane = kChannelsLast ? thread % lanes : thread / tile.lines % lanes;
  const int team = thread / (lanes * tile.lines);
  GatherRun own;
  own.line = kChannelsLast ? thread / lanes % tile.lines : thread % tile.lines;
  own.run = team % kRoiRuns, own.slice = team / kRoiRuns;
  own.first_channel = (int64_t{tile.channel_group} * lanes + lane) * kVec<T>;
  own.channels = static_cast<int>(min(gathering.grad.channels - own.first_channel, int64_t{kVec<T>}));
  if (own.slice >= tile.slices) own.channels = 0;
  return own;
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    multiscale_roi_align_backward_kernel(const __grid_constant__ RoiAlignGathering<T> gathering) {
  using acc_t = acc_type<T>;
  __shared__ GatherBlock<T> block;
  if (threadIdx.x == 0) block.tile = locate_tile(gathering);
  __syncthreads();
  const FeatureMap<const T>& grad = gathering.grad;
  acc_t sum[kRoiRun][kVec<T>] = {};
  GatherRun own = locate_run<T, kChannelsLast>(gathering, block.tile);
#pragma unroll 1
  for (int first = block.tile.list.begin; first < block.tile.list.end; first += kRoiHits) {
    const int hits = find_hits<T, kChannelsLast>(gathering, first, block);
#pragma unroll 1
    for (int batch = 0; batch < hits; batch += kRoiBatch) {
      const int batched = min(hits - batch, kRoiBatch);
      int round = 0;
      do {
        const int along_rounds = round == 0 ? 1 : count_rounds(block.along, batched);
        const int across_round = round / along_rounds, along_round = round % along_rounds;
        __syncthreads();
        weigh_batch<T, kChannelsLast>(gathering, block.hits + batch, batched, across_round, along_round, block);
        __syncthreads();
        find_reading_bins<T>(batched, across_round, along_round, block);
        __syncthreads();
        if (own.channels > 0) {
          add_batch(block, batched, own, grad.data + own.first_channel * grad.stride_c,
                    kChannelsLast ? grad.stride_h : grad.stride_w, kChannelsLast ? grad.stride_w : grad.stride_h,
                    channel_access<T, kChannelsLast, kGatherLoads>(grad.stride_c, 0, own.channels), sum);
        }
      } while (++round < count_rounds(block.across, batched) * count_rounds(block.along, batched));
    }
  }
  // Computed again to save registers.
  const RoiTile tile = block.tile;
  own = locate_run<T, kChannelsLast>(gathering, tile);
  if (tile.slices > 1) add_slices<T>(own.slice, gathering.lanes * tile.lines * kRoiRuns, block, sum);
  if (own.channels <= 0 || own.slice > 0) return;
  const FeatureMap<T>& map = gathering.sum[tile.level];
  const auto access = channel_access<T, kChannelsLast, kGatherLoads>(0, map.stride_c, own.channels);
#pragma unroll
  for (int i = 0; i < kRoiRun; ++i) {
    const int across = tile.across + own.line, along = tile.along + own.run * kRoiRun + i;
    const int y = kChannelsLast ? across : along, x = kChannelsLast ? along : across;
    if (y < map.height && x < map.width) access.put(map.at(tile.image, own.first_channel, y, x), sum[i]);
  }
}

template <class T, class Launch, class acc_t = acc_type<T>>
void gather_in_launches(const RoiAlignArguments<acc_t>& arguments, const FeatureMap<const T>& grad,
                        std::vector<FeatureMap<T>> sums, const RoiLists<acc_t>& lists, const Launch& launch) {
  RoiAlignGathering<T> gathering{};
  gathering.lists = lists, gathering.grad = grad, gathering.levels = arguments.rule.levels;
  std::copy(sums.begin(), sums.end(), gathering.sum);
  list_in_launch(arguments, sums, lists, launch);
  std::vector<FeatureMap<const T>> sources{grad};
  const auto run = [&]<bool kChannelsLast>() {
    const LaunchConfig config = roi_align_backward_launch<T, kChannelsLast>(gathering);
    launch(multiscale_roi_align_backward_kernel<T, kChannelsLast>, config, gathering);
  };
  mark_vectorised(sources, sums) ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace fpn_fast
