// SPDX-License-Identifier: Apache-2.0
// Tiles of gradient maps, and what each block of the gradient of multi-level RoIAlign gathers.
//
// Note [Parts of tiles]
// Proposals crowd around objects: of 1000 RoIs, 80 may read one tile, and the block that gathers them alone ends long
// after all others. So a tile that more than `most` RoIs read is divided into parts of at most so many, in order. The
// first blocks of the launch gather a part each into partial sums, and a last launch adds the parts of each tile in
// order. Which RoIs a part has depends on their numbers alone, so two runs are equal bit for bit.
#pragma once

#include <climits>
#include <cstdint>
#include <vector>

#include "launch.h"
#include "roi_lists.cuh"

namespace fpn_fast {

// RoIs whose weights a block computes together; fewer are no part of their own.
constexpr int kGatherBatch = 16;
// The most parts of all tiles: four blocks for each of an H100's 132 multiprocessors.
constexpr int kMostParts = 528;
// Tiles that a block counts the RoIs of.
constexpr int kStripTiles = 8;

// The tiles of all maps of a level. Coarse maps come first, because many RoIs share their tiles.
struct RoiTiling {
  unsigned first_tile, first_strip, rows, cols;
};

struct RoiTile {
  int image, level, top, left;
};

// Part `part` of the `parts` of a tile, which has the RoIs [begin, end) of those that read it.
struct RoiPart {
  RoiTile tile;
  int part, parts, begin, end;
};

// Scratch memory.
struct RoiPlan {
  int* hits;       // RoIs that read each tile
  RoiPart* parts;  // [kMostParts], in order
  int* most;       // RoIs that a block gathers from a tile that is not divided; then the number of parts
};

template <class acc_t>
struct RoiTiles {
  RoiLists<acc_t> lists;
  RoiPlan plan;
  RoiTiling tiling[kMaxRoiLevels];
  int levels;
  int64_t count, strips;  // of tiles, and of the blocks that count their RoIs
};

template <class acc_t, class T>
RoiTiles<acc_t> make_roi_tiles(const std::vector<FeatureMap<T>>& maps, const RoiLists<acc_t>& lists,
                               const RoiPlan& plan) {
  RoiTiles<acc_t> tiles{lists, plan, {}, static_cast<int>(maps.size()), 0, 0};
  for (int level = tiles.levels - 1; level >= 0; --level) {
    const int64_t rows = ceil_div(maps[level].height, kRoiTile), cols = ceil_div(maps[level].width, kRoiTile);
    tiles.tiling[level] = {static_cast<unsigned>(tiles.count), static_cast<unsigned>(tiles.strips),
                           static_cast<unsigned>(rows), static_cast<unsigned>(cols)};
    tiles.strips += maps[level].batch * rows * ceil_div(cols, kStripTiles);
    tiles.count += maps[level].batch * rows * cols;
  }
  return tiles;
}

template <class acc_t>
__device__ __forceinline__ RoiTile locate_tile(const RoiTiles<acc_t>& tiles, unsigned index) {
  RoiTile tile;
  tile.level = 0;
  while (index < tiles.tiling[tile.level].first_tile) ++tile.level;
  const RoiTiling& tiling = tiles.tiling[tile.level];
  index -= tiling.first_tile;
  tile.left = static_cast<int>(index % tiling.cols) * kRoiTile;
  index /= tiling.cols;
  tile.top = static_cast<int>(index % tiling.rows) * kRoiTile;
  tile.image = static_cast<int>(index / tiling.rows);
  return tile;
}

template <class acc_t>
__device__ __forceinline__ MapArea area_of(const RoiTiles<acc_t>& tiles, const RoiTile& tile) {
  return {tile.image * tiles.levels + tile.level, {tile.top, tile.top + kRoiTile, tile.left, tile.left + kRoiTile}};
}

// A block counts the RoIs that read each tile of a strip: kStripTiles neighbours in a row of tiles.
template <class acc_t>
__global__ void __launch_bounds__(kRoiReaders) roi_tiles_kernel(const __grid_constant__ RoiTiles<acc_t> tiles) {
  __shared__ int counts[kRoiReaderWarps][kStripTiles];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int level = 0;
  while (blockIdx.x < tiles.tiling[level].first_strip) ++level;
  const RoiTiling& tiling = tiles.tiling[level];
  const unsigned strip = blockIdx.x - tiling.first_strip, strips = (tiling.cols + kStripTiles - 1) / kStripTiles;
  // Rows are counted through all images.
  const unsigned row = strip / strips, col = strip % strips * kStripTiles;
  const int map = static_cast<int>(row / tiling.rows) * tiles.levels + level;
  const int top = static_cast<int>(row % tiling.rows) * kRoiTile, left = static_cast<int>(col) * kRoiTile;
  int hits[kStripTiles] = {};
#pragma unroll 1
  for (int first = 0; first < tiles.lists.count; first += kRoiRound) {
    PixelBox boxes[kRoiBoxes];
    load_boxes(tiles.lists, first, map, boxes);
#pragma unroll
    for (int i = 0; i < kRoiBoxes; ++i) {
      const bool reads = boxes[i].top < top + kRoiTile && boxes[i].bottom > top;
      if (!__any_sync(~0u, reads)) continue;
#pragma unroll
      for (int t = 0; t < kStripTiles; ++t) {
        const int begin = left + t * kRoiTile;
        hits[t] += __popc(__ballot_sync(~0u, reads && boxes[i].left < begin + kRoiTile && boxes[i].right > begin));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kStripTiles; ++t) {
    if (lane == 0) counts[warp][t] = hits[t];
  }
  __syncthreads();
  if (warp > 0 || lane >= kStripTiles || col + lane >= tiling.cols) return;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kRoiReaderWarps; ++i) sum += counts[i][lane];
  tiles.plan.hits[tiling.first_tile + row * tiling.cols + col + lane] = sum;
}

constexpr int kPlanThreads = 1024;

// Sets `before` to the sum of the values of lower threads. Returns the sum of all.
__device__ __forceinline__ int block_prefix(int value, int& before, int (&sums)[kPlanThreads / 32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = warp_prefix(value, before);
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  int lower = 0;
  const int all = warp_prefix(sums[lane], lower);
  before += __shfl_sync(~0u, lower, warp);
  // The next call writes the sums again.
  __syncthreads();
  return all;
}

// One block divides the tiles. It doubles `most` until the parts are few enough.
template <class acc_t>
__global__ void __launch_bounds__(kPlanThreads) roi_plan_kernel(const __grid_constant__ RoiTiles<acc_t> tiles) {
  __shared__ int sums[kPlanThreads / 32];
  const auto count = static_cast<unsigned>(tiles.count);
  // Each thread has some tiles in a row.
  const unsigned each = (count + kPlanThreads - 1) / kPlanThreads;
  const unsigned first = min(threadIdx.x * each, count), last = min(first + each, count);
  int most = kGatherBatch, number = 0, all = 0;
#pragma unroll 1
  for (;; most *= 2) {
    int own = 0;
#pragma unroll 4
    for (unsigned tile = first; tile < last; ++tile) {
      const int hits = tiles.plan.hits[tile];
      if (hits > most) own += min((hits - 1) / most + 1, kMostParts + 1);
    }
    all = block_prefix(min(own, kMostParts + 1), number, sums);
    if (all <= kMostParts) break;
  }
  if (threadIdx.x == 0) tiles.plan.most[0] = most, tiles.plan.most[1] = all;
#pragma unroll 1
  for (unsigned tile = first; tile < last; ++tile) {
    const int hits = tiles.plan.hits[tile];
    if (hits <= most) continue;
    const RoiTile place = locate_tile(tiles, tile);
    const int parts = (hits - 1) / most + 1, least = hits / parts, more = hits % parts;
    int begin = 0;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int end = begin + least + (part < more);
      tiles.plan.parts[number++] = {place, part, parts, begin, end};
      begin = end;
    }
  }
}

// `divides` if tiles may have parts.
template <class Launch, class acc_t>
void plan_in_launches(const RoiTiles<acc_t>& tiles, bool divides, const Launch& launch) {
  launch(roi_tiles_kernel<acc_t>, LaunchConfig{tiles.strips, kRoiReaders}, tiles);
  if (divides) launch(roi_plan_kernel<acc_t>, LaunchConfig{1, kPlanThreads}, tiles);
}

}  // namespace fpn_fast
