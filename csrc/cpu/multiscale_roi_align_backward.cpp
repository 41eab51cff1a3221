// SPDX-License-Identifier: Apache-2.0
// Gradient of multi-level RoIAlign on the CPU. Threads do not scatter into shared memory: a task owns a row of a map
// (channels_last) or a plane of all maps (channels_first), clears it, and adds the RoIs that read it in ascending
// order. So the sums do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <vector>

#include "../torch/multiscale_roi_align.h"
#include "pack.h"
#include "parallel.h"
#include "roi_taps.h"

namespace fpn_fast {
namespace {

// A row of bins that reads a row of a map.
template <class acc_t>
struct RowReader {
  int64_t roi;
  int bin;
  acc_t weight;
};

// The readers of every row of every map of every image, in ascending order of RoI and bin.
template <class acc_t>
class RowReaders {
 public:
  RowReaders(const RoiTapTable<acc_t>& rois, const std::vector<std::pair<int, int>>& sizes, int64_t batch, int pooled) {
    int64_t rows = 0;
    for (const auto& size : sizes) {
      first_row_.push_back(rows);
      rows += batch * size.first;
    }
    begin_.assign(rows + 1, 0);
    const auto each = [&](const auto& visit) {
      for (int64_t k = 0; k < rois.size(); ++k) {
        const RoiTaps<acc_t>& roi = rois[k];
        if (roi.reads_nothing()) continue;
        const int64_t first = first_row_[roi.level] + roi.image * sizes[roi.level].first;
        for (int bin = 0; bin < pooled; ++bin) {
          for (int i = roi.rows.begin[bin]; i < roi.rows.begin[bin + 1]; ++i) {
            const Tap<acc_t>& tap = roi.rows.taps[i];
            visit(first + tap.pixel, RowReader<acc_t>{k, bin, tap.weight * roi.inverse_count});
          }
        }
      }
    };
    each([&](int64_t row, const RowReader<acc_t>&) { ++begin_[row + 1]; });
    for (int64_t row = 0; row < rows; ++row) begin_[row + 1] += begin_[row];
    readers_.resize(begin_[rows]);
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    each([&](int64_t row, const RowReader<acc_t>& reader) { readers_[next[row]++] = reader; });
  }

  int64_t first_row(int level) const { return first_row_[level]; }
  const RowReader<acc_t>* begin(int64_t row) const { return readers_.data() + begin_[row]; }
  const RowReader<acc_t>* end(int64_t row) const { return readers_.data() + begin_[row + 1]; }

 private:
  std::vector<int64_t> first_row_, begin_;
  std::vector<RowReader<acc_t>> readers_;
};

template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void add_bins(const FeatureMap<const T>& grad, const RoiTaps<acc_t>& roi, const RowReader<acc_t>& reader,
                          acc_t* sums) {
  const int channels = static_cast<int>(grad.channels);
  for (int pw = 0; pw < grad.width; ++pw) {
    const T* bin = grad.at(reader.roi, 0, reader.bin, pw);
    for (int j = roi.cols.begin[pw]; j < roi.cols.begin[pw + 1]; ++j) {
      const acc_t weight = reader.weight * roi.cols.taps[j].weight;
      acc_t* pixel = sums + int64_t{roi.cols.taps[j].pixel} * channels;
      if (grad.stride_c == 1) {
        FPN_FAST_IVDEP
        for (int c = 0; c < channels; ++c) pixel[c] += weight * to_acc(bin[c]);
      } else {
        for (int c = 0; c < channels; ++c) pixel[c] += weight * to_acc(bin[c * grad.stride_c]);
      }
    }
  }
}

template <class T, class acc_t = acc_type<T>>
void gather_rows(const FeatureMap<const T>& grad, const RoiTapTable<acc_t>& rois,
                 const std::vector<FeatureMap<T>>& maps) {
  const RowReaders<acc_t> readers(rois, map_sizes(maps), maps[0].batch, grad.height);
  for (size_t level = 0; level < maps.size(); ++level) {
    const FeatureMap<T>& map = maps[level];
    const int64_t elements = map.width * map.channels, rows = map.batch * map.height;
    // Each thread takes consecutive tasks, and RoIs are not spread evenly. So neighbouring rows go to different
    // threads.
    const int64_t half = (rows + 1) / 2;
    parallel_rows(rows, 8 * elements, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> buffer(std::is_same_v<T, acc_t> ? 0 : elements);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task < half ? 2 * task : 2 * (task - half) + 1;
        T* out = map.at(row / map.height, 0, row % map.height, 0);
        acc_t* sums = buffer.data();
        if constexpr (std::is_same_v<T, acc_t>) sums = out;
        std::fill_n(sums, elements, acc_t(0));
        const int64_t of_all = readers.first_row(level) + row;
        for (const auto* reader = readers.begin(of_all); reader != readers.end(of_all); ++reader) {
          add_bins(grad, rois[reader->roi], *reader, sums);
        }
        if constexpr (!std::is_same_v<T, acc_t>) {
          FPN_FAST_IVDEP
          for (int64_t i = 0; i < elements; ++i) out[i] = Rounded<T>::from(sums[i]);
        }
      }
    });
  }
}

