// SPDX-License-Identifier: Apache-2.0
// Anchor matching on the CPU: see Note [Matching without the matrix]. A task is a block of anchors, made or loaded
// once for all images; ground truths that the block does not reach are left out.
#include "../torch/match_anchors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/anchors.h"
#include "pack.h"
#include "tasks.h"

namespace fpn_fast {
namespace {

// Anchors of a block: in a P2 of three anchors a cell, 85 columns. Few enough to reach few ground truths, and for all
// that is known of them to stay in the fastest cache.
constexpr int kBlock = 256;

// As wide as the numbers that it goes with: one comparison then chooses both.
template <class T>
using Index = std::conditional_t<sizeof(T) == sizeof(double), int64_t, int32_t>;

// One array for each coordinate, so that anchors are compared eight at a time. What is no anchor (not finite, beyond
// its image's count, or the end of the last block) is an empty box, whose IoU is 0.
template <class T>
struct Block {
  T x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];
  bool valid[kBlock];
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
HOST_DEVICE T extreme(const T (&values)[kBlock]) {
  Pack<T> found, next;
  load_pack(values, found);
  for (int i = kPackLanes; i < kBlock; i += kPackLanes) {
    load_pack(values + i, next);
    found = (kMaximum ? next > found : next < found) ? next : found;
  }
  T result = found[0];
  for (int i = 1; i < kPackLanes; ++i) result = (kMaximum ? found[i] > result : found[i] < result) ? found[i] : result;
  return result;
}

// A ground truth, with its place among those of its image.
template <class T>
struct GroundTruth {
  Box<T> box;
  T area;
  int index;
};

template <class T>
struct Matching {
  const T* anchors;              // boxes; null: made of `levels`
  const int64_t* anchor_counts;  // null: all exist
  int64_t images, anchors_per_image;
  bool anchors_differ;  // from image to image
  std::vector<AnchorLevel> levels;
  std::vector<T> cell_anchors;
  BoxCoding<T> coding;  // of which the offset alone matters
  MatchRule<T> rule;
  // The finite ground truths of all images, those of image n from first[n] on, and the highest IoU of each.
  std::vector<GroundTruth<T>> gts;
  std::vector<int64_t> first;
  std::vector<T> highest;
  int64_t* matches;
  T* ious;

  int64_t blocks() const { return (anchors_per_image + kBlock - 1) / kBlock; }

  HOST_DEVICE int64_t existing(int64_t image) const {
    return anchor_counts == nullptr ? anchors_per_image : anchor_counts[image];
  }

  HOST_DEVICE void load(int64_t image, int64_t begin, Block<T>& block) const {
    block.count = static_cast<int>(std::min<int64_t>(kBlock, anchors_per_image - begin));
    anchors != nullptr ? load_boxes(image, begin, block) : make_boxes(image, begin, block);
    for (int i = block.count; i < kBlock; ++i) block.put(i, {0, 0, 0, 0}, false);
    block.around = {extreme<false>(block.x1), extreme<false>(block.y1), extreme<true>(block.x2),
                    extreme<true>(block.y2)};
  }

  HOST_DEVICE void load_boxes(int64_t image, int64_t begin, Block<T>& block) const {
    const T* source = anchors + 4 * ((anchors_differ ? image * anchors_per_image : 0) + begin);
    const int64_t exist = existing(image) - begin;
    for (int i = 0; i < block.count; ++i, source += 4) {
      block.put(i, {source[0], source[1], source[2], source[3]}, i < exist);
    }
  }

  HOST_DEVICE void make_boxes(int64_t image, int64_t begin, Block<T>& block) const {
    const int64_t exist = existing(image) - begin;
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

  // The best ground truth of each anchor of `block`; raises `highest`, which holds this thread's maxima.
  HOST_DEVICE void match(int64_t image, const Block<T>& block, int64_t begin, T* best_of_gts) const {
    const int64_t end = first[image + 1];
    T best[kBlock] = {}, iou[kBlock];
    Index<T> match[kBlock];
    std::fill_n(match, kBlock, static_cast<Index<T>>(first[image] < end ? gts[first[image]].index : 0));
    for (int64_t g = first[image]; g < end; ++g) {
      const GroundTruth<T> gt = gts[g];
      if (!boxes_meet(gt.box, block.around)) continue;
      const Index<T> index = gt.index;
      FPN_FAST_IVDEP
      for (int i = 0; i < kBlock; ++i) {
        iou[i] = box_iou(gt.box, gt.area, block.box(i), block.area[i]);
        // Strictly: the first of equals stays. NaN is above nothing.
        match[i] = iou[i] > best[i] ? index : match[i];
        best[i] = iou[i] > best[i] ? iou[i] : best[i];
      }
      if (!rule.low_quality) continue;
      Pack<T> top = {}, next;
      for (int i = 0; i < kBlock; i += kPackLanes) {
        load_pack(iou + i, next);
        top = next > top ? next : top;
      }
      for (int i = 0; i < kPackLanes; ++i) best_of_gts[g] = top[i] > best_of_gts[g] ? top[i] : best_of_gts[g];
    }
    const int64_t at = image * anchors_per_image + begin;
    const bool none = first[image] == end;
    for (int i = 0; i < block.count; ++i) {
      ious[at + i] = best[i];
      // With low-quality matches the codes have to wait for the second pass.
      const int64_t code = rule.low_quality ? match[i] : rule.code(best[i], match[i]);
      matches[at + i] = none || !block.valid[i] ? kBelowLowThreshold : code;
    }
  }

  // Codes of one block from its matches: those that reach the highest IoU of a ground truth stay.
  HOST_DEVICE void restore(int64_t image, int64_t begin, bool all, Block<T>& block, int64_t& loaded) const {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, anchors_per_image - begin));
    const T* best = ious + image * anchors_per_image + begin;
    int64_t* codes = matches + image * anchors_per_image + begin;
    if (all) return;
    const T top = *std::max_element(best, best + count);
    Index<T> restored[kBlock] = {};
    for (int64_t g = first[image]; g < first[image + 1]; ++g) {
      if (highest[g] > top) continue;
      const int64_t source = anchors_differ || anchor_counts != nullptr ? image : 0;
      if (loaded != source) load(image, begin, block), loaded = source;
      if (!boxes_meet(gts[g].box, block.around)) continue;
      const GroundTruth<T> gt = gts[g];
      const T wanted = highest[g];
      FPN_FAST_IVDEP
      for (int i = 0; i < kBlock; ++i) {
        const Index<T> equal = box_iou(gt.box, gt.area, block.box(i), block.area[i]) == wanted ? 1 : 0;
        restored[i] |= equal;
      }
    }
    for (int i = 0; i < count; ++i) {
      // -1 already: no anchor, or no ground truth.
      if (!restored[i] && codes[i] >= 0) codes[i] = rule.code(best[i], codes[i]);
    }
  }

