// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign on the CPU. The taps of each RoI are computed once for all channels, and taps of the same pixel
// are merged. Two loop nests serve all memory formats:
//   - pixels (channels_last): a bin is a weighted sum of its pixels' channel vectors, with the accumulators in
//     registers. A task is a range of RoIs.
//   - planes (channels_first, and any other strides): a task is a plane of one channel, which stays in cache while all
//     RoIs of its image read it. Its rows are blended into one vector along W, which the column taps then read.
#include "../torch/multiscale_roi_align.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "pack.h"
#include "parallel.h"
#include "roi_taps.h"

namespace fpn_fast {
namespace {

template <class T>
struct PixelTap {
  const T* pixel;
  acc_type<T> weight;
};

// Channels [c, c + kPacks * kPackLanes) of one bin.
template <int kPacks, class T, class acc_t = acc_type<T>>
HOST_DEVICE void pool_channels(const std::vector<PixelTap<T>>& taps, acc_t inverse_count, int c, T* out) {
  Pack<acc_t> sums[kPacks];
  FPN_FAST_UNROLL
  for (auto& sum : sums) sum = Pack<acc_t>{};
  for (const PixelTap<T>& tap : taps) {
    FPN_FAST_UNROLL
    for (int i = 0; i < kPacks; ++i) {
      Pack<acc_t> values;
      load_pack(tap.pixel + c + i * kPackLanes, values);
      sums[i] += tap.weight * values;
    }
  }
  FPN_FAST_UNROLL
  for (int i = 0; i < kPacks; ++i) store_pack<T>(out + c + i * kPackLanes, sums[i] * inverse_count);
}

template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void pool_pixels(const FeatureMap<const T>& map, const RoiTaps<acc_t>& roi, const FeatureMap<T>& out,
                             int64_t k, std::vector<PixelTap<T>>& taps) {
  constexpr int kPacks = 8;
  const int channels = static_cast<int>(out.channels);
  const bool adjacent = map.stride_c == 1;
  for (int ph = 0; ph < out.height; ++ph) {
    for (int pw = 0; pw < out.width; ++pw) {
      taps.clear();
      for (int i = roi.rows.begin[ph]; i < roi.rows.begin[ph + 1]; ++i) {
        const Tap<acc_t>& row = roi.rows.taps[i];
        for (int j = roi.cols.begin[pw]; j < roi.cols.begin[pw + 1]; ++j) {
          const Tap<acc_t>& col = roi.cols.taps[j];
          taps.push_back({map.at(roi.image, 0, row.pixel, col.pixel), row.weight * col.weight});
        }
      }
      T* bin = out.at(k, 0, ph, pw);
      int c = 0;
      if (adjacent) {
        for (; c + kPacks * kPackLanes <= channels; c += kPacks * kPackLanes) {
          pool_channels<kPacks>(taps, roi.inverse_count, c, bin);
        }
        for (; c + kPackLanes <= channels; c += kPackLanes) pool_channels<1>(taps, roi.inverse_count, c, bin);
      }
      for (; c < channels; ++c) {
        acc_t sum = 0;
        for (const PixelTap<T>& tap : taps) sum += tap.weight * to_acc(tap.pixel[c * map.stride_c]);
        bin[c] = Rounded<T>::from(sum * roi.inverse_count);
      }
    }
  }
}

// Pools one channel of a RoI. `blended` has room for a row of the widest map.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void pool_plane(const FeatureMap<const T>& map, const RoiTaps<acc_t>& roi, const FeatureMap<T>& out,
                            int64_t k, int64_t c, acc_t* blended) {
  const Span<acc_t> span(roi.cols, map.width, false);
  const T* corner = map.at(roi.image, c, 0, span.first);
  for (int ph = 0; ph < out.height; ++ph) {
    for (int x = 0; x < span.width; ++x) {
      acc_t sum = 0;
      for (int i = roi.rows.begin[ph]; i < roi.rows.begin[ph + 1]; ++i) {
        const Tap<acc_t>& row = roi.rows.taps[i];
        sum += row.weight * to_acc(corner[row.pixel * map.stride_h + x * map.stride_w]);
      }
      blended[x] = sum;
    }
    T* out_row = out.at(k, c, ph, 0);
    for (int pw = 0; pw < out.width; ++pw) {
      acc_t sum = 0;
      for (int j = roi.cols.begin[pw]; j < roi.cols.begin[pw + 1]; ++j) {
        sum += roi.cols.taps[j].weight * blended[roi.cols.taps[j].pixel - span.first];
      }
      out_row[pw * out.stride_w] = Rounded<T>::from(sum * roi.inverse_count);
    }
  }
}

// Pools kPackLanes channels of a RoI, from `c` on. Rows are blended as vectors along W, columns as vectors of channels.
// `blended` has room for a row of packs of the widest map, `pooled` for the bins and one pack more per channel.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void pool_planes(const FeatureMap<const T>& map, const RoiTaps<acc_t>& roi, const Span<acc_t>& span,
                             const FeatureMap<T>& out, int64_t k, int64_t c, acc_t* blended, acc_t* pooled) {
  const T* corner = map.at(roi.image, c, 0, span.first);
  const int bins = out.height * out.width;
  const int row_of_bins = bins + kPackLanes;
  for (int ph = 0; ph < out.height; ++ph) {
    const Tap<acc_t>* rows = roi.rows.taps + roi.rows.begin[ph];
    const int count = roi.rows.begin[ph + 1] - roi.rows.begin[ph];
    for (int x = 0; x < span.width; x += kPackLanes) {
      // Channels are the inner loop, because their sums are independent.
      Pack<acc_t> sums[kPackLanes];
      FPN_FAST_UNROLL
      for (auto& sum : sums) sum = Pack<acc_t>{};
      for (int row = 0; row < count; ++row) {
        const T* source = corner + rows[row].pixel * map.stride_h + x;
        const acc_t weight = rows[row].weight;
        FPN_FAST_UNROLL
        for (int channel = 0; channel < kPackLanes; ++channel) {
          Pack<acc_t> values;
          load_pack(source + channel * map.stride_c, values);
          sums[channel] += weight * values;
        }
      }
      transpose<acc_t>(sums);
      std::memcpy(blended + x * kPackLanes, sums, sizeof sums);
    }
    for (int pw = 0; pw < out.width; pw += kPackLanes) {
      Pack<acc_t> sums[kPackLanes];
      FPN_FAST_UNROLL
      for (int i = 0; i < kPackLanes; ++i) {
        Pack<acc_t> sum = {};
        const int end = pw + i < out.width ? roi.cols.begin[pw + i + 1] : 0;
        for (int j = pw + i < out.width ? roi.cols.begin[pw + i] : 0; j < end; ++j) {
          Pack<acc_t> values;
          load_pack(blended + (roi.cols.taps[j].pixel - span.first) * kPackLanes, values);
          sum += roi.cols.taps[j].weight * values;
        }
        sums[i] = sum * roi.inverse_count;
      }
      transpose<acc_t>(sums);
      // The next row overwrites what a pack holds beyond this row; after the last row it lies in the spare pack.
      FPN_FAST_UNROLL
      for (int channel = 0; channel < kPackLanes; ++channel) {
        store_pack<acc_t>(pooled + channel * row_of_bins + ph * out.width + pw, sums[channel]);
      }
    }
  }
  for (int channel = 0; channel < kPackLanes; ++channel) {
    T* target = out.at(k, c + channel, 0, 0);
    const acc_t* source = pooled + channel * row_of_bins;
    FPN_FAST_IVDEP
    for (int i = 0; i < bins; ++i) target[i] = Rounded<T>::from(source[i]);
  }
}

