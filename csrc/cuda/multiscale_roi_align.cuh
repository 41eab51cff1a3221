// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign, forward, in one launch for all RoIs. The bandwidth of the L2 cache limits it.
//
// Note [Lines and walks]
// RoIAlign is separable. A block computes once which pixels each of its bins reads along either axis, and merges equal
// pixels. A thread owns a line of bins: the row of one bin (channels_last) or the column of one (channels_first), by 16
// bytes of channels. It walks along the line. Each pixel on the way is summed across the line first and then weighted
// into the bin. The last of these sums is kept, because a bin begins where the previous one ends. A bin that reads more
// pixels along an axis than its table holds is summed sample by sample.
// Where a line reads at most kRoiAlignAcross pixels of a column, the walk of all bins is one list of columns, and the
// next column's loads are in flight while one is summed.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/roi_align.h"
#include "../common/roi_align_arguments.h"
#include "launch.h"
#include "roi_taps.cuh"
#include "transposed_maps.cuh"
#include "warp.cuh"

namespace fpn_fast {

// The distance of a pixel from the RoI's line or walk, and its weight. It is one access to shared memory, and 32-bit
// offsets save registers.
template <class acc_t>
struct alignas(2 * sizeof(acc_t)) RoiTap {
  uint32_t offset;
  acc_t weight;
};

// Larger than every offset.
constexpr uint32_t kNoOffset = UINT32_MAX;

// 7 lines by 32 lanes, the most common block.
constexpr int kRoiAlignThreads = 224;
// Allows 96 registers: 21 warps on a multiprocessor.
template <class T>
constexpr int kRoiAlignBlocks = sizeof(T) == 8 ? 2 : 3;
// 16-byte loads in flight per thread: two samples read at most four pixels.
constexpr int kRoiAlignLoads = 4;
// Bins of a block along each axis. 14 or 28 bins take one block.
constexpr int kRoiAlignBins = 32;
// Pixels that the bins of a block read along an axis: a RoI as wide as a map of 1000 pixels, in 16 KB for both axes.
template <class acc_t>
constexpr int kRoiAlignTaps = 8192 / static_cast<int>(sizeof(RoiTap<acc_t>));
// Columns on a block's list, and how many of a thread are loaded or summed at a time.
constexpr int kRoiAlignColumns = 256;
constexpr int kRoiAlignAhead = 2;
// Pixels of a column that are loaded together.
constexpr int kRoiAlignAcross = 4;
// Fewer blocks leave multiprocessors idle: two for each of an H100's 132.
constexpr int64_t kRoiAlignSpread = 264;

template <class T>
struct RoiAlignPooling {
  RoiAlignArguments<acc_type<T>> arguments;
  FeatureMap<const T> feature[kMaxRoiLevels];
  FeatureMap<T> pooled;
  // The bins of a block across the lines (one per line) and along them, and the number of blocks per RoI along each.
  int line_bins, walk_bins;
  unsigned lanes;   // threads along the channels
  unsigned chunks;  // of kVec<T> channels
  unsigned line_groups, walk_groups, channel_groups;
};

template <class T, bool kChannelsLast>
LaunchConfig roi_align_launch(RoiAlignPooling<T>& pooling) {
  const RoiAlignArguments<acc_type<T>>& arguments = pooling.arguments;
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); };
  const int lines = kChannelsLast ? arguments.pooled_height : arguments.pooled_width;
  const int walk = kChannelsLast ? arguments.pooled_width : arguments.pooled_height;
  pooling.chunks = ceil_div(arguments.channels, kVec<T>);
  // A fixed grid must fit into the table. An adaptive grid seldom reads much more.
  const int most_bins =
      std::clamp(kRoiAlignTaps<acc_type<T>> / (2 * std::max(arguments.sampling_ratio, 1)), 1, kRoiAlignBins);
  pooling.walk_groups = ceil_div(walk, most_bins);
  pooling.walk_bins = ceil_div(walk, pooling.walk_groups);
  // channels_last: a warp loads whole cache lines. channels_first: lanes share only the table.
  const int64_t most_lanes = kChannelsLast ? 32 : kRoiAlignThreads / std::min(lines, most_bins);
  const int64_t fewest_lanes = kChannelsLast ? 32 : 8;
  int64_t blocks = 0;
  // Few RoIs are spread over many blocks: first by channels, then by lines.
  for (pooling.channel_groups = 1;; pooling.channel_groups *= 2) {
    const int64_t repeats = ceil_div(pooling.chunks, most_lanes * pooling.channel_groups);
    pooling.lanes = ceil_div(pooling.chunks, repeats * pooling.channel_groups);
    pooling.line_groups = ceil_div(lines, std::min<int64_t>(most_bins, kRoiAlignThreads / pooling.lanes));
    blocks = arguments.count * pooling.walk_groups * pooling.channel_groups;
    if (blocks * pooling.line_groups >= kRoiAlignSpread) break;
    if (pooling.chunks <= fewest_lanes * pooling.channel_groups) break;
  }
  while (blocks * pooling.line_groups < kRoiAlignSpread && 2 * pooling.line_groups <= static_cast<unsigned>(lines)) {
    pooling.line_groups *= 2;
  }
  pooling.line_bins = ceil_div(lines, pooling.line_groups);
  pooling.line_groups = ceil_div(lines, pooling.line_bins);
  return {blocks * pooling.line_groups, static_cast<int>(ceil_div(pooling.lanes * pooling.line_bins, 32) * 32)};
}

