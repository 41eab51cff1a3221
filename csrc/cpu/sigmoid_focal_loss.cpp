// SPDX-License-Identifier: Apache-2.0
// The focal loss on the CPU: see Note [Focal loss]. A tile is walked twice: element by element as if no class were any
// anchor's, in vectors; then row by row, for what is an anchor's.
#include "../torch/sigmoid_focal_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "parallel.h"

namespace fpn_fast {
namespace {

template <class T>
struct FocalLoss {
  using acc_t = acc_type<T>;
  const T* logits;  // [M, classes], `elements` of them
  const int64_t* labels;
  const acc_t* weights;
  int64_t classes, elements;
  acc_t alpha;
  acc_t* parts;
  T* gradient;  // null: not asked for

  HOST_DEVICE void tile(int64_t index) const {
    const int64_t begin = index * kFocalTile;
    const int count = static_cast<int>(std::min<int64_t>(kFocalTile, elements - begin));
    acc_t loss[kFocalTile], slope[kFocalTile], sums[kFocalTile];
    const T* source = logits + begin;
    FPN_FAST_IVDEP
    for (int i = 0; i < count; ++i) {
      const FocalTerm<acc_t> term = focal_term(to_acc(source[i]), false, alpha);
      loss[i] = term.loss, slope[i] = term.slope;
    }
    // A sum for each place in a row: what stands side by side is added to different ones, in vectors.
    const int widest = static_cast<int>(std::min<int64_t>(classes, count));
    std::fill_n(sums, widest, acc_t(0));
    int64_t row = begin / classes, column = begin % classes;
    for (int i = 0; i < count; ++row, column = 0) {
      const int run = static_cast<int>(std::min<int64_t>(classes - column, count - i));
      const int64_t own = labels[row] - column;
      if (own >= 0 && own < run) {
        const FocalTerm<acc_t> term = focal_term(to_acc(source[i + own]), true, alpha);
        loss[i + own] = term.loss, slope[i + own] = term.slope;
      }
      const acc_t weight = weights[row];
      FPN_FAST_IVDEP
      for (int j = 0; j < run; ++j) sums[j] += weight * loss[i + j];
      if (gradient != nullptr) {
        T* target = gradient + begin + i;
        FPN_FAST_IVDEP
        for (int j = 0; j < run; ++j) target[j] = Rounded<T>::from(weight * slope[i + j]);
      }
      i += run;
    }
    double sum = 0;
    for (int j = 0; j < widest; ++j) sum += sums[j];
    parts[index] = static_cast<acc_t>(sum);
  }
};

std::tuple<Tensor, Tensor> sigmoid_focal_loss_cpu(Tensor logits, Tensor labels, Tensor weights, double alpha,
                                                  bool with_gradient) {
  FocalOutputs outputs = empty_focal_outputs(logits, labels, weights, with_gradient);
  dispatch_floating(logits.scalar_type(), "sigmoid_focal_loss", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc_t = acc_type<T>;
    FocalLoss<T> loss{};
    loss.logits = static_cast<const T*>(logits.data_ptr());
    loss.labels = static_cast<const int64_t*>(labels.data_ptr());
    loss.weights = static_cast<const acc_t*>(weights.data_ptr());
    loss.classes = logits.size(1), loss.elements = logits.numel();
    loss.alpha = static_cast<acc_t>(alpha);
    loss.parts = static_cast<acc_t*>(outputs.parts.data_ptr());
    if (with_gradient) loss.gradient = static_cast<T*>(outputs.gradient.data_ptr());
    // An element costs about as much as ten copied ones.
    parallel_rows(focal_tiles(loss.elements), 10 * kFocalTile, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) loss.tile(tile);
    });
  });
  return {outputs.parts, outputs.gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
}

}  // namespace fpn_fast
