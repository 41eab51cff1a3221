// SPDX-License-Identifier: Apache-2.0
// Gradient of multi-level RoIAlign for channels that are 16-byte accesses. It is gathered, without atomics, zero fill
// or a wider copy of the gradient.
//
// Note [Gathering a tile]
// A block owns a tile of pixels of one map of one image, or a part of its RoIs: Note [Parts of tiles]. A warp owns a
// row of the tile, and a thread its channels of all pixels of the row. The weights of a batch of RoIs are computed
// together, in tables of kGatherBins bins by kRoiTile pixels. From them each warp lists, RoI by RoI and column of bins
// by column, the bins that read its row. It walks along this list: a column's gradient is summed across the row first,
// and then added to the pixels that the column reads. The list is the same for every RoI and ratio of sizes, so the
// loads of the next bins are in flight while these are added.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"
#include "multiscale_roi_align_backward_strided.cuh"
#include "roi_lists.cuh"
#include "roi_taps.cuh"
#include "roi_tiles.cuh"
#include "roi_weights.cuh"
#include "transposed_maps.cuh"

namespace fpn_fast {

static_assert(kRoiReaderWarps == kRoiTile);
// Allows 128 registers: the sums of a row of pixels take 64.
constexpr int kGatherBlocks = 2;
// Bins along an axis whose weights are computed together, enough for 14 by 14. A RoI of more takes several rounds.
constexpr int kGatherBins = 16;
// Bins on a warp's list at a time: with those that are only loaded in advance, two for each lane.
constexpr int kGatherList = 60;
// 16-byte accesses of a thread in a pixel: 8 channels, 2 for float64.
template <class T>
constexpr int kGatherLoads = sizeof(T) == 4 ? 2 : 1;
// Bins whose loads are in flight: 64 bytes of a thread.
template <class T>
constexpr int kGatherAhead = 4 / kGatherLoads<T>;
template <class T>
constexpr int kGatherChannels = 32 * kGatherLoads<T> * kVec<T>;

template <class T>
struct RoiAlignGathering {
  RoiTiles<acc_type<T>> tiles;
  FeatureMap<const T> grad;  // [count, channels, pooled_height, pooled_width]
  FeatureMap<T> sum[kMaxRoiLevels];
  acc_type<T>* partial;     // [parts, kRoiTile * kRoiTile, channels]: the sums of the parts of tiles
  unsigned part_blocks;     // of each channel group: the most parts, or 0 if no tile can be divided
  unsigned channel_groups;  // blocks along the channels
};

// A bin that reads a warp's row: of float32 one access.
template <class acc_t>
struct alignas(sizeof(acc_t) == 4 ? 16 : 8) RowBin {
  acc_t weight;     // with which the row is read
  uint32_t offset;  // in the gradient, in 16 bytes
  int column;       // in its column's last bin: whose weights in the table `along` its pixels have; otherwise -1
  unsigned halves;  // of the row's pixels that the column reads, a bit for each
};

// Bins in a row of a round.
struct RowBins {
  uint8_t first, count;
};

template <class acc_t>
struct GatherBlock {
  // [of a batch][bin][pixel]: the weights of the tile's rows, and of its columns.
  alignas(16) acc_t across[kGatherBatch][kGatherBins][kRoiTile], along[kGatherBatch][kGatherBins][kRoiTile];
  RowBin<acc_t> list[kRoiReaderWarps][64];
  uint32_t across_offset[kGatherBatch], along_offset[kGatherBatch];  // of a round's first bins
  int across_bins[kGatherBatch], along_bins[kGatherBatch];           // on the tile, in all rounds
  RowBins rows[kGatherBatch][kRoiTile], cols[kGatherBatch];
  uint8_t halves[kGatherBatch][kGatherBins];  // of the columns that a bin reads
  unsigned votes[32];
  uint16_t hits[kRoiRound];
  RoiPart part;
};

__device__ __forceinline__ RowBins bins_of(unsigned mask) {
  // The bins that read a pixel or a tile are neighbours.
  return {static_cast<uint8_t>(mask == 0 ? 0 : __ffs(mask) - 1), static_cast<uint8_t>(__popc(mask))};
}

// Computes the weights of one round of a batch's bins, and which bins read each row and the columns. `slots` threads,
// 8 or 16, have a bin each of one RoI along one axis.
template <class T>
__device__ __forceinline__ void weigh_batch(const RoiAlignGathering<T>& gathering, const RoiTile& tile, int first,
                                            const uint16_t* hits, int batched, int across_round, int along_round,
                                            GatherBlock<acc_type<T>>& block) {
  using acc_t = acc_type<T>;
  const FeatureMap<const T>& grad = gathering.grad;
  const int lane = threadIdx.x % 32;
  const int slots = max(grad.height, grad.width) <= 8 ? 8 : kGatherBins;
  const int tasks = 2 * slots * batched;
  // Whole warps, which vote.
#pragma unroll 1
  for (int task = threadIdx.x; task - lane < tasks; task += kRoiReaders) {
    const int slot = task % slots, entry = task / (2 * slots);
    const bool is_across = task / slots % 2 == 0;
    unsigned pixels = 0;
    if (task < tasks) {
      const int k = first + hits[entry];
      const ListedRoi<acc_t>& roi = gathering.tiles.lists.rois[k];
      const RoiAxis<acc_t> axis = is_across ? roi.rows : roi.cols;
      const int begin_pixel = is_across ? tile.top : tile.left, pooled = is_across ? grad.height : grad.width;
      Range bins{0, pooled};
      if (pooled > kGatherBins) bins = bins_between(axis, pooled, begin_pixel - 1, begin_pixel + kRoiTile);
      const int begin = bins.begin + (is_across ? across_round : along_round) * kGatherBins;
      if (slot == 0) {
        (is_across ? block.across_bins : block.along_bins)[entry] = bins.end - bins.begin;
        const int64_t offset = is_across ? k * grad.stride_n + begin * grad.stride_h : begin * grad.stride_w;
        (is_across ? block.across_offset : block.along_offset)[entry] = static_cast<uint32_t>(offset / kVec<T>);
      }
      if (begin + slot < bins.end) {
        pixels = weigh_pixels(axis, begin + slot, begin_pixel, is_across ? roi.scale : acc_t(1),
                              (is_across ? block.across : block.along)[entry][slot]);
      }
    }
    const int group = lane / slots * slots;
    const auto mask_of = [&](bool reads) { return __ballot_sync(~0u, reads) >> group & ((1u << slots) - 1); };
    unsigned own = 0;
#pragma unroll
    for (int i = 0; i < kRoiTile; ++i) {
      const unsigned mask = mask_of(pixels >> i & 1);
      if (slot == i) own = mask;
    }
    const unsigned any = mask_of(pixels != 0);
    if (task < tasks && is_across && slot < kRoiTile) block.rows[entry][slot] = bins_of(own);
    if (task < tasks && !is_across) {
      block.halves[entry][slot] = static_cast<uint8_t>((pixels % 16 != 0) | (pixels / 16 != 0) << 1);
      if (slot == 0) block.cols[entry] = bins_of(any);
    }
  }
}

// Which of a thread's channels are on the map, and where they are in a RoI's bin.
template <class T>
struct GatherChannels {
  const T* source[kGatherLoads<T>];
};

// The sums of a thread's channels of a row.
template <class T>
using RowSums = acc_type<T>[kRoiTile][kGatherLoads<T>][kVec<T>];

// Lists the bins [begin, begin + count) of those that read the warp's row. `end` is, of a lane's RoI, the number of its
// bins and of those before. The last one is repeated without a weight, for walk_list to load in advance.
template <class T>
__device__ __forceinline__ void list_bins(const RoiAlignGathering<T>& gathering, int row, int begin, int count, int end,
                                          GatherBlock<acc_type<T>>& block) {
  constexpr int kAhead = kGatherAhead<T>;
  static_assert(kGatherList % kAhead == 0 && kGatherList + kAhead <= 64);
  const int lane = threadIdx.x % 32;
  const auto stride_h = static_cast<uint32_t>(gathering.grad.stride_h / kVec<T>);
  const auto stride_w = static_cast<uint32_t>(gathering.grad.stride_w / kVec<T>);
#pragma unroll 1
  for (int i = lane; i - lane < (count + kAhead - 1) / kAhead * kAhead + kAhead; i += 32) {
    const int index = begin + min(i, count - 1);
    int entry = 0;
#pragma unroll
    for (int step = kGatherBatch / 2; step > 0; step /= 2) {
      if (__shfl_sync(~0u, end, entry + step - 1) <= index) entry += step;
    }
    const RowBins rows = block.rows[entry][row], cols = block.cols[entry];
    const int within = index - (__shfl_sync(~0u, end, entry) - rows.count * cols.count);
    const int x = within / rows.count, y = within - x * rows.count;
    const int bin_y = rows.first + y, bin_x = cols.first + x;
    const uint32_t offset =
        block.across_offset[entry] + block.along_offset[entry] + bin_y * stride_h + bin_x * stride_w;
    const bool listed = i < count, ends = listed && y == rows.count - 1;
    block.list[row][i] = RowBin<acc_type<T>>{listed ? block.across[entry][bin_y][row] : acc_type<T>(0), offset,
                                             ends ? entry * kGatherBins + bin_x : -1, block.halves[entry][bin_x]};
  }
  __syncwarp();
}

__device__ __forceinline__ void clear(float& value) { asm volatile("mov.b32 %0, 0;" : "+f"(value)); }
__device__ __forceinline__ void clear(double& value) { value = 0; }

// Adds the bins on the warp's list. `partial` is the sum of the column that the last list ended in.
template <class T>
__device__ __forceinline__ void walk_list(const GatherBlock<acc_type<T>>& block, int row, int count,
                                          const GatherChannels<T>& channels,
                                          acc_type<T> (&partial)[kGatherLoads<T>][kVec<T>], RowSums<T>& sum) {
  using acc_t = acc_type<T>;
  constexpr int kAhead = kGatherAhead<T>, kLoads = kGatherLoads<T>;
  const RowBin<acc_t>* list = block.list[row];
  uint4 raw[kAhead][kLoads];
  const auto load_bin = [&](int slot, uint32_t offset) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      raw[slot][l] = *reinterpret_cast<const uint4*>(channels.source[l] + int64_t{offset} * kVec<T>);
    }
  };