template <class acc_t>
struct RoiTable {
  RoiAxis<acc_t> axis;
  int64_t stride;             // between neighbouring pixels
  int first;                  // first bin
  int room;                   // taps per bin
  int counts[kRoiAlignBins];  // taps per bin, or -1: too many taps, or an offset beyond 32 bits
  RoiTap<acc_t> taps[kRoiAlignTaps<acc_t>];
};

// A column of pixels on the walk.
template <class acc_t>
struct alignas(16) RoiColumn {
  uint32_t offset;
  uint32_t ends;  // whether it is the last of its bin
  acc_t weight;   // in its bin
  acc_t next;     // in the next bin, which may begin where this one ends
};

// Shared by the threads of a block. At level -1 its tables are empty.
template <class acc_t>
struct RoiBlock {
  RoiTable<acc_t> lines, walk;
  // The walk of all bins of a line. Empty if a bin is not listed or reads nothing, or if they are too many.
  RoiColumn<acc_t> columns[kRoiAlignColumns + kRoiAlignAhead];
  int columns_listed;
  int64_t image;
  int level;

  __device__ __forceinline__ bool lists(int line, int bin) const {
    return lines.counts[line] >= 0 && walk.counts[bin] >= 0;
  }
};

// Lists the pixels that `bin` reads, counted from the table's first bin. `fits`: all offsets fit into 32 bits.
template <class acc_t>
__device__ __forceinline__ void collect_taps(const RoiAxis<acc_t>& axis, int64_t stride, bool fits, int first, int room,
                                             int bin, RoiTable<acc_t>& table) {
  if (bin == 0) table.axis = axis, table.stride = stride, table.first = first, table.room = room;
  RoiTap<acc_t>* taps = table.taps + bin * room;
  int count = fits ? 0 : -1;
  // The pixels of the last two taps. Samples are in ascending order, so the same pixel can only be one of these.
  int before = -1, last = -1;
  const Range samples = samples_near_map(axis, first + bin);
#pragma unroll 1
  for (int sample = samples.begin; sample < samples.end && count >= 0; ++sample) {
    Taps<acc_t> pair;
    if (!sample_taps(axis, first + bin, sample, pair)) continue;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const int pixel = side == 0 ? pair.lo : pair.hi;
      const acc_t weight = side == 0 ? pair.weight_lo : pair.weight_hi;
      if (pixel == last) {
        taps[count - 1].weight += weight;
      } else if (pixel == before) {
        taps[count - 2].weight += weight;
      } else if (count < room) {
        taps[count++] = {static_cast<uint32_t>(pixel * stride), weight};
        before = last, last = pixel;
      } else {
        count = -1;
        break;
      }
    }
  }
  table.counts[bin] = count;
}

// Lists the columns of all bins. A warp calls it.
template <class acc_t>
__device__ __forceinline__ void list_columns(RoiBlock<acc_t>& block, int bins) {
  const int bin = threadIdx.x;
  const RoiTable<acc_t>& walk = block.walk;
  const RoiTap<acc_t>* taps = walk.taps + bin * walk.room;
  const int count = bin < bins ? walk.counts[bin] : 0;
  const bool listed = __all_sync(~0u, bin >= bins || count > 0);
  // Whether the first pixel is the last one of the bin before. A bin has at least one column of its own.
  const bool joins =
      listed && bin > 0 && count > 1 && taps[0].offset == (taps - walk.room)[walk.counts[bin - 1] - 1].offset;
  const acc_t next = __shfl_down_sync(~0u, joins ? taps[0].weight : acc_t(0), 1);
  int at = 0;
  const int total = warp_prefix(count - joins, at);
  const bool fits = listed && total <= kRoiAlignColumns;
  if (bin == 0) block.columns_listed = fits ? total : 0;
  if (!fits || bin >= bins) return;
#pragma unroll 1
  for (int i = joins; i < count; ++i, ++at) {
    const bool ends = i == count - 1;
    block.columns[at] = {taps[i].offset, ends, taps[i].weight, ends && bin + 1 < bins ? next : acc_t(0)};
  }
  if (bin + 1 < bins) return;
  // Loaded in advance, and of no bin.
#pragma unroll
  for (int i = 0; i < kRoiAlignAhead; ++i) block.columns[at + i] = {taps[count - 1].offset, 0, 0, 0};
}

