// SPDX-License-Identifier: Apache-2.0
// The frozen batch norm on the CPU: Note [Frozen batch norm]. Memory bandwidth limits it, and each map is read or
// written once. Elements are walked in the order of memory, in runs within a plane, of one scale and shift, or within a
// pixel (channels_last), with a scale and shift for each element.
#include "../torch/frozen_batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "parallel_maps.h"

namespace fpn_fast {
namespace {

// Elements of a task: they are half of a core's first-level cache at most.
constexpr int64_t kTaskElements = 4096;

// Two numbers for each element of a run. Those of a whole run are broadcast.
template <class acc_t, bool kChannelsLast>
struct RunPair {
  const acc_t *firsts, *seconds;
  HOST_DEVICE acc_t first(int64_t i) const { return firsts[kChannelsLast ? i : 0]; }
  HOST_DEVICE acc_t second(int64_t i) const { return seconds[kChannelsLast ? i : 0]; }
};

// Two numbers for each channel.
template <class acc_t>
struct ChannelPairs {
  std::vector<acc_t> firsts, seconds;

  explicit ChannelPairs(int64_t channels) : firsts(channels), seconds(channels) {}
  template <bool kChannelsLast>
  RunPair<acc_t, kChannelsLast> from(int64_t channel) const {
    return {firsts.data() + channel, seconds.data() + channel};
  }
};

// Scale and shift.
template <class T>
ChannelPairs<acc_type<T>> affines_of(const NormMaps& maps, const Norm& norm) {
  ChannelPairs<acc_type<T>> pairs(maps.channels);
  for (int64_t c = 0; c < maps.channels; ++c) {
    const auto affine = affine_of<T>(norm, maps.eps, maps.rule, c);
    pairs.firsts[c] = affine.scale, pairs.seconds[c] = affine.shift;
  }
  return pairs;
}

// What a gradient is multiplied by: the scale, or as F.batch_norm's first by a reciprocal root of float64.
template <class T, class acc_t = acc_type<T>>
ChannelPairs<acc_t> slopes_of(const NormMaps& maps, const Norm& norm) {
  ChannelPairs<acc_t> pairs = affines_of<T>(maps, norm);
  std::fill(pairs.seconds.begin(), pairs.seconds.end(), acc_t(1));
  if (maps.rule < NormRule::kBatchNorm || norm.weight == nullptr) return pairs;
  const auto element = [&](const void* vector, int64_t c) -> acc_t {
    if constexpr (std::is_same_v<acc_t, double>) {
      if (norm.type == VectorType::kDouble) return static_cast<const double*>(vector)[c];
    }
    return vector_element(vector, norm.type, c);
  };
  for (int64_t c = 0; c < maps.channels; ++c) {
    pairs.firsts[c] = static_cast<acc_t>(reciprocal_root(double{element(norm.variance, c)} + maps.eps));
    pairs.seconds[c] = element(norm.weight, c);
  }
  return pairs;
}

// Calls `run(offset, count, channel)` for runs that cover all elements.
template <bool kChannelsLast, class Run>
void walk(const NormMaps& maps, const Run& run) {
  const int64_t tasks = (maps.elements + kTaskElements - 1) / kTaskElements;
  parallel_maps(tasks, kTaskElements, [&](int64_t first, int64_t last) {
    const int64_t length = kChannelsLast ? maps.channels : maps.plane;
    const int64_t end = std::min(last * kTaskElements, maps.elements);
    int64_t offset = first * kTaskElements;
    int64_t row = offset / length, within = offset % length;
    int64_t channel = row % maps.channels;
    while (offset < end) {
      const int64_t count = std::min(length - within, end - offset);
      run(offset, count, kChannelsLast ? within : channel);
      offset += count, within = 0;
      if (++channel == maps.channels) channel = 0;
    }
  });
}

template <bool kContracted, class acc_t, bool kChannelsLast>
HOST_DEVICE acc_t transformed(acc_t value, RunPair<acc_t, kChannelsLast> norm, int64_t i) {
  if constexpr (kContracted) return std::fma(value, norm.first(i), norm.second(i));
  return transformed(value, Affine<acc_t>{norm.first(i), norm.second(i)});
}

template <bool kContracted, bool kResidual, bool kNormed, class T, class R, class O, bool kChannelsLast,
          class acc_t = acc_type<T>>
HOST_DEVICE void forward_run(const T* x, const R* residual, O* y, int64_t count, RunPair<acc_t, kChannelsLast> norm,
                             RunPair<acc_t, kChannelsLast> residual_norm, acc_t floor) {
  FPN_FAST_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    acc_t value = transformed<kContracted>(to_acc(x[i]), norm, i);
    if constexpr (kNormed) {
      value += transformed<kContracted>(to_acc(residual[i]), residual_norm, i);
    } else if constexpr (kResidual) {
      value += to_acc(residual[i]);
    }
    y[i] = Rounded<O>::from(clamped(value, floor));
  }
}

template <bool kRelu, bool kResidual, class T, class R, class O, bool kChannelsLast, class acc_t = acc_type<T>>
HOST_DEVICE void backward_run(const O* grad, const O* y, T* grad_x, R* grad_residual, int64_t count,
                              RunPair<acc_t, kChannelsLast> norm, RunPair<acc_t, kChannelsLast> residual_norm) {
  FPN_FAST_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    acc_t g = to_acc(grad[i]);
    if constexpr (kRelu) g = behind_relu(g, to_acc(y[i]));
    grad_x[i] = Rounded<T>::from(g * norm.first(i) * norm.second(i));
    if constexpr (kResidual) {
      grad_residual[i] = Rounded<R>::from(g * residual_norm.first(i) * residual_norm.second(i));
    }
  }
}

