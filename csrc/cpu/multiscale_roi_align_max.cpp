// SPDX-License-Identifier: Apache-2.0
// Multi-level RoIAlign in max mode on the CPU, and its gradient: Note [Winners] in common/roi_align_max.h. A task of
// the forward pass is a RoI. A task of the backward pass owns a plane of one channel of all maps, and adds the RoIs of
// its image in ascending order, so that threads do not share sums.
#include "../torch/multiscale_roi_align_max.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace fpn_fast {
namespace {

template <class T, class acc_t = acc_type<T>>
void pool_roi(const std::vector<FeatureMap<const T>>& maps, const RoiAlignArguments<acc_t>& arguments, int64_t k,
              const FeatureMap<T>& pooled, const FeatureMap<int>& winners) {
  const Roi<acc_t> roi = locate_roi(arguments, k);
  RoiAxis<acc_t> rows{}, cols{};
  if (roi.level >= 0) {
    rows = roi_rows(arguments, roi, maps[roi.level].height), cols = roi_cols(arguments, roi, maps[roi.level].width);
  }
  const auto pool_bin = [&](int64_t c, int ph, int pw) {
    LargestSample<acc_t> largest{0, kNoWinner};
    if (roi.level >= 0) {
      const FeatureMap<const T>& map = maps[roi.level];
      largest = largest_sample(rows, cols, ph, pw, [&](int y, int x) { return to_acc(*map.at(roi.image, c, y, x)); });
    }
    *pooled.at(k, c, ph, pw) = Rounded<T>::from(largest.value);
    *winners.at(k, c, ph, pw) = largest.winner;
  };
  const int64_t bins = int64_t{pooled.height} * pooled.width;
  for (int64_t i = 0; i < pooled.channels * bins; ++i) {
    // In the order of memory.
    const bool along_channels = channels_adjacent(pooled);
    const int64_t c = along_channels ? i % pooled.channels : i / bins;
    const int bin = static_cast<int>(along_channels ? i / pooled.channels : i % bins);
    pool_bin(c, bin / pooled.width, bin % pooled.width);
  }
}

template <class acc_t>
struct LocatedRoi {
  int64_t k;
  int level;
  RoiAxis<acc_t> rows, cols;
};

// The RoIs with a level, per image, in ascending order.
template <class T, class acc_t = acc_type<T>>
std::vector<std::vector<LocatedRoi<acc_t>>> located_rois(const RoiAlignArguments<acc_t>& arguments,
                                                         const std::vector<FeatureMap<T>>& maps) {
  std::vector<std::vector<LocatedRoi<acc_t>>> images(arguments.batch);
  for (int64_t k = 0; k < arguments.count; ++k) {
    const Roi<acc_t> roi = locate_roi(arguments, k);
    if (roi.level < 0) continue;
    images[roi.image].push_back({k, roi.level, roi_rows(arguments, roi, maps[roi.level].height),
                                 roi_cols(arguments, roi, maps[roi.level].width)});
  }
  return images;
}

template <class T, class acc_t = acc_type<T>>
void add_roi(const FeatureMap<const T>& grad, const FeatureMap<const int>& winners, const LocatedRoi<acc_t>& roi,
             int64_t c, acc_t* sums, int width) {
  for (int ph = 0; ph < grad.height; ++ph) {
    for (int pw = 0; pw < grad.width; ++pw) {
      const int winner = *winners.at(roi.k, c, ph, pw);
      if (winner < 0) continue;
      Taps<acc_t> y, x;
      if (!sample_taps(roi.rows, ph, winning_sample(roi.rows, ph, winner >> 16), y)) continue;
      if (!sample_taps(roi.cols, pw, winning_sample(roi.cols, pw, winner), x)) continue;
      const acc_t value = to_acc(*grad.at(roi.k, c, ph, pw));
      const auto add_to = [&](int row, int col, acc_t weight) {
        // Only the pixels that a bin reads receive its NaN.
        if (weight != 0) sums[int64_t{row} * width + col] += weight * value;
      };
      add_to(y.lo, x.lo, y.weight_lo * x.weight_lo), add_to(y.lo, x.hi, y.weight_lo * x.weight_hi);
      add_to(y.hi, x.lo, y.weight_hi * x.weight_lo), add_to(y.hi, x.hi, y.weight_hi * x.weight_hi);
    }
  }
}

struct Cpu {
  template <class T>
  static void pool(const RoiAlignArguments<acc_type<T>>& arguments, const std::vector<FeatureMap<const T>>& maps,
                   const FeatureMap<T>& pooled, const FeatureMap<int>& winners, bool, const Tensor&) {
    parallel_rows(arguments.count, 16 * pooled.channels * pooled.height * pooled.width,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t k = begin; k < end; ++k) pool_roi<T>(maps, arguments, k, pooled, winners);
                  });
  }

  template <class T, class acc_t = acc_type<T>>
  static void gather(const RoiAlignArguments<acc_t>& arguments, const FeatureMap<const T>& grad,
                     const FeatureMap<const int>& winners, const std::vector<FeatureMap<T>>& maps, bool,
                     const Tensor&) {
    std::vector<int64_t> first{0};
    for (const auto& map : maps) first.push_back(first.back() + int64_t{map.height} * map.width);
    const auto images = located_rois<T>(arguments, maps);
    parallel_rows(arguments.batch * arguments.channels, 8 * first.back(), [&](int64_t begin, int64_t end) {
      std::vector<acc_t> sums(first.back());
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t n = plane / arguments.channels, c = plane % arguments.channels;
        std::fill(sums.begin(), sums.end(), acc_t(0));
        for (const LocatedRoi<acc_t>& roi : images[n]) {
          add_roi(grad, winners, roi, c, sums.data() + first[roi.level], maps[roi.level].width);
        }
        for (size_t level = 0; level < maps.size(); ++level) {
          const acc_t* sum = sums.data() + first[level];
          for (int y = 0; y < maps[level].height; ++y) {
            for (int x = 0; x < maps[level].width; ++x) *maps[level].at(n, c, y, x) = Rounded<T>::from(*sum++);
          }
        }
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("multiscale_roi_align_max", TORCH_BOX(&multiscale_roi_align_max<Cpu>));
  library.impl("multiscale_roi_align_max_backward", TORCH_BOX(&multiscale_roi_align_max_backward<Cpu>));
}

}  // namespace fpn_fast
