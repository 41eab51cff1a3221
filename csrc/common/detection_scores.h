// SPDX-License-Identifier: Apache-2.0
// Scores of a dense head, and from which logit on they pass a threshold.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "exact.h"
#include "exponential.h"
#include "host_device.h"
#include "ordered_bits.h"

namespace fpn_fast {

// FCOS: the root of the product of two probabilities.
template <class acc_t>
HOST_DEVICE acc_t centered_score(acc_t logit, acc_t center_probability) {
  return square_root(multiply(logistic(logit), center_probability));
}

// The lowest logit whose probability is above `score_thresh`; infinity where there is none. By bisection of the
// numbers themselves, so that a comparison of logits decides what a comparison of probabilities would.
template <class acc_t>
acc_t lowest_passing_logit(acc_t score_thresh) {
  using Bits = OrderedBits<acc_t>;
  Bits fails = ordered_bits(-std::numeric_limits<acc_t>::infinity());
  Bits passes = ordered_bits(std::numeric_limits<acc_t>::infinity());
  if (logistic(from_ordered_bits(fails)) > score_thresh) return from_ordered_bits(fails);
  while (passes - fails > 1) {
    const Bits middle = fails + (passes - fails) / 2;
    (logistic(from_ordered_bits(middle)) > score_thresh ? passes : fails) = middle;
  }
  return from_ordered_bits(passes);
}

// A logit below which no score with this centre is `lowest_score`: a bound, lower than need be by some rounding.
template <class acc_t>
acc_t logit_bound(acc_t lowest_score, acc_t center_probability) {
  constexpr double kSlack = 1e-5;
  const double least = double(lowest_score) * double(lowest_score) / double(center_probability) * (1 - kSlack);
  // NaN, where the centre's probability is 0 and so is the lowest score, takes no part in either.
  if (lowest_score <= 0 || !(least > 0)) return -std::numeric_limits<acc_t>::infinity();
  if (least >= 1) return std::numeric_limits<acc_t>::infinity();
  const double bound = std::log(least / (1 - least));
  return static_cast<acc_t>(bound - kSlack * (1 + std::fabs(bound)));
}

}  // namespace fpn_fast
