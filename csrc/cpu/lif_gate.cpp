// The LIF gate on the CPU: one read of x and one write of y forward; one read of x and grad_y and
// one write of grad_x backward. A row stays in the first-level cache between the two loops over it
// that a norm needs. The loops carry `omp simd` so that sums may be split over vector lanes.
#include "../common/lif_gate.h"

#include <cmath>
#include <type_traits>

#include "../common/lif_gate_math.h"
#include "parallel.h"
#include "sums.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

// The parameters of element j of a row, where every column is a unit and where the row is one.
template <typename C>
struct ColumnGates {
  const C *thresholds, *leaks, *steepnesses;
  EMBER_HD C threshold(int64_t j) const { return thresholds[j]; }
  EMBER_HD C leak(int64_t j) const { return leaks[j]; }
  EMBER_HD C steepness(int64_t j) const { return steepnesses[j]; }
};

template <typename C>
struct RowGate {
  C row_threshold, row_leak, row_steepness;
  EMBER_HD C threshold(int64_t) const { return row_threshold; }
  EMBER_HD C leak(int64_t) const { return row_leak; }
  EMBER_HD C steepness(int64_t) const { return row_steepness; }
};

template <Norm norm, typename C>
EMBER_HD C norm_term(C v) {
  return norm == Norm::l2 ? v * v : norm == Norm::l1 ? absolute(v) : C(0);
}

// Sums of norm_term over a row; `dot` is the sum of grad_y * y.
struct RowSums {
  double x, y, dot;

  // Whether no sum in C can have overflowed or lost terms below the smallest normal number, and no
  // gate that is further shut than C can tell (see gate_odds) counts.
  template <typename C>
  bool trustworthy() const {
    constexpr bool single = sizeof(C) == 4;
    const double tiny = single ? 1e-24 : 1e-280, huge = single ? 1e36 : 1e280;
    const double least_gate = single ? 1e-30 : 1e-290;
    return x > tiny && x < huge && y > tiny && y > least_gate * x;
  }
};

template <Norm norm>
double norm_of(double sum) {
  return norm == Norm::l2 ? __builtin_sqrt(sum) : sum;
}

// out = y * ratio with ratio = |x| / (|y| + eps).
template <Norm norm>
double norm_ratio(const RowSums& sums, double eps) {
  return norm_of<norm>(sums.x) / (norm_of<norm>(sums.y) + eps);
}

// A row whose sums in C cannot be trusted, in double: its values over its largest, which may be
// anything, and gates that may be shut as far as exp goes, to 5e-324. Where a leak is 0 such gates
// are all there is. One element after the other: such rows are rare.
template <Norm norm, typename C, typename Gates>
class CarefulRow {
 public:
  struct Element {
    double x, threshold, leak, steepness;
    double fire, smoulder;
    double scaled_x, scaled_y;  // over the row's largest x
  };

  CarefulRow(int64_t n, const C* x, const Gates& gates, double eps) : x_(x), gates_(gates) {
    for (int64_t j = 0; j < n; ++j) {
      const double magnitude = absolute(double(x[j]));
      scale_ = magnitude > scale_ ? magnitude : scale_;
    }
    bool numbers = true;
    double largest_y = 0;
    for (int64_t j = 0; j < n; ++j) {
      numbers = numbers && x[j] == x[j];
      const double y = absolute(at(j).scaled_y);
      largest_y = y > largest_y ? y : largest_y;
    }
    zero_ = scale_ == 0 && numbers;
    LongSum<double> x_sum, y_sum;
    for (int64_t j = 0; j < n && !zero_; ++j) {
      const Element e = at(j);
      x_sum.add(norm_term<norm>(e.scaled_x));
      y_sum.add(largest_y == 0 ? e.scaled_y : norm_term<norm>(e.scaled_y / largest_y));
    }
    x_norm_ = norm_of<norm>(x_sum.value());
    y_norm_ = norm_of<norm>(y_sum.value()) * (largest_y == 0 ? 1 : largest_y);
    denominator_ = y_norm_ + eps / scale_;
    ratio_ = x_norm_ / denominator_;
  }

