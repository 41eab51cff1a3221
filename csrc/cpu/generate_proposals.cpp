// SPDX-License-Identifier: Apache-2.0
// Region proposals on the CPU: an image's level is one task, from the scan of its logits to its kept boxes; then each
// image's levels, each in order of its scores, are merged.
#include "../torch/generate_proposals.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
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

template <class T, class acc_t = acc_type<T>>
struct Heads {
  std::vector<FeatureMap<const T>> objectness, deltas;
  std::vector<Box<acc_t>> cells;  // of each level, as many as objectness has channels
  const acc_t* image_sizes;       // [N, 2], height and width
};

template <class T>
struct Scratch {
  TopLogits<T> top;
  KeptBoxes<acc_type<T>> kept;
};

// The proposals of one image and level, best first.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void propose(const Heads<T>& heads, const ProposalArguments<acc_t>& arguments, int64_t image, int64_t level,
                         Scratch<T>& scratch, std::vector<Proposal<acc_t>>& found) {
  const FeatureMap<const T>&objectness = heads.objectness[level], &deltas = heads.deltas[level];
  const int64_t anchors = objectness.channels, width = objectness.width;
  const Box<acc_t>* cells = heads.cells.data() + level * anchors;
  const acc_t* size = heads.image_sizes + 2 * image;
  scratch.top.reset(arguments.pre_nms_top_n, anchors * objectness.height * width,
                    -std::numeric_limits<acc_t>::infinity());
  scratch.top.scan_rows(objectness, image, 0, objectness.height);
  const auto& keys = scratch.top.sorted();
  const int64_t room = std::min<int64_t>(keys.size(), arguments.post_nms_top_n);
  scratch.kept.reset(room);
  found.reserve(room);
  for (const auto key : keys) {
    if (static_cast<int64_t>(found.size()) == room) break;
    const acc_t logit = TopLogits<T>::number_of(key);
    const acc_t probability = logistic(logit);
    // Later ones are not higher.
    if (!(probability >= arguments.score_thresh)) break;
    const int64_t index = TopLogits<T>::index_of(key);
    const int64_t anchor = index % anchors, x = index / anchors % width, y = index / anchors / width;
    acc_t code[4];
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
      code[i] = to_acc(*deltas.at(image, 4 * anchor + i, y, x));
      finite &= is_finite(code[i]);
    }
    if (!finite) continue;
    const Box<acc_t> source =
        anchor_at(arguments.coding, cells[anchor], y, x, arguments.stride_y[level], arguments.stride_x[level]);
    Box<acc_t> box = decode(arguments.coding, source, code);
    if (!is_finite(box)) continue;
    box = clip(box, size[0], size[1]);
    if (!is_large_enough(box, arguments.min_size, arguments.strict_size)) continue;
    if (scratch.kept.overlaps_one(arguments.rule, box, 0, scratch.kept.size())) continue;
    scratch.kept.push(box);
    found.push_back({box, arguments.logits_out ? logit : probability});
  }
}

// The best of all levels of an image; of equal scores the finer level's first.
template <class acc_t>
int64_t merge(const std::vector<Proposal<acc_t>>* levels, int64_t count, int64_t room, acc_t* boxes, acc_t* scores) {
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
    boxes[4 * found] = next.box.x1, boxes[4 * found + 1] = next.box.y1;
    boxes[4 * found + 2] = next.box.x2, boxes[4 * found + 3] = next.box.y2;
    scores[found] = next.score;
  }
  std::fill(boxes + 4 * found, boxes + 4 * room, acc_t(0));
  std::fill(scores + found, scores + room, acc_t(0));
  return found;
}

template <class T, class acc_t = acc_type<T>>
void generate(const Heads<T>& heads, const ProposalArguments<acc_t>& arguments, acc_t* boxes, acc_t* scores,
              int64_t* counts) {
  const int64_t levels = static_cast<int64_t>(heads.objectness.size()), batch = heads.objectness[0].batch;
  const int64_t room = arguments.post_nms_top_n;
  int64_t logits = 0;
  for (const auto& map : heads.objectness) logits += map.channels * map.height * map.width;
  std::vector<std::vector<Proposal<acc_t>>> found(batch * levels);
  parallel_tasks(batch * levels, 2 * logits / levels, [&](const auto& next) {
    Scratch<T> scratch;
    for (int64_t task = next(); task < batch * levels; task = next()) {
      // The finest levels of all images first: they take longest.
      const int64_t level = task / batch, image = task % batch;
      propose(heads, arguments, image, level, scratch, found[image * levels + level]);
    }
  });
  for (int64_t n = 0; n < batch; ++n) {
    counts[n] = merge(&found[n * levels], levels, room, boxes + 4 * n * room, scores + n * room);
  }
}

std::tuple<Tensor, Tensor, Tensor> generate_proposals_cpu(
    std::vector<Tensor> objectness, std::vector<Tensor> deltas, std::vector<double> cell_anchors,
    std::vector<int64_t> strides, Tensor image_sizes, int64_t pre_nms_top_n, int64_t post_nms_top_n, double nms_thresh,
    double score_thresh, double min_size, std::vector<double> weights, std::vector<double> means,
    std::vector<double> stds, double scale_clamp, bool symmetric_clamp, bool mean_center, double center_offset,
    double center_clamp, bool strict_size, bool logits_out, int64_t convention) {
  check_proposals(objectness, deltas, cell_anchors, strides, image_sizes, pre_nms_top_n, post_nms_top_n, convention);
  const ScalarType type = image_sizes.scalar_type();
  const int64_t batch = objectness[0].size(0);
  Tensor boxes = empty_like(image_sizes, {batch, post_nms_top_n, 4}, type);
  Tensor scores = empty_like(image_sizes, {batch, post_nms_top_n}, type);
  Tensor counts = empty_like(image_sizes, {batch}, ScalarType::Long);
  dispatch_floating(objectness[0].scalar_type(), "generate_proposals", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    const auto coding =
        box_coding<acc_t>(weights, means, stds, scale_clamp, symmetric_clamp, mean_center, center_offset, center_clamp);
    const auto arguments = proposal_arguments<acc_t>(strides, pre_nms_top_n, post_nms_top_n, nms_thresh, score_thresh,
                                                     min_size, coding, strict_size, logits_out, convention);
    const Heads<T> heads{to_feature_maps<const T>(objectness), to_feature_maps<const T>(deltas),
                         cell_boxes<acc_t>(cell_anchors), static_cast<const acc_t*>(image_sizes.data_ptr())};
    generate(heads, arguments, static_cast<acc_t*>(boxes.data_ptr()), static_cast<acc_t*>(scores.data_ptr()),
             static_cast<int64_t*>(counts.data_ptr()));
  });
  return {boxes, scores, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("generate_proposals", TORCH_BOX(&generate_proposals_cpu));
}

}  // namespace fpn_fast
