// SPDX-License-Identifier: Apache-2.0
// The top-down merge on the CPU. Memory bandwidth limits it: each lateral is read once, each merged map is written
// once, and the coarser map is read from cache. Two loop nests serve all memory formats:
//   - planes (channels_first, and any other strides): a source row is resampled along W into a buffer once, and the
//     destination rows that read it, two or so, add it as plain vectors.
//   - pixels (channels_last): the channels of a pixel are the vector.
#include "../torch/top_down.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../common/resample.h"
#include "parallel.h"

namespace fpn_fast {
namespace {

template <class T>
HOST_DEVICE T fuse(acc_type<T> lateral, acc_type<T> top, bool average) {
  const T sum = Rounded<T>::from(lateral + top);
  return average ? Rounded<T>::from(to_acc(sum) * acc_type<T>(0.5)) : sum;
}

template <class acc_t>
struct LevelPair {
  Axis<acc_t> rows, cols;
  bool average;
};

// A source row that is resampled to the destination's width, and its index. A plane uses two buffers, for the rows
// above and below, and a third for their blend.
template <class acc_t>
struct RowBuffer {
  int row = -1;
  std::vector<acc_t> values;
};

// The resampling of every column, computed once per level.
template <bool kBilinear, class acc_t>
struct ColumnTable {
  std::vector<int> lo, hi;
  std::vector<acc_t> weight_lo, weight_hi;
  bool doubled;