  // Of a row of zeros the result is 0, its limit, and so are all gradients.
  bool zero() const { return zero_; }
  double ratio() const { return ratio_; }

  Element at(int64_t j) const {
    Element e{double(x_[j]), double(gates_.threshold(j)), double(gates_.leak(j)),
              double(gates_.steepness(j))};
    const double exponent = gate_exponent(absolute(e.x), e.threshold, e.steepness);
    // (1 - f) / f or its inverse, whichever is at most 1.
    const double odds = __builtin_exp(exponent > 0 ? -exponent : exponent);
    const double larger = 1 / (1 + odds), less = odds / (1 + odds);
    e.fire = exponent > 0 ? less : larger;
    e.smoulder = exponent > 0 ? larger : less;
    e.scaled_x = e.x / scale_;
    e.scaled_y = e.scaled_x * gate_value(e.fire, e.smoulder, e.leak);
    return e;
  }

  double out(const Element& e) const { return e.scaled_y * ratio_ * scale_; }

  // y over |y| + eps, and the norms' slopes at x and y.
  double share(const Element& e) const { return e.scaled_y / denominator_; }
  double x_slope(const Element& e) const { return slope(e.scaled_x, x_norm_); }
  double y_slope(const Element& e) const { return slope(e.scaled_y, y_norm_); }

 private:
  static double slope(double v, double norm_of_row) {
    if (norm == Norm::l1) return double(v > 0) - double(v < 0);
    return norm_of_row == 0 ? 0 : v / norm_of_row;
  }

  const C* x_;
  const Gates& gates_;
  double scale_ = 0, x_norm_, y_norm_, denominator_, ratio_;
  bool zero_;
};

template <Norm norm, typename C, typename Gates>
__attribute__((noinline)) void careful_forward_row(int64_t n, const C* x, const Gates& gates,
                                                   double eps, C* y) {
  const CarefulRow<norm, C, Gates> row(n, x, gates, eps);
  for (int64_t j = 0; j < n; ++j) y[j] = row.zero() ? C(0) : C(row.out(row.at(j)));
}

template <Norm norm, typename C, typename Gates>
EMBER_HD void forward_row(int64_t n, const C* x, const Gates& gates, double eps, C* y) {
  const int64_t segment = norm == Norm::none ? n : sum_segment<C>;
  LongSum<C> x_total, y_total;
  for (int64_t from = 0; from < n; from += segment) {
    const int64_t end = n - from < segment ? n : from + segment;
    C x_sum = 0, y_sum = 0;
#pragma omp simd reduction(+ : x_sum, y_sum)
    for (int64_t j = from; j < end; ++j) {
      const C odds = gate_odds(absolute(x[j]), gates.threshold(j), gates.steepness(j));
      const C fire = C(1) / (C(1) + odds);
      const C out = x[j] * gate_value(fire, odds * fire, gates.leak(j));
      x_sum += norm_term<norm>(x[j]);
      y_sum += norm_term<norm>(out);
      y[j] = out;
    }
    if (norm == Norm::none) continue;
    x_total.add(x_sum);
    y_total.add(y_sum);
  }
  if (norm == Norm::none) return;
  const RowSums sums{x_total.value(), y_total.value(), 0};
  if (!sums.trustworthy<C>()) return careful_forward_row<norm>(n, x, gates, eps, y);
  const C ratio = C(norm_ratio<norm>(sums, eps));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] *= ratio;
}

// The gradient of out = y |x| / (|y| + eps) with respect to y is ratio * grad_y + from_y * d|y|/dy,
// and what reaches x through |x| is from_x * d|x|/dx; the norm's slopes are v (l2, the division by
// the norm being part of the factor) or sign(v) (l1).
template <typename C>
struct NormGradient {
  C ratio, from_y, from_x;
};

template <Norm norm, typename C>
EMBER_HD C norm_slope(C v) {
  return norm == Norm::l2 ? v : C(v > 0) - C(v < 0);
}

