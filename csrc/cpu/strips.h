// SPDX-License-Identifier: Apache-2.0
// Note [Strips]
// Maps are walked in rows of strips, runs of adjacent elements that stay in a core's first-level cache: a whole row of
// a plane (channels_first), or some pixels with all their channels (channels_last). Resampling along H combines whole
// runs, so it is the same for both. Along W, `inner` elements move together: one, or the channels of a pixel.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/fuse_maps.h"
#include "parallel_maps.h"

namespace fpn_fast {

// Of a strip of pixels. Three runs of this size for each of three maps fill a first-level cache of 48 KB.
constexpr int64_t kStripElements = 1024;

// As parallel_maps, or with `kWholeLines` false as parallel_rows, which is compiled for fewer instruction sets.
// Float64, which is for tests, is compiled for one.
template <class T, bool kWholeLines, class Body>
void parallel_strips(int64_t tasks, int64_t elements_per_task, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_task));
    torch::stable::parallel_for(0, tasks, grain, body);
  } else if constexpr (kWholeLines) {
    parallel_maps(tasks, elements_per_task, body);
  } else {
    parallel_rows(tasks, elements_per_task, body);
  }
}

// Calls `strip(n, c, x0, x1, y0, y1)`, of a functor that `make()` makes for each task, for all strips of maps
// [batch, channels, height, width]. elements: read or written for one element of them.
template <class T, bool kWholeLines, class Make>
void for_strips(bool pixels, int64_t batch, int64_t channels, int height, int width, int64_t elements,
                const Make& make) {
  if (batch == 0 || channels == 0) return;
  if (pixels) {
    const int step = static_cast<int>(std::max<int64_t>(1, kStripElements / channels));
    parallel_strips<T, kWholeLines>(batch * height, elements * width * channels, [&](int64_t begin, int64_t end) {
      auto strip = make();
      while (begin < end) {
        const int64_t n = begin / height;
        const int y0 = static_cast<int>(begin - n * height);
        const int y1 = static_cast<int>(std::min<int64_t>(height, y0 + end - begin));
        for (int x = 0; x < width; x += step) strip(n, 0, x, std::min(x + step, width), y0, y1);
        begin += y1 - y0;
      }
    });
  } else {
    parallel_strips<T, kWholeLines>(batch * channels, elements * height * width, [&](int64_t begin, int64_t end) {
      auto strip = make();
      for (int64_t plane = begin; plane < end; ++plane) strip(plane / channels, plane % channels, 0, width, 0, height);
    });
  }
}

template <class T>
struct StripMap {
  FeatureMap<T> map;
  bool pixels;
  int inner;
  bool dense, adjacent;  // the elements of a row are adjacent; those of a pixel are

  StripMap(const FeatureMap<T>& map, bool pixels) : map(map), pixels(pixels) {
    inner = pixels ? static_cast<int>(map.channels) : 1;
    adjacent = !pixels || map.stride_c == 1 || map.channels == 1;
    dense = adjacent && (map.stride_w == inner || map.width == 1);
  }

  // Whether a row of `columns` columns is followed by the next.
  HOST_DEVICE bool follows(int columns) const { return dense && map.stride_h == int64_t{columns} * inner; }

  HOST_DEVICE int64_t run(int begin, int end) const { return int64_t{end - begin} * inner; }
};

// The elements of columns [begin, end) of a row, widened: those of the map itself, or copied to `buffer`.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE const acc_t* load_run(const StripMap<const T>& from, int64_t n, int64_t c, int y, int begin, int end,
                                  acc_t* buffer) {
  const T* row = from.map.at(n, c, y, begin);
  if (from.dense) {
    if constexpr (std::is_same_v<T, acc_t>) {
      return row;
    } else {
      const int64_t count = from.run(begin, end);
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) buffer[i] = to_acc(row[i]);
      return buffer;
    }
  }
  const int inner = from.inner;
  for (int x = 0; x < end - begin; ++x) {
    const T* pixel = row + x * from.map.stride_w;
    if (from.adjacent) {
      FPN_FAST_IVDEP
      for (int i = 0; i < inner; ++i) buffer[int64_t{x} * inner + i] = to_acc(pixel[i]);
    } else {
      for (int i = 0; i < inner; ++i) buffer[int64_t{x} * inner + i] = to_acc(pixel[i * from.map.stride_c]);
    }
  }
  return buffer;
}

