// SPDX-License-Identifier: Apache-2.0
// Detections of a dense head on the CPU. A task scans some rows of one level of one image. Each thread keeps the best
// logits that it has seen per level, and the results of all threads are merged. Then the best of each level are decoded
// and suppressed per image.
#include "../torch/select_detections.h"

#include <torch/csrc/stable/library.h>

#include <mutex>
#include <vector>

#include "candidates.h"
#include "top_logits.h"

namespace fpn_fast {
namespace {

// Logits of a task: two threads can share the finest level of one image evenly.
constexpr int64_t kTaskLogits = 1 << 18;

struct Rows {
  int64_t image, level, begin, end;
};

// Passes the scores of some rows to `top`. A logit is compared with a bound of its position first, so that most scores
// are never computed.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void scan_centered(const DenseHeads<T>& heads, const Rows& rows, std::vector<acc_t>& bounds,
                               std::vector<acc_t>& centers, TopNumbers<acc_t>& top) {
  const FeatureMap<const T>&logits = heads.logits[rows.level], &centerness = heads.centerness[rows.level];
  const int64_t width = logits.width, channels = logits.channels, anchors = heads.head.anchors;
  bounds.resize(width * anchors), centers.resize(width * anchors);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t i = 0; i < width * anchors; ++i) {
      const acc_t center = to_acc(*centerness.at(rows.image, i % anchors, y, i / anchors));
      centers[i] = logistic(center);
      bounds[i] = is_finite(center) ? logit_bound(top.lowest(), centers[i]) : std::numeric_limits<acc_t>::infinity();
    }
    const auto consider = [&](acc_t logit, int64_t x, int64_t c) {
      const int64_t i = x * anchors + c / heads.classes;
      if (!(logit >= bounds[i]) || !is_finite(logit)) return;
      top.consider(centered_score(logit, centers[i]), (y * width + x) * channels + c);
    };
    // In the order of memory.
    if (logits.stride_c <= logits.stride_w) {
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t c = 0; c < channels; ++c) consider(to_acc(*logits.at(rows.image, c, y, x)), x, c);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = 0; x < width; ++x) consider(to_acc(*logits.at(rows.image, c, y, x)), x, c);
      }
    }
  }
}

// The best of each image and level, ordered by level.
template <class T, class acc_t = acc_type<T>>
std::vector<TopLogits<T>> find_best(const DenseHeads<T>& heads) {
  const int64_t batch = heads.batch(), levels = heads.levels();
  std::vector<TopLogits<T>> best(levels * batch);
  std::vector<Rows> tasks;
  for (int64_t level = 0; level < levels; ++level) {
    const FeatureMap<const T>& map = heads.logits[level];
    const int64_t row = map.channels * map.width, step = std::max<int64_t>(1, kTaskLogits / std::max<int64_t>(1, row));
    for (int64_t n = 0; n < batch; ++n) {
      best[level * batch + n].reset(heads.pre_nms_top_n, row * map.height, heads.lowest);
      for (int64_t y = 0; y < map.height; y += step) {
        tasks.push_back({n, level, y, std::min<int64_t>(y + step, map.height)});
      }
    }
  }
  std::mutex merging;
  const std::vector<TopLogits<T>> nothing = best;
  parallel_tasks(static_cast<int64_t>(tasks.size()), kTaskLogits, [&](const auto& next) {
    std::vector<TopLogits<T>> own = nothing;
    std::vector<acc_t> bounds, centers;
    for (size_t i = next(); i < tasks.size(); i = next()) {
      const Rows& rows = tasks[i];
      TopLogits<T>& top = own[rows.level * batch + rows.image];
      if (heads.centerness.empty()) {
        top.scan_rows(heads.logits[rows.level], rows.image, rows.begin, rows.end);
      } else {
        scan_centered<T>(heads, rows, bounds, centers, top);
      }
    }
    // The result does not depend on which thread saw a logit.
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < best.size(); ++i) best[i].take_over(own[i]);
  });
  return best;
}

template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void decode_best(const DenseHeads<T>& heads, int64_t image, int level, TopLogits<T>& best,
                             std::vector<Candidate<acc_t>>& found) {
  for (const auto key : best.sorted()) {
    const int64_t index = TopLogits<T>::index_of(key);
    const Box<acc_t> box = decoded_box(heads.head, image, level, static_cast<uint32_t>(index / heads.classes));
    if (!is_finite(box.x1)) continue;
    const acc_t number = TopLogits<T>::number_of(key);
    found.push_back({box, heads.centerness.empty() ? logistic(number) : number, index % heads.classes});
  }
}

struct Cpu {
  template <class T, class acc_t = acc_type<T>>
  static void run(DenseHeads<T>& heads, const Detections& detections) {
    heads.head.cells = heads.cells.data();
    const int64_t batch = heads.batch(), levels = heads.levels();
    std::vector<TopLogits<T>> best = find_best(heads);
    std::vector<std::vector<Candidate<acc_t>>> found(batch * levels);
    // A candidate takes about as long as a hundred logits.
    parallel_rows(batch * levels, 100 * heads.pre_nms_top_n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / levels, level = i % levels;
        decode_best(heads, image, static_cast<int>(level), best[level * batch + image], found[i]);
      }
    });
    detect(found, levels, heads.nms_thresh, detections);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("select_detections", TORCH_BOX(&select_detections<Cpu>));
}

}  // namespace fpn_fast
