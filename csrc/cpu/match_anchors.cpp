// SPDX-License-Identifier: Apache-2.0
// Anchor matching on the CPU: Note [Matching without the matrix]. A task is a block of anchors, which is computed or
// loaded once for all images. It skips the ground truths that it does not reach.
#include "../torch/match_anchors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "../common/anchors.h"
#include "pack.h"
#include "tasks.h"

namespace fpn_fast {
namespace {

// Anchors of a block: 85 columns of a P2 with three anchors per position. A block of this size reaches few ground
// truths and fits into the L1 cache.
constexpr int kBlockAnchors = 256;

// As wide as T, so that one comparison mask selects both.
template <class T>
using Index = std::conditional_t<sizeof(T) == sizeof(double), int64_t, int32_t>;

// One array per coordinate, so that eight anchors are compared at a time. An entry without an anchor (not finite,
// beyond its image's count, or beyond the last anchor) is an empty box with an IoU of 0.
template <class T>
struct Block {
  T x1[kBlockAnchors], y1[kBlockAnchors], x2[kBlockAnchors], y2[kBlockAnchors], area[kBlockAnchors];
  bool valid[kBlockAnchors];
  int count;
  Box<T> around;

  HOST_DEVICE void put(int i, const Box<T>& box, bool exists) {
    valid[i] = exists && is_finite(box);
    const Box<T> kept = valid[i] ? box : Box<T>{0, 0, 0, 0};
    x1[i] = kept.x1, y1[i] = kept.y1, x2[i] = kept.x2, y2[i] = kept.y2, area[i] = fpn_fast::area(kept);
  }

  HOST_DEVICE Box<T> box(int i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
};

template <bool kMaximum, class T>
HOST_DEVICE T extreme(const T (&values)[kBlockAnchors]) {
  Pack<T> found, next;
  load_pack(values, found);
  for (int i = kPackLanes; i < kBlockAnchors; i += kPackLanes) {
    load_pack(values + i, next);
    found = (kMaximum ? next > found : next < found) ? next : found;
  }
  T result = found[0];
  for (int i = 1; i < kPackLanes; ++i) result = (kMaximum ? found[i] > result : found[i] < result) ? found[i] : result;
  return result;
}

template <class T>
struct GroundTruth {
  Box<T> box;
  T area;
  int index;
};

template <class T>
struct Matching {
  const T* gt_boxes;             // [images, gts_per_image, 4]
  const int64_t* gt_counts;      // [images]
  const T* anchors;              // boxes, or null: computed from `levels`
  const int64_t* anchor_counts;  // [images], or null: all exist
  int64_t images, anchors_per_image;
  int gts_per_image;
  bool anchors_differ;  // between images
  std::vector<AnchorLevel> levels;
  std::vector<T> cell_anchors;
  BoxCoding<T> coding;  // only its offset is used
  MatchRule<T> rule;
  // The ground truths of all images: image n has [first[n], first[n + 1]). `highest` holds the highest IoU of each. An
  // image with one that is not finite has none here, but the index of its first such in `not_finite`, which is
  // otherwise -1.
  std::vector<GroundTruth<T>> gts;
  std::vector<int64_t> first, not_finite;
  std::vector<T> highest;
  int64_t* matches;
  T* ious;

  int64_t blocks() const { return (anchors_per_image + kBlockAnchors - 1) / kBlockAnchors; }

  HOST_DEVICE void load(int64_t image, int64_t begin, Block<T>& block) const {
    block.count = static_cast<int>(std::min<int64_t>(kBlockAnchors, anchors_per_image - begin));
    const int64_t exist = (anchor_counts == nullptr ? anchors_per_image : anchor_counts[image]) - begin;
    anchors != nullptr ? load_boxes(image, begin, exist, block) : make_boxes(begin, exist, block);
    for (int i = block.count; i < kBlockAnchors; ++i) block.put(i, {0, 0, 0, 0}, false);
    block.around = {extreme<false>(block.x1), extreme<false>(block.y1), extreme<true>(block.x2),
                    extreme<true>(block.y2)};
  }

