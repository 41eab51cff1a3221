// SPDX-License-Identifier: Apache-2.0
// Gradient of the top-down merge on the CPU. Each coarser gradient is gathered from the pixels that read it, so nothing
// is zero-filled, and the sums do not depend on the number of threads. It has the loop nests of the forward pass:
// planes sum destination rows into a buffer and then along W; pixels sum channels.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../common/resample.h"
#include "../torch/top_down.h"
#include "parallel.h"

namespace fpn_fast {
namespace {

template <bool kBilinear, class acc_t>
struct ColumnTargets {
  std::vector<Range> ranges;
  std::vector<int> first_weight;
  std::vector<acc_t> weights;
  bool pairs = !kBilinear;

  explicit ColumnTargets(const Axis<acc_t>& axis) {
    for (int src = 0; src < axis.in; ++src) {
      const Range range = targets<kBilinear>(axis, src);
      ranges.push_back(range);
      pairs &= range.begin == 2 * src && range.end == 2 * src + 2;
      if constexpr (kBilinear) {
        first_weight.push_back(static_cast<int>(weights.size()));
        for (int dst = range.begin; dst < range.end; ++dst) weights.push_back(bilinear_weight(axis, dst, src));
      }
    }
  }
};

template <class acc_t>
struct GradientPair {
  Axis<acc_t> rows;
  bool halve;
};

// out[i] = round(sums(i) + grad[i]), halved if `halve`. `grad` is null where the level has none. Each case has its own
// loop, because a condition inside the loop would prevent vectorisation.
template <class T, class Sums, class acc_t = acc_type<T>>
HOST_DEVICE void finish(T* out, int64_t out_stride, const T* grad, int64_t grad_stride, int count, bool halve,
                        const Sums& sums) {
  const acc_t factor = halve ? acc_t(0.5) : acc_t(1);
  if (out_stride != 1 || (grad != nullptr && grad_stride != 1)) {
    for (int i = 0; i < count; ++i) {
      const acc_t own = grad != nullptr ? to_acc(grad[i * grad_stride]) : acc_t(0);
      out[i * out_stride] = Rounded<T>::from((sums(i) + own) * factor);
    }
  } else if (grad != nullptr) {
    FPN_FAST_IVDEP
    for (int i = 0; i < count; ++i) out[i] = Rounded<T>::from((sums(i) + to_acc(grad[i])) * factor);
  } else {
    FPN_FAST_IVDEP
    for (int i = 0; i < count; ++i) out[i] = Rounded<T>::from(sums(i) * factor);
  }
}

template <bool kBilinear, class T, class acc_t = acc_type<T>>
HOST_DEVICE void gather_plane(const FeatureMap<const T>& fine, const FeatureMap<const T>* grad,
                              const FeatureMap<T>& out, const GradientPair<acc_t>& pair,
                              const ColumnTargets<kBilinear, acc_t>& columns, int64_t n, int64_t c, acc_t* row_sum) {
  for (int y = 0; y < out.height; ++y) {
    const Range rows = targets<kBilinear>(pair.rows, y);
    std::fill_n(row_sum, fine.width, acc_t(0));
    for (int fine_y = rows.begin; fine_y < rows.end; ++fine_y) {
      const T* fine_row = fine.at(n, c, fine_y, 0);
      const acc_t weight = kBilinear ? bilinear_weight(pair.rows, fine_y, y) : acc_t(1);
      if (fine.stride_w == 1) {
        FPN_FAST_IVDEP
        for (int x = 0; x < fine.width; ++x) row_sum[x] += weight * to_acc(fine_row[x]);
      } else {
        for (int x = 0; x < fine.width; ++x) row_sum[x] += weight * to_acc(fine_row[x * fine.stride_w]);
      }
    }
    const T* grad_row = grad != nullptr ? grad->at(n, c, y, 0) : nullptr;
    const int64_t grad_stride = grad != nullptr ? grad->stride_w : 0;
    T* out_row = out.at(n, c, y, 0);
    if (columns.pairs) {
      finish<T>(out_row, out.stride_w, grad_row, grad_stride, out.width, pair.halve,
                [&](int x) { return row_sum[2 * x] + row_sum[2 * x + 1]; });
      continue;
    }
    finish<T>(out_row, out.stride_w, grad_row, grad_stride, out.width, pair.halve, [&](int x) {
      const Range range = columns.ranges[x];
      acc_t sum = 0;
      for (int fine_x = range.begin; fine_x < range.end; ++fine_x) {
        if constexpr (kBilinear) {
          sum += columns.weights[columns.first_weight[x] + fine_x - range.begin] * row_sum[fine_x];
        } else {
          sum += row_sum[fine_x];
        }
      }
      return sum;
    });
  }
}

template <bool kBilinear, class T, class acc_t = acc_type<T>>
HOST_DEVICE void gather_pixel_row(const FeatureMap<const T>& fine, const FeatureMap<const T>* grad,
                                  const FeatureMap<T>& out, const GradientPair<acc_t>& pair,
                                  const ColumnTargets<kBilinear, acc_t>& columns, int64_t n, int y, acc_t* pixel_sum) {
  const int channels = static_cast<int>(out.channels);
  const Range rows = targets<kBilinear>(pair.rows, y);
  for (int x = 0; x < out.width; ++x) {
    const Range range = columns.ranges[x];
    T* out_pixel = out.at(n, 0, y, x);
    const T* grad_pixel = grad != nullptr ? grad->at(n, 0, y, x) : nullptr;
    if (!kBilinear && rows.end - rows.begin == 2 && range.end - range.begin == 2) {
      const T *a = fine.at(n, 0, rows.begin, range.begin), *b = fine.at(n, 0, rows.begin, range.begin + 1);
      const T *c = fine.at(n, 0, rows.begin + 1, range.begin), *d = fine.at(n, 0, rows.begin + 1, range.begin + 1);
      finish<T>(out_pixel, 1, grad_pixel, 1, channels, pair.halve,
                [&](int i) { return (to_acc(a[i]) + to_acc(b[i])) + (to_acc(c[i]) + to_acc(d[i])); });
      continue;
    }
    std::fill_n(pixel_sum, channels, acc_t(0));
    for (int fine_y = rows.begin; fine_y < rows.end; ++fine_y) {
      const acc_t row_weight = kBilinear ? bilinear_weight(pair.rows, fine_y, y) : acc_t(1);
      for (int fine_x = range.begin; fine_x < range.end; ++fine_x) {
        acc_t weight = row_weight;
        if constexpr (kBilinear) weight *= columns.weights[columns.first_weight[x] + fine_x - range.begin];
        const T* fine_pixel = fine.at(n, 0, fine_y, fine_x);
        FPN_FAST_IVDEP
        for (int i = 0; i < channels; ++i) pixel_sum[i] += weight * to_acc(fine_pixel[i]);
      }
    }
    finish<T>(out_pixel, 1, grad_pixel, 1, channels, pair.halve, [&](int i) { return pixel_sum[i]; });
  }
}

// `grads` are the gradients of the merged maps, without the coarsest. `sums[k]` is the gradient of lateral k + 1.
template <bool kBilinear, class T>
void gather_pathway(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                    Resample mode, bool average) {
  using acc_t = acc_type<T>;
  const size_t levels = sums.size();
  const auto fine_of = [&](size_t level) { return level == 0 ? grads[0] : read_only(sums[level - 1]); };
  std::vector<GradientPair<acc_t>> pairs;
  std::vector<ColumnTargets<kBilinear, acc_t>> columns;
  bool all_channels_last = true;
  int64_t plane_elements = 0;
  int widest = 0;
  for (size_t level = 0; level < levels; ++level) {
    const FeatureMap<const T> fine = fine_of(level);
    const FeatureMap<T>& out = sums[level];
    // The coarsest merged map is its lateral, which was not averaged.
    pairs.push_back({make_axis<acc_t>(out.height, fine.height, mode), average && level + 1 < levels});
    columns.emplace_back(make_axis<acc_t>(out.width, fine.width, mode));
    all_channels_last &= channels_adjacent(fine) && channels_adjacent(out) &&
                         (level + 1 == levels || channels_adjacent(grads[level + 1]));
    plane_elements += int64_t{fine.height} * fine.width;
    widest = std::max(widest, fine.width);
  }
  const auto grad_of = [&](size_t level) { return level + 1 < levels ? &grads[level + 1] : nullptr; };
  const int64_t channels = grads[0].channels;
  if (all_channels_last) {
    const auto gather_row = [&](size_t level, int64_t n, int y, acc_t* pixel_sum) {
      gather_pixel_row<kBilinear>(fine_of(level), grad_of(level), sums[level], pairs[level], columns[level], n, y,
                                  pixel_sum);
    };
    for (size_t level = 0; level < levels; ++level) {
      // Two levels in one pass: one coarser row reads each finer row, which is still in cache.
      const bool two = !kBilinear && level + 1 < levels;
      if (two) ++level;
      const FeatureMap<T>& out = sums[level];
      // An element gathers about four elements, and with two levels four more for each of those.
      const int64_t gathered = two ? 4 + 16 : 4;
      parallel_rows(out.batch * out.height, gathered * out.width * channels, [&](int64_t begin, int64_t end) {
        std::vector<acc_t> pixel_sum(channels);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t n = row / out.height;
          const int y = static_cast<int>(row % out.height);
          if (two) {
            const Range finer = targets<kBilinear>(pairs[level].rows, y);
            for (int fine_y = finer.begin; fine_y < finer.end; ++fine_y) {
              gather_row(level - 1, n, fine_y, pixel_sum.data());
            }
          }
          gather_row(level, n, y, pixel_sum.data());
        }
      });
    }
    return;
  }
  parallel_rows(grads[0].batch * channels, plane_elements, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row_sum(widest);
    for (int64_t plane = begin; plane < end; ++plane) {
      for (size_t level = 0; level < levels; ++level) {
        gather_plane<kBilinear>(fine_of(level), grad_of(level), sums[level], pairs[level], columns[level],
                                plane / channels, plane % channels, row_sum.data());
      }
    }
  });
}

struct Cpu {
  template <class T>
  static void gather(const std::vector<FeatureMap<const T>>& grads, const std::vector<FeatureMap<T>>& sums,
                     Resample mode, bool average, const Tensor&) {
    mode == Resample::kNearest ? gather_pathway<false, T>(grads, sums, mode, average)
                               : gather_pathway<true, T>(grads, sums, mode, average);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("top_down_backward", TORCH_BOX(&top_down_backward<Cpu>));
}

}  // namespace fpn_fast