// Rounds the elements of columns [begin, end) of a row. Their pixels are adjacent in `values`.
template <class T, class acc_t = acc_type<T>>
HOST_DEVICE void store_run(const StripMap<T>& to, int64_t n, int64_t c, int y, int begin, int end,
                           const acc_t* values) {
  T* row = to.map.at(n, c, y, begin);
  // A dense row is one long pixel.
  const int pixels = to.dense ? 1 : end - begin;
  const int64_t inner = to.dense ? to.run(begin, end) : to.inner;
  for (int x = 0; x < pixels; ++x, row += to.map.stride_w, values += inner) {
    FPN_FAST_IVDEP
    for (int64_t i = 0; i < inner; ++i) row[i] = Rounded<T>::from(values[i]);
  }
}

// What the columns of a result read, computed once for a call.
template <class acc_t>
struct ColumnSources {
  Form form;
  int in, out;
  Windows windows{};
  std::vector<int> lo, hi;
  std::vector<acc_t> weight_lo, weight_hi;
  bool doubled = false;

  ColumnSources(Form form, int in, int out) : form(form), in(in), out(out) {
    if (form == Form::kIdentity) return;
    if (is_pooled(form)) {
      windows = windows_of(form, in, out);
      return;
    }
    const Axis<acc_t> axis = make_axis<acc_t>(in, out, resample_of(form));
    doubled = form == Form::kNearest && out == 2 * in;
    for (int x = 0; x < out; ++x) {
      if (form == Form::kNearest) {
        lo.push_back(nearest_source(axis, x));
        continue;
      }
      const Taps<acc_t> taps = bilinear_source(axis, x);
      lo.push_back(taps.lo), hi.push_back(taps.hi);
      weight_lo.push_back(taps.weight_lo), weight_hi.push_back(taps.weight_hi);
    }
  }

  // The columns of the map that columns [begin, end) of the result read.
  HOST_DEVICE Range sources(int begin, int end) const {
    if (form == Form::kIdentity) return {begin, end};
    if (is_pooled(form)) {
      return {std::max(window(windows, begin).begin, 0), std::min(window(windows, end - 1).end, in)};
    }
    return {lo[begin], (form == Form::kNearest ? lo : hi)[end - 1] + 1};
  }
};

template <class acc_t>
HOST_DEVICE void repeat_columns(const acc_t* in, const ColumnSources<acc_t>& columns, Range from, int begin, int end,
                                int inner, acc_t* out) {
  if (inner > 1) {
    for (int x = begin; x < end; ++x) {
      const acc_t* pixel = in + int64_t{columns.lo[x] - from.begin} * inner;
      acc_t* target = out + int64_t{x - begin} * inner;
      FPN_FAST_IVDEP
      for (int i = 0; i < inner; ++i) target[i] = pixel[i];
    }
  } else if (columns.doubled && end - begin == columns.out) {
    FPN_FAST_IVDEP
    for (int x = 0; x < columns.in; ++x) out[2 * x] = out[2 * x + 1] = in[x];
  } else {
    for (int x = begin; x < end; ++x) out[x - begin] = in[columns.lo[x] - from.begin];
  }
}