  HOST_DEVICE void load_boxes(int64_t image, int64_t begin, int64_t exist, Block<T>& block) const {
    const T* source = anchors + 4 * ((anchors_differ ? image * anchors_per_image : 0) + begin);
    for (int i = 0; i < block.count; ++i, source += 4) {
      block.put(i, {source[0], source[1], source[2], source[3]}, i < exist);
    }
  }

  HOST_DEVICE void make_boxes(int64_t begin, int64_t exist, Block<T>& block) const {
    int made = 0;
    for (const AnchorLevel& level : levels) {
      if (made == block.count) break;
      const int64_t skipped = begin + made - level.first, size = level.cells * level.height * level.width;
      if (skipped >= size || size == 0) continue;
      const int64_t row = level.cells * level.width;
      int64_t y = skipped / row, x = skipped % row / level.cells;
      int cell = static_cast<int>(skipped % level.cells);
      const T* table = cell_anchors.data() + 4 * level.first_cell;
      const T stride_y = static_cast<T>(level.stride_y), stride_x = static_cast<T>(level.stride_x);
      for (; y < level.height && made < block.count; ++y, x = 0) {
        for (; x < level.width && made < block.count; ++x, cell = 0) {
          for (; cell < level.cells && made < block.count; ++cell, ++made) {
            const T* corners = table + 4 * cell;
            const Box<T> around{corners[0], corners[1], corners[2], corners[3]};
            block.put(made, anchor_at(coding, around, y, x, stride_y, stride_x), made < exist);
          }
        }
      }
    }
  }

  // Finds the best ground truth of each anchor of `block`, and raises the maxima of this thread, `best_of_gts`.
  HOST_DEVICE void match(int64_t image, const Block<T>& block, int64_t begin, T* best_of_gts) const {
    const int64_t end = first[image + 1];
    T best[kBlockAnchors] = {}, iou[kBlockAnchors];
    Index<T> match[kBlockAnchors];
    std::fill_n(match, kBlockAnchors, static_cast<Index<T>>(first[image] < end ? gts[first[image]].index : 0));
    for (int64_t g = first[image]; g < end; ++g) {
      const GroundTruth<T> gt = gts[g];
      if (!boxes_meet(gt.box, block.around)) continue;
      const Index<T> index = gt.index;
      FPN_FAST_IVDEP
      for (int i = 0; i < kBlockAnchors; ++i) {
        iou[i] = box_iou(gt.box, gt.area, block.box(i), block.area[i]);
        // The first of equal IoUs stays, because the comparison is strict. It is false for NaN.
        match[i] = iou[i] > best[i] ? index : match[i];
        best[i] = iou[i] > best[i] ? iou[i] : best[i];
      }
      if (!rule.low_quality) continue;
      Pack<T> top = {}, next;
      for (int i = 0; i < kBlockAnchors; i += kPackLanes) {
        load_pack(iou + i, next);
        top = next > top ? next : top;
      }
      for (int i = 0; i < kPackLanes; ++i) best_of_gts[g] = top[i] > best_of_gts[g] ? top[i] : best_of_gts[g];
    }
    const int64_t at = image * anchors_per_image + begin;
    const bool none = first[image] == end;
    const int64_t spoilt = not_finite[image];
    for (int i = 0; i < block.count; ++i) {
      if (spoilt >= 0 && block.valid[i]) {
        // Note [Ground truths that are not finite].
        ious[at + i] = std::numeric_limits<T>::quiet_NaN(), matches[at + i] = spoilt;
        continue;
      }
      ious[at + i] = best[i];
      // With low-quality matches the second pass writes the codes.
      const int64_t code = rule.low_quality ? match[i] : rule.code(best[i], match[i]);
      matches[at + i] = none || !block.valid[i] ? kBelowLowThreshold : code;
    }
  }

