// SPDX-License-Identifier: Apache-2.0
// Gradients of fused, and of resized and concatenated, maps on the CPU. A map's gradient is gathered from the pixels
// that read it, so nothing is zero-filled, and the sums do not depend on the number of threads. Maxima are found again.
#include <torch/csrc/stable/library.h>

#include "../torch/fuse_maps.h"
#include "strips.h"

namespace fpn_fast {
namespace {

// Columns of the result that read each column of a map, and their weights.
template <class acc_t>
struct ColumnReaders {
  std::vector<Range> ranges;
  std::vector<int> first_weight;
  std::vector<acc_t> weights;
  bool pairs = true;

  ColumnReaders(Form form, int in, int out) {
    const bool nearest = form == Form::kNearest;
    pairs = nearest;
    const Axis<acc_t> axis = make_axis<acc_t>(in, out, resample_of(form));
    for (int src = 0; src < in; ++src) {
      const Range range = nearest ? targets<false>(axis, src) : targets<true>(axis, src);
      ranges.push_back(range);
      pairs &= range.begin == 2 * src && range.end == 2 * src + 2;
      first_weight.push_back(static_cast<int>(weights.size()));
      if (nearest) continue;
      for (int dst = range.begin; dst < range.end; ++dst) weights.push_back(bilinear_weight(axis, dst, src));
    }
  }
};

// Gathers one map's gradient, strip by strip.
template <class T>
struct GatherPlan {
  using acc_t = acc_type<T>;
  StripMap<const T> grad;
  StripMap<T> out;
  StripMap<const T> map;
  Form form;
  Axis<acc_t> rows{};
  Windows row_windows{}, col_windows{};
  std::optional<ColumnReaders<acc_t>> columns;
  acc_t coefficient;
  const T* gate;

  GatherPlan(const ResampleGradient<T>& from, bool pixels, acc_t coefficient, const T* gate)
      : grad(from.grad, pixels),
        out(from.out, pixels),
        map(from.map, pixels),
        form(from.form),
        coefficient(coefficient),
        gate(gate) {
    const int height = from.out.height, width = from.out.width;
    if (is_pooled(form)) {
      row_windows = windows_of(form, height, from.grad.height);
      col_windows = windows_of(form, width, from.grad.width);
    } else if (form != Form::kIdentity) {
      rows = make_axis<acc_t>(height, from.grad.height, resample_of(form));
      columns.emplace(form, width, from.grad.width);
    }
  }

  // The columns of the gradient that columns [begin, end) of the map were read by.
  HOST_DEVICE Range readers(int begin, int end) const {
    if (form == Form::kIdentity) return {begin, end};
    if (is_pooled(form)) return {window_targets(col_windows, begin).begin, window_targets(col_windows, end - 1).end};
    return {columns->ranges[begin].begin, columns->ranges[end - 1].end};
  }

  int64_t longest(int pixels) const {
    int widest = 0;
    for (int x = 0; x < out.map.width; x += pixels) {
      const int end = std::min(x + pixels, out.map.width);
      const Range range = readers(x, end);
      widest = std::max({widest, range.end - range.begin, end - x});
      // Windows of the first and last reader reach beyond the strip.
      if (is_pooled(form) && range.end > range.begin) {
        widest = std::max(widest, window(col_windows, range.end - 1).end - window(col_windows, range.begin).begin);
      }
    }
    return int64_t{widest + 2} * out.inner;
  }
};

template <class T>
class Gatherer {
  using acc_t = acc_type<T>;

 public:
  Gatherer(const GatherPlan<T>& plan, int64_t longest) : plan_(plan), longest_(longest), buffers_(kBuffers * longest) {}

  HOST_DEVICE void operator()(int64_t n, int64_t c, int x0, int x1, int y0, int y1) {
    n_ = n, c_ = c, x0_ = x0, x1_ = x1;
    readers_ = plan_.readers(x0, x1);
    found_[0] = found_[1] = -1;
    for (int y = y0; y < y1; ++y) {
      if (plan_.form == Form::kIdentity) {
        store(y, load_run(plan_.grad, n, c, y, x0, x1, buffer(0)));
      } else if (is_pooled(plan_.form)) {
        gather_maxima(y);
      } else {
        gather_readers(y);
      }
    }
  }