#pragma unroll
  for (int a = 0; a < kAhead; ++a) load_bin(a, list[a].offset);
  RowBin<acc_t> next = list[0];
#pragma unroll 1
  for (const RowBin<acc_t>* end = list + count; list < end; list += kAhead) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const RowBin<acc_t> bin = next;
      next = list[a + 1];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        acc_t values[kVec<T>];
        widen<T>(raw[a][l], values);
        add_weighted(bin.weight, values, partial[l]);
      }
      load_bin(a, list[a + kAhead].offset);
      if (bin.column < 0) continue;
      const auto* weights = reinterpret_cast<const RunWeights<acc_t>*>(block.along[0][bin.column]);
#pragma unroll
      for (int half = 0; half < kRoiRuns; ++half) {
        if ((bin.halves >> half & 1) == 0) continue;
        const RunWeights<acc_t> run = weights[half];
#pragma unroll
        for (int i = 0; i < kRoiRun; ++i) {
          // Only the pixels that a bin reads receive its NaN.
          if (run.weight[i] == 0) continue;
#pragma unroll
          for (int l = 0; l < kLoads; ++l) add_weighted(run.weight[i], partial[l], sum[half * kRoiRun + i][l]);
        }
      }
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) clear(partial[l][j]);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void add_batch(const RoiAlignGathering<T>& gathering, int batched,
                                          const GatherChannels<T>& channels, GatherBlock<acc_type<T>>& block,
                                          RowSums<T>& sum) {
  const int row = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;
  const int own = lane < batched ? block.rows[lane][row].count * block.cols[lane].count : 0;
  const int total = warp_prefix(own, before);
  acc_type<T> partial[kGatherLoads<T>][kVec<T>] = {};
#pragma unroll 1
  for (int begin = 0; begin < total; begin += kGatherList) {
    const int count = min(total - begin, kGatherList);
    // All lanes have read the last list.
    __syncwarp();
    list_bins(gathering, row, begin, count, before + own, block);
    walk_list<T>(block, row, count, channels, partial, sum);
  }
}