  void run() {
    std::mutex merging;
    const int64_t work = kBlock * static_cast<int64_t>(gts.size() + images);
    parallel_tasks(blocks(), work, [&](const auto& next) {
      std::vector<T> best_of_gts(gts.size(), T(0));
      Block<T> block;
      for (int64_t b = next(); b < blocks(); b = next()) {
        for (int64_t image = 0; image < images; ++image) {
          if (image == 0 || anchors_differ || anchor_counts != nullptr) load(image, b * kBlock, block);
          match(image, block, b * kBlock, best_of_gts.data());
        }
      }
      // A maximum does not depend on which thread took which task.
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t g = 0; g < gts.size(); ++g) highest[g] = std::max(highest[g], best_of_gts[g]);
    });
    if (!rule.low_quality) return;
    // A ground truth that no anchor overlaps has a highest IoU of 0, which is that of every anchor.
    std::vector<char> all(images);
    for (int64_t image = 0; image < images; ++image) {
      all[image] = std::any_of(highest.begin() + first[image], highest.begin() + first[image + 1],
                               [](T iou) { return iou == 0; });
    }
    parallel_tasks(blocks(), work, [&](const auto& next) {
      Block<T> block;
      for (int64_t b = next(); b < blocks(); b = next()) {
        int64_t loaded = -1;
        for (int64_t image = 0; image < images; ++image) restore(image, b * kBlock, all[image], block, loaded);
      }
    });
  }
};

template <class T>
void collect(const Tensor& boxes, const Tensor& counts, Matching<T>& matching) {
  const T* box = static_cast<const T*>(boxes.data_ptr());
  const int64_t* count = static_cast<const int64_t*>(counts.data_ptr());
  for (int64_t image = 0; image < boxes.size(0); ++image) {
    matching.first.push_back(static_cast<int64_t>(matching.gts.size()));
    for (int64_t g = 0; g < boxes.size(1); ++g, box += 4) {
      const Box<T> gt{box[0], box[1], box[2], box[3]};
      if (g < count[image] && is_finite(gt)) matching.gts.push_back({gt, area(gt), static_cast<int>(g)});
    }
  }
  matching.first.push_back(static_cast<int64_t>(matching.gts.size()));
  matching.highest.assign(matching.gts.size(), T(0));
}

std::tuple<Tensor, Tensor> match_anchors_cpu(Tensor gt_boxes, Tensor gt_counts, std::optional<Tensor> anchors,
                                             std::optional<Tensor> anchor_counts, std::vector<double> cell_anchors,
                                             std::vector<int64_t> cells, std::vector<int64_t> sizes,
                                             std::vector<int64_t> strides, double offset, double high_threshold,
                                             double low_threshold, bool allow_low_quality_matches) {
  check_match_anchors(gt_boxes, gt_counts, anchors, anchor_counts);
  const std::vector<AnchorLevel> levels = anchor_levels(cell_anchors, cells, sizes, strides);
  const int64_t count = anchor_count(anchors, levels);
  MatchOutputs outputs = empty_matches(gt_boxes, count);
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    Matching<T> matching{};
    matching.anchors = optional_data<T>(anchors);
    matching.anchor_counts = optional_data<int64_t>(anchor_counts);
    matching.images = gt_boxes.size(0), matching.anchors_per_image = count;
    matching.anchors_differ = anchors.has_value() && anchors->dim() == 3;
    matching.levels = levels, matching.coding.center_offset = static_cast<T>(offset);
    for (const double each : cell_anchors) matching.cell_anchors.push_back(static_cast<T>(each));
    matching.rule = {static_cast<T>(high_threshold), static_cast<T>(low_threshold), allow_low_quality_matches};
    matching.matches = static_cast<int64_t*>(outputs.matches.data_ptr());
    matching.ious = static_cast<T*>(outputs.ious.data_ptr());
    collect(gt_boxes, gt_counts, matching);
    matching.run();
  };
  gt_boxes.scalar_type() == ScalarType::Double ? run(TypeTag<double>{}) : run(TypeTag<float>{});
  return {outputs.matches, outputs.ious};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("match_anchors", TORCH_BOX(&match_anchors_cpu)); }

}  // namespace fpn_fast
