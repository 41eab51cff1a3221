// SPDX-License-Identifier: Apache-2.0
// The focal loss on the CPU: Note [Focal loss]. The first walk over a tile is vectorised and treats no class as a
// label. The second corrects the labels and sums row by row.
#include "../torch/sigmoid_focal_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "parallel.h"

namespace fpn_fast {
namespace {

template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void sum_tile(const FocalLoss<T>& loss, int64_t index) {
  const int64_t begin = index * kFocalTile;
  const int64_t classes = loss.classes;
  const int count = static_cast<int>(std::min<int64_t>(kFocalTile, loss.elements - begin));
  acc_t losses[kFocalTile], slopes[kFocalTile], sums[kFocalTile];
  const T* source = loss.logits + begin;
  FPN_FAST_IVDEP
  for (int i = 0; i < count; ++i) {
    const FocalTerm<acc_t> term = focal_term(to_acc(source[i]), false, loss.alpha);
    losses[i] = term.loss, slopes[i] = term.slope;
  }
  // One sum per column of a row, so that neighbouring elements are added as vectors.
  const int widest = static_cast<int>(std::min<int64_t>(classes, count));
  std::fill_n(sums, widest, acc_t(0));
  int64_t row = begin / classes, column = begin % classes;
  for (int i = 0; i < count; ++row, column = 0) {
    const int run = static_cast<int>(std::min<int64_t>(classes - column, count - i));
    const int64_t own = loss.labels[row] - column;
    if (own >= 0 && own < run) {
      const FocalTerm<acc_t> term = focal_term(to_acc(source[i + own]), true, loss.alpha);
      losses[i + own] = term.loss, slopes[i + own] = term.slope;
    }
    const acc_t weight = loss.weights[row];
    FPN_FAST_IVDEP
    for (int j = 0; j < run; ++j) sums[j] += weight * losses[i + j];
    if (loss.gradient != nullptr) {
      T* target = loss.gradient + begin + i;
      FPN_FAST_IVDEP
      for (int j = 0; j < run; ++j) target[j] = Rounded<T>::from(weight * slopes[i + j]);
    }
    i += run;
  }
  double sum = 0;
  for (int j = 0; j < widest; ++j) sum += sums[j];
  loss.parts[index] = static_cast<acc_t>(sum);
}

struct Cpu {
  template <class T>
  static void run(const FocalLoss<T>& loss, const Tensor&) {
    // An element costs about as much as copying ten.
    parallel_rows(focal_tiles(loss.elements), 10 * kFocalTile, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) sum_tile(loss, tile);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss<Cpu>));
}

}  // namespace fpn_fast
