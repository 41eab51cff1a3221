// SPDX-License-Identifier: Apache-2.0
// The taps of every RoI along both axes: Note [RoIAlign is separable] in common/roi_align.h.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

#include "../common/roi_align.h"
#include "../torch/multiscale_roi_align.h"
#include "pack.h"
#include "parallel.h"

namespace fpn_fast {

template <class acc_t>
struct Tap {
  int pixel;
  acc_t weight;
};

// One axis of a RoI. Bin b reads taps[begin[b]] to taps[begin[b + 1] - 1], all of which are pixels in [first, last].
template <class acc_t>
struct AxisTaps {
  const int* begin;
  const Tap<acc_t>* taps;
  int first, last;

  HOST_DEVICE bool empty() const { return last < first; }
};

// The columns of a RoI, rounded up to whole packs where the map is wide enough.
template <class acc_t>
struct Span {
  int first, width;
  bool packed;

  HOST_DEVICE Span(const AxisTaps<acc_t>& cols, int map_width, bool adjacent) {
    const int packs = (cols.last - cols.first) / kPackLanes + 1;
    packed = adjacent && packs * kPackLanes <= map_width;
    first = packed ? std::min(cols.first, map_width - packs * kPackLanes) : cols.first;
    width = packed ? packs * kPackLanes : cols.last - first + 1;
  }
};

template <class acc_t>
struct RoiTaps {
  int level;  // -1: the output row is zero
  int64_t image;
  AxisTaps<acc_t> rows, cols;
  acc_t inverse_count;

  HOST_DEVICE bool reads_nothing() const { return level < 0 || rows.empty() || cols.empty(); }
};

// RoIs whose taps share two vectors: enough work for a task, and small enough for the cache.
constexpr int64_t kRoisPerChunk = 64;

template <class acc_t>
class RoiTapTable {
 public:
  // `sizes` holds H and W per map.
  RoiTapTable(const RoiAlignArguments<acc_t>& arguments, const std::vector<std::pair<int, int>>& sizes)
      : rois_(arguments.count), chunks_((arguments.count + kRoisPerChunk - 1) / kRoisPerChunk) {
    const int64_t bins = arguments.pooled_height + arguments.pooled_width;
    parallel_rows(chunks_.size(), kRoisPerChunk * bins * 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(arguments, sizes, i);
    });
  }

  const RoiTaps<acc_t>& operator[](int64_t k) const { return rois_[k]; }
  int64_t size() const { return rois_.size(); }

 private:
  struct Chunk {
    std::vector<int> begins;
    std::vector<Tap<acc_t>> taps;
  };

  void fill(const RoiAlignArguments<acc_t>& arguments, const std::vector<std::pair<int, int>>& sizes, int64_t index) {
    Chunk& chunk = chunks_[index];
    const int64_t first = index * kRoisPerChunk;
    const int64_t last = std::min(first + kRoisPerChunk, arguments.count);
    for (int64_t k = first; k < last; ++k) {
      const Roi<acc_t> roi = locate_roi(arguments, k);
      RoiTaps<acc_t>& out = rois_[k];
      out.level = roi.level, out.image = roi.image;
      if (roi.level < 0) continue;
      const RoiAxis<acc_t> rows = roi_rows(arguments, roi, sizes[roi.level].first);
      const RoiAxis<acc_t> cols = roi_cols(arguments, roi, sizes[roi.level].second);
      out.inverse_count = inverse_count(rows, cols);
      append(chunk, rows, arguments.pooled_height, out.rows);
      append(chunk, cols, arguments.pooled_width, out.cols);
    }
    // The vectors no longer grow, so offsets become pointers.
    const int* begins = chunk.begins.data();
    for (int64_t k = first; k < last; ++k) {
      if (rois_[k].level < 0) continue;
      rois_[k].rows.begin = begins, rois_[k].cols.begin = begins + arguments.pooled_height + 1;
      rois_[k].rows.taps = rois_[k].cols.taps = chunk.taps.data();
      begins += arguments.pooled_height + arguments.pooled_width + 2;
    }
  }

  static void append(Chunk& chunk, const RoiAxis<acc_t>& axis, int pooled, AxisTaps<acc_t>& out) {
    out.first = INT_MAX, out.last = -1;
    chunk.begins.push_back(static_cast<int>(chunk.taps.size()));
    for (int bin = 0; bin < pooled; ++bin) {
      const size_t begin = chunk.taps.size();
      const auto add = [&](int pixel, acc_t weight) {
        // Samples are in ascending order, so the same pixel can only be one of the last two taps.
        for (size_t back = 1; back <= 2 && begin + back <= chunk.taps.size(); ++back) {
          Tap<acc_t>& tap = chunk.taps[chunk.taps.size() - back];
          if (tap.pixel == pixel) {
            tap.weight += weight;
            return;
          }
        }
        chunk.taps.push_back({pixel, weight});
        out.first = std::min(out.first, pixel), out.last = std::max(out.last, pixel);
      };
      const Range samples = samples_near_map(axis, bin);
      for (int sample = samples.begin; sample < samples.end; ++sample) {
        Taps<acc_t> taps;
        if (!sample_taps(axis, bin, sample, taps)) continue;
        add(taps.lo, taps.weight_lo);
        if (taps.hi != taps.lo) add(taps.hi, taps.weight_hi);
      }
      chunk.begins.push_back(static_cast<int>(chunk.taps.size()));
    }
  }

  std::vector<RoiTaps<acc_t>> rois_;
  std::vector<Chunk> chunks_;
};

template <class T>
std::vector<std::pair<int, int>> map_sizes(const std::vector<FeatureMap<T>>& maps) {
  std::vector<std::pair<int, int>> sizes;
  for (const auto& map : maps) sizes.push_back({map.height, map.width});
  return sizes;
}

// The RoIs that read a pixel, per image, in ascending order.
template <class acc_t>
std::vector<std::vector<int64_t>> rois_by_image(const RoiTapTable<acc_t>& rois, int64_t batch) {
  std::vector<std::vector<int64_t>> images(batch);
  for (int64_t k = 0; k < rois.size(); ++k) {
    if (!rois[k].reads_nothing()) images[rois[k].image].push_back(k);
  }
  return images;
}

}  // namespace fpn_fast