template <class acc_t>
HOST_DEVICE void blend_columns(const acc_t* in, const ColumnSources<acc_t>& columns, Range from, int begin, int end,
                               int inner, acc_t* out) {
  if (inner == 1) {
    const int *lo = columns.lo.data(), *hi = columns.hi.data();
    FPN_FAST_IVDEP
    for (int x = begin; x < end; ++x) {
      out[x - begin] = columns.weight_lo[x] * in[lo[x] - from.begin] + columns.weight_hi[x] * in[hi[x] - from.begin];
    }
    return;
  }
  for (int x = begin; x < end; ++x) {
    const acc_t *left = in + int64_t{columns.lo[x] - from.begin} * inner,
                *right = in + int64_t{columns.hi[x] - from.begin} * inner;
    const acc_t weight_lo = columns.weight_lo[x], weight_hi = columns.weight_hi[x];
    acc_t* target = out + int64_t{x - begin} * inner;
    FPN_FAST_IVDEP
    for (int i = 0; i < inner; ++i) target[i] = weight_lo * left[i] + weight_hi * right[i];
  }
}

// The columns whose windows of a fixed size lie within the map.
HOST_DEVICE Range whole_windows(const Windows& axis, int begin, int end) {
  if (axis.size == 0) return {end, end};
  const int first = (axis.before + axis.stride - 1) / axis.stride;
  const int last = axis.in >= axis.size ? (axis.in - axis.size + axis.before) / axis.stride + 1 : 0;
  const int from = std::min(std::max(first, begin), end);
  return {from, std::max(from, std::min(last, end))};
}

// Elements 2 i and 2 i + 1 of `count`: compilers vectorise loops over what is adjacent.
template <class acc_t>
HOST_DEVICE void split_columns(const acc_t* in, int count, acc_t* even, acc_t* odd) {
  const int half = count / 2;
  FPN_FAST_IVDEP
  for (int i = 0; i < half; ++i) even[i] = in[2 * i], odd[i] = in[2 * i + 1];
  if (count % 2 == 1) even[half] = in[count - 1];
}

template <class acc_t>
HOST_DEVICE void maximum_of_columns(const acc_t* in, const Windows& axis, Range from, int begin, int end, int inner,
                                    acc_t* out, acc_t* even, acc_t* odd) {
  const auto one = [&](int x) {
    const Range range = window(axis, x);
    const int first = std::max(range.begin, 0), last = std::min(range.end, axis.in);
    acc_t* target = out + int64_t{x - begin} * inner;
    const acc_t* pixel = in + int64_t{first - from.begin} * inner;
    FPN_FAST_IVDEP
    for (int i = 0; i < inner; ++i) target[i] = pixel[i];
    for (int column = first + 1; column < last; ++column) {
      pixel += inner;
      FPN_FAST_IVDEP
      for (int i = 0; i < inner; ++i) target[i] = greater(target[i], pixel[i]);
    }
    if (axis.zeros && (first > range.begin || last < range.end)) {
      for (int i = 0; i < inner; ++i) target[i] = greater(target[i], acc_t(0));
    }
  };
  const Range whole = whole_windows(axis, begin, end);
  for (int x = begin; x < whole.begin; ++x) one(x);
  const acc_t* first = in + int64_t{whole.begin * axis.stride - axis.before - from.begin} * inner;
  acc_t* target = out + int64_t{whole.begin - begin} * inner;
  const int count = whole.end - whole.begin;
  if (inner > 1) {
    for (int x = 0; x < count; ++x, first += 2 * int64_t{inner}, target += inner) {
      if (axis.size == 3) {
        FPN_FAST_IVDEP
        for (int i = 0; i < inner; ++i) {
          target[i] = greater(greater(first[i], first[inner + i]), first[2 * inner + i]);
        }
      } else {
        FPN_FAST_IVDEP
        for (int i = 0; i < inner; ++i) target[i] = greater(first[i], first[inner + i]);
      }
    }
  } else if (count > 0) {
    split_columns(first, 2 * count + axis.size - 2, even, odd);
    if (axis.size == 3) {
      FPN_FAST_IVDEP
      for (int x = 0; x < count; ++x) target[x] = greater(greater(even[x], odd[x]), even[x + 1]);
    } else {
      FPN_FAST_IVDEP
      for (int x = 0; x < count; ++x) target[x] = greater(even[x], odd[x]);
    }
  }
  for (int x = whole.end; x < end; ++x) one(x);
}

