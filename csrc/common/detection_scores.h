// SPDX-License-Identifier: Apache-2.0
// Scores of a dense head, and the lowest logits that pass a score threshold.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "exact.h"
#include "exponential.h"
#include "host_device.h"
#include "ordered_bits.h"

namespace fpn_fast {

// FCOS: the square root of the product of the class and centre probabilities.
template <class acc_t>
HOST_DEVICE acc_t centered_score(acc_t logit, acc_t center_probability) {
  return square_root(multiply(logistic(logit), center_probability));
}

// The lowest logit whose probability is above `score_thresh`, or infinity. It is found by bisection over the
// floating-point values, so comparing logits decides exactly as comparing probabilities would.
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

// A lower bound of the logits whose score with this centre probability reaches `lowest_score`, minus a margin for
// rounding.
template <class acc_t>
acc_t logit_bound(acc_t lowest_score, acc_t center_probability) {
  constexpr double kSlack = 1e-5;
  const double least = double(lowest_score) * double(lowest_score) / double(center_probability) * (1 - kSlack);
  // 0 / 0 is NaN and fails the second comparison.
  if (lowest_score <= 0 || !(least > 0)) return -std::numeric_limits<acc_t>::infinity();
  if (least >= 1) return std::numeric_limits<acc_t>::infinity();
  const double bound = std::log(least / (1 - least));
  return static_cast<acc_t>(bound - kSlack * (1 + std::fabs(bound)));
}

}  // namespace fpn_fast
