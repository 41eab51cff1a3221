// SPDX-License-Identifier: Apache-2.0
// Region proposals: the highest logits of each level, their boxes, suppression per level, and the best of all levels.
// This takes seven launches for up to 8192 boxes per level. top_logits.cuh, sorted_runs.cuh and greedy_nms.cuh say when
// there are more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/anchors.h"
#include "../common/boxes.h"
#include "../common/exponential.h"
#include "../common/feature_map.h"
#include "../common/ordered_bits.h"
#include "../common/proposal_arguments.h"
#include "../common/scalar.h"
#include "greedy_nms.cuh"
#include "head_setup.cuh"
#include "launch.h"
#include "scratch.h"
#include "sorted_runs.cuh"
#include "top_logits.cuh"

namespace fpn_fast {

constexpr int kProposalThreads = 256;

template <class T>
struct ProposalDecoding {
  using acc_t = acc_type<T>;

  HeadDecoding<T> head;
  acc_t score_thresh, min_size;
  bool strict_size, logits_out;
  SortedRuns<RankKey<acc_t>> runs;  // one list per image and level
  Candidates<acc_t> candidates;     // one list per image and level
  acc_t* scores;                    // of the candidates
};

// Merges the runs of a level and decodes each logit at its final position.
template <class T>
__global__ void __launch_bounds__(kMergeThreads, 3)
    decode_proposals_kernel(const __grid_constant__ ProposalDecoding<T> decoding) {
  using acc_t = acc_type<T>;
  const Candidates<acc_t>& candidates = decoding.candidates;
  const SortedRuns<RankKey<acc_t>>& runs = decoding.runs;
  const MergeBlock block = merge_block(runs);
  const int64_t list = block.image * runs.lists + block.list, first = list * candidates.room;
  for (int place = block.thread(); place < candidates.room; place += block.threads()) {
    prepare_place(candidates, list, place);
  }
  const int count = place_in_order(runs, block, [&](int rank, const RankKey<acc_t>& key) {
    const acc_t logit = number_of_key<acc_t>(key), probability = logistic(logit);
    Box<acc_t> box = decoded_box(decoding.head, block.image, block.list, index_of_key(key));
    const bool large = is_large_enough(box, decoding.min_size, decoding.strict_size);
    if (!large || !(probability >= decoding.score_thresh)) box.x1 = std::numeric_limits<acc_t>::quiet_NaN();
    candidates.boxes[first + rank] = box;
    decoding.scores[first + rank] = decoding.logits_out ? logit : probability;
  });
  if (block.thread() == 0) candidates.counts[list] = count;
}

template <class acc_t>
struct ProposalOutput {
  Candidates<acc_t> candidates;
  int levels;
  int64_t room;
  Box<acc_t>* boxes;  // [N, room]
  acc_t* scores;      // [N, room]
  int64_t* counts;    // [N]
};

// Writes each kept box at its position among those of all levels. Of equal scores the finer level's comes first. Also
// zeroes the padding.
template <class acc_t>
__global__ void __launch_bounds__(kProposalThreads, 3)
    merge_proposals_kernel(const __grid_constant__ ProposalOutput<acc_t> output) {
  const Candidates<acc_t>& candidates = output.candidates;
  const int64_t own = int64_t{output.levels} * candidates.room;
  const int64_t blocks = (own + kProposalThreads - 1) / kProposalThreads;
  const int64_t image = blockIdx.x / blocks, thread = blockIdx.x % blocks * kProposalThreads + threadIdx.x;
  const int level = static_cast<int>(thread / candidates.room), number = static_cast<int>(thread % candidates.room);
  const int64_t first_list = image * output.levels;
  const auto score_of = [&](int64_t list, int i) { return candidates.kept_scores[list * candidates.room + i]; };
  int counts[kMaxProposalLevels], most = 0;
  int64_t total = 0;
#pragma unroll
  for (int i = 0; i < kMaxProposalLevels; ++i) {
    counts[i] = i < output.levels ? candidates.kept_counts[(first_list + i) * candidates.room] : 0;
    total += counts[i], most = max(most, counts[i]);
  }
  total = min(total, output.room);
  if (thread == 0) output.counts[image] = total;
  const int64_t first = image * output.room;
  for (int64_t i = total + thread; i < output.room; i += blocks * kProposalThreads) {
    output.boxes[first + i] = {0, 0, 0, 0}, output.scores[first + i] = 0;
  }
  if (level >= output.levels || number >= candidates.kept_counts[(first_list + level) * candidates.room]) return;
  const acc_t score = score_of(first_list + level, number);
  const int64_t list = (first_list + level) * candidates.room;
  const Box<acc_t> box = candidates.boxes[list + candidates.kept[list + number]];
  int found[kMaxProposalLevels] = {};
#pragma unroll 1
  for (int step = 1 << (31 - __clz(most)); step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kMaxProposalLevels; ++i) {
      const int next = found[i] + step;
      if (i == level || next > counts[i]) continue;
      const acc_t other = score_of(first_list + i, next - 1);
      if (other > score || (other == score && i < level)) found[i] = next;
    }
  }
  int64_t rank = number;
#pragma unroll
  for (int i = 0; i < kMaxProposalLevels; ++i) rank += found[i];
  if (rank >= output.room) return;
  output.boxes[first + rank] = box;
  output.scores[first + rank] = score;
}