template <class T>
void clear_row(const FeatureMap<T>& out, int64_t k) {
  // The output is dense in both memory formats.
  std::memset(out.at(k, 0, 0, 0), 0, sizeof(T) * out.channels * out.height * out.width);
}

struct Cpu {
  template <class T, class acc_t = acc_type<T>>
  static void pool(const RoiAlignArguments<acc_t>& arguments, const std::vector<FeatureMap<const T>>& maps,
                   const FeatureMap<T>& out, const Tensor&) {
    const RoiTapTable<acc_t> rois(arguments, map_sizes(maps));
    const int64_t bins = int64_t{out.height} * out.width;
    if (channels_adjacent(out)) {
      parallel_rows(rois.size(), 8 * bins * out.channels, [&](int64_t begin, int64_t end) {
        std::vector<PixelTap<T>> taps;
        for (int64_t k = begin; k < end; ++k) {
          rois[k].reads_nothing() ? clear_row(out, k) : pool_pixels(maps[rois[k].level], rois[k], out, k, taps);
        }
      });
      return;
    }
    for (int64_t k = 0; k < rois.size(); ++k) {
      if (rois[k].reads_nothing()) clear_row(out, k);
    }
    int widest = 0;
    for (const auto& map : maps) widest = std::max(widest, map.width);
    auto images = rois_by_image(rois, arguments.batch);
    for (auto& image : images) {
      // From top to bottom of each map: a RoI finds in cache what the RoI before it read.
      std::sort(image.begin(), image.end(), [&](int64_t a, int64_t b) {
        return std::pair(rois[a].level, rois[a].rows.first) < std::pair(rois[b].level, rois[b].rows.first);
      });
    }
    const int64_t rois_per_image = rois.size() / std::max<int64_t>(arguments.batch, 1) + 1;
    // A task is a group of channels of an image, whose planes fit into cache.
    const int64_t groups = (out.channels + kPackLanes - 1) / kPackLanes;
    parallel_rows(arguments.batch * groups, 64 * bins * rois_per_image, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> blended(kPackLanes * (widest + kPackLanes)), pooled(kPackLanes * (bins + kPackLanes));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % groups * kPackLanes, last = std::min(first + kPackLanes, out.channels);
        for (const int64_t k : images[task / groups]) {
          const RoiTaps<acc_t>& roi = rois[k];
          const FeatureMap<const T>& map = maps[roi.level];
          const Span<acc_t> span(roi.cols, map.width, map.stride_w == 1 && last - first == kPackLanes);
          if (span.packed) {
            pool_planes(map, roi, span, out, k, first, blended.data(), pooled.data());
          } else {
            for (int64_t c = first; c < last; ++c) {
              pool_plane(map, roi, out, k, c, blended.data());
            }
          }
        }
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align<Cpu>));
}

}  // namespace fpn_fast