template <class T>
__device__ __forceinline__ int64_t gather_channel(unsigned channel_group, int load) {
  return int64_t{channel_group} * kGatherChannels<T> + (load * 32 + threadIdx.x % 32) * kVec<T>;
}

__device__ __forceinline__ int gather_rounds(const int (&bins)[kGatherBatch], int pooled, int batched) {
  int most = 1;
  if (pooled <= kGatherBins) return 1;
#pragma unroll 1
  for (int entry = 0; entry < batched; ++entry) most = max(most, bins[entry]);
  return (most + kGatherBins - 1) / kGatherBins;
}

// Adds the RoIs of the block's part to the sums of a thread.
template <class T>
__device__ __forceinline__ void gather_part(const RoiAlignGathering<T>& gathering, unsigned channel_group,
                                            GatherBlock<acc_type<T>>& block, RowSums<T>& sum) {
  const FeatureMap<const T>& grad = gathering.grad;
  const RoiTile& tile = block.part.tile;
  GatherChannels<T> channels;
#pragma unroll
  for (int l = 0; l < kGatherLoads<T>; ++l) {
    // Threads beyond the channels repeat the last ones.
    channels.source[l] = whole(grad.data + min(gather_channel<T>(channel_group, l), grad.channels - kVec<T>));
  }
  int seen = 0;
#pragma unroll 1
  for (int first = 0; first < gathering.tiles.lists.count && seen < block.part.end; first += kRoiRound) {
    vote(gathering.tiles.lists, first, area_of(gathering.tiles, tile), block.votes);
    const int begin = max(seen, block.part.begin);
    seen += list_hits(block.votes, seen, block.part.begin, block.part.end, block.hits);
    const int listed = min(seen, block.part.end) - begin;
#pragma unroll 1
    for (int batch = 0; batch < listed; batch += kGatherBatch) {
      const int batched = min(listed - batch, kGatherBatch);
      int round = 0;
      do {
        const int along_rounds = round == 0 ? 1 : gather_rounds(block.along_bins, grad.width, batched);
        if (batch > 0 || round > 0) __syncthreads();
        weigh_batch(gathering, tile, first, block.hits + batch, batched, round / along_rounds, round % along_rounds,
                    block);
        __syncthreads();
        add_batch(gathering, batched, channels, block, sum);
      } while (++round < gather_rounds(block.across_bins, grad.height, batched) *
                             gather_rounds(block.along_bins, grad.width, batched));
    }
  }
}

