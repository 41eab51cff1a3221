// SPDX-License-Identifier: Apache-2.0
// The taps of every RoI along both axes, worked out once: Note [RoIAlign is separable] in common/roi_align.h.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

#include "../common/roi_align.h"
#include "../torch/multiscale_roi_align.h"
#include "parallel.h"

namespace fpn_fast {

template <class acc_t>
struct Tap {
  int pixel;
  acc_t weight;
};

// Along one axis: what bin b reads is taps[begin[b]] up to taps[begin[b + 1]]; all of it lies in [first, last].
template <class acc_t>
struct AxisTaps {
  const int* begin;
  const Tap<acc_t>* taps;
  int first, last;

  HOST_DEVICE bool empty() const { return last < first; }
};

template <class acc_t>
struct RoiTaps {
  int level;  // -1: the row is zero
  int64_t image;
  AxisTaps<acc_t> rows, cols;
  acc_t inverse_count;

  HOST_DEVICE bool reads_nothing() const { return level < 0 || rows.empty() || cols.empty(); }
};

// RoIs whose taps share two vectors: enough for a task, few enough for the vectors to stay in cache.
constexpr int64_t kRoisPerChunk = 64;

template <class acc_t>
class RoiTapTable {
 public:
  // `sizes` are H and W of each map.
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
      const int64_t* given = arguments.levels != nullptr ? arguments.levels + k : nullptr;
      const Roi<acc_t> roi = locate_roi(arguments.rois + 5 * k, given, arguments.rule, arguments.batch);
      RoiTaps<acc_t>& out = rois_[k];
      out.level = roi.level, out.image = roi.image;
      if (roi.level < 0) continue;
      const acc_t scale = arguments.scale[roi.level];
      const auto axis = [&](acc_t lo, acc_t hi, int size, int pooled) {
        return make_roi_axis(lo, hi, scale, size, pooled, arguments.sampling_ratio, arguments.aligned);
      };
      const RoiAxis<acc_t> rows = axis(roi.y1, roi.y2, sizes[roi.level].first, arguments.pooled_height);
      const RoiAxis<acc_t> cols = axis(roi.x1, roi.x2, sizes[roi.level].second, arguments.pooled_width);
      out.inverse_count = inverse_count(rows, cols);
      append(chunk, rows, arguments.pooled_height, out.rows);
      append(chunk, cols, arguments.pooled_width, out.cols);
    }
    // The vectors have stopped growing: offsets become pointers.
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
        // Samples come in order, so that an equal pixel is one of the last two.
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

// The RoIs of each image that read anything, ascending.
template <class acc_t>
std::vector<std::vector<int64_t>> rois_by_image(const RoiTapTable<acc_t>& rois, int64_t batch) {
  std::vector<std::vector<int64_t>> images(batch);
  for (int64_t k = 0; k < rois.size(); ++k) {
    if (!rois[k].reads_nothing()) images[rois[k].image].push_back(k);
  }
  return images;
}

}  // namespace fpn_fast
