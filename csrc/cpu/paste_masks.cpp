// SPDX-License-Identifier: Apache-2.0
// Mask pasting on the CPU. A task is one mask. Each mask row is resized along x once and blended along y for each row
// of the image. Every byte of the output is written once; most of them are zeros outside the box.
#include "../torch/paste_masks.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "../common/paste_masks.h"
#include "tasks.h"

namespace fpn_fast {
namespace {

template <class acc_t>
struct StoreValue {
  template <class T>
  HOST_DEVICE void operator()(T* target, acc_t value) const {
    *target = Rounded<T>::from(value);
  }
};

template <class acc_t>
struct StoreAbove {
  acc_t threshold;

  HOST_DEVICE void operator()(bool* target, acc_t value) const { *target = value > threshold; }
};

// A padded mask, and the two of its rows, resized along x, that the current row of the image blends.
template <class acc_t>
struct Resized {
  std::vector<acc_t> padded, rows[2];
  std::vector<Taps<acc_t>> columns;
  int held[2];

  template <class S>
  HOST_DEVICE void start(const S* mask, int size, int padding, const PasteAxis<acc_t>& x) {
    const int stride = size + 2 * padding;
    padded.assign(static_cast<size_t>(stride) * stride, acc_t(0));
    for (int row = 0; row < size; ++row) {
      acc_t* target = padded.data() + static_cast<size_t>(row + padding) * stride + padding;
      for (int column = 0; column < size; ++column) target[column] = to_acc(mask[int64_t{row} * size + column]);
    }
    columns.clear();
    for (int pixel = x.pixels.begin; pixel < x.pixels.end; ++pixel) columns.push_back(x.taps(pixel));
    for (int i = 0; i < 2; ++i) rows[i].resize(columns.size()), held[i] = -1;
  }

  HOST_DEVICE void hold(int slot, int row, int stride) {
    if (held[slot] == row) return;
    if (held[1 - slot] == row) {
      std::swap(rows[0], rows[1]), std::swap(held[0], held[1]);
      return;
    }
    held[slot] = row;
    const acc_t* source = padded.data() + static_cast<size_t>(row) * stride;
    const Taps<acc_t>* taps = columns.data();
    acc_t* target = rows[slot].data();
    const int count = static_cast<int>(columns.size());
    for (int i = 0; i < count; ++i) {
      target[i] = taps[i].weight_lo * source[taps[i].lo] + taps[i].weight_hi * source[taps[i].hi];
    }
  }
};

template <class S, class T, class Store, class acc_t = acc_type<S>>
HOST_DEVICE void paste(const S* mask, int size, int padding, const PasteAxis<acc_t>& x, const PasteAxis<acc_t>& y,
                       int64_t height, int64_t width, const Store& store, Resized<acc_t>& resized, T* out) {
  const bool empty = x.pixels.begin == x.pixels.end || y.pixels.begin == y.pixels.end;
  const int first = empty ? 0 : y.pixels.begin, last = empty ? 0 : y.pixels.end;
  const auto clear = [&](int64_t begin, int64_t end) { std::memset(out + begin, 0, sizeof(T) * (end - begin)); };
  clear(0, first * width);
  if (!empty) resized.start(mask, size, padding, x);
  for (int row = first; row < last; ++row) {
    const Taps<acc_t> taps = y.taps(row);
    resized.hold(0, taps.lo, size + 2 * padding);
    // At the end of the mask both taps are the same row, and the second weight is 0.
    if (taps.hi != taps.lo) resized.hold(1, taps.hi, size + 2 * padding);
    const acc_t* upper = resized.rows[0].data();
    const acc_t* lower = resized.rows[taps.hi != taps.lo].data();
    clear(row * width, row * width + x.pixels.begin);
    T* target = out + row * width + x.pixels.begin;
    const int count = x.pixels.end - x.pixels.begin;
    FPN_FAST_IVDEP
    for (int i = 0; i < count; ++i) store(target + i, taps.weight_lo * upper[i] + taps.weight_hi * lower[i]);
    clear(row * width + x.pixels.end, (row + 1) * width);
  }
  clear(last * width, height * width);
}

template <class S, class T, class B, class Store>
void paste_all(const Tensor& masks, const Tensor& boxes, int padding, const Store& store, const Tensor& out) {
  using acc_t = acc_type<S>;
  const int size = static_cast<int>(masks.size(3));
  const int64_t height = out.size(2), width = out.size(3);
  const S* mask = data<const S>(masks);
  const B* box = data<const B>(boxes);
  T* target = data<T>(out);
  const B scale = static_cast<B>(static_cast<double>(size + 2 * padding) / size);
  parallel_tasks(masks.size(0), height * width, [&](const auto& next) {
    Resized<acc_t> resized;
    for (int64_t k = next(); k < masks.size(0); k = next()) {
      T* pasted = target + k * height * width;
      const GrownBox grown = grow_box(box + 4 * k, scale);
      const PasteAxis<acc_t> x(grown.left, grown.right, static_cast<int>(width), size + 2 * padding);
      const PasteAxis<acc_t> y(grown.top, grown.bottom, static_cast<int>(height), size + 2 * padding);
      paste(mask + k * size * size, size, padding, x, y, height, width, store, resized, pasted);
    }
  });
}

struct Cpu {
  template <class S>
  static void run(const Tensor& masks, const Tensor& boxes, int padding, const std::optional<double>& threshold,
                  const Tensor& out) {
    using acc_t = acc_type<S>;
    dispatch_boxes(boxes.scalar_type(), [&](auto tag) {
      using B = typename decltype(tag)::type;
      if (threshold.has_value()) {
        paste_all<S, bool, B>(masks, boxes, padding, StoreAbove<acc_t>{static_cast<acc_t>(*threshold)}, out);
      } else {
        paste_all<S, S, B>(masks, boxes, padding, StoreValue<acc_t>{}, out);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("paste_masks", TORCH_BOX(&paste_masks<Cpu>)); }

}  // namespace fpn_fast
