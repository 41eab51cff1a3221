// SPDX-License-Identifier: Apache-2.0
// The pyramid level that a RoI is pooled from.
//
// Note [Levels by area]
// The libraries use floor(k0 + log2(sqrt(w * h) / s0)), each with its own epsilon. This never decreases with the area,
// so it equals a list of areas at which the next level begins. fpn_fast/ops/levels.py finds these areas once, with the
// rule itself. Comparing areas avoids logarithms, whose last bit differs between devices.
#pragma once

#include <cstdint>

#include "exact.h"
#include "host_device.h"

namespace fpn_fast {

// Maps of one call: P2 to P9.
constexpr int kMaxRoiLevels = 8;

struct LevelRule {
  int levels;  // number of maps
  int thresholds;
  float threshold[kMaxRoiLevels];  // ascending areas, in float32 like the libraries'
};

// A RoI with its level and image. Its output is zero at level -1.
template <class acc_t>
struct Roi {
  acc_t x1, y1, x2, y2;
  int64_t image;
  int level;
};

// `row` is (image, x1, y1, x2, y2). `given` points to the RoI's level, or is null: the rule decides.
template <class acc_t>
HOST_DEVICE Roi<acc_t> locate_roi(const acc_t* row, const int64_t* given, const LevelRule& rule, int64_t batch) {
  Roi<acc_t> roi{row[1], row[2], row[3], row[4], 0, -1};
  const acc_t image = row[0];
  // A NaN fails this test.
  if (!(image > -1 && image < static_cast<acc_t>(batch))) return roi;
  if (roi.x1 != roi.x1 || roi.y1 != roi.y1 || roi.x2 != roi.x2 || roi.y2 != roi.y2) return roi;
  roi.image = static_cast<int64_t>(image);
  if (given != nullptr) {
    if (*given >= 0 && *given < rule.levels) roi.level = static_cast<int>(*given);
    return roi;
  }
  if (rule.levels == 1) {
    roi.level = 0;
    return roi;
  }
  const float width = subtract(static_cast<float>(roi.x2), static_cast<float>(roi.x1));
  const float height = subtract(static_cast<float>(roi.y2), static_cast<float>(roi.y1));
  const float area = multiply(width, height);
  // NaN or negative where a RoI is inverted along one axis, or infinite along one and empty along the other.
  if (!(area >= 0)) return roi;
  int level = 0;
  for (int i = 0; i < rule.thresholds; ++i) level += area >= rule.threshold[i];
  if (level < rule.levels) roi.level = level;
  return roi;
}

}  // namespace fpn_fast