template <Norm norm, typename C>
NormGradient<C> norm_gradient(const RowSums& sums, double eps) {
  const double x_norm = norm_of<norm>(sums.x), y_norm = norm_of<norm>(sums.y);
  const double ratio = norm_ratio<norm>(sums, eps), c = sums.dot / (y_norm + eps);
  const bool l2 = norm == Norm::l2;
  return {C(ratio), C(-c * ratio / (l2 ? y_norm : 1)), C(c / (l2 ? x_norm : 1))};
}

// Sums of parameter gradients over a block, and what rounding took from them.
struct Totals {
  double *sums, *rests;  // [3, units of a tile] each

  EMBER_HD void add(int64_t at, double term) const { add_exactly(term, sums[at], rests[at]); }
  EMBER_HD double value(int64_t at) const {
    return rests[at] - rests[at] == 0 ? sums[at] + rests[at] : sums[at];
  }
};

template <typename C, typename Gates>
constexpr bool is_per_column = std::is_same<Gates, ColumnGates<C>>::value;

// Row buffers and running sums of one thread.
template <typename C>
struct Scratch {
  Totals total;
  C* sums;                  // [3, columns of a tile] over a few rows, where columns are units
  C *fire, *smoulder;       // of a row
  C *x, *grad_y, *written;  // rows in their compute type, where they are stored in a narrower one

  Scratch(const LifGateParams& p, const ThreadPool& pool) {
    const int64_t cols = lif_gate_tile_cols(p);
    const int64_t units = p.unit_rows ? p.units : cols;
    total.sums = reinterpret_cast<double*>(static_cast<char*>(p.thread_scratch) +
                                           pool.thread_index() * lif_gate_scratch_bytes(p));
    total.rests = total.sums + 3 * units;
    sums = reinterpret_cast<C*>(total.rests + 3 * units);
    fire = sums + 3 * units;
    smoulder = fire + cols;
    x = smoulder + cols;
    grad_y = x + cols;
    written = grad_y + cols;
  }
};

template <typename C>
EMBER_HD const C* load_row(const C* row, int64_t, C*) {
  return row;
}
template <typename T, typename C>
EMBER_HD const C* load_row(const T* row, int64_t n, C* buffer) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) buffer[j] = widen(row[j]);
  return buffer;
}

template <typename C>
EMBER_HD C* row_to_write(C* row, C*) {
  return row;
}
template <typename T, typename C>
EMBER_HD C* row_to_write(T*, C* buffer) {
  return buffer;
}
template <typename C>
EMBER_HD void store_row(const C*, int64_t, C*) {}
template <typename T, typename C>
EMBER_HD void store_row(const C* buffer, int64_t n, T* row) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(buffer[j], row[j]);
}