// Writes the bins of a line which reads kAcross pixels of each column. The next columns are loaded before this one is
// summed.
template <class T, int kAcross>
__device__ __forceinline__ void walk_columns(const RoiBlock<acc_type<T>>& block, int line, acc_type<T> scale,
                                             const T* source, T* target, int64_t step) {
  using acc_t = acc_type<T>;
  constexpr int kAhead = kRoiAlignAhead;
  const RoiTap<acc_t>* across = block.lines.taps + line * block.lines.room;
  uint32_t offsets[kAcross];
  acc_t weights[kAcross];
#pragma unroll
  for (int t = 0; t < kAcross; ++t) offsets[t] = across[t].offset, weights[t] = across[t].weight * scale;
  uint4 raw[kAhead][kAcross];
  const auto load_column = [&](int slot, int i) {
    const uint32_t offset = block.columns[i].offset;
#pragma unroll
    for (int t = 0; t < kAcross; ++t) raw[slot][t] = *reinterpret_cast<const uint4*>(source + (offset + offsets[t]));
  };
#pragma unroll
  for (int a = 0; a < kAhead - 1; ++a) load_column(a, a);
  acc_t sum[kVec<T>] = {};
#pragma unroll 1
  for (int first = 0; first < block.columns_listed; first += kAhead) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      load_column((a + kAhead - 1) % kAhead, first + a + kAhead - 1);
      const RoiColumn<acc_t> column = block.columns[first + a];
      acc_t pixels[kVec<T>] = {};
#pragma unroll
      for (int t = 0; t < kAcross; ++t) {
        acc_t values[kVec<T>];
        widen<T>(raw[a][t], values);
        add_weighted(weights[t], values, pixels);
      }
      add_weighted(column.weight, pixels, sum);
      if (column.ends == 0) continue;
      store(target, 1, kVec<T>, true, sum);
      target += step;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[j] = column.next * pixels[j];
    }
  }
}

// Calls walk_columns for the line's number of pixels. False if the line or the walk is not listed.
template <class T, int kAcross = kRoiAlignAcross, class... Arguments>
__device__ __forceinline__ bool walk_listed(const RoiBlock<acc_type<T>>& block, int line,
                                            const Arguments&... arguments) {
  if constexpr (kAcross == 0) {
    return false;
  } else {
    if (block.lines.counts[line] != kAcross) return walk_listed<T, kAcross - 1>(block, line, arguments...);
    if (block.columns_listed == 0) return false;
    walk_columns<T, kAcross>(block, line, arguments...);
    return true;
  }
}

// Writes the listed bins [0, bins) of a line, `step` apart and multiplied by `scale`: Note [Lines and walks].
template <class T, class Access>
__device__ __forceinline__ void walk_line(const RoiBlock<acc_type<T>>& block, int line, int bins, acc_type<T> scale,
                                          const T* source, T* target, int64_t step, const Access& access) {
  using acc_t = acc_type<T>;
  const RoiTap<acc_t>* across = block.lines.taps + line * block.lines.room;
  const int taps_across = block.lines.counts[line];
  if (taps_across < 0) return;
  acc_t last[kVec<T>] = {};
  uint32_t last_offset = kNoOffset;
#pragma unroll 1
  for (int bin = 0; bin < bins; ++bin, target += step) {
    const RoiTap<acc_t>* along = block.walk.taps + bin * block.walk.room;
    const int taps_along = block.walk.counts[bin];
    if (taps_along < 0) continue;
    acc_t sum[kVec<T>] = {};
    // The last pixel of the previous bin is the first pixel of this one, or the second if bins are small.
    int kept = -1;
    if (taps_along > 1 && along[1].offset == last_offset) kept = 1;
    if (taps_along > 0 && along[0].offset == last_offset) kept = 0;
    if (kept >= 0) add_weighted(along[kept].weight, last, sum);
#pragma unroll 1
    for (int i = 0; i < taps_along; ++i) {
      if (i == kept) continue;
      const RoiTap<acc_t> tap = along[i];
      last_offset = tap.offset;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) last[j] = 0;
      const auto source_at = [&](int t) -> WeightedSource<T> {
        const RoiTap<acc_t> other = across[t];
        return {source + (tap.offset + other.offset), other.weight};
      };
      access.add_sources(taps_across, source_at, last);
      add_weighted(tap.weight, last, sum);
    }
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) sum[j] *= scale;
    access.put(target, sum);
  }
}

