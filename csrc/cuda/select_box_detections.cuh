// SPDX-License-Identifier: Apache-2.0
// Detections of a box head.
// Probabilities are stored by class, so that the candidates of one class and image form a list. The best of a list are
// sorted, decoded and suppressed without the other classes, so no candidate is ever sorted by class. The kept scores
// return to the table, all others are removed, and the best of the table are an image's detections. This takes nine
// launches for up to 65,536 boxes and classes of up to 4096 candidates. sorted_runs.cuh and greedy_nms.cuh say when
// there are more.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../common/box_heads.h"
#include "../common/detections.h"
#include "../common/exact.h"
#include "../common/exponential.h"
#include "../common/ordered_bits.h"
#include "greedy_nms.cuh"
#include "head_setup.cuh"
#include "launch.h"
#include "scratch.h"
#include "sorted_runs.cuh"
#include "top_logits.cuh"
#include "warp.cuh"

namespace fpn_fast {

// Eight warps with one box each. Neighbours in the table fill a memory sector of 32 bytes.
constexpr int kBoxThreads = 256;
constexpr int kBoxWarps = kBoxThreads / 32;

template <class acc_t>
struct BoxScoring {
  BoxHeads<acc_t> heads;
  acc_t* probabilities;  // [batch, classes - 1, room]; NaN where there is no box
};

// A warp computes the probabilities of a box, in double with our exponential and rounded, so that the maths library
// does not matter.
template <class acc_t>
__global__ void __launch_bounds__(kBoxThreads, 3)
    box_probabilities_kernel(const __grid_constant__ BoxScoring<acc_t> scoring) {
  const BoxHeads<acc_t>& heads = scoring.heads;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kBoxWarps + threadIdx.x / 32;
  if (row >= heads.batch * heads.room) return;
  const int64_t image = row / heads.room, box = row % heads.room;
  const acc_t* logits = heads.logits + row * heads.classes;
  bool there = box < heads.count(image);
  acc_t highest = -std::numeric_limits<acc_t>::infinity();
  if (there) {
#pragma unroll 4
    for (int64_t c = lane; c < heads.classes; c += 32) {
      const acc_t logit = logits[c];
      there = there && logit == logit;
      highest = logit > highest ? logit : highest;
    }
  }
  highest = warp_maximum(highest);
  there = __all_sync(~0u, there) && is_finite(highest);
  const auto power = [&](int64_t c) {
    return exponential(subtract(static_cast<double>(logits[c]), static_cast<double>(highest)));
  };
  double sum = 0;
  if (there) {
#pragma unroll 1
    for (int64_t c = lane; c < heads.classes; c += 32) sum = add(sum, power(c));
  }
  sum = warp_reduce(sum, [](double a, double b) { return add(a, b); });
  acc_t* own = scoring.probabilities + (image * (heads.classes - 1) - 1) * heads.room + box;
  // Class 0, the background, is left out.
#pragma unroll 1
  for (int64_t c = lane == 0 ? 32 : lane; c < heads.classes; c += 32) {
    own[c * heads.room] = there ? static_cast<acc_t>(divide(power(c), sum)) : std::numeric_limits<acc_t>::quiet_NaN();
  }
}

template <class acc_t>
struct BoxCandidates {
  BoxHeads<acc_t> heads;
  SortedRuns<RankKey<acc_t>> runs;  // one list per image and class
  Candidates<acc_t> candidates;
  int* sources;          // [lists, candidates.room], the boxes that they come from
  acc_t* scores;         // [lists, candidates.room]
  acc_t* probabilities;  // [lists, room]
};

// Merges the runs of a class and decodes each box at its final position. Also clears the table: no box is kept yet.
template <class acc_t>
__global__ void __launch_bounds__(kMergeThreads, 3)
    decode_boxes_kernel(const __grid_constant__ BoxCandidates<acc_t> decoding) {
  const BoxHeads<acc_t>& heads = decoding.heads;
  const Candidates<acc_t>& candidates = decoding.candidates;
  const SortedRuns<RankKey<acc_t>>& runs = decoding.runs;
  const MergeBlock block = merge_block(runs);
  const int64_t list = block.image, first = list * candidates.room;
  for (int place = block.thread(); place < candidates.room; place += block.threads()) {
    prepare_place(candidates, list, place);
  }
  for (int64_t box = block.thread(); box < heads.room; box += block.threads()) {
    decoding.probabilities[list * heads.room + box] = std::numeric_limits<acc_t>::quiet_NaN();
  }
  const int64_t image = list / (heads.classes - 1), label = list % (heads.classes - 1) + 1;
  const int count = place_in_order(runs, block, [&](int rank, const RankKey<acc_t>& key) {
    const int box = static_cast<int>(index_of_key(key));
    candidates.boxes[first + rank] = decoded_box(heads, image, box, label);
    decoding.sources[first + rank] = box;
    decoding.scores[first + rank] = number_of_key<acc_t>(key);
  });
  if (block.thread() == 0) candidates.counts[list] = count;
}

template <class acc_t>
__global__ void __launch_bounds__(kBoxThreads)
    keep_boxes_kernel(const __grid_constant__ BoxCandidates<acc_t> decoding) {
  const Candidates<acc_t>& candidates = decoding.candidates;
  const int blocks = (candidates.room + kBoxThreads - 1) / kBoxThreads;
  const int64_t list = blockIdx.x / blocks, first = list * candidates.room;
  const int number = static_cast<int>(blockIdx.x % blocks) * kBoxThreads + threadIdx.x;
  if (number >= candidates.kept_counts[first]) return;
  const int64_t place = first + candidates.kept[first + number];
  decoding.probabilities[list * decoding.heads.room + decoding.sources[place]] = decoding.scores[place];
}

template <class acc_t>
struct BoxOutput {
  BoxHeads<acc_t> heads;
  SortedRuns<RankKey<acc_t>> runs;  // pairs in the order (box, class), per image
  DetectionTables<acc_t> tables;
};

// Merges the runs of an image, decodes each box again at its final position, and writes the padding.
template <class acc_t>
__global__ void __launch_bounds__(kMergeThreads, 3)
    box_detections_kernel(const __grid_constant__ BoxOutput<acc_t> output) {
  const SortedRuns<RankKey<acc_t>>& runs = output.runs;
  const MergeBlock block = merge_block(runs);
  const int count = place_in_order(runs, block, [&](int rank, const RankKey<acc_t>& key) {
    const int64_t pair = index_of_key(key), classes = output.heads.classes - 1;
    const int64_t box = pair / classes, label = pair % classes + 1;
    output.tables.write(block.image, rank, decoded_box(output.heads, block.image, box, label),
                        number_of_key<acc_t>(key), label);
  });
  for (int64_t place = count + block.thread(); place < output.tables.room; place += block.threads()) {
    output.tables.clear(block.image, place);
  }
  if (block.thread() == 0) output.tables.counts[block.image] = count;
}

template <class acc_t>
struct BoxPlan {
  BoxScoring<acc_t> scoring;
  LogitSelection<acc_t> of_classes, of_images;
  std::vector<RunMerge<RankKey<acc_t>>> class_merges, image_merges;
  BoxCandidates<acc_t> decoding;
  SortedRuns<RankKey<acc_t>> detections;
};

// Plans up to `max_detections` per image, from the best `class_top_n` of each class with scores above `score_thresh`.
template <class acc_t>
BoxPlan<acc_t> plan_boxes(Scratch& scratch, const BoxHeads<acc_t>& heads, acc_t score_thresh,
                          std::optional<int64_t> class_top_n, const OverlapRule<acc_t>& rule, int64_t max_detections) {
  BoxPlan<acc_t> plan{};
  const acc_t infinity = std::numeric_limits<acc_t>::infinity();
  const int64_t classes = heads.classes - 1, lists = heads.batch * classes, room = heads.room;
  const int64_t limit = std::min(class_top_n.value_or(room), room);
  BoxCandidates<acc_t>& decoding = plan.decoding;
  decoding.heads = plan.scoring.heads = heads;
  decoding.probabilities = plan.scoring.probabilities = scratch.take<acc_t>(lists * room);
  decoding.candidates = plan_candidates<acc_t>(scratch, lists, limit, false, false, rule);
  const int64_t places = decoding.candidates.room;
  decoding.sources = scratch.take<int>(lists * places), decoding.scores = scratch.take<acc_t>(lists * places);
  // The boxes of a class are the channels of a map of one pixel.
  const FeatureMap<const acc_t> of_class{decoding.probabilities, lists, room, 1, 1, room, 1, 1, 1};
  plan.of_classes =
      plan_selection<acc_t>(scratch, {of_class}, limit, places, std::nextafter(score_thresh, infinity), false);
  decoding.runs = plan.of_classes.runs;
  plan.class_merges = plan_merges(scratch, lists, places, decoding.runs);
  // The boxes of an image are the pixels of a map, and its classes the channels.
  const FeatureMap<const acc_t> of_image{decoding.probabilities, heads.batch, classes, 1, static_cast<int>(room),
                                         classes * room,         room,        room,    1};
  const int64_t most = std::min(max_detections, classes * room);
  const int64_t rounded = (std::max<int64_t>(most, 1) + kNmsChunk - 1) / kNmsChunk * kNmsChunk;
  plan.of_images = plan_selection<acc_t>(scratch, {of_image}, most, rounded, -infinity, true);
  plan.detections = plan.of_images.runs;
  plan.image_merges = plan_merges(scratch, heads.batch, rounded, plan.detections);
  return plan;
}

template <class acc_t, class Launch>
void detect_in_launches(const BoxPlan<acc_t>& plan, const DetectionTables<acc_t>& tables, const Launch& launch) {
  const BoxHeads<acc_t>& heads = plan.scoring.heads;
  const Candidates<acc_t>& candidates = plan.decoding.candidates;
  set_up_in_launches<acc_t>(nullptr, {}, plan.of_images.bins, heads.batch * kBins, launch);
  launch(box_probabilities_kernel<acc_t>,
         LaunchConfig{(heads.batch * heads.room + kBoxWarps - 1) / kBoxWarps, kBoxThreads}, plan.scoring);
  select_in_launches(plan.of_classes, launch);
  merge_in_launches(plan.class_merges, candidates.lists, launch);
  launch(decode_boxes_kernel<acc_t>, merge_config(plan.decoding.runs, candidates.lists), plan.decoding);
  suppress_in_launches(candidates, launch);
  const int64_t blocks = (candidates.room + kBoxThreads - 1) / kBoxThreads;
  launch(keep_boxes_kernel<acc_t>, LaunchConfig{candidates.lists * blocks, kBoxThreads}, plan.decoding);
  select_in_launches(plan.of_images, launch);
  merge_in_launches(plan.image_merges, heads.batch, launch);
  launch(box_detections_kernel<acc_t>, merge_config(plan.detections, heads.batch),
         BoxOutput<acc_t>{heads, plan.detections, tables});
}

}  // namespace fpn_fast
