// SPDX-License-Identifier: Apache-2.0
// The highest logits of one image and level, read directly from the head's map in one scan. Most blocks of logits are
// below the lowest of the best k so far and cost one comparison per logit. Other logits go to a buffer, which is cut
// back to k when it is full.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "../common/boxes.h"
#include "../common/feature_map.h"
#include "../common/ordered_bits.h"
#include "../common/scalar.h"
#include "isa.h"

namespace fpn_fast {

// The best `count` of the values passed to `consider`.
template <class acc_t>
class TopNumbers {
 public:
  using Key = RankKey<acc_t>;

  // Starts a search among `all` values. Values below `floor` are ignored.
  HOST_DEVICE void reset(int64_t count, int64_t all, acc_t floor) {
    count_ = std::min(count, all);
    keys_.clear();
    // Room for twice `count`, so that the cost of a cut is spread over many candidates.
    room_ = std::min(all, 2 * count_ + kBlock);
    lowest_ = count_ == 0 ? std::numeric_limits<acc_t>::infinity() : floor;
    lowest_key_ = 0;
  }

  HOST_DEVICE acc_t lowest() const { return lowest_; }

  HOST_DEVICE void consider(acc_t number, int64_t index) {
    // A NaN fails this test.
    if (number >= lowest_ && is_finite(number)) consider(rank_key(number, static_cast<uint32_t>(index)));
  }

  HOST_DEVICE void take_over(const TopNumbers& other) {
    for (const Key key : other.keys_) consider(key);
  }

  // Best first.
  HOST_DEVICE const std::vector<Key>& sorted() {
    cut();
    std::sort(keys_.begin(), keys_.end(), std::greater<Key>());
    return keys_;
  }

  static HOST_DEVICE int64_t index_of(Key key) { return index_of_key(key); }

  static HOST_DEVICE acc_t number_of(Key key) { return number_of_key<acc_t>(key); }

 protected:
  // Two AVX2 vectors of floats between branches.
  static constexpr int kBlock = 16;

 private:
  HOST_DEVICE void consider(Key key) {
    if (key <= lowest_key_) return;
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) < room_) return;
    cut();
    lowest_key_ = keys_[count_ - 1];
    lowest_ = number_of(lowest_key_);
  }

  HOST_DEVICE void cut() {
    if (static_cast<int64_t>(keys_.size()) <= count_) return;
    std::nth_element(keys_.begin(), keys_.begin() + (count_ - 1), keys_.end(), std::greater<Key>());
    keys_.resize(count_);
  }

  int64_t count_ = 0, room_ = 0;
  acc_t lowest_ = 0;
  Key lowest_key_ = 0;
  std::vector<Key> keys_;
};

template <class T, class acc_t = acc_type<T>>
class TopLogits : public TopNumbers<acc_t> {
 public:
  // Scans rows [begin, end) of an image's map. Indices follow torchvision's order (y, x, channel). Logits that are not
  // finite are ignored.
  HOST_DEVICE void scan_rows(const FeatureMap<const T>& map, int64_t image, int64_t begin, int64_t end) {
    const int64_t channels = map.channels, width = map.width, rows = end - begin;
    const T* data = map.at(image, 0, begin, 0);
    const int64_t first = begin * width * channels;
    if (map.stride_c == 1 && map.stride_w == channels) {
      const bool dense = map.stride_h == width * channels;
      for (int64_t y = 0; y < (dense ? 1 : rows); ++y) {
        scan(data + y * map.stride_h, (dense ? rows : 1) * width * channels, 1, first + y * width * channels, 1);
      }
    } else {
      const bool dense = map.stride_w == 1 && map.stride_h == width;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t y = 0; y < (dense ? 1 : rows); ++y) {
          const T* row = data + c * map.stride_c + y * map.stride_h;
          scan(row, (dense ? rows : 1) * width, map.stride_w, first + y * width * channels + c, channels);
        }
      }
    }
  }

 private:
  // Scans `length` logits that are `step` elements and `index_step` indices apart.
  HOST_DEVICE void scan(const T* logits, int64_t length, int64_t step, int64_t index, int64_t index_step) {
    constexpr int kBlock = TopNumbers<acc_t>::kBlock;
    int64_t i = 0;
    if (step == 1) {
      for (; i + kBlock <= length; i += kBlock) {
        const acc_t lowest = this->lowest();
        int any = 0;
        for (int j = 0; j < kBlock; ++j) any |= to_acc(logits[i + j]) >= lowest ? 1 : 0;
        if (any == 0) continue;
        for (int j = 0; j < kBlock; ++j) this->consider(to_acc(logits[i + j]), index + (i + j) * index_step);
      }
    }
    for (; i < length; ++i) this->consider(to_acc(logits[i * step]), index + i * index_step);
  }
};

}  // namespace fpn_fast