// 16-byte accesses of sums.
template <int kWidth, class acc_t>
__device__ __forceinline__ void store_sums(acc_t* target, const acc_t (&values)[kWidth]) {
  static_assert(sizeof values % sizeof(uint4) == 0);
  uint4 raw[sizeof values / sizeof(uint4)];
  memcpy(raw, values, sizeof values);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof values / sizeof(uint4)); ++i)
    reinterpret_cast<uint4*>(target)[i] = raw[i];
}

template <int kWidth, class acc_t>
__device__ __forceinline__ void load_sums(const acc_t* source, acc_t (&values)[kWidth]) {
  uint4 raw[sizeof values / sizeof(uint4)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof values / sizeof(uint4)); ++i)
    raw[i] = reinterpret_cast<const uint4*>(source)[i];
  memcpy(values, raw, sizeof values);
}

// Where the sums of a pixel of a part are.
template <class T>
__device__ __forceinline__ acc_type<T>* partial_at(const RoiAlignGathering<T>& gathering, int part, int pixel) {
  return gathering.partial + (int64_t{part} * (kRoiTile * kRoiTile) + pixel) * gathering.grad.channels;
}

template <class T>
__global__ void __launch_bounds__(kRoiReaders, kGatherBlocks)
    multiscale_roi_align_backward_kernel(const __grid_constant__ RoiAlignGathering<T> gathering) {
  using acc_t = acc_type<T>;
  __shared__ GatherBlock<acc_t> block;
  const unsigned channel_group = blockIdx.x % gathering.channel_groups, index = blockIdx.x / gathering.channel_groups;
  const bool has_part = index < gathering.part_blocks;
  const RoiPlan& plan = gathering.tiles.plan;
  if (has_part) {
    if (static_cast<int>(index) >= plan.most[1]) return;
    if (threadIdx.x == 0) block.part = plan.parts[index];
  } else {
    const unsigned tile = index - gathering.part_blocks;
    const int hits = plan.hits[tile];
    if (gathering.part_blocks > 0 && hits > plan.most[0]) return;
    if (threadIdx.x == 0) block.part = {locate_tile(gathering.tiles, tile), 0, 1, 0, hits};
  }
  __syncthreads();
  RowSums<T> sum = {};
  gather_part(gathering, channel_group, block, sum);
  const RoiTile& tile = block.part.tile;
  const FeatureMap<T>& map = gathering.sum[tile.level];
  const int row = threadIdx.x / 32, pixels = tile.top + row < map.height ? map.width - tile.left : 0;
#pragma unroll
  for (int l = 0; l < kGatherLoads<T>; ++l) {
    const int64_t channel = gather_channel<T>(channel_group, l);
    if (channel >= map.channels) break;
    if (has_part) {
      acc_t* target = partial_at(gathering, static_cast<int>(index), row * kRoiTile) + channel;
#pragma unroll
      for (int i = 0; i < kRoiTile; ++i, target += map.channels) store_sums(target, sum[i][l]);
    } else {
      T* target = map.at(tile.image, channel, tile.top + row, tile.left);
#pragma unroll
      for (int i = 0; i < kRoiTile; ++i, target += map.stride_w) {
        if (i < pixels) store(target, 1, kVec<T>, true, sum[i][l]);
      }
    }
  }
}

