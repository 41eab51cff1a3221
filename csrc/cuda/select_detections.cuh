// SPDX-License-Identifier: Apache-2.0
// Detections of a dense head: the best logits of each level above a threshold, their boxes, class-aware suppression
// over all levels, and the best of an image. This takes eleven launches for up to 8192 candidates per image.
// top_logits.cuh, sorted_runs.cuh and greedy_nms.cuh say when there are more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/boxes.h"
#include "../common/dense_heads.h"
#include "../common/detection_scores.h"
#include "../common/detections.h"
#include "../common/exponential.h"
#include "../common/feature_map.h"
#include "../common/head_decoding.h"
#include "../common/ordered_bits.h"
#include "../common/scalar.h"
#include "head_setup.cuh"
#include "launch.h"
#include "scratch.h"
#include "segmented_nms.cuh"
#include "sorted_runs.cuh"
#include "top_logits.cuh"

namespace fpn_fast {

// Logits that are ranked together with the centerness of their position.
template <class T>
struct CenteredSelection {
  LogitSelection<T> logits;  // logits below its lowest cannot pass the threshold
  FeatureMap<const T> centerness[kMaxProposalLevels];
  acc_type<T> lowest_score;
  uint32_t classes;
};

// Ranks a logit by its score. A score takes two exponentials, so most logits are excluded before.
template <class T>
struct RankedByScore {
  using acc_t = acc_type<T>;
  const CenteredSelection<T>& selection;

  __device__ __forceinline__ acc_t operator()(const LogitSpan& span, acc_t logit, uint32_t i) const {
    constexpr acc_t kNone = std::numeric_limits<acc_t>::infinity();
    if (!(logit >= selection.logits.lowest) || !is_finite(logit)) return kNone;
    const FeatureMap<const T>& centerness = selection.centerness[span.level];
    const uint32_t place = logit_index(selection.logits.levels[span.level], i) / selection.classes;
    const uint32_t anchors = static_cast<uint32_t>(centerness.channels), pixel = place / anchors;
    const uint32_t width = centerness.width;
    const acc_t center = to_acc(*centerness.at(span.image, place % anchors, pixel / width, pixel % width));
    if (!is_finite(center)) return kNone;
    const acc_t score = centered_score(logit, logistic(center));
    return score >= selection.lowest_score ? score : kNone;
  }

  __device__ __forceinline__ acc_t bound(int) const { return selection.logits.lowest; }
};

template <class T>
__global__ void __launch_bounds__(kLogitThreads, 3)
    count_scores_kernel(const __grid_constant__ CenteredSelection<T> selection) {
  count_span(selection.logits, RankedByScore<T>{selection});
}

template <class T>
__global__ void __launch_bounds__(kLogitThreads, 3)
    select_scores_kernel(const __grid_constant__ CenteredSelection<T> selection) {
  select_span(selection.logits, RankedByScore<T>{selection});
}

// The candidates of all levels of an image, one level after the other, as segmented NMS takes them.
template <class T>
struct CandidateDecoding {
  using acc_t = acc_type<T>;

  HeadDecoding<T> head;
  SortedRuns<RankKey<acc_t>> runs;    // one list per image and level
  int first[kMaxProposalLevels + 1];  // level i of an image has the candidates [first[i], first[i + 1])
  uint32_t classes;
  bool scored;        // ranked by score instead of logit
  Box<acc_t>* boxes;  // [images, candidates of all levels]
  acc_t* scores;      // NaN where there is no candidate
  int64_t* labels;
};

// Merges the runs of a level and decodes each logit at its final position.
template <class T>
__global__ void __launch_bounds__(kMergeThreads, 3)
    decode_candidates_kernel(const __grid_constant__ CandidateDecoding<T> decoding) {
  using acc_t = acc_type<T>;
  const SortedRuns<RankKey<acc_t>>& runs = decoding.runs;
  const MergeBlock block = merge_block(runs);
  const int64_t first = block.image * decoding.first[runs.lists] + decoding.first[block.list];
  const int room = decoding.first[block.list + 1] - decoding.first[block.list];
  const int count = place_in_order(runs, block, [&](int rank, const RankKey<acc_t>& key) {
    const uint32_t index = index_of_key(key);
    const acc_t number = number_of_key<acc_t>(key);
    decoding.boxes[first + rank] = decoded_box(decoding.head, block.image, block.list, index / decoding.classes);
    decoding.scores[first + rank] = decoding.scored ? number : logistic(number);
    decoding.labels[first + rank] = index % decoding.classes;
  });
  for (int place = count + block.thread(); place < room; place += block.threads()) {
    decoding.boxes[first + place] = {0, 0, 0, 0};
    decoding.scores[first + place] = std::numeric_limits<acc_t>::quiet_NaN();
  }
}

template <class acc_t>
struct DetectionGathering {
  const Box<acc_t>* boxes;  // [images, places]
  const acc_t* scores;
  const int64_t* labels;
  int64_t places;
  KeptRanks ranks;
  DetectionTables<acc_t> tables;
};

// A block writes an image's kept candidates by score, and the padding.
template <class acc_t>
__global__ void __launch_bounds__(kNmsThreads)
    gather_detections_kernel(const __grid_constant__ DetectionGathering<acc_t> gathering) {
  const DetectionTables<acc_t>& tables = gathering.tables;
  const int64_t image = blockIdx.x;
  const int64_t found = write_by_score(gathering.ranks, image, tables.room, [&](int64_t place, int index) {
    const int64_t source = image * gathering.places + index;
    tables.write(image, place, gathering.boxes[source], gathering.scores[source], gathering.labels[source]);
  });
  for (int64_t place = found + threadIdx.x; place < tables.room; place += kNmsThreads) tables.clear(image, place);
  if (threadIdx.x == 0) tables.counts[image] = found;
}

template <class T>
struct DetectionPlan {
  using acc_t = acc_type<T>;