 private:
  // 0: a run of the gradient; 1: sums; 2: a run of the map; 3 to 6: the greatest values and where they are, of two
  // rows; 7 and 8: even and odd columns.
  static constexpr int kBuffers = 9;
  HOST_DEVICE acc_t* buffer(int i) { return buffers_.data() + i * longest_; }

  // Row `y`, times its coefficient. `values` may be changed unless they are those of the gradient.
  HOST_DEVICE void store(int y, const acc_t* values) {
    const int64_t count = plan_.out.run(x0_, x1_);
    acc_t factor = plan_.coefficient;
    const T* gate = plan_.gate == nullptr ? nullptr : plan_.gate + n_ * plan_.out.map.channels;
    if (gate != nullptr && !plan_.out.pixels) factor *= to_acc(gate[c_]), gate = nullptr;
    acc_t* scaled = buffer(1);
    if (gate != nullptr) {
      const int inner = plan_.out.inner;
      for (int64_t first = 0; first < count; first += inner) {
        FPN_FAST_IVDEP
        for (int i = 0; i < inner; ++i) scaled[first + i] = values[first + i] * (factor * to_acc(gate[i]));
      }
      values = scaled;
    } else if (factor != 1) {
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) scaled[i] = values[i] * factor;
      values = scaled;
    }
    store_run(plan_.out, n_, c_, y, x0_, x1_, values);
  }

  HOST_DEVICE void gather_readers(int y) {
    const bool bilinear = plan_.form != Form::kNearest;
    const Range rows = bilinear ? targets<true>(plan_.rows, y) : targets<false>(plan_.rows, y);
    const int64_t count = plan_.grad.run(readers_.begin, readers_.end);
    acc_t* sums = buffer(1);
    std::fill_n(sums, count, acc_t(0));
    for (int row = rows.begin; row < rows.end; ++row) {
      const acc_t* grad = load_run(plan_.grad, n_, c_, row, readers_.begin, readers_.end, buffer(0));
      const acc_t weight = bilinear ? bilinear_weight(plan_.rows, row, y) : acc_t(1);
      FPN_FAST_IVDEP
      for (int64_t i = 0; i < count; ++i) sums[i] += weight * grad[i];
    }
    const ColumnReaders<acc_t>& columns = *plan_.columns;
    acc_t* out = buffer(2);
    const int inner = plan_.out.inner;
    if (!plan_.out.pixels && columns.pairs) {
      const int width = x1_;
      FPN_FAST_IVDEP
      for (int x = 0; x < width; ++x) out[x] = sums[2 * x] + sums[2 * x + 1];
      return store(y, out);
    }
    for (int x = x0_; x < x1_; ++x) {
      const Range range = columns.ranges[x];
      acc_t* pixel = out + int64_t{x - x0_} * inner;
      std::fill_n(pixel, inner, acc_t(0));
      for (int column = range.begin; column < range.end; ++column) {
        const acc_t weight = bilinear ? columns.weights[columns.first_weight[x] + column - range.begin] : acc_t(1);
        const acc_t* from = sums + int64_t{column - readers_.begin} * inner;
        FPN_FAST_IVDEP
        for (int i = 0; i < inner; ++i) pixel[i] += weight * from[i];
      }
    }
    store(y, out);
  }

  // For row `y` of the result, which pixel of its window each maximum is: row * window width + column, -1 for padding.
  HOST_DEVICE const acc_t* winners(int y) {
    const int slot = y & 1;
    acc_t *best = buffer(3 + 2 * slot), *code = buffer(4 + 2 * slot);
    if (found_[slot] == y) return code;
    found_[slot] = y;
    const Windows &rows = plan_.row_windows, &cols = plan_.col_windows;
    const int inner = plan_.out.inner, width = window_size(cols);
    const Range range = window(rows, y);
    const int first_row = std::max(range.begin, 0) - range.begin;
    const int64_t count = plan_.grad.run(readers_.begin, readers_.end);
    std::fill_n(code, count, cols.zeros && first_row > 0 ? acc_t(-1) : acc_t(first_row * width));
    for (int x = readers_.begin; x < readers_.end && window(cols, x).begin < 0; ++x) {
      const acc_t first = cols.zeros ? acc_t(-1) : acc_t(first_row * width - window(cols, x).begin);
      std::fill_n(code + int64_t{x - readers_.begin} * inner, inner, first);
    }
    std::fill_n(best, count, -std::numeric_limits<acc_t>::infinity());
    const int left = std::max(window(cols, readers_.begin).begin, 0);
    const int right = std::min(window(cols, readers_.end - 1).end, cols.in);
    for (int row = range.begin; row < range.end; ++row) {
      const bool is_inside = row >= 0 && row < rows.in;
      if (!is_inside && !rows.zeros) continue;
      const acc_t* run = is_inside ? load_run(plan_.map, n_, c_, row, left, right, buffer(2)) : nullptr;
      const int at = (row - range.begin) * width;
      take_row(run, left, at, best, code);
    }
    return code;
  }

