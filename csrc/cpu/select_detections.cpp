// SPDX-License-Identifier: Apache-2.0
// Detections of a dense head on the CPU. A task is some rows of an image's level: each thread keeps the best that it
// has seen of each level, and what threads have kept is put together. Then each level's best are decoded, and each
// image's suppressed.
#include "../torch/select_detections.h"

#include <torch/csrc/stable/library.h>

#include <mutex>
#include <tuple>
#include <vector>

#include "../common/dense_heads.h"
#include "../common/detection_scores.h"
#include "candidates.h"
#include "top_logits.h"

namespace fpn_fast {
namespace {

// Logits in a task: few enough for two threads to share the finest level of one image evenly.
constexpr int64_t kTaskLogits = 1 << 18;

struct Rows {
  int64_t image, level, begin, end;
};

// Shows `top` the scores of some rows. A logit is compared with a bound of its place before its score is computed.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void scan_centered(const DenseHeads<T>& heads, const Rows& rows, std::vector<acc_t>& bounds,
                               std::vector<acc_t>& centers, TopNumbers<acc_t>& top) {
  const FeatureMap<const T>&logits = heads.logits[rows.level], &centerness = heads.centerness[rows.level];
  const int64_t width = logits.width, channels = logits.channels, anchors = heads.anchors;
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

// The best of each image and level, level by level.
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
    // The best do not depend on which thread saw them.
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < best.size(); ++i) best[i].take_over(own[i]);
  });
  return best;
}

template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void decode_best(const DenseHeads<T>& heads, int64_t image, int64_t level, TopLogits<T>& best,
                             std::vector<Candidate<acc_t>>& found) {
  const FeatureMap<const T>& deltas = heads.deltas[level];
  const acc_t* size = heads.image_sizes + 2 * image;
  for (const auto key : best.sorted()) {
    const int64_t index = TopLogits<T>::index_of(key), place = index / heads.classes;
    const int64_t anchor = place % heads.anchors, x = place / heads.anchors % deltas.width;
    const int64_t y = place / heads.anchors / deltas.width;
    acc_t code[4];
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
      code[i] = to_acc(*deltas.at(image, 4 * anchor + i, y, x));
      finite &= is_finite(code[i]);
    }
    const Box<acc_t>& cell = heads.cells[level * heads.anchors + anchor];
    const Box<acc_t> source = anchor_at(heads.coding, cell, y, x, heads.stride_y[level], heads.stride_x[level]);
    const Box<acc_t> box = heads.distances ? decode_distances(source, code) : decode(heads.coding, source, code);
    if (!finite || !is_finite(box)) continue;
    const acc_t number = TopLogits<T>::number_of(key);
    const acc_t score = heads.centerness.empty() ? logistic(number) : number;
    found.push_back({clip(box, size[0], size[1]), score, index % heads.classes});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_detections_cpu(
    std::vector<Tensor> logits, std::vector<Tensor> deltas, std::vector<Tensor> centerness,
    std::vector<double> cell_anchors, std::vector<int64_t> strides, Tensor image_sizes, double score_thresh,
    int64_t pre_nms_top_n, double nms_thresh, int64_t max_detections, std::vector<double> weights, double scale_clamp,
    bool distances) {
  check_dense_heads(logits, deltas, centerness, cell_anchors, strides, image_sizes, pre_nms_top_n, max_detections,
                    weights);
  const Detections detections = empty_detections(image_sizes, max_detections);
  dispatch_floating(logits[0].scalar_type(), "select_detections", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    const auto heads = dense_heads<T>(logits, deltas, centerness, cell_anchors, strides, image_sizes, score_thresh,
                                      pre_nms_top_n, nms_thresh, max_detections, weights, scale_clamp, distances);
    const int64_t batch = heads.batch(), levels = heads.levels();
    std::vector<TopLogits<T>> best = find_best(heads);
    std::vector<std::vector<Candidate<acc_t>>> found(batch * levels);
    // A candidate takes as long as a hundred logits.
    parallel_rows(batch * levels, 100 * pre_nms_top_n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / levels, level = i % levels;
        decode_best(heads, image, level, best[level * batch + image], found[i]);
      }
    });
    detect(found, levels, nms_thresh, detections);
  });
  return {detections.boxes, detections.scores, detections.labels, detections.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("select_detections", TORCH_BOX(&select_detections_cpu));
}

}  // namespace fpn_fast