// How one map becomes a term.
template <class T>
struct TermPlan {
  using acc_t = acc_type<T>;
  StripMap<const T> map;
  Form form;
  Axis<acc_t> rows{};
  Windows row_windows{};
  ColumnSources<acc_t> columns;

  TermPlan(const FeatureMap<const T>& from, bool pixels, Form form, int height, int width)
      : map(from, pixels), form(form), columns(form, from.width, width) {
    if (is_pooled(form)) {
      row_windows = windows_of(form, from.height, height);
    } else {
      rows = make_axis<acc_t>(from.height, height, resample_of(form));
    }
  }

  // Of the longest run of a strip of `pixels` pixels of the result.
  int64_t longest(int pixels) const {
    int widest = 0;
    for (int x = 0; x < columns.out; x += pixels) {
      const int end = std::min(x + pixels, columns.out);
      const Range from = columns.sources(x, end);
      widest = std::max({widest, from.end - from.begin, end - x});
    }
    return int64_t{widest} * map.inner;
  }
};

// Reads the rows of a strip of a term from top to bottom.
template <class T>
class TermReader {
  using acc_t = acc_type<T>;

 public:
  TermReader(const TermPlan<T>& plan, int64_t longest) : plan_(plan), longest_(longest), buffers_(7 * longest) {}

  // Columns [begin, end) of the result. factor: nullptr for a map as it is; gate: [C] for pixels, otherwise nullptr.
  HOST_DEVICE void start(int64_t n, int64_t c, int begin, int end, const Factor<acc_t>* factor, const T* gate) {
    n_ = n, c_ = c, begin_ = begin, end_ = end, factor_ = factor, gate_ = gate;
    from_ = plan_.columns.sources(begin, end);
    std::fill_n(loaded_, 3, -1), std::fill_n(resampled_, 2, -1);
  }

  // Rows [y0, y1) of the term, one after the other, valid until the next call. Small rows come together, because each
  // loop takes time to begin. Rows are loaded in one place, and terms scaled in one, because each is compiled for every
  // type and instruction set.
  HOST_DEVICE const acc_t* rows(int y0, int y1) {
    const int64_t count = plan_.map.run(begin_, end_);
    acc_t* out = buffer(5);
    if (plan_.form == Form::kIdentity && plan_.map.follows(end_ - begin_)) {
      const acc_t* run = load_run(plan_.map, n_, c_, y0, begin_, begin_ + (end_ - begin_) * (y1 - y0), out);
      return scaled(run, count * (y1 - y0), out);
    }
    for (int y = y0; y < y1; ++y) resample_row(y, out + (y - y0) * count);
    return scaled(out, count * (y1 - y0), out);
  }

