// SPDX-License-Identifier: Apache-2.0
// Detections of a box head on the CPU. A task takes some boxes of an image from their softmax to their candidates. If
// there is a limit per class, candidates are decoded only after that limit has been applied.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../torch/select_detections.h"
#include "candidates.h"

namespace fpn_fast {
namespace {

constexpr int64_t kBoxesPerTask = 64;
// Logits that are read in the time of one exponential.
constexpr int64_t kExponentialCost = 16;

template <class acc_t>
struct Pair {
  acc_t score;
  uint32_t index;  // box * classes + class
};

// Collects the pairs of one box. Probabilities are computed in double with our exponential and rounded, so that the
// maths library does not matter.
template <class acc_t>
HOST_DEVICE void pass_threshold(const BoxHeads<acc_t>& heads, acc_t score_thresh, int64_t image, int64_t box,
                                std::vector<double>& powers, std::vector<Pair<acc_t>>& pairs) {
  const int64_t classes = heads.classes;
  const acc_t* logits = heads.logits + (image * heads.room + box) * classes;
  acc_t highest = logits[0];
  for (int64_t c = 1; c < classes; ++c) highest = logits[c] > highest ? logits[c] : highest;
  FPN_FAST_IVDEP
  for (int64_t c = 0; c < classes; ++c) {
    powers[c] = exponential(static_cast<double>(logits[c]) - static_cast<double>(highest));
  }
  double sum = 0;
  bool is_number = true;
  // exponential() must not be given a NaN; such boxes are dropped here.
  for (int64_t c = 0; c < classes; ++c) {
    sum += powers[c];
    is_number &= logits[c] == logits[c];
  }
  if (!is_number || !is_finite(highest)) return;
  for (int64_t c = 1; c < classes; ++c) {
    const acc_t score = static_cast<acc_t>(powers[c] / sum);
    if (score > score_thresh) pairs.push_back({score, static_cast<uint32_t>(box * classes + c)});
  }
}

template <class acc_t>
HOST_DEVICE void decode_pair(const BoxHeads<acc_t>& heads, int64_t image, const Pair<acc_t>& pair,
                             std::vector<Candidate<acc_t>>& found) {
  const int64_t label = pair.index % heads.classes;
  const Box<acc_t> box = decoded_box(heads, image, pair.index / heads.classes, label);
  if (box.x1 == box.x1) found.push_back({box, pair.score, label});
}

// Keeps the best `limit` pairs of each class, in their order. Of equal scores the first is kept.
template <class acc_t>
void limit_classes(std::vector<Pair<acc_t>>& pairs, int64_t classes, int64_t limit) {
  std::vector<std::vector<Pair<acc_t>>> by_class(classes);
  for (const auto& pair : pairs) by_class[pair.index % classes].push_back(pair);
  pairs.clear();
  for (auto& own : by_class) {
    if (static_cast<int64_t>(own.size()) > limit) {
      std::nth_element(own.begin(), own.begin() + limit, own.end(), [](const auto& a, const auto& b) {
        return a.score != b.score ? a.score > b.score : a.index < b.index;
      });
      own.resize(limit);
    }
    pairs.insert(pairs.end(), own.begin(), own.end());
  }
  std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
}

struct Cpu {
  template <class acc_t>
  static void run(const BoxHeads<acc_t>& heads, acc_t score_thresh, std::optional<int64_t> class_top_n,
                  double nms_thresh, const Detections& detections) {
    const int64_t parts = std::max<int64_t>(1, (heads.room + kBoxesPerTask - 1) / kBoxesPerTask);
    std::vector<std::vector<Pair<acc_t>>> pairs(heads.batch * parts);
    std::vector<std::vector<Candidate<acc_t>>> found(heads.batch * parts);
    const auto decode_part = [&](int64_t i) {
      for (const auto& pair : pairs[i]) decode_pair(heads, i / parts, pair, found[i]);
    };
    parallel_tasks(heads.batch * parts, kExponentialCost * kBoxesPerTask * heads.classes, [&](const auto& next) {
      std::vector<double> powers(heads.classes);
      for (int64_t i = next(); i < heads.batch * parts; i = next()) {
        const int64_t image = i / parts, begin = i % parts * kBoxesPerTask;
        const int64_t end = std::min(begin + kBoxesPerTask, heads.count(image));
        for (int64_t box = begin; box < end; ++box) pass_threshold(heads, score_thresh, image, box, powers, pairs[i]);
        if (!class_top_n.has_value()) decode_part(i);
      }
    });
    if (class_top_n.has_value()) {
      parallel_rows(heads.batch, kExponentialCost * heads.room, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
          auto& all = pairs[n * parts];
          for (int64_t i = n * parts + 1; i < (n + 1) * parts; ++i) {
            all.insert(all.end(), pairs[i].begin(), pairs[i].end());
          }
          limit_classes(all, heads.classes, *class_top_n);
          decode_part(n * parts);
        }
      });
    }
    detect(found, parts, nms_thresh, detections);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("select_box_detections", TORCH_BOX(&select_box_detections<Cpu>));
}

}  // namespace fpn_fast
