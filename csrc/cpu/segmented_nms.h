// SPDX-License-Identifier: Apache-2.0
// Greedy non-maximum suppression on the CPU. The boxes of an image are sorted by score and then, stably, by group.
// Within a group each box is tested against the boxes kept before it, many at a time, until one suppresses it. A task
// is a group. A large group is divided into blocks, whose tests against earlier blocks run in parallel.
#pragma once

#include <numeric>
#include <vector>

#include "../common/nms_input.h"
#include "../common/ordered_bits.h"
#include "greedy_nms.h"
#include "radix_sort.h"
#include "tasks.h"

namespace fpn_fast {

constexpr int64_t kLargeGroup = 8192;
// Boxes of a large group that are tested in parallel before they are tested against one another.
constexpr int64_t kBlock = 1024;
// Pairs of boxes tested in the time of one element of `parallel_rows`; a pair took a third of a nanosecond when
// measured.
constexpr int64_t kPairsPerElement = 32;

// The boxes of an image in the order of their decisions. `rank[i]` is the position of box i by score, and `ends` holds
// the end of each group.
template <class acc_t>
struct Image {
  std::vector<uint32_t> by_score;
  std::vector<uint32_t> rank;
  std::vector<Box<acc_t>> boxes;
  std::vector<int64_t> ends;
  std::vector<uint8_t> kept;
};

template <class acc_t>
std::vector<uint32_t> order_by_score(const Box<acc_t>* boxes, const acc_t* scores, int64_t count) {
  std::vector<Keyed<OrderedBits<acc_t>>> items;
  items.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!is_finite(boxes[i]) || !is_finite(scores[i])) continue;
    items.push_back({static_cast<OrderedBits<acc_t>>(~ordered_bits(scores[i])), static_cast<uint32_t>(i)});
  }
  radix_sort(items);
  std::vector<uint32_t> order(items.size());
  for (size_t i = 0; i < items.size(); ++i) order[i] = items[i].value;
  return order;
}

// torchvision's trick of moving groups apart, with its arithmetic, because rounding decides which boxes still overlap.
template <class acc_t>
std::vector<Box<acc_t>> offset_by_group(const Box<acc_t>* boxes, const int64_t* groups,
                                        const std::vector<uint32_t>& chosen) {
  std::vector<Box<acc_t>> moved;
  moved.reserve(chosen.size());
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for (const uint32_t i : chosen) largest = std::max({largest, boxes[i].x1, boxes[i].y1, boxes[i].x2, boxes[i].y2});
  const acc_t apart = add(largest, acc_t(1));
  for (const uint32_t i : chosen) {
    const acc_t offset = multiply(static_cast<acc_t>(groups[i]), apart);
    const Box<acc_t>& box = boxes[i];
    moved.push_back({add(box.x1, offset), add(box.y1, offset), add(box.x2, offset), add(box.y2, offset)});
  }
  return moved;
}

template <class acc_t>
Image<acc_t> sort_image(const NmsInput<acc_t>& input, int64_t n) {
  const Box<acc_t>* boxes = input.boxes + n * input.room;
  const int64_t* groups = input.groups != nullptr ? input.groups + n * input.room : nullptr;
  const int64_t count = input.counts != nullptr ? std::clamp<int64_t>(input.counts[n], 0, input.room) : input.room;
  Image<acc_t> image;
  image.by_score = order_by_score(boxes, input.scores + n * input.room, count);
  const size_t valid = image.by_score.size();
  image.kept.assign(valid, 0);
  image.rank.resize(valid);
  std::iota(image.rank.begin(), image.rank.end(), 0u);
  if (valid == 0) return image;
  image.boxes.reserve(valid);
  if (!input.labelled()) {
    if (groups != nullptr) {
      image.boxes = offset_by_group(boxes, groups, image.by_score);
    } else {
      for (const uint32_t i : image.by_score) image.boxes.push_back(boxes[i]);
    }
    image.ends = {static_cast<int64_t>(valid)};
    return image;
  }
  std::vector<Keyed<uint64_t>> items(valid);
  for (size_t i = 0; i < valid; ++i) {
    items[i] = {static_cast<uint64_t>(groups[image.by_score[i]]), static_cast<uint32_t>(i)};
  }
  radix_sort(items);
  for (size_t i = 0; i < valid; ++i) {
    image.rank[i] = items[i].value;
    image.boxes.push_back(boxes[image.by_score[items[i].value]]);
    if (i + 1 == valid || items[i].key != items[i + 1].key) image.ends.push_back(i + 1);
  }
  return image;
}