// Adds the parts of tiles. A tile has as many blocks as parts, and each of these has some of its pixels.
template <class T>
__global__ void __launch_bounds__(kRoiReaders)
    roi_parts_kernel(const __grid_constant__ RoiAlignGathering<T> gathering) {
  using acc_t = acc_type<T>;
  constexpr int kAhead = 4;
  const unsigned channel_group = blockIdx.x % gathering.channel_groups;
  const int index = static_cast<int>(blockIdx.x / gathering.channel_groups);
  if (index >= gathering.tiles.plan.most[1]) return;
  const RoiPart part = gathering.tiles.plan.parts[index];
  const FeatureMap<T>& map = gathering.sum[part.tile.level];
#pragma unroll 1
  for (int pixel = part.part + part.parts * (threadIdx.x / 32); pixel < kRoiTile * kRoiTile;
       pixel += part.parts * kRoiReaderWarps) {
    const int y = part.tile.top + pixel / kRoiTile, x = part.tile.left + pixel % kRoiTile;
    if (y >= map.height || x >= map.width) continue;
#pragma unroll
    for (int l = 0; l < kGatherLoads<T>; ++l) {
      const int64_t channel = gather_channel<T>(channel_group, l);
      if (channel >= map.channels) break;
      acc_t sum[kVec<T>] = {};
#pragma unroll 1
      for (int first = 0; first < part.parts; first += kAhead) {
        acc_t values[kAhead][kVec<T>];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int other = min(first + a, part.parts - 1);
          load_sums(partial_at(gathering, index - part.part + other, pixel) + channel, values[a]);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (first + a >= part.parts) break;
#pragma unroll
          for (int j = 0; j < kVec<T>; ++j) sum[j] += values[a][j];
        }
      }
      store(map.at(part.tile.image, channel, y, x), 1, kVec<T>, true, sum);
    }
  }
}