  // Takes the pixels of a row of every window, from left to right, where they are greater. run: nullptr for padding.
  HOST_DEVICE void take_row(const acc_t* run, int left, int at, acc_t* best, acc_t* code) {
    const Windows& cols = plan_.col_windows;
    const int inner = plan_.out.inner;
    Range whole = whole_windows(cols, readers_.begin, readers_.end);
    if (run == nullptr) whole = {readers_.end, readers_.end};
    const auto take_window = [&](int x) {
      const Range range = window(cols, x);
      const int64_t first = int64_t{x - readers_.begin} * inner;
      for (int column = range.begin; column < range.end; ++column) {
        const bool is_inside = run != nullptr && column >= 0 && column < cols.in;
        if (!is_inside && !cols.zeros) continue;
        const acc_t own = is_inside ? static_cast<acc_t>(at + column - range.begin) : acc_t(-1);
        const acc_t* source = is_inside ? run + int64_t{column - left} * inner : nullptr;
        for (int i = 0; i < inner; ++i) {
          take(is_inside ? source[i] : acc_t(0), own, best[first + i], code[first + i]);
        }
      }
    };
    for (int x = readers_.begin; x < whole.begin; ++x) take_window(x);
    const int count = whole.end - whole.begin;
    const int64_t first = int64_t{whole.begin - readers_.begin} * inner;
    if (count > 0) {
      const acc_t* source = run + int64_t{whole.begin * cols.stride - cols.before - left} * inner;
      if (inner == 1) {
        acc_t *even = buffer(7), *odd = buffer(8);
        split_columns(source, 2 * count + cols.size - 2, even, odd);
        take_three(even, odd, cols.size == 3 ? even + 1 : nullptr, at, count, best + first, code + first);
      } else {
        for (int64_t x = 0; x < count; ++x, source += 2 * int64_t{inner}) {
          const acc_t* third = cols.size == 3 ? source + 2 * inner : nullptr;
          take_three(source, source + inner, third, at, inner, best + first + x * inner, code + first + x * inner);
        }
      }
    }
    for (int x = whole.end; x < readers_.end; ++x) take_window(x);
  }

  HOST_DEVICE static void take_three(const acc_t* a, const acc_t* b, const acc_t* c, int at, int count, acc_t* best,
                                     acc_t* code) {
    const acc_t number = static_cast<acc_t>(at);
    if (c == nullptr) {
      FPN_FAST_IVDEP
      for (int i = 0; i < count; ++i) {
        acc_t greatest = best[i], where = code[i];
        take(a[i], number, greatest, where), take(b[i], number + 1, greatest, where);
        best[i] = greatest, code[i] = where;
      }
      return;
    }
    FPN_FAST_IVDEP
    for (int i = 0; i < count; ++i) {
      acc_t greatest = best[i], where = code[i];
      take(a[i], number, greatest, where), take(b[i], number + 1, greatest, where);
      take(c[i], number + 2, greatest, where);
      best[i] = greatest, code[i] = where;
    }
  }

  HOST_DEVICE static void take(acc_t value, acc_t number, acc_t& best, acc_t& code) {
    const bool is_taken = (value > best) | (value != value);
    best = is_taken ? value : best;
    code = is_taken ? number : code;
  }

