// SPDX-License-Identifier: Apache-2.0
// Keypoints of heatmaps on the CPU. A task is one heatmap. Each row is resized along x once, and four resized rows are
// blended into a row of the box, which is searched immediately. The whole resized map is never stored.
#include "../torch/heatmaps_to_keypoints.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../common/heatmaps_to_keypoints.h"
#include "tasks.h"

namespace fpn_fast {
namespace {

// Columns that are searched together: two 256-bit vectors of float32.
constexpr int kLanes = 16;

// The four heatmap rows, resized along x, that a row of the box reads. The number of columns is rounded up to a
// multiple of kLanes by repeating the last one.
template <class acc_t>
class ResizedRows {
 public:
  HOST_DEVICE void start(int pixels, int size) {
    const acc_t scale = divide(static_cast<acc_t>(size), static_cast<acc_t>(pixels));
    columns_ = (pixels + kLanes - 1) / kLanes * kLanes;
    for (auto& row : rows_) row.resize(columns_);
    for (int tap = 0; tap < 4; ++tap) index_[tap].resize(columns_), weights_[tap].resize(columns_);
    for (int column = 0; column < columns_; ++column) {
      const CubicTaps<acc_t> taps = cubic_taps(std::min(column, pixels - 1), scale, size);
      for (int tap = 0; tap < 4; ++tap) {
        index_[tap][column] = clamp_tap(taps.first + tap, size), weights_[tap][column] = taps.weights[tap];
      }
    }
  }

  // Replaces the oldest row by `source`.
  template <class S>
  HOST_DEVICE void push(const S* source) {
    std::rotate(rows_.begin(), rows_.begin() + 1, rows_.end());
    acc_t* target = rows_[3].data();
    const int *a = index_[0].data(), *b = index_[1].data(), *c = index_[2].data(), *d = index_[3].data();
    const acc_t *wa = weights_[0].data(), *wb = weights_[1].data(), *wc = weights_[2].data(), *wd = weights_[3].data();
    FPN_FAST_IVDEP
    for (int i = 0; i < columns_; ++i) {
      target[i] = blend<acc_t>({wa[i], wb[i], wc[i], wd[i]}, to_acc(source[a[i]]), to_acc(source[b[i]]),
                               to_acc(source[c[i]]), to_acc(source[d[i]]));
    }
  }

  // Writes the row of the box with these weights to `row`. Returns its highest value, or NaN if it has one.
  HOST_DEVICE acc_t blend_rows(const acc_t (&weights)[4], acc_t* row) const {
    const acc_t *a = rows_[0].data(), *b = rows_[1].data(), *c = rows_[2].data(), *d = rows_[3].data();
    acc_t highest[kLanes];
    // Not zero after a NaN. It has the values' type, so that the loop vectorises.
    acc_t nan[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) highest[lane] = -std::numeric_limits<acc_t>::infinity(), nan[lane] = 0;
    for (int column = 0; column < columns_; column += kLanes) {
      FPN_FAST_IVDEP
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = column + lane;
        const acc_t value = blend(weights, a[i], b[i], c[i], d[i]);
        row[i] = value;
        highest[lane] = value > highest[lane] ? value : highest[lane];
        nan[lane] = value == value ? nan[lane] : acc_t(1);
      }
    }
    acc_t found = highest[0];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (nan[lane] != 0) return std::numeric_limits<acc_t>::quiet_NaN();
      found = highest[lane] > found ? highest[lane] : found;
    }
    return found;
  }

  HOST_DEVICE int columns() const { return columns_; }

 private:
  int columns_ = 0;
  std::array<std::vector<int>, 4> index_;
  std::array<std::vector<acc_t>, 4> weights_, rows_;
};

template <class S, class acc_t = acc_type<S>>
HOST_DEVICE Peak<acc_t> find_peak(const S* heatmap, int height, int width, int box_height, int box_width,
                                  ResizedRows<acc_t>& rows, std::vector<acc_t>& row) {
  const acc_t scale = divide(static_cast<acc_t>(height), static_cast<acc_t>(box_height));
  row.resize(rows.columns());
  Peak<acc_t> peak = no_peak<acc_t>();
  // The first row of the box needs four new rows.
  int first = cubic_taps(0, scale, height).first - 4;
  for (int y = 0; y < box_height; ++y) {
    const CubicTaps<acc_t> taps = cubic_taps(y, scale, height);
    for (; first < taps.first; ++first) rows.push(heatmap + int64_t{clamp_tap(first + 4, height)} * width);
    const acc_t highest = rows.blend_rows(taps.weights, row.data());
    if (highest <= peak.value) continue;
    const bool nan = highest != highest;
    int x = 0;
    while (nan ? row[x] == row[x] : row[x] != highest) ++x;
    peak = {row[x], y * box_width + x};
    if (nan) break;
  }
  return peak;
}

template <class S, class B>
void find_all(const Tensor& heatmaps, const Tensor& boxes, float* keypoints, float* scores) {
  using acc_t = acc_type<S>;
  const int64_t per_box = heatmaps.size(1), count = heatmaps.size(0) * per_box;
  const int height = static_cast<int>(heatmaps.size(2)), width = static_cast<int>(heatmaps.size(3));
  const S* maps = data<const S>(heatmaps);
  const B* corners = data<const B>(boxes);
  // Most boxes have more pixels than their heatmap.
  parallel_tasks(count, int64_t{4} * height * width, [&](const auto& next) {
    ResizedRows<acc_t> rows;
    std::vector<acc_t> row;
    int64_t started = -1;
    for (int64_t map = next(); map < count; map = next()) {
      const int64_t index = map / per_box;
      const KeypointBox<B> box(corners + 4 * index);
      float* keypoint = keypoints + 3 * map;
      if (box.empty()) {
        std::fill_n(keypoint, 3, 0.0f), scores[map] = 0;
        continue;
      }
      if (started != index) rows.start(box.x.pixels, width), started = index;
      const Peak<acc_t> peak =
          find_peak(maps + map * height * width, height, width, box.y.pixels, box.x.pixels, rows, row);
      box.keypoint(peak.position, keypoint), scores[map] = static_cast<float>(peak.value);
    }
  });
}

struct Cpu {
  template <class S>
  static void run(const Tensor& heatmaps, const Tensor& boxes, float* keypoints, float* scores) {
    dispatch_boxes(boxes.scalar_type(),
                   [&](auto tag) { find_all<S, typename decltype(tag)::type>(heatmaps, boxes, keypoints, scores); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("heatmaps_to_keypoints", TORCH_BOX(&heatmaps_to_keypoints<Cpu>));
}

}  // namespace fpn_fast