template <class T, bool kWideResidual, bool kWideOutput, bool kChannelsLast, bool kResidual, bool kNormed>
void forward_maps(const NormForward<T>& pass) {
  const auto norm = affines_of<T>(pass.maps, pass.maps.norm);
  const auto residual_norm = affines_of<T>(pass.maps, pass.maps.residual_norm);
  const auto* residual = static_cast<const MapType<kWideResidual, T>*>(pass.residual);
  auto* y = static_cast<MapType<kWideOutput, T>*>(pass.y);
  const bool contracted = pass.maps.rule == NormRule::kContracted;
  walk<kChannelsLast>(pass.maps, [&](int64_t offset, int64_t count, int64_t channel) {
    const auto run = [&](auto rule) {
      forward_run<rule(), kResidual, kNormed>(pass.x + offset, residual + (kResidual ? offset : 0), y + offset, count,
                                              norm.template from<kChannelsLast>(channel),
                                              residual_norm.template from<kChannelsLast>(channel), pass.floor);
    };
    contracted ? run(std::true_type()) : run(std::false_type());
  });
}

template <class T, bool kWideGrad, bool kWideResidual, bool kChannelsLast, bool kRelu, bool kResidual>
void backward_maps(const NormBackward<T>& pass) {
  const auto norm = slopes_of<T>(pass.maps, pass.maps.norm);
  const auto residual_norm = slopes_of<T>(pass.maps, pass.maps.residual_norm);
  const auto *grad = static_cast<const MapType<kWideGrad, T>*>(pass.grad),
             *y = static_cast<const MapType<kWideGrad, T>*>(pass.y);
  auto* grad_residual = static_cast<MapType<kWideResidual, T>*>(pass.grad_residual);
  walk<kChannelsLast>(pass.maps, [&](int64_t offset, int64_t count, int64_t channel) {
    backward_run<kRelu, kResidual>(
        grad + offset, y + (kRelu ? offset : 0), pass.grad_x + offset, grad_residual + (kResidual ? offset : 0), count,
        norm.template from<kChannelsLast>(channel), residual_norm.template from<kChannelsLast>(channel));
  });
}

// Calls `body` with the two choices as constants.
template <class Body>
void with_constants(bool first, bool second, const Body& body) {
  if (first) {
    second ? body(std::true_type(), std::true_type()) : body(std::true_type(), std::false_type());
  } else {
    second ? body(std::false_type(), std::true_type()) : body(std::false_type(), std::false_type());
  }
}

// Several sums at once, so that an addition does not wait for the one before it.
constexpr int kSumLanes = 16;