  HOST_DEVICE void gather_maxima(int y) {
    const Windows &rows = plan_.row_windows, &cols = plan_.col_windows;
    const Range found = window_targets(rows, y);
    const int inner = plan_.out.inner, width = window_size(cols);
    const int64_t count = plan_.out.run(x0_, x1_);
    acc_t* sums = buffer(1);
    std::fill_n(sums, count, acc_t(0));
    for (int row = found.begin; row < found.end; ++row) {
      const acc_t* code = winners(row);
      const acc_t* grad = load_run(plan_.grad, n_, c_, row, readers_.begin, readers_.end, buffer(0));
      const int at = (y - window(rows, row).begin) * width;
      if (!plan_.out.pixels && cols.size > 0) {
        add_maxima(code, grad, at, sums);
        continue;
      }
      for (int x = readers_.begin; x < readers_.end; ++x) {
        const Range range = window(cols, x);
        const int64_t first = int64_t{x - readers_.begin} * inner;
        for (int column = std::max(range.begin, x0_); column < std::min(range.end, x1_); ++column) {
          const int own = at + column - range.begin;
          acc_t* to = sums + int64_t{column - x0_} * inner;
          FPN_FAST_IVDEP
          for (int i = 0; i < inner; ++i) to[i] += chosen(code[first + i], own, grad[first + i]);
        }
      }
    }
    store(y, sums);
  }

  // `value` is read whether or not it is chosen, so that the choice is no branch.
  HOST_DEVICE static acc_t chosen(acc_t code, int own, acc_t value) {
    return code == static_cast<acc_t>(own) ? value : acc_t(0);
  }

  // Adds to the pixels of a plane's row what the windows of a stride of 2 hand on to them.
  HOST_DEVICE void add_maxima(const acc_t* code, const acc_t* grad, int at, acc_t* sums) {
    const Windows& cols = plan_.col_windows;
    const int windows = readers_.end;
    acc_t* parts[3] = {buffer(7), buffer(8), buffer(2)};
    for (int column = 0; column < cols.size; ++column) {
      acc_t* part = parts[column];
      FPN_FAST_IVDEP
      for (int x = 0; x < windows; ++x) part[x] = chosen(code[x], at + column, grad[x]);
    }
    const auto handed = [&](int x, int column) { return parts[column][x]; };
    const int count = windows, width = plan_.out.map.width;
    const int pairs = std::min(count - 1, width / 2 - 1);
    if (cols.size == 2) {
      FPN_FAST_IVDEP
      for (int x = 0; x < count; ++x) sums[2 * x] += handed(x, 0), sums[2 * x + 1] += handed(x, 1);
    } else if (cols.before == 1) {
      FPN_FAST_IVDEP
      for (int x = 0; x < pairs; ++x) {
        sums[2 * x] += handed(x, 1), sums[2 * x + 1] += handed(x, 2) + handed(x + 1, 0);
      }
      // The first column of window `pairs` has been added.
      for (int x = std::max(pairs, 0); x < count; ++x) {
        const bool is_begun = x == pairs && pairs > 0;
        const int begin = 2 * x - 1;
        for (int column = is_begun ? 1 : 0; column < 3; ++column) {
          if (begin + column >= 0 && begin + column < width) sums[begin + column] += handed(x, column);
        }
      }
    } else {
      sums[0] += handed(0, 0), sums[1] += handed(0, 1);
      FPN_FAST_IVDEP
      for (int x = 1; x < count; ++x) {
        sums[2 * x] += handed(x - 1, 2) + handed(x, 0), sums[2 * x + 1] += handed(x, 1);
      }
    }
  }