// Adds one channel of a RoI to a plane of `width` columns. `spread` has room for a row of the widest map.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void add_plane(const FeatureMap<const T>& grad, const RoiTaps<acc_t>& roi, int64_t k, int64_t c,
                           acc_t* sums, int width, acc_t* spread) {
  const Span<acc_t> columns(roi.cols, width, true);
  for (int ph = 0; ph < grad.height; ++ph) {
    const T* bins = grad.at(k, c, ph, 0);
    std::fill_n(spread, columns.width, acc_t(0));
    for (int pw = 0; pw < grad.width; ++pw) {
      const acc_t value = to_acc(bins[pw * grad.stride_w]) * roi.inverse_count;
      for (int j = roi.cols.begin[pw]; j < roi.cols.begin[pw + 1]; ++j) {
        spread[roi.cols.taps[j].pixel - columns.first] += roi.cols.taps[j].weight * value;
      }
    }
    for (int i = roi.rows.begin[ph]; i < roi.rows.begin[ph + 1]; ++i) {
      const acc_t weight = roi.rows.taps[i].weight;
      acc_t* row = sums + int64_t{roi.rows.taps[i].pixel} * width + columns.first;
      if (columns.packed) {
        for (int x = 0; x < columns.width; x += kPackLanes) {
          Pack<acc_t> total, values;
          load_pack(row + x, total), load_pack(spread + x, values);
          store_pack<acc_t>(row + x, total + weight * values);
        }
      } else {
        for (int x = 0; x < columns.width; ++x) row[x] += weight * spread[x];
      }
    }
  }
}

template <class T, class acc_t = acc_type<T>>
void gather_planes(const FeatureMap<const T>& grad, const RoiTapTable<acc_t>& rois,
                   const std::vector<FeatureMap<T>>& maps) {
  int64_t plane_elements = 0;
  int widest = 0;
  for (const auto& map : maps) {
    plane_elements += int64_t{map.height} * map.width;
    widest = std::max(widest, map.width);
  }
  const int64_t channels = maps[0].channels, batch = maps[0].batch;
  const auto images = rois_by_image(rois, batch);
  parallel_rows(batch * channels, 8 * plane_elements, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> buffer(std::is_same_v<T, acc_t> ? 0 : plane_elements), spread(widest + kPackLanes);
    std::vector<acc_t*> sums(maps.size());
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / channels, c = plane % channels;
      acc_t* free = buffer.data();
      for (size_t level = 0; level < maps.size(); ++level) {
        const int64_t elements = int64_t{maps[level].height} * maps[level].width;
        if constexpr (std::is_same_v<T, acc_t>) {
          sums[level] = maps[level].at(n, c, 0, 0);
        } else {
          sums[level] = free, free += elements;
        }
        std::fill_n(sums[level], elements, acc_t(0));
      }
      for (const int64_t k : images[n]) {
        add_plane(grad, rois[k], k, c, sums[rois[k].level], maps[rois[k].level].width, spread.data());
      }
      if constexpr (!std::is_same_v<T, acc_t>) {
        for (size_t level = 0; level < maps.size(); ++level) {
          T* out = maps[level].at(n, c, 0, 0);
          const int64_t elements = int64_t{maps[level].height} * maps[level].width;
          FPN_FAST_IVDEP
          for (int64_t i = 0; i < elements; ++i) out[i] = Rounded<T>::from(sums[level][i]);
        }
      }
    }
  });
}

struct Cpu {
  template <class T>
  static void gather(const RoiAlignArguments<acc_type<T>>& arguments, const FeatureMap<const T>& grad,
                     const std::vector<FeatureMap<T>>& maps, bool channels_last, const Tensor&) {
    const RoiTapTable<acc_type<T>> rois(arguments, map_sizes(maps));
    channels_last&& grad.channels > 1 ? gather_rows<T>(grad, rois, maps) : gather_planes<T>(grad, rois, maps);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward<Cpu>));
}

}  // namespace fpn_fast
