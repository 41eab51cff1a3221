// SPDX-License-Identifier: Apache-2.0
// Region proposals on the CPU. A task is one level of one image, from the scan of its logits to its kept boxes. Then
// the levels of each image are merged by score.
#include "../torch/generate_proposals.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "greedy_nms.h"
#include "tasks.h"
#include "top_logits.h"

namespace fpn_fast {
namespace {

template <class acc_t>
struct Proposal {
  Box<acc_t> box;
  acc_t score;
};

template <class T>
struct Scratch {
  TopLogits<T> top;
  KeptBoxes<acc_type<T>> kept;
};

// The proposals of one image and level, best first.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void propose(const ProposalArguments<T>& arguments, int64_t image, int level, Scratch<T>& scratch,
                         std::vector<Proposal<acc_t>>& found) {
  const FeatureMap<const T>& objectness = arguments.objectness[level];
  const int64_t logits = objectness.channels * objectness.height * objectness.width;
  scratch.top.reset(arguments.pre_nms_top_n, logits, -std::numeric_limits<acc_t>::infinity());
  scratch.top.scan_rows(objectness, image, 0, objectness.height);
  const auto& keys = scratch.top.sorted();
  const int64_t room = std::min<int64_t>(keys.size(), arguments.post_nms_top_n);
  scratch.kept.reset(room);
  found.reserve(room);
  for (const auto key : keys) {
    if (static_cast<int64_t>(found.size()) == room) break;
    const acc_t logit = TopLogits<T>::number_of(key);
    const acc_t probability = logistic(logit);
    // Keys descend, so later probabilities are not higher.
    if (!(probability >= arguments.score_thresh)) break;
    const Box<acc_t> box = decoded_box(arguments.head, image, level, TopLogits<T>::index_of(key));
    // False where x1 is NaN.
    if (!is_large_enough(box, arguments.min_size, arguments.strict_size)) continue;
    if (scratch.kept.overlaps_one(arguments.rule, box, 0, scratch.kept.size())) continue;
    scratch.kept.push(box);
    found.push_back({box, arguments.logits_out ? logit : probability});
  }
}

// Merges the levels of an image by score. Of equal scores the finer level's comes first.
template <class acc_t>
int64_t merge(const std::vector<Proposal<acc_t>>* levels, int64_t count, int64_t room, Box<acc_t>* boxes,
              acc_t* scores) {
  std::vector<size_t> taken(count, 0);
  int64_t found = 0;
  for (; found < room; ++found) {
    int64_t best = -1;
    for (int64_t level = 0; level < count; ++level) {
      if (taken[level] == levels[level].size()) continue;
      if (best < 0 || levels[level][taken[level]].score > levels[best][taken[best]].score) best = level;
    }
    if (best < 0) break;
    const Proposal<acc_t>& next = levels[best][taken[best]++];
    boxes[found] = next.box, scores[found] = next.score;
  }
  std::fill(boxes + found, boxes + room, Box<acc_t>{0, 0, 0, 0});
  std::fill(scores + found, scores + room, acc_t(0));
  return found;
}

struct Cpu {
  template <class T, class acc_t = acc_type<T>>
  static void run(ProposalArguments<T>& arguments, Box<acc_t>* boxes, acc_t* scores, int64_t* counts, const Tensor&) {
    arguments.head.cells = arguments.cells.data();
    const int64_t levels = static_cast<int64_t>(arguments.objectness.size()), batch = arguments.objectness[0].batch;
    const int64_t room = arguments.post_nms_top_n;
    int64_t logits = 0;
    for (const auto& map : arguments.objectness) logits += map.channels * map.height * map.width;
    std::vector<std::vector<Proposal<acc_t>>> found(batch * levels);
    parallel_tasks(batch * levels, 2 * logits / levels, [&](const auto& next) {
      Scratch<T> scratch;
      for (int64_t task = next(); task < batch * levels; task = next()) {
        // The finest levels of all images first, because they take longest.
        const int64_t level = task / batch, image = task % batch;
        propose(arguments, image, static_cast<int>(level), scratch, found[image * levels + level]);
      }
    });
    for (int64_t n = 0; n < batch; ++n) {
      counts[n] = merge(&found[n * levels], levels, room, boxes + n * room, scores + n * room);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("generate_proposals", TORCH_BOX(&generate_proposals<Cpu>));
}

}  // namespace fpn_fast