  const GatherPlan<T>& plan_;
  int64_t longest_;
  std::vector<acc_t> buffers_;
  int64_t n_ = 0, c_ = 0;
  int x0_ = 0, x1_ = 0;
  Range readers_{};
  int found_[2];
};

template <class T>
void gather_maps(const ResampleGradients<T>& pass, bool pixels) {
  for (size_t k = 0; k < pass.maps.size(); ++k) {
    const FeatureMap<T>& out = pass.maps[k].out;
    if (out.channels == 0) continue;
    const GatherPlan<T> plan(pass.maps[k], pixels, pass.coefficients != nullptr ? pass.coefficients[k] : 1,
                             k == 0 ? pass.gate : nullptr);
    const int64_t step = pixels ? std::max<int64_t>(1, kStripElements / out.channels) : out.width;
    const int64_t longest = plan.longest(static_cast<int>(step));
    // An element of a coarser map gathers about four.
    const int64_t read =
        int64_t{pass.maps[k].grad.height} * pass.maps[k].grad.width / (int64_t{out.height} * out.width);
    for_strips<T, false>(pixels, out.batch, out.channels, out.height, out.width, 2 + read,
                         [&] { return Gatherer<T>(plan, longest); });
  }
}

// Several sums at once, so that an addition does not wait for the one before it.
constexpr int kWeightLanes = 16;

template <class T>
void sum_strips(const FeatureMap<const T>& grad, const std::vector<FeatureMap<const T>>& maps,
                const std::vector<Form>& forms, acc_type<T>* parts, bool pixels) {
  using acc_t = acc_type<T>;
  const TermPlans<T> plans(maps, pixels, forms, grad.height, grad.width);
  const StripMap<const T> own(grad, pixels);
  const int count = static_cast<int>(maps.size());
  const int64_t bands = sum_bands(grad.height), channels = grad.channels;
  const int step = pixels ? static_cast<int>(std::max<int64_t>(1, kStripElements / channels)) : grad.width;
  const int64_t tasks = pixels ? grad.batch * bands : grad.batch * channels;
  const int64_t elements = (count + 1) * grad.width * (pixels ? channels * kSumRows : int64_t{grad.height});
  parallel_strips<T, false>(tasks, elements, [&](int64_t begin, int64_t end) {
    auto readers = plans.readers();
    std::vector<acc_t> buffer(plans.longest);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = pixels ? task / bands : task / channels, c = pixels ? 0 : task % channels;
      const int64_t first_band = pixels ? task % bands : 0, last_band = pixels ? first_band + 1 : bands;
      for (int x0 = 0; x0 < grad.width; x0 += step) {
        const int x1 = std::min(x0 + step, grad.width);
        for (auto& reader : readers) reader.start(n, c, x0, x1, nullptr, nullptr);
        for (int64_t band = first_band; band < last_band; ++band) {
          acc_t* part = parts + (n * bands + band) * count * channels + c;
          if (pixels && x0 == 0) std::fill_n(part, count * channels, acc_t(0));
          acc_t lanes[kMostFused][kWeightLanes] = {};
          const int last = std::min(static_cast<int>(band + 1) * kSumRows, grad.height);
          for (int y = static_cast<int>(band) * kSumRows; y < last; ++y) {
            const acc_t* g = load_run(own, n, c, y, x0, x1, buffer.data());
            for (int k = 0; k < count; ++k) {
              const acc_t* run = readers[k].rows(y, y + 1);
              if (pixels) {
                acc_t* sums = part + k * channels;
                for (int64_t x = 0; x < x1 - x0; ++x) {
                  FPN_FAST_IVDEP
                  for (int64_t i = 0; i < channels; ++i) sums[i] += g[x * channels + i] * run[x * channels + i];
                }
              } else {
                int x = 0;
                for (; x + kWeightLanes <= x1; x += kWeightLanes) {
                  FPN_FAST_IVDEP
                  for (int lane = 0; lane < kWeightLanes; ++lane) lanes[k][lane] += g[x + lane] * run[x + lane];
                }
                for (; x < x1; ++x) lanes[k][x % kWeightLanes] += g[x] * run[x];
              }
            }
          }
          if (!pixels) {
            for (int k = 0; k < count; ++k) {
              acc_t sum = 0;
              for (int lane = 0; lane < kWeightLanes; ++lane) sum += lanes[k][lane];
              part[k * channels] = sum;
            }
          }
        }
      }
    }
  });
}

struct Cpu {
  template <class T>
  static void gather(const ResampleGradients<T>& pass, bool channels_last, const Tensor&) {
    gather_maps(pass, channels_last);
  }

  template <class T>
  static void sum(const FeatureMap<const T>& grad, const std::vector<FeatureMap<const T>>& maps,
                  const std::vector<Form>& forms, acc_type<T>* parts, bool channels_last, const Tensor&) {
    sum_strips(grad, maps, forms, parts, channels_last);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) {
  library.impl("resample_backward", TORCH_BOX(&resample_backward<Cpu>));
  library.impl("resample_sums", TORCH_BOX(&resample_sums<Cpu>));
}

}  // namespace fpn_fast