  explicit ColumnTable(const Axis<acc_t>& axis) : lo(axis.out), doubled(!kBilinear && axis.out == 2 * axis.in) {
    if constexpr (kBilinear) {
      hi.resize(axis.out), weight_lo.resize(axis.out), weight_hi.resize(axis.out);
    }
    for (int x = 0; x < axis.out; ++x) {
      if constexpr (kBilinear) {
        const Taps<acc_t> taps = bilinear_source(axis, x);
        lo[x] = taps.lo, hi[x] = taps.hi, weight_lo[x] = taps.weight_lo, weight_hi[x] = taps.weight_hi;
      } else {
        lo[x] = nearest_source(axis, x);
      }
    }
  }
};

template <bool kBilinear, class T, class acc_t = acc_type<T>>
HOST_DEVICE void resample_row(const T* row, int64_t stride, const ColumnTable<kBilinear, acc_t>& columns, int width,
                              acc_t* out) {
  if (columns.doubled && stride == 1) {
    FPN_FAST_IVDEP
    for (int x = 0; x < width / 2; ++x) out[2 * x] = out[2 * x + 1] = to_acc(row[x]);
    return;
  }
  for (int x = 0; x < width; ++x) {
    const acc_t lo = to_acc(row[columns.lo[x] * stride]);
    if constexpr (kBilinear) {
      out[x] = columns.weight_lo[x] * lo + columns.weight_hi[x] * to_acc(row[columns.hi[x] * stride]);
    } else {
      out[x] = lo;
    }
  }
}

template <class T>
HOST_DEVICE void fuse_row(const T* lateral, int64_t lateral_stride, const acc_type<T>* top, T* out, int64_t out_stride,
                          int width, bool average) {
  if (lateral_stride == 1 && out_stride == 1 && !average) {
    FPN_FAST_IVDEP
    for (int x = 0; x < width; ++x) out[x] = Rounded<T>::from(to_acc(lateral[x]) + top[x]);
  } else {
    for (int x = 0; x < width; ++x) {
      out[x * out_stride] = fuse<T>(to_acc(lateral[x * lateral_stride]), top[x], average);
    }
  }
}

template <bool kBilinear, class T, class acc_t = acc_type<T>>
HOST_DEVICE void merge_plane(const FeatureMap<const T>& lateral, const FeatureMap<const T>& top,
                             const FeatureMap<T>& out, const LevelPair<acc_t>& pair,
                             const ColumnTable<kBilinear, acc_t>& columns, int64_t n, int64_t c,
                             RowBuffer<acc_t> (&buffers)[3]) {
  const int width = lateral.width;
  buffers[0].row = buffers[1].row = -1;
  const auto resampled = [&](int row) -> const acc_t* {
    RowBuffer<acc_t>& buffer = buffers[row & 1];
    if (buffer.row != row) {
      resample_row<kBilinear>(top.at(n, c, row, 0), top.stride_w, columns, width, buffer.values.data());
      buffer.row = row;
    }
    return buffer.values.data();
  };
  acc_t* blended = buffers[2].values.data();
  for (int y = 0; y < lateral.height; ++y) {
    const T* lateral_row = lateral.at(n, c, y, 0);
    T* out_row = out.at(n, c, y, 0);
    if constexpr (kBilinear) {
      const Taps<acc_t> taps = bilinear_source(pair.rows, y);
      const acc_t* lo = resampled(taps.lo);
      const acc_t* hi = resampled(taps.hi);
      FPN_FAST_IVDEP
      for (int x = 0; x < width; ++x) blended[x] = taps.weight_lo * lo[x] + taps.weight_hi * hi[x];
      fuse_row(lateral_row, lateral.stride_w, blended, out_row, out.stride_w, width, pair.average);
    } else {
      fuse_row(lateral_row, lateral.stride_w, resampled(nearest_source(pair.rows, y)), out_row, out.stride_w, width,
               pair.average);
    }
  }
}

template <bool kBilinear, class T, class acc_t = acc_type<T>>
HOST_DEVICE void merge_pixel_row(const FeatureMap<const T>& lateral, const FeatureMap<const T>& top,
                                 const FeatureMap<T>& out, const LevelPair<acc_t>& pair,
                                 const ColumnTable<kBilinear, acc_t>& columns, int64_t n, int y) {
  const int channels = static_cast<int>(lateral.channels);
  if constexpr (kBilinear) {
    const Taps<acc_t> row = bilinear_source(pair.rows, y);
    for (int x = 0; x < lateral.width; ++x) {
      const T* lateral_pixel = lateral.at(n, 0, y, x);
      T* out_pixel = out.at(n, 0, y, x);
      const T *top_ll = top.at(n, 0, row.lo, columns.lo[x]), *top_lh = top.at(n, 0, row.lo, columns.hi[x]);
      const T *top_hl = top.at(n, 0, row.hi, columns.lo[x]), *top_hh = top.at(n, 0, row.hi, columns.hi[x]);
      const acc_t left = columns.weight_lo[x], right = columns.weight_hi[x];
      FPN_FAST_IVDEP
      for (int c = 0; c < channels; ++c) {
        const acc_t above = left * to_acc(top_ll[c]) + right * to_acc(top_lh[c]);
        const acc_t below = left * to_acc(top_hl[c]) + right * to_acc(top_hh[c]);
        out_pixel[c] = fuse<T>(to_acc(lateral_pixel[c]), row.weight_lo * above + row.weight_hi * below, pair.average);
      }
    }
  } else {
    const int source = nearest_source(pair.rows, y);
    for (int x = 0; x < lateral.width; ++x) {
      const T* lateral_pixel = lateral.at(n, 0, y, x);
      const T* top_pixel = top.at(n, 0, source, columns.lo[x]);
      T* out_pixel = out.at(n, 0, y, x);
      if (pair.average) {
        for (int c = 0; c < channels; ++c) out_pixel[c] = fuse<T>(to_acc(lateral_pixel[c]), to_acc(top_pixel[c]), true);
        continue;
      }
      FPN_FAST_IVDEP
      for (int c = 0; c < channels; ++c) {
        out_pixel[c] = Rounded<T>::from(to_acc(lateral_pixel[c]) + to_acc(top_pixel[c]));
      }
    }
  }
}

template <bool kBilinear, class T>
void merge_pathway(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                   Resample mode, bool average) {
  using acc_t = acc_type<T>;
  const auto top_of = [&](size_t level) {
    return level + 1 == laterals.size() ? laterals[level] : read_only(merged[level]);
  };
  std::vector<LevelPair<acc_t>> pairs;
  std::vector<ColumnTable<kBilinear, acc_t>> columns;
  bool all_channels_last = true;
  int64_t plane_elements = 0;
  int widest = 0;
  for (size_t level = 0; level + 1 < laterals.size(); ++level) {
    const auto &fine = laterals[level], &coarse = laterals[level + 1];
    pairs.push_back({make_axis<acc_t>(coarse.height, fine.height, mode),
                     make_axis<acc_t>(coarse.width, fine.width, mode), average});
    columns.emplace_back(pairs.back().cols);
    all_channels_last &=
        channels_adjacent(fine) && channels_adjacent(top_of(level + 1)) && channels_adjacent(merged[level]);
    plane_elements += int64_t{fine.height} * fine.width;
    widest = std::max(widest, fine.width);
  }
  const int last = static_cast<int>(pairs.size()) - 1;
  if (all_channels_last) {
    for (int level = last; level >= 0; --level) {
      const FeatureMap<const T>& lateral = laterals[level];
      const FeatureMap<const T> top = top_of(level + 1);
      parallel_rows(lateral.batch * lateral.height, lateral.width * lateral.channels, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          merge_pixel_row<kBilinear>(lateral, top, merged[level], pairs[level], columns[level], row / lateral.height,
                                     static_cast<int>(row % lateral.height));
        }
      });
    }
    return;
  }
  // A plane's whole pathway before the next plane, so that its coarser levels stay in the core's own cache.
  const int64_t channels = laterals[0].channels;
  parallel_rows(laterals[0].batch * channels, plane_elements, [&](int64_t begin, int64_t end) {
    RowBuffer<acc_t> buffers[3];
    for (auto& buffer : buffers) buffer.values.resize(widest);
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int level = last; level >= 0; --level) {
        merge_plane<kBilinear>(laterals[level], top_of(level + 1), merged[level], pairs[level], columns[level],
                               plane / channels, plane % channels, buffers);
      }
    }
  });
}

struct Cpu {
  template <class T>
  static void merge(const std::vector<FeatureMap<const T>>& laterals, const std::vector<FeatureMap<T>>& merged,
                    Resample mode, bool average, const Tensor&) {
    mode == Resample::kNearest ? merge_pathway<false, T>(laterals, merged, mode, average)
                               : merge_pathway<true, T>(laterals, merged, mode, average);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("top_down", TORCH_BOX(&top_down<Cpu>)); }

}  // namespace fpn_fast