// One row of backward. Parameter gradients are added to `sums` [3, stride] where every column is a
// unit, to `total` [3, stride] where the row is one, and left alone without `want_sums`.
template <Norm norm, bool want_sums, typename C, typename Gates>
EMBER_HD void backward_row(int64_t n, const C* x, const C* grad_y, const C* fires,
                           const C* smoulders, const Gates& gates, const NormGradient<C>& ng,
                           C* grad_x, C* sums, const Totals& total, int64_t stride) {
  constexpr bool per_column = is_per_column<C, Gates>;
  const int64_t segment = want_sums && !per_column ? sum_segment<C> : n;
  const C ratio = ng.ratio, from_y = ng.from_y, from_x = ng.from_x;
  C *thresholds = sums, *leaks = sums + stride, *steepnesses = sums + 2 * stride;
  for (int64_t from = 0; from < n; from += segment) {
    const int64_t end = n - from < segment ? n : from + segment;
    C threshold_sum = 0, leak_sum = 0, steepness_sum = 0;
#pragma omp simd reduction(+ : threshold_sum, leak_sum, steepness_sum)
    for (int64_t j = from; j < end; ++j) {
      const C magnitude = absolute(x[j]), threshold = gates.threshold(j), leak = gates.leak(j),
              steepness = gates.steepness(j);
      C fire, smoulder;
      if (norm == Norm::none) {
        const C odds = gate_odds(magnitude, threshold, steepness);
        fire = C(1) / (C(1) + odds);
        smoulder = odds * fire;
      } else {
        fire = fires[j];
        smoulder = smoulders[j];
      }
      const C value = gate_value(fire, smoulder, leak), slope = gate_slope(fire, smoulder, leak);
      C dy = grad_y[j], dx = 0;
      if (norm != Norm::none) {
        dy = ratio * dy + from_y * norm_slope<norm>(x[j] * value);
        dx = from_x * norm_slope<norm>(x[j]);
      }
      const C d_threshold = dy * gate_dy_dthreshold(x[j], steepness, slope),
              d_leak = dy * x[j] * smoulder,
              d_steepness = dy * gate_dy_dsteepness(x[j], magnitude, threshold, slope);
      grad_x[j] = dx + dy * gate_dy_dx(magnitude, steepness, value, slope);
      if (want_sums && per_column) {
        thresholds[j] += d_threshold;
        leaks[j] += d_leak;
        steepnesses[j] += d_steepness;
      } else if (want_sums) {
        threshold_sum += d_threshold;
        leak_sum += d_leak;
        steepness_sum += d_steepness;
      }
    }
    if (want_sums && !per_column) {
      total.add(0, threshold_sum);
      total.add(stride, leak_sum);
      total.add(2 * stride, steepness_sum);
    }
  }
}

// The first loop over a row that has a norm: its sums, and what the second loop reads.
template <Norm norm, typename C, typename Gates>
EMBER_HD RowSums backward_sums(int64_t n, const C* x, const C* grad_y, const Gates& gates, C* fires,
                               C* smoulders) {
  constexpr int64_t segment = sum_segment<C>;
  LongSum<C> x_total, y_total, dots;
  for (int64_t from = 0; from < n; from += segment) {
    const int64_t end = n - from < segment ? n : from + segment;
    C x_sum = 0, y_sum = 0, dot = 0;
#pragma omp simd reduction(+ : x_sum, y_sum, dot)
    for (int64_t j = from; j < end; ++j) {
      const C odds = gate_odds(absolute(x[j]), gates.threshold(j), gates.steepness(j));
      const C fire = C(1) / (C(1) + odds);
      const C y = x[j] * gate_value(fire, odds * fire, gates.leak(j));
      fires[j] = fire;
      smoulders[j] = odds * fire;
      x_sum += norm_term<norm>(x[j]);
      y_sum += norm_term<norm>(y);
      dot += grad_y[j] * y;
    }
    x_total.add(x_sum);
    y_total.add(y_sum);
    dots.add(dot);
  }
  return {x_total.value(), y_total.value(), dots.value()};
}

// backward_row of a row whose sums cannot be trusted.
template <Norm norm, bool want_sums, typename C, typename Gates>
__attribute__((noinline)) void careful_backward_row(int64_t n, const C* x, const C* grad_y,
                                                    const Gates& gates, double eps, C* grad_x,
                                                    C* sums, const Totals& total, int64_t stride) {
  const CarefulRow<norm, C, Gates> row(n, x, gates, eps);
  if (row.zero()) {
    for (int64_t j = 0; j < n; ++j) grad_x[j] = 0;
    return;
  }
  LongSum<double> dot;
  for (int64_t j = 0; j < n; ++j) dot.add(double(grad_y[j]) * row.share(row.at(j)));
  const double c = dot.value();
  for (int64_t j = 0; j < n; ++j) {
    const auto e = row.at(j);
    const double magnitude = absolute(e.x), dy = row.ratio() * (grad_y[j] - c * row.y_slope(e));
    const double value = gate_value(e.fire, e.smoulder, e.leak);
    const double slope = gate_slope(e.fire, e.smoulder, e.leak);
    grad_x[j] = C(c * row.x_slope(e) + dy * gate_dy_dx(magnitude, e.steepness, value, slope));
    if (!want_sums) continue;
    const double terms[] = {dy * gate_dy_dthreshold(e.x, e.steepness, slope), dy * e.x * e.smoulder,
                            dy * gate_dy_dsteepness(e.x, magnitude, e.threshold, slope)};
    for (int64_t which = 0; which < 3; ++which) {
      if (is_per_column<C, Gates>) {
        sums[which * stride + j] += C(terms[which]);
      } else {
        total.add(which * stride, terms[which]);
      }
    }
  }
}