// The weighted sum of body(offset) over both pixels of each sample of `bin`. Computing a sample for each of its pixels
// takes fewer registers than keeping it.
template <class acc_t, class Body>
__device__ __forceinline__ acc_t sum_samples(const RoiTable<acc_t>& table, int bin, const Body& body) {
  acc_t sum = 0;
  const Range samples = samples_near_map(table.axis, table.first + bin);
#pragma unroll 1
  for (int i = 2 * samples.begin; i < 2 * samples.end; ++i) {
    Taps<acc_t> taps;
    if (!sample_taps(table.axis, table.first + bin, i / 2, taps)) continue;
    const int64_t offset = (i % 2 == 0 ? taps.lo : taps.hi) * table.stride;
    sum += (i % 2 == 0 ? taps.weight_lo : taps.weight_hi) * body(offset);
  }
  return sum;
}

// Writes the unlisted bins of a line in one channel.
template <class T>
__device__ __forceinline__ void sum_unlisted(const RoiBlock<acc_type<T>>& block, int line, int bins, acc_type<T> scale,
                                             const T* source, T* target, int64_t step) {
#pragma unroll 1
  for (int bin = 0; bin < bins; ++bin, target += step) {
    if (block.lists(line, bin)) continue;
    const acc_type<T> sum = sum_samples(block.walk, bin, [&](int64_t along) {
      return sum_samples(block.lines, line, [&](int64_t across) { return to_acc(source[along + across]); });
    });
    *target = Rounded<T>::from(sum * scale);
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kRoiAlignThreads, kRoiAlignBlocks<T>)
    multiscale_roi_align_kernel(const __grid_constant__ RoiAlignPooling<T> pooling) {
  using acc_t = acc_type<T>;
  __shared__ RoiBlock<acc_t> block;
  const RoiAlignArguments<acc_t>& arguments = pooling.arguments;
  unsigned index = blockIdx.x;
  const unsigned channel_group = index % pooling.channel_groups;
  index /= pooling.channel_groups;
  const int walk_first = index % pooling.walk_groups * pooling.walk_bins;
  index /= pooling.walk_groups;
  const int line_first = index % pooling.line_groups * pooling.line_bins;
  const int64_t k = index / pooling.line_groups;
  const int line_total = kChannelsLast ? arguments.pooled_height : arguments.pooled_width;
  const int walk_total = kChannelsLast ? arguments.pooled_width : arguments.pooled_height;
  const int line_bins = min(pooling.line_bins, line_total - line_first);
  const int walk_bins = min(pooling.walk_bins, walk_total - walk_first);

#pragma unroll 1
  for (int i = threadIdx.x; i < line_bins + walk_bins; i += blockDim.x) {
    const bool is_line = i < line_bins;
    const int bin = is_line ? i : i - line_bins;
    RoiTable<acc_t>& table = is_line ? block.lines : block.walk;
    const Roi<acc_t> roi = locate_roi(arguments, k);
    if (i == 0) block.level = roi.level, block.image = roi.image;
    if (roi.level < 0) {
      // Its pixels are none, but their place is read.
      table.counts[bin] = 0, table.room = 0;
      continue;
    }
    const FeatureMap<const T>& map = pooling.feature[roi.level];
    const bool is_row = is_line == kChannelsLast;
    const RoiAxis<acc_t> axis = is_row ? roi_rows(arguments, roi, map.height) : roi_cols(arguments, roi, map.width);
    const bool fits = (map.height - 1) * map.stride_h + (map.width - 1) * map.stride_w < kNoOffset;
    collect_taps(axis, is_row ? map.stride_h : map.stride_w, fits, is_line ? line_first : walk_first,
                 kRoiAlignTaps<acc_t> / (is_line ? line_bins : walk_bins), bin, table);
  }
  __syncthreads();
  if constexpr (kChannelsLast) {
    if (threadIdx.x < 32) list_columns(block, walk_bins);
    __syncthreads();
  }

  const int line = kChannelsLast ? threadIdx.x / pooling.lanes : threadIdx.x % line_bins;
  const unsigned lane = kChannelsLast ? threadIdx.x % pooling.lanes : threadIdx.x / line_bins;
  if (line >= line_bins || lane >= pooling.lanes) return;
  const acc_t scale = block.level < 0 ? acc_t(0) : inverse_count(block.lines.axis, block.walk.axis);
  const FeatureMap<const T>& map = pooling.feature[max(block.level, 0)];
  const FeatureMap<T>& pooled = pooling.pooled;
  const int64_t step = kChannelsLast ? pooled.stride_w : pooled.stride_h;
  const int y = kChannelsLast ? line_first + line : walk_first, x = kChannelsLast ? walk_first : line_first + line;
  const int64_t first_channel = int64_t{channel_group * pooling.lanes + lane} * kVec<T>;
  const int64_t channel_step = int64_t{pooling.channel_groups * pooling.lanes} * kVec<T>;
#pragma unroll 1
  for (int64_t c = first_channel; c < arguments.channels; c += channel_step) {
    const int count = static_cast<int>(min(arguments.channels - c, int64_t{kVec<T>}));
    const T* source = whole(map.at(block.image, c, 0, 0));
    T* target = pooled.at(k, c, y, x);
    const auto walk = [&](const auto& access) {
      walk_line(block, line, walk_bins, scale, source, target, step, access);
    };
    // Other levels are fast where one is not aligned.
    if (kChannelsLast && map.vectorised && pooled.vectorised) {
      if (!walk_listed<T>(block, line, scale, source, target, step)) walk(VectorChannels<T, kRoiAlignLoads>{});
    } else {
      walk(StridedChannels<T>{map.stride_c, pooled.stride_c, count});
    }
  }
  bool lists_all = true;
#pragma unroll 1
  for (int bin = 0; bin < walk_bins; ++bin) lists_all &= block.lists(line, bin);
  if (lists_all) return;
  // A loop of its own, because the loop above needs the registers.
#pragma unroll 1
  for (int64_t c = first_channel; c < arguments.channels; c += channel_step) {
#pragma unroll 1
    for (int64_t i = c; i < min(arguments.channels, c + kVec<T>); ++i) {
      sum_unlisted(block, line, walk_bins, scale, map.at(block.image, i, 0, 0), pooled.at(k, i, y, x), step);
    }
  }
}

// What a call pools, and into what: `copies` if these are channels_last copies of the maps that it was given.
template <class T>
struct RoiAlignPool {
  std::vector<FeatureMap<const T>> given, features;
  FeatureMap<T> target, pooled;
  bool copies;
};

template <class T>
RoiAlignPool<T> plan_pool(Scratch& scratch, const RoiAlignArguments<acc_type<T>>& arguments,
                          const std::vector<FeatureMap<const T>>& features, const FeatureMap<T>& pooled) {
  RoiAlignPool<T> pool{features, features, pooled, pooled, false};
  pool.copies = pays_to_copy(arguments, features) && has_dense_planes(pooled) &&
                std::all_of(features.begin(), features.end(), [](const auto& map) { return has_dense_planes(map); });
  if (!pool.copies) return pool;
  for (auto& map : pool.features) map = copy_in_rows(scratch, map);
  pool.pooled = copy_in_rows(scratch, pooled);
  return pool;
}

template <class T, class Launch>
void pool_in_launches(const RoiAlignArguments<acc_type<T>>& arguments, const RoiAlignPool<T>& pool,
                      const Launch& launch) {
  if (pool.copies) transpose_in_launch<true>(pool.given, pool.features, launch);
  std::vector<FeatureMap<const T>> features = pool.features;
  std::vector<FeatureMap<T>> targets{pool.pooled};
  mark_vectorised(features, targets);
  const auto is_last = [](const auto& map) { return map.stride_c == 1; };
  const bool channels_last = is_last(pool.pooled) && std::all_of(features.begin(), features.end(), is_last);
  RoiAlignPooling<T> pooling{};
  pooling.arguments = arguments;
  std::copy(features.begin(), features.end(), pooling.feature);
  pooling.pooled = targets[0];
  const auto run = [&]<bool kChannelsLast>() {
    const LaunchConfig config = roi_align_launch<T, kChannelsLast>(pooling);
    launch(multiscale_roi_align_kernel<T, kChannelsLast>, config, pooling);
  };
  channels_last ? run.template operator()<true>() : run.template operator()<false>();
  if (pool.copies) transpose_in_launch<false>({pool.target}, targets, launch);
}

}  // namespace fpn_fast