// What a call gathers, and how: `vectorised` if by this file's kernels, `copies` if from and into channels_last copies
// of the maps that it was given.
template <class T>
struct RoiAlignGather {
  FeatureMap<const T> grad;
  std::vector<FeatureMap<T>> sums;
  RoiAlignGathering<T> gathering;
  bool vectorised, copies;
};

template <class T, class acc_t = acc_type<T>>
RoiAlignGather<T> plan_gather(Scratch& scratch, const RoiAlignArguments<acc_t>& arguments,
                              const FeatureMap<const T>& grad, const std::vector<FeatureMap<T>>& sums) {
  RoiAlignGather<T> gather{grad, sums, {}, false, false};
  gather.copies = pays_to_copy(arguments, sums) && has_dense_planes(grad) &&
                  std::all_of(sums.begin(), sums.end(), [](const auto& map) { return has_dense_planes(map); });
  std::vector<FeatureMap<const T>> sources{grad};
  std::vector<FeatureMap<T>> targets = sums;
  if (gather.copies) {
    sources[0] = copy_in_rows(scratch, grad);
    for (auto& map : targets) map = copy_in_rows(scratch, map);
  }
  const FeatureMap<const T>& source = sources[0];
  const auto end_of = [](int64_t stride, int64_t size) { return stride * (size - 1); };
  const int64_t end = end_of(source.stride_n, source.batch) + end_of(source.stride_h, source.height) +
                      end_of(source.stride_w, source.width);
  gather.vectorised = mark_vectorised(sources, targets) && end / kVec<T> <= int64_t{UINT32_MAX};
  RoiAlignGathering<T>& gathering = gather.gathering;
  const RoiLists<acc_t> lists = plan_roi_lists(scratch, arguments);
  gathering.grad = source;
  std::copy(targets.begin(), targets.end(), gathering.sum);
  if (!gather.vectorised) {
    gathering.tiles.lists = lists, gathering.tiles.levels = static_cast<int>(sums.size());
    return gather;
  }
  gathering.tiles = make_roi_tiles(targets, lists, RoiPlan{});
  // A tile that is divided has more than kGatherBatch RoIs, and parts of more than half as many.
  const int64_t parts =
      arguments.count <= kGatherBatch
          ? 0
          : std::min<int64_t>(gathering.tiles.count * ceil_div(arguments.count, kGatherBatch), kMostParts);
  gathering.tiles.plan = {scratch.take<int>(gathering.tiles.count), scratch.take<RoiPart>(parts), scratch.take<int>(2)};
  gathering.channel_groups = static_cast<unsigned>(ceil_div(arguments.channels, kGatherChannels<T>));
  gathering.part_blocks = static_cast<unsigned>(parts);
  gathering.partial = scratch.take<acc_t>(parts * kRoiTile * kRoiTile * arguments.channels);
  return gather;
}

template <class T, class Launch, class acc_t = acc_type<T>>
void gather_in_launches(const RoiAlignArguments<acc_t>& arguments, const RoiAlignGather<T>& gather,
                        const Launch& launch) {
  const RoiAlignGathering<T>& gathering = gather.gathering;
  const std::vector<FeatureMap<T>> sums(gathering.sum, gathering.sum + gathering.tiles.levels);
  list_in_launch(arguments, sums, gathering.tiles.lists, launch);
  if (gather.copies) transpose_in_launch<true>({gather.grad}, std::vector{gathering.grad}, launch);
  if (gather.vectorised) {
    plan_in_launches(gathering.tiles, gathering.part_blocks > 0, launch);
    const int64_t groups = gathering.channel_groups;
    launch(multiscale_roi_align_backward_kernel<T>,
           LaunchConfig{(gathering.part_blocks + gathering.tiles.count) * groups, kRoiReaders}, gathering);
    if (gathering.part_blocks > 0) {
      launch(roi_parts_kernel<T>, LaunchConfig{gathering.part_blocks * groups, kRoiReaders}, gathering);
    }
  } else {
    gather_strided_in_launch(gathering.grad, sums, gathering.tiles.lists, launch);
  }
  if (gather.copies) transpose_in_launch<false>(gather.sums, sums, launch);
}

}  // namespace fpn_fast