template <Norm norm, bool want_sums, typename C, typename Gates>
EMBER_HD void backward_whole_row(int64_t n, const C* x, const C* grad_y, const Gates& gates,
                                 double eps, const Scratch<C>& s, C* grad_x, const Totals& total,
                                 int64_t stride) {
  NormGradient<C> ng{};
  if (norm != Norm::none) {
    const RowSums sums = backward_sums<norm>(n, x, grad_y, gates, s.fire, s.smoulder);
    if (!sums.trustworthy<C>()) {
      return careful_backward_row<norm, want_sums>(n, x, grad_y, gates, eps, grad_x, s.sums, total,
                                                   stride);
    }
    ng = norm_gradient<norm, C>(sums, eps);
  }
  backward_row<norm, want_sums>(n, x, grad_y, s.fire, s.smoulder, gates, ng, grad_x, s.sums, total,
                                stride);
}

template <typename C, bool per_column>
struct GatesOf;
template <typename C>
struct GatesOf<C, true> {
  static EMBER_HD ColumnGates<C> at(const LifGateParams& p, int64_t, int64_t column) {
    return {static_cast<const C*>(p.threshold) + column, static_cast<const C*>(p.leak) + column,
            static_cast<const C*>(p.steepness) + column};
  }
};
template <typename C>
struct GatesOf<C, false> {
  static EMBER_HD RowGate<C> at(const LifGateParams& p, int64_t row, int64_t) {
    const int64_t unit = row / p.unit_rows % p.units;
    return {static_cast<const C*>(p.threshold)[unit], static_cast<const C*>(p.leak)[unit],
            static_cast<const C*>(p.steepness)[unit]};
  }
};

template <typename T, Norm norm, bool per_column>
void forward(const LifGateParams& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  const int64_t tile = lif_gate_tile_cols(p), tiles = (p.cols + tile - 1) / tile;
  parallel_for(pool, p.rows * tiles, grain_for(tile), [&](int64_t begin, int64_t end) {
    const Scratch<C> s(p, pool);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, first = i % tiles * tile;
      const int64_t n = p.cols - first < tile ? p.cols - first : tile;
      const T* x = static_cast<const T*>(p.x) + row * p.cols + first;
      T* y = static_cast<T*>(p.y) + row * p.cols + first;
      C* written = row_to_write(y, s.written);
      forward_row<norm>(n, load_row(x, n, s.x), GatesOf<C, per_column>::at(p, row, first), p.eps,
                        written);
      store_row(written, n, y);
    }
  });
}

// Moves the running sums into the block's totals.
template <typename C>
EMBER_HD void flush(int64_t n, C* sums, const Totals& total) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    total.add(j, double(sums[j]));
    sums[j] = 0;
  }
}