template <class T>
struct ProposalPlan {
  using acc_t = acc_type<T>;

  LogitSelection<T> selection;
  std::vector<RunMerge<RankKey<acc_t>>> merges;
  ProposalDecoding<T> decoding;
  Box<acc_t>* cells;
  int64_t post_nms_top_n;
};

template <class T>
ProposalPlan<T> plan_proposals(Scratch& scratch, const ProposalArguments<T>& arguments) {
  using acc_t = acc_type<T>;
  ProposalPlan<T> plan{};
  const auto& objectness = arguments.objectness;
  const int64_t levels = static_cast<int64_t>(objectness.size()), images = objectness[0].batch;
  const int64_t anchors = objectness[0].channels;
  int64_t limit = 0;
  for (const auto& map : objectness) limit = std::max(limit, anchors * map.height * map.width);
  limit = std::min(limit, arguments.pre_nms_top_n);
  ProposalDecoding<T>& decoding = plan.decoding;
  decoding.head = arguments.head;
  decoding.score_thresh = arguments.score_thresh, decoding.min_size = arguments.min_size;
  decoding.strict_size = arguments.strict_size, decoding.logits_out = arguments.logits_out;
  decoding.candidates = plan_candidates<acc_t>(scratch, images * levels, limit, false, false, arguments.rule);
  const int64_t room = decoding.candidates.room;
  decoding.candidates.scores = decoding.scores = scratch.take<acc_t>(images * levels * room);
  decoding.candidates.kept_scores = scratch.take<acc_t>(images * levels * room);
  decoding.head.cells = plan.cells = scratch.take<Box<acc_t>>(levels * anchors);
  plan.selection = plan_selection<T>(scratch, objectness, limit, room, -std::numeric_limits<acc_t>::infinity(), true);
  decoding.runs = plan.selection.runs;
  plan.merges = plan_merges(scratch, images, room, decoding.runs);
  plan.post_nms_top_n = arguments.post_nms_top_n;
  return plan;
}

// `cells` are the levels' cell anchors in host memory.
template <class T, class Launch, class acc_t = acc_type<T>>
void propose_in_launches(const ProposalPlan<T>& plan, const std::vector<Box<acc_t>>& cells, Box<acc_t>* boxes,
                         acc_t* scores, int64_t* counts, const Launch& launch) {
  const int64_t images = plan.selection.images, levels = plan.selection.runs.lists;
  set_up_in_launches(plan.cells, cells, plan.selection.bins, images * levels * kBins, launch);
  select_in_launches(plan.selection, launch);
  merge_in_launches(plan.merges, images, launch);
  launch(decode_proposals_kernel<T>, merge_config(plan.decoding.runs, images), plan.decoding);
  const Candidates<acc_t>& candidates = plan.decoding.candidates;
  suppress_in_launches(candidates, launch);
  launch(merge_proposals_kernel<acc_t>,
         LaunchConfig{images * ceil_div(levels * candidates.room, kProposalThreads), kProposalThreads},
         ProposalOutput<acc_t>{candidates, static_cast<int>(levels), plan.post_nms_top_n, boxes, scores, counts});
}

}  // namespace fpn_fast
