// SPDX-License-Identifier: Apache-2.0
// Fused maps on the CPU: Note [Fused maps]. Memory bandwidth limits a fusion of large maps: each is read once, and the
// result is written once. Terms are made a run at a time, Note [Strips], and then added.
#include "../torch/fuse_maps.h"

#include <torch/csrc/stable/library.h>

#include "strips.h"

namespace fpn_fast {
namespace {

// target[i] = the sum of the terms, rounded to T once, or after each addition.
template <class T, int kCount, bool kSequential, class Target, class acc_t = acc_type<T>>
HOST_DEVICE void add_terms(const acc_t* const* terms, int64_t count, Target* target) {
  const acc_t *first = terms[0], *second = terms[kCount > 1 ? 1 : 0], *third = terms[kCount > 2 ? 2 : 0];
  FPN_FAST_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    acc_t sum = first[i];
    if constexpr (kCount > 1) sum = sum + second[i];
    if constexpr (kCount > 2) sum = (kSequential ? rounded<T>(sum) : sum) + third[i];
    if constexpr (std::is_same_v<Target, T>) {
      target[i] = Rounded<T>::from(sum);
    } else {
      target[i] = kSequential ? rounded<T>(sum) : sum;
    }
  }
}

template <class T, bool kSequential, class Target, class acc_t = acc_type<T>>
HOST_DEVICE void add_terms(const acc_t* const* terms, int terms_left, int64_t count, Target* target) {
  switch (terms_left) {
    case 1:
      return add_terms<T, 1, kSequential>(terms, count, target);
    case 2:
      return add_terms<T, 2, kSequential>(terms, count, target);
    default:
      return add_terms<T, 3, kSequential>(terms, count, target);
  }
}

template <class T, bool kSequential, class acc_t = acc_type<T>>
HOST_DEVICE void add_all_terms(const acc_t** terms, int terms_left, int64_t count, acc_t* buffer, T* target) {
  while (terms_left > 3) {
    add_terms<T, 2, kSequential>(terms, count, buffer);
    *++terms = buffer, --terms_left;
  }
  add_terms<T, kSequential>(terms, terms_left, count, target);
}

template <Activation kActivation, class T>
HOST_DEVICE void activate(T* run, int64_t count) {
  FPN_FAST_IVDEP
  for (int64_t i = 0; i < count; ++i) run[i] = Rounded<T>::from(activated<kActivation>(to_acc(run[i])));
}

// In place, while the run is in cache.
template <class T>
HOST_DEVICE void finish(T* run, int64_t count, int divide, Activation activation) {
  if (divide != 1) {
    const acc_type<T> divisor = static_cast<acc_type<T>>(divide);
    FPN_FAST_IVDEP
    for (int64_t i = 0; i < count; ++i) run[i] = Rounded<T>::from(to_acc(run[i]) / divisor);
  }
  if (activation == Activation::kRelu) activate<Activation::kRelu>(run, count);
  if (activation == Activation::kRelu6) activate<Activation::kRelu6>(run, count);
  if (activation == Activation::kSilu) activate<Activation::kSilu>(run, count);
}

template <class T>
void fuse_strips(const FusedMaps<T>& fused, const FeatureMap<T>& out, bool pixels) {
  using acc_t = acc_type<T>;
  const int count = static_cast<int>(fused.maps.size());
  const TermPlans<T> plans(fused.maps, pixels, fused.forms, out.height, out.width);
  const StripMap<T> target(out, pixels);
  Factor<acc_t> factors[kMostFused];
  for (int k = 0; k < count; ++k) {
    if (fused.weights == nullptr) break;
    factors[k] = {multiplier_of(fused.weights, fused.fast, k), divisor_of(fused.weights, count, fused.fast)};
  }
  const auto make = [&] {
    return [&, readers = plans.readers(), sum = std::vector<acc_t>(plans.longest)](int64_t n, int64_t c, int x0, int x1,
                                                                                   int y0, int y1) mutable {
      Factor<acc_t> gate{1, 1};
      for (int k = 0; k < count; ++k) {
        const Factor<acc_t>* factor = fused.weights != nullptr ? factors + k : nullptr;
        const T* gates = k == 0 && fused.gate != nullptr ? fused.gate + n * out.channels : nullptr;
        if (gates != nullptr && !pixels) gate.multiplier = to_acc(gates[c]), factor = &gate, gates = nullptr;
        readers[k].start(n, c, x0, x1, factor, gates);
      }
      const int step = pixels ? 1 : plans.rows_together;
      for (int y = y0; y < y1; y += step) {
        const int rows = std::min(step, y1 - y);
        const int64_t elements = target.run(x0, x1) * rows;
        const acc_t* terms[kMostFused] = {};
        for (int k = 0; k < count; ++k) terms[k] = readers[k].rows(y, y + rows);
        // Of a concatenation the pixels of a part are apart, and nothing is added.
        if (!target.dense) {
          store_run(target, n, c, y, x0, x1, terms[0]);
          continue;
        }
        T* run = out.at(n, c, y, x0);
        if constexpr (std::is_same_v<T, acc_t>) {
          add_all_terms<T, false>(terms, count, elements, sum.data(), run);
        } else {
          fused.sequential ? add_all_terms<T, true>(terms, count, elements, sum.data(), run)
                           : add_all_terms<T, false>(terms, count, elements, sum.data(), run);
        }
        finish(run, elements, fused.divide, fused.activation);
      }
    };
  };
  for_strips<T, true>(pixels, out.batch, out.channels, out.height, out.width, count + 1, make);
}

struct Cpu {
  template <class T>
  static void fuse(const FusedMaps<T>& fused, const FeatureMap<T>& out, const Tensor& first) {
    fuse_strips(fused, out, is_channels_last(first));
  }

  // Each is the fusion of one map, into its channels.
  template <class T>
  static void resize(const std::vector<FeatureMap<const T>>& maps, const std::vector<Form>& forms,
                     const FeatureMap<T>& out, const Tensor& first) {
    int64_t channel = 0;
    for (size_t k = 0; k < maps.size(); ++k) {
      FeatureMap<T> part = out;
      part.data = out.at(0, channel, 0, 0), part.channels = maps[k].channels;
      channel += maps[k].channels;
      fuse_strips({{maps[k]}, {forms[k]}, nullptr, nullptr, false, false, 1, Activation::kNone}, part,
                  is_channels_last(first));
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("fuse_maps", TORCH_BOX(&fuse_maps<Cpu>));
  library.impl("resize_cat", TORCH_BOX(&resize_cat<Cpu>));
}

}  // namespace fpn_fast