// The rows [row, row_end) and columns [first, first + n): one block, or one tile of it.
template <typename T, Norm norm, bool per_column, bool want_sums>
void backward_block(const LifGateParams& p, const Scratch<compute_t<T>>& s, int64_t block,
                    int64_t first, int64_t n) {
  using C = compute_t<T>;
  const int64_t flush_rows = 16, block_rows = lif_gate_block_rows(p);
  const int64_t row_end = (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
  const int64_t units = per_column ? n : p.units;
  for (int64_t j = 0; want_sums && j < 3 * units; ++j) {
    s.sums[j] = 0;
    s.total.sums[j] = s.total.rests[j] = 0;
  }
  for (int64_t row = block * block_rows; row < row_end; ++row) {
    const int64_t tile = lif_gate_tile_cols(p);
    const int64_t unit = per_column ? 0 : row / p.unit_rows % p.units;
    const Totals total{s.total.sums + unit, s.total.rests + unit};
    for (int64_t from = first; from < first + n; from += tile) {
      const int64_t width = first + n - from < tile ? first + n - from : tile;
      const int64_t offset = row * p.cols + from;
      T* grad_x = static_cast<T*>(p.grad_x) + offset;
      C* written = row_to_write(grad_x, s.written);
      backward_whole_row<norm, want_sums>(
          width, load_row(static_cast<const T*>(p.x) + offset, width, s.x),
          load_row(static_cast<const T*>(p.grad_y) + offset, width, s.grad_y),
          GatesOf<C, per_column>::at(p, row, from), p.eps, s, written, total, units);
      store_row(written, width, grad_x);
    }
    if (want_sums && per_column && (row + 1) % flush_rows == 0) flush(3 * units, s.sums, s.total);
  }
  if (!want_sums) return;
  if (per_column) flush(3 * units, s.sums, s.total);
  C* partial = static_cast<C*>(p.partial_gradients) + block * 3 * p.units + first;
  for (int64_t parameter = 0; parameter < 3; ++parameter) {
    for (int64_t j = 0; j < units; ++j) {
      partial[parameter * p.units + j] = C(s.total.value(parameter * units + j));
    }
  }
}

template <typename T, Norm norm, bool per_column>
void backward(const LifGateParams& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  // A row that belongs to one unit is summed up as a whole; columns can be shared out.
  const int64_t width = per_column ? lif_gate_tile_cols(p) : p.cols;
  const int64_t tiles = (p.cols + width - 1) / width, blocks = lif_gate_blocks(p);
  const int64_t grain = grain_for(2 * lif_gate_block_rows(p) * width);
  parallel_for(pool, blocks * tiles, grain, [&](int64_t begin, int64_t end) {
    const Scratch<C> s(p, pool);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * width;
      const int64_t n = p.cols - first < width ? p.cols - first : width;
      if (p.grad_parameters) {
        backward_block<T, norm, per_column, true>(p, s, i / tiles, first, n);
      } else {
        backward_block<T, norm, per_column, false>(p, s, i / tiles, first, n);
      }
    }
  });
  if (!p.grad_parameters) return;
  const C* partial = static_cast<const C*>(p.partial_gradients);
  C* out = static_cast<C*>(p.grad_parameters);
  parallel_for(pool, 3 * p.units, grain_for(blocks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      LongSum<C> sum;
      for (int64_t block = 0; block < blocks; ++block) sum.add(partial[block * 3 * p.units + i]);
      out[i] = C(sum.value());
    }
  });
}

// Calls body.template run<T, norm, per_column>() for what the parameters ask.
template <typename T, Norm norm, typename Body>
void dispatch_units(const LifGateParams& p, const Body& body) {
  if (p.unit_rows) {
    body.template run<T, norm, false>();
  } else {
    body.template run<T, norm, true>();
  }
}

template <typename Body>
void dispatch(const LifGateParams& p, const Body& body) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    switch (p.norm) {
      case Norm::none:
        return dispatch_units<T, Norm::none>(p, body);
      case Norm::l1:
        return dispatch_units<T, Norm::l1>(p, body);
      case Norm::l2:
        return dispatch_units<T, Norm::l2>(p, body);
    }
  });
}

struct Forward {
  const LifGateParams& p;
  const ThreadPool& pool;
  template <typename T, Norm norm, bool per_column>
  void run() const {
    forward<T, norm, per_column>(p, pool);
  }
};

struct Backward {
  const LifGateParams& p;
  const ThreadPool& pool;
  template <typename T, Norm norm, bool per_column>
  void run() const {
    backward<T, norm, per_column>(p, pool);
  }
};

}  // namespace

void lif_gate_forward(const LifGateParams& p, const ThreadPool& pool) {
  if (p.rows * p.cols > 0) dispatch(p, Forward{p, pool});
}

void lif_gate_backward(const LifGateParams& p, const ThreadPool& pool) {
  dispatch(p, Backward{p, pool});
}

}  // namespace EMBER_ISA
}  // namespace ember