// The sums of one part for the channels from `channel` on.
template <class G, class X, class acc_t>
HOST_DEVICE void sum_channels(const G* grad, const G* y, const X* x, const acc_t* mean, int64_t channels, int64_t count,
                              acc_t* sums, acc_t* products) {
  std::fill_n(sums, channels, acc_t(0));
  std::fill_n(products, channels, acc_t(0));
  for (int64_t position = 0; position < count; ++position) {
    const int64_t at = position * channels;
    FPN_FAST_IVDEP
    for (int64_t c = 0; c < channels; ++c) {
      acc_t g = to_acc(grad[at + c]);
      if (y != nullptr) g = behind_relu(g, to_acc(y[at + c]));
      sums[c] += g;
      products[c] += g * (to_acc(x[at + c]) - mean[c]);
    }
  }
}

template <class G, class X, class acc_t>
HOST_DEVICE void sum_run(const G* grad, const G* y, const X* x, acc_t mean, int64_t count, acc_t (&sums)[kSumLanes],
                         acc_t (&products)[kSumLanes]) {
  const auto add_element = [&](int64_t i, int lane) {
    acc_t g = to_acc(grad[i]);
    if (y != nullptr) g = behind_relu(g, to_acc(y[i]));
    sums[lane] += g;
    products[lane] += g * (to_acc(x[i]) - mean);
  };
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    FPN_FAST_IVDEP
    for (int lane = 0; lane < kSumLanes; ++lane) add_element(i + lane, lane);
  }
  for (; i < count; ++i) add_element(i, static_cast<int>(i % kSumLanes));
}

template <class T, class G, class X, class acc_t = acc_type<T>>
void sum_parts(const NormSums<T>& pass) {
  const auto *grad = static_cast<const G*>(pass.grad), *y = static_cast<const G*>(pass.y);
  const auto* x = static_cast<const X*>(pass.x);
  const int64_t parts = norm_parts(pass.positions), channels = pass.channels;
  if (pass.channels_last) {
    parallel_maps(parts, kNormPart * channels, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * kNormPart, at = first * channels;
        acc_t* sums = pass.parts + part * 2 * channels;
        sum_channels(grad + at, y == nullptr ? y : y + at, x + at, pass.mean, channels,
                     std::min<int64_t>(kNormPart, pass.positions - first), sums, sums + channels);
      }
    });
    return;
  }
  parallel_maps(parts * channels, kNormPart, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / channels, channel = task % channels;
      const int64_t last = std::min<int64_t>((part + 1) * kNormPart, pass.positions);
      acc_t sums[kSumLanes] = {}, products[kSumLanes] = {};
      for (int64_t position = part * kNormPart; position < last;) {
        const int64_t count = std::min(pass.plane - position % pass.plane, last - position);
        const int64_t at = pass.offset(position, channel);
        sum_run(grad + at, y == nullptr ? y : y + at, x + at, pass.mean[channel], count, sums, products);
        position += count;
      }
      acc_t sum = 0, product = 0;
      for (int lane = 0; lane < kSumLanes; ++lane) sum += sums[lane], product += products[lane];
      pass.parts[part * 2 * channels + channel] = sum;
      pass.parts[(part * 2 + 1) * channels + channel] = product;
    }
  });
}

struct Cpu {
  template <class T, bool kWideResidual, bool kWideOutput>
  static void forward(const NormForward<T>& pass, bool channels_last, const Tensor&) {
    const bool has_norm = pass.maps.residual_norm.weight != nullptr;
    with_constants(channels_last, pass.residual != nullptr, [&](auto last, auto residual) {
      residual&& has_norm ? forward_maps<T, kWideResidual, kWideOutput, last(), residual(), residual()>(pass)
                          : forward_maps<T, kWideResidual, kWideOutput, last(), residual(), false>(pass);
    });
  }

  template <class T, bool kWideGrad, bool kWideResidual>
  static void backward(const NormBackward<T>& pass, bool channels_last, const Tensor&) {
    with_constants(channels_last, pass.y != nullptr, [&](auto last, auto relu) {
      pass.grad_residual != nullptr ? backward_maps<T, kWideGrad, kWideResidual, last(), relu(), true>(pass)
                                    : backward_maps<T, kWideGrad, kWideResidual, last(), relu(), false>(pass);
    });
  }

  template <class T, bool kWideGrad, bool kWideX>
  static void sums(const NormSums<T>& pass, const Tensor&) {
    sum_parts<T, MapType<kWideGrad, T>, MapType<kWideX, T>>(pass);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm<Cpu>));
  library.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward<Cpu>));
  library.impl("frozen_batch_norm_sums", TORCH_BOX(&frozen_batch_norm_sums<Cpu>));
}

}  // namespace fpn_fast