  // Replaces the matches of one block by codes, except where an anchor reaches the highest IoU of a ground truth.
  HOST_DEVICE void restore(int64_t image, int64_t begin, Block<T>& block, int64_t& loaded) const {
    const int count = static_cast<int>(std::min<int64_t>(kBlockAnchors, anchors_per_image - begin));
    const T* best = ious + image * anchors_per_image + begin;
    int64_t* codes = matches + image * anchors_per_image + begin;
    const T top = *std::max_element(best, best + count);
    Index<T> restored[kBlockAnchors] = {};
    for (int64_t g = first[image]; g < first[image + 1]; ++g) {
      if (highest[g] > top) continue;
      const int64_t source = anchors_differ || anchor_counts != nullptr ? image : 0;
      if (loaded != source) load(image, begin, block), loaded = source;
      if (!boxes_meet(gts[g].box, block.around)) continue;
      const GroundTruth<T> gt = gts[g];
      const T wanted = highest[g];
      FPN_FAST_IVDEP
      for (int i = 0; i < kBlockAnchors; ++i) {
        const Index<T> equal = box_iou(gt.box, gt.area, block.box(i), block.area[i]) == wanted ? 1 : 0;
        restored[i] |= equal;
      }
    }
    for (int i = 0; i < count; ++i) {
      // -1 already marks no anchor or no ground truth.
      if (!restored[i] && codes[i] >= 0) codes[i] = rule.code(best[i], codes[i]);
    }
  }

  void run() {
    std::mutex merging;
    const int64_t work = kBlockAnchors * static_cast<int64_t>(gts.size() + images);
    parallel_tasks(blocks(), work, [&](const auto& next) {
      std::vector<T> best_of_gts(gts.size(), T(0));
      Block<T> block;
      for (int64_t b = next(); b < blocks(); b = next()) {
        for (int64_t image = 0; image < images; ++image) {
          if (image == 0 || anchors_differ || anchor_counts != nullptr) load(image, b * kBlockAnchors, block);
          match(image, block, b * kBlockAnchors, best_of_gts.data());
        }
      }
      // A maximum does not depend on the order of the threads.
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t g = 0; g < gts.size(); ++g) highest[g] = std::max(highest[g], best_of_gts[g]);
    });
    if (!rule.low_quality) return;
    // If no anchor overlaps a ground truth, its highest IoU is 0, and every anchor reaches it.
    std::vector<char> all(images);
    for (int64_t image = 0; image < images; ++image) {
      all[image] =
          not_finite[image] >= 0 || std::any_of(highest.begin() + first[image], highest.begin() + first[image + 1],
                                                [](T iou) { return iou == 0; });
    }
    parallel_tasks(blocks(), work, [&](const auto& next) {
      Block<T> block;
      for (int64_t b = next(); b < blocks(); b = next()) {
        int64_t loaded = -1;
        for (int64_t image = 0; image < images; ++image) {
          if (!all[image]) restore(image, b * kBlockAnchors, block, loaded);
        }
      }
    });
  }
};

struct Cpu {
  template <class T>
  using Matching = fpn_fast::Matching<T>;

  template <class T>
  static void run(Matching<T>& matching, const std::vector<AnchorLevel>& levels,
                  const std::vector<double>& cell_anchors, const Tensor&) {
    matching.levels = levels;
    matching.cell_anchors.assign(cell_anchors.begin(), cell_anchors.end());
    const T* box = matching.gt_boxes;
    for (int64_t image = 0; image < matching.images; ++image) {
      matching.first.push_back(static_cast<int64_t>(matching.gts.size()));
      matching.not_finite.push_back(-1);
      int64_t& not_finite = matching.not_finite.back();
      for (int g = 0; g < matching.gts_per_image; ++g, box += 4) {
        const Box<T> gt{box[0], box[1], box[2], box[3]};
        if (g >= matching.gt_counts[image]) continue;
        if (!is_finite(gt) && not_finite < 0) not_finite = g;
        matching.gts.push_back({gt, area(gt), g});
      }
      if (not_finite >= 0) matching.gts.erase(matching.gts.begin() + matching.first.back(), matching.gts.end());
    }
    matching.first.push_back(static_cast<int64_t>(matching.gts.size()));
    matching.highest.assign(matching.gts.size(), T(0));
    matching.run();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("match_anchors", TORCH_BOX(&match_anchors<Cpu>)); }

}  // namespace fpn_fast
