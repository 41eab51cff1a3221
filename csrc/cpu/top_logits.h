// SPDX-License-Identifier: Apache-2.0
// The highest logits of one image and level, straight from the head's map. One scan: a block of logits below the lowest
// of the best k so far, which most are, costs one comparison each. Candidates that pass are cut back to k when their
// buffer is full.
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

// A logit and its index as one integer, of which the largest comes first: higher logits, then lower indices.
template <class acc_t>
struct LogitKey {
  using type = uint64_t;
};
template <>
struct LogitKey<double> {
  using type = unsigned __int128;
};

template <class T, class acc_t = acc_type<T>>
class TopLogits {
 public:
  using Key = typename LogitKey<acc_t>::type;

  // Indices are torchvision's, (y, x, anchor); logits that are not finite are left out. Best first.
  HOST_DEVICE const std::vector<Key>& select(const FeatureMap<const T>& map, int64_t image, int64_t count) {
    const int64_t anchors = map.channels, height = map.height, width = map.width;
    const int64_t all = anchors * height * width;
    count_ = std::min(count, all);
    keys_.clear();
    // Room for as many again, so that a cut is paid for by the candidates since the last.
    room_ = std::min(all, 2 * count_ + kBlock);
    keys_.reserve(room_);
    lowest_ = -std::numeric_limits<acc_t>::infinity();
    lowest_key_ = 0;
    if (count_ == 0) return keys_;
    const T* data = map.at(image, 0, 0, 0);
    if (map.stride_c == 1 && map.stride_w == anchors) {
      const bool dense = map.stride_h == width * anchors;
      for (int64_t y = 0; y < (dense ? 1 : height); ++y) {
        scan(data + y * map.stride_h, dense ? all : width * anchors, 1, y * width * anchors, 1);
      }
    } else {
      const bool dense = map.stride_w == 1 && map.stride_h == width;
      for (int64_t a = 0; a < anchors; ++a) {
        for (int64_t y = 0; y < (dense ? 1 : height); ++y) {
          const T* row = data + a * map.stride_c + y * map.stride_h;
          scan(row, dense ? height * width : width, map.stride_w, y * width * anchors + a, anchors);
        }
      }
    }
    cut();
    std::sort(keys_.begin(), keys_.end(), std::greater<Key>());
    return keys_;
  }

  static HOST_DEVICE int64_t index_of(Key key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

  static HOST_DEVICE acc_t logit_of(Key key) { return from_ordered_bits(static_cast<OrderedBits<acc_t>>(key >> 32)); }

 private:
  // Two vectors of AVX2 floats between branches.
  static constexpr int kBlock = 16;

  static HOST_DEVICE Key key_of(acc_t logit, int64_t index) {
    return Key{ordered_bits(logit)} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
  }

  // `length` logits, `step` elements and `index_step` indices apart.
  HOST_DEVICE void scan(const T* logits, int64_t length, int64_t step, int64_t index, int64_t index_step) {
    int64_t i = 0;
    if (step == 1) {
      for (; i + kBlock <= length; i += kBlock) {
        int any = 0;
        for (int j = 0; j < kBlock; ++j) any |= to_acc(logits[i + j]) >= lowest_ ? 1 : 0;
        if (any == 0) continue;
        for (int j = 0; j < kBlock; ++j) consider(to_acc(logits[i + j]), index + (i + j) * index_step);
      }
    }
    for (; i < length; ++i) consider(to_acc(logits[i * step]), index + i * index_step);
  }

  HOST_DEVICE void consider(acc_t logit, int64_t index) {
    // Written so that NaN fails.
    if (!(logit >= lowest_) || !is_finite(logit)) return;
    const Key key = key_of(logit, index);
    if (key <= lowest_key_) return;
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) < room_) return;
    cut();
    lowest_key_ = keys_[count_ - 1];
    lowest_ = logit_of(lowest_key_);
  }

  // Leaves the best `count_`, the lowest of them last.
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

}  // namespace fpn_fast
