// SPDX-License-Identifier: Apache-2.0
// The arguments of multi-level RoIAlign that do not depend on the device, except its maps.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "levels.h"
#include "roi_align.h"

namespace fpn_fast {

// `levels` [count] is null where the rule decides.
template <class acc_t>
struct RoiAlignArguments {
  const acc_t* rois;  // [count, 5]
  const int64_t* levels;
  int64_t count, batch, channels;
  int pooled_height, pooled_width, sampling_ratio;
  bool aligned;
  LevelRule rule;
  acc_t scale[kMaxRoiLevels];
};

template <class acc_t>
HOST_DEVICE Roi<acc_t> locate_roi(const RoiAlignArguments<acc_t>& arguments, int64_t k) {
  const int64_t* given = arguments.levels != nullptr ? arguments.levels + k : nullptr;
  return locate_roi(arguments.rois + 5 * k, given, arguments.rule, arguments.batch);
}

// The axes of a RoI on a map with `height` rows or `width` columns. The RoI must have a level.
template <class acc_t>
HOST_DEVICE RoiAxis<acc_t> roi_rows(const RoiAlignArguments<acc_t>& arguments, const Roi<acc_t>& roi, int height) {
  return make_roi_axis(roi.y1, roi.y2, arguments.scale[roi.level], height, arguments.pooled_height,
                       arguments.sampling_ratio, arguments.aligned);
}

template <class acc_t>
HOST_DEVICE RoiAxis<acc_t> roi_cols(const RoiAlignArguments<acc_t>& arguments, const Roi<acc_t>& roi, int width) {
  return make_roi_axis(roi.x1, roi.x2, arguments.scale[roi.level], width, arguments.pooled_width,
                       arguments.sampling_ratio, arguments.aligned);
}

}  // namespace fpn_fast