 private:
  HOST_DEVICE void resample_row(int y, acc_t* out) {
    const Form form = plan_.form;
    const bool is_bilinear = form == Form::kBilinear || form == Form::kBilinearAlignCorners;
    Range rows{y, y + 1};
    Taps<acc_t> taps{};
    if (form == Form::kNearest) {
      rows.begin = nearest_source(plan_.rows, y), rows.end = rows.begin + 1;
    } else if (is_pooled(form)) {
      rows = window(plan_.row_windows, y);
    } else if (is_bilinear) {
      taps = bilinear_source(plan_.rows, y);
      rows = {taps.lo, taps.hi + 1};
    }
    const int first = std::max(rows.begin, 0), last = std::min(rows.end, plan_.map.map.height);
    const int64_t loads = plan_.map.run(from_.begin, from_.end), count = plan_.map.run(begin_, end_);
    const int inner = plan_.map.inner;
    const acc_t* run = nullptr;
    for (int source = first; source < last; ++source) {
      const int slot = source % 3;
      if (loaded_[slot] != source) {
        runs_[slot] = load_run(plan_.map, n_, c_, source, from_.begin, from_.end, buffer(slot));
        loaded_[slot] = source;
      }
      run = runs_[slot];
      if (is_bilinear && resampled_[source & 1] != source) {
        blend_columns(run, plan_.columns, from_, begin_, end_, inner, buffer(3 + (source & 1)));
        resampled_[source & 1] = source;
      }
      if (!is_pooled(form) || last - first == 3) continue;
      // Of windows of three rows all are loaded first.
      acc_t* greatest = buffer(3);
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < loads; ++i) greatest[i] = source == first ? run[i] : greater(greatest[i], run[i]);
    }
    if (form == Form::kNearest) {
      repeat_columns(run, plan_.columns, from_, begin_, end_, inner, out);
    } else if (is_pooled(form)) {
      acc_t* greatest = buffer(3);
      if (last - first == 3) {
        const acc_t *above = runs_[first % 3], *middle = runs_[(first + 1) % 3], *below = runs_[(first + 2) % 3];
        FPN_FAST_IVDEP
        for (int64_t i = 0; i < loads; ++i) greatest[i] = greater(greater(above[i], middle[i]), below[i]);
      }
      if (plan_.row_windows.zeros && last - first < rows.end - rows.begin) {
        for (int64_t i = 0; i < loads; ++i) greatest[i] = greater(greatest[i], acc_t(0));
      }
      maximum_of_columns(greatest, plan_.columns.windows, from_, begin_, end_, inner, out, buffer(4), buffer(6));
    } else if (is_bilinear) {
      const acc_t *above = buffer(3 + (taps.lo & 1)), *below = buffer(3 + (taps.hi & 1));
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) out[i] = taps.weight_lo * above[i] + taps.weight_hi * below[i];
    } else {
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) out[i] = run[i];
    }
  }

  // 0 to 2: source rows; 3 and 4: resampled along one axis; 5: the term; 6: odd columns.
  HOST_DEVICE acc_t* buffer(int i) { return buffers_.data() + i * longest_; }

  HOST_DEVICE const acc_t* scaled(const acc_t* run, int64_t count, acc_t* out) {
    const int inner = plan_.map.inner;
    if (gate_ != nullptr) {
      for (int64_t first = 0; first < count; first += inner) {
        FPN_FAST_IVDEP
        for (int i = 0; i < inner; ++i) out[first + i] = rounded<T>(run[first + i] * to_acc(gate_[i]));
      }
      return out;
    }
    if (factor_ == nullptr) return run;
    const Factor<acc_t> factor = *factor_;
    if (factor.divisor == 1) {
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(run[i] * factor.multiplier);
    } else {
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(rounded<T>(run[i] * factor.multiplier) / factor.divisor);
    }
    return out;
  }

  const TermPlan<T>& plan_;
  int64_t longest_;
  std::vector<acc_t> buffers_;
  int64_t n_ = 0, c_ = 0;
  int begin_ = 0, end_ = 0;
  Range from_{};
  const Factor<acc_t>* factor_ = nullptr;
  const T* gate_ = nullptr;
  int loaded_[3], resampled_[2];
  const acc_t* runs_[3];
};

// The plans of maps that are resampled to one size, and readers of them.
template <class T>
struct TermPlans {
  std::vector<TermPlan<T>> maps;
  int64_t longest = 0;
  int rows_together = 1;  // of small planes

  TermPlans(const std::vector<FeatureMap<const T>>& from, bool pixels, const std::vector<Form>& forms, int height,
            int width) {
    for (size_t k = 0; k < from.size(); ++k) {
      maps.emplace_back(from[k], pixels, forms[k], height, width);
      const int64_t step = std::max<int64_t>(1, kStripElements / std::max<int64_t>(1, from[k].channels));
      longest = std::max(longest, maps[k].longest(pixels ? static_cast<int>(step) : width));
    }
    if (!pixels) rows_together = static_cast<int>(std::clamp<int64_t>(kStripElements / width, 1, height));
    longest = std::max<int64_t>(longest, int64_t{rows_together} * width);
  }

  std::vector<TermReader<T>> readers() const {
    std::vector<TermReader<T>> found;
    for (const auto& plan : maps) found.emplace_back(plan, longest);
    return found;
  }
};

}  // namespace fpn_fast