  CenteredSelection<T> selection;
  std::vector<RunMerge<RankKey<acc_t>>> merges;
  CandidateDecoding<T> decoding;
  NmsPlan<acc_t> nms;
  Box<acc_t>* cells;
};

template <class T>
DetectionPlan<T> plan_detections(Scratch& scratch, const DenseHeads<T>& heads) {
  using acc_t = acc_type<T>;
  DetectionPlan<T> plan{};
  const int64_t levels = heads.levels(), images = heads.batch();
  CandidateDecoding<T>& decoding = plan.decoding;
  decoding.classes = static_cast<uint32_t>(heads.classes), decoding.scored = !heads.centerness.empty();
  int64_t limit = 0;
  for (int64_t i = 0; i < levels; ++i) {
    limit = std::max(limit, heads.most(i));
    decoding.first[i + 1] = decoding.first[i] + static_cast<int>(heads.most(i));
  }
  const int64_t all = decoding.first[levels];

  decoding.head = heads.head;
  decoding.head.cells = plan.cells = scratch.take<Box<acc_t>>(levels * heads.head.anchors);

  CenteredSelection<T>& selection = plan.selection;
  selection.classes = decoding.classes;
  std::copy(heads.centerness.begin(), heads.centerness.end(), selection.centerness);
  selection.lowest_score = heads.lowest;
  // A bound for the highest centerness.
  const acc_t lowest = decoding.scored ? logit_bound(heads.lowest, acc_t(1)) : heads.lowest;
  const int64_t room = (std::max<int64_t>(limit, 1) + kNmsChunk - 1) / kNmsChunk * kNmsChunk;
  // Few logits pass a threshold, and then counting takes longer than it saves. A probability of 1e-3 is none.
  const bool counted = !(lowest > acc_t(-7));
  selection.logits = plan_selection<T>(scratch, heads.logits, limit, room, lowest, counted);
  decoding.runs = selection.logits.runs;
  plan.merges = plan_merges(scratch, images, room, decoding.runs);

  decoding.boxes = scratch.take<Box<acc_t>>(images * all);
  decoding.scores = scratch.take<acc_t>(images * all);
  decoding.labels = scratch.take<int64_t>(images * all);
  const NmsInput<acc_t> input{decoding.boxes, decoding.scores, decoding.labels, nullptr, images, all, false};
  plan.nms = plan_nms(scratch, input, make_overlap_rule<acc_t>(heads.nms_thresh, NmsConvention::kDivision));
  return plan;
}

template <class T, class Launch, class acc_t = acc_type<T>>
void detect_in_launches(const DetectionPlan<T>& plan, const std::vector<Box<acc_t>>& cells,
                        const DetectionTables<acc_t>& tables, const Launch& launch) {
  const CandidateDecoding<T>& decoding = plan.decoding;
  const LogitSelection<T>& logits = plan.selection.logits;
  const int64_t images = logits.images, levels = logits.runs.lists;
  const bool counted = logits.bins != nullptr;
  set_up_in_launches(plan.cells, cells, logits.bins, counted ? images * levels * kBins : 0, launch);
  if (decoding.scored) {
    if (counted) launch(count_scores_kernel<T>, selection_config(logits), plan.selection);
    launch(select_scores_kernel<T>, selection_config(logits), plan.selection);
  } else {
    select_in_launches(logits, launch);
  }
  merge_in_launches(plan.merges, images, launch);
  launch(decode_candidates_kernel<T>, merge_config(decoding.runs, images), decoding);
  const KeptRanks ranks = nms_in_launches(plan.nms, launch);
  launch(gather_detections_kernel<acc_t>, LaunchConfig{images, kNmsThreads},
         DetectionGathering<acc_t>{decoding.boxes, decoding.scores, decoding.labels, decoding.first[levels], ranks,
                                   tables});
}

}  // namespace fpn_fast