template <class acc_t>
HOST_DEVICE void suppress(Image<acc_t>& image, int64_t begin, int64_t end, const OverlapRule<acc_t>& rule,
                          int64_t max_output, KeptBoxes<acc_t>& kept) {
  kept.reset(std::min(end - begin, max_output));
  for (int64_t i = begin; i < end && kept.size() < max_output; ++i) {
    if (kept.overlaps_one(rule, image.boxes[i], 0, kept.size())) continue;
    kept.push(image.boxes[i]);
    image.kept[image.rank[i]] = 1;
  }
}

template <class acc_t>
void suppress_large(Image<acc_t>& image, int64_t begin, int64_t end, const OverlapRule<acc_t>& rule, int64_t max_output,
                    KeptBoxes<acc_t>& kept) {
  kept.reset(std::min(end - begin, max_output));
  uint8_t out[kBlock];
  for (int64_t first = begin; first < end && kept.size() < max_output; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end), before = kept.size();
    parallel_rows(last - first, before / kPairsPerElement, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) out[i] = kept.overlaps_one(rule, image.boxes[first + i], 0, before);
    });
    run_with_best_isa([&] {
      for (int64_t i = first; i < last && kept.size() < max_output; ++i) {
        if (out[i - first] || kept.overlaps_one(rule, image.boxes[i], before, kept.size())) continue;
        kept.push(image.boxes[i]);
        image.kept[image.rank[i]] = 1;
      }
    });
  }
}

template <class acc_t>
void suppress_all(std::vector<Image<acc_t>>& images, const OverlapRule<acc_t>& rule, int64_t max_output) {
  struct Run {
    int64_t image, begin, end;
  };
  std::vector<Run> runs;
  int64_t pairs = 0;
  KeptBoxes<acc_t> large;
  for (size_t n = 0; n < images.size(); ++n) {
    int64_t begin = 0;
    for (const int64_t end : images[n].ends) {
      if (end - begin >= kLargeGroup) {
        suppress_large(images[n], begin, end, rule, max_output, large);
      } else {
        runs.push_back({static_cast<int64_t>(n), begin, end});
        pairs += (end - begin) * (end - begin) / 2;
      }
      begin = end;
    }
  }
  const int64_t tasks = static_cast<int64_t>(runs.size());
  parallel_tasks(tasks, pairs / std::max<int64_t>(1, kPairsPerElement * tasks), [&](const auto& next) {
    KeptBoxes<acc_t> kept;
    for (int64_t i = next(); i < tasks; i = next()) {
      suppress(images[runs[i].image], runs[i].begin, runs[i].end, rule, max_output, kept);
    }
  });
}

// Writes the indices of each image's kept boxes, [batch, max_output], best first and padded with -1, and their numbers.
template <class acc_t>
void suppress_segments(const NmsInput<acc_t>& input, const OverlapRule<acc_t>& rule, int64_t max_output, int64_t* keep,
                       int64_t* kept) {
  std::vector<Image<acc_t>> images(input.batch);
  parallel_rows(input.batch, 16 * input.room, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) images[n] = sort_image(input, n);
  });
  suppress_all(images, rule, max_output);
  for (int64_t n = 0; n < input.batch; ++n) {
    int64_t found = 0;
    for (size_t i = 0; i < images[n].kept.size() && found < max_output; ++i) {
      if (images[n].kept[i]) keep[n * max_output + found++] = images[n].by_score[i];
    }
    kept[n] = found;
    std::fill(keep + n * max_output + found, keep + (n + 1) * max_output, int64_t{-1});
  }
}

}  // namespace fpn_fast
