// SPDX-License-Identifier: Apache-2.0
// Candidates of a batch of images, and the detections that remain after class-aware suppression.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../torch/select_detections.h"
#include "segmented_nms.h"

namespace fpn_fast {

template <class acc_t>
struct Candidate {
  Box<acc_t> box;
  acc_t score;
  int64_t label;
};

// `found[n * parts + i]` holds candidates of image n. Candidates of equal scores keep their order.
template <class acc_t>
void detect(const std::vector<std::vector<Candidate<acc_t>>>& found, int64_t parts, double nms_thresh,
            const Detections& detections) {
  const int64_t batch = detections.scores.size(0), room = detections.scores.size(1);
  std::vector<int64_t> counts(batch, 0);
  for (size_t i = 0; i < found.size(); ++i) counts[i / parts] += static_cast<int64_t>(found[i].size());
  const int64_t most = batch == 0 ? 0 : *std::max_element(counts.begin(), counts.end());
  std::vector<Box<acc_t>> boxes(batch * most);
  std::vector<acc_t> scores(batch * most);
  std::vector<int64_t> labels(batch * most), keep(batch * room);
  for (int64_t n = 0; n < batch; ++n) {
    int64_t at = n * most;
    for (int64_t i = n * parts; i < (n + 1) * parts; ++i) {
      for (const auto& each : found[i]) boxes[at] = each.box, scores[at] = each.score, labels[at++] = each.label;
    }
  }
  const auto tables = detections.tables<acc_t>();
  const NmsInput<acc_t> input{boxes.data(), scores.data(), labels.data(), counts.data(), batch, most, false};
  suppress_segments(input, make_overlap_rule<acc_t>(nms_thresh, NmsConvention::kDivision), room, keep.data(),
                    tables.counts);
  for (int64_t i = 0; i < batch * room; ++i) {
    const int64_t source = i / room * most + keep[i];
    if (keep[i] < 0) {
      tables.clear(i / room, i % room);
    } else {
      tables.write(i / room, i % room, boxes[source], scores[source], labels[source]);
    }
  }
}

}  // namespace fpn_fast
