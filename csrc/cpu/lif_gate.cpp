// The LIF gate on the CPU: one read of x and one write of y forward; one read of x and grad_y and
// one write of grad_x backward. A row stays in the first-level cache between the two loops over it
// that a norm needs. The loops carry `omp simd` so that sums may be split over vector lanes.
#include "../common/lif_gate.h"

#include <cmath>
#include <type_traits>

#include "../common/lif_gate_math.h"
#include "parallel.h"

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

// Sums along a row are taken in C over this many elements and in double beyond: rounding errors
// grow with the number of terms.
constexpr int64_t segment = 512;

// Sums of norm_term over a row; `dot` is the sum of grad_y * y.
struct RowSums {
  double x, y, dot;

  // Whether no sum in C can have overflowed or lost terms below the smallest normal number.
  template <typename C>
  bool trustworthy() const {
    const double tiny = sizeof(C) == 4 ? 1e-24 : 1e-280, huge = sizeof(C) == 4 ? 1e36 : 1e280;
    return x > tiny && x < huge && y > tiny;
  }
};

// What a row's norms come to: out = y * ratio with ratio = |x| / (|y| + eps).
struct RowNorms {
  double x, y, ratio;
};

// Sums that cannot be trusted are taken again on the row divided by its largest entry. A row of
// zeros gets ratio 0, the limit of |x| / (|y| + eps).
template <Norm norm, typename C>
RowNorms row_norms(int64_t n, const C* x, const C* y, const RowSums& sums, double eps) {
  double scale = 1, x_sum = sums.x, y_sum = sums.y;
  if (!sums.trustworthy<C>()) {
    scale = x_sum = y_sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double magnitude = absolute(x[j]);
      scale = magnitude > scale ? magnitude : scale;
    }
    if (scale == 0 && sums.x == 0) return {0, 0, 0};  // and not a row of NaN
    for (int64_t j = 0; j < n; ++j) {
      x_sum += norm_term<norm>(x[j] / scale);
      y_sum += norm_term<norm>(y[j] / scale);
    }
  }
  const double x_norm = scale * (norm == Norm::l2 ? __builtin_sqrt(x_sum) : x_sum);
  const double y_norm = scale * (norm == Norm::l2 ? __builtin_sqrt(y_sum) : y_sum);
  return {x_norm, y_norm, x_norm / (y_norm + eps)};
}

template <Norm norm, typename C, typename Gates>
EMBER_HD void forward_row(int64_t n, const C* x, const Gates& gates, double eps, C* y) {
  RowSums sums{};
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
    sums.x += x_sum;
    sums.y += y_sum;
  }
  if (norm == Norm::none) return;
  const C ratio = C(row_norms<norm>(n, x, y, sums, eps).ratio);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] *= ratio;
}

// The gradient of out = y |x| / (|y| + eps) with respect to y is ratio * grad_y + from_y * d|y|/dy,
// and what reaches x through |x| is from_x * d|x|/dx; the norm's slopes are v (l2, the division by
// the norm being part of the factor) or sign(v) (l1). R is double where float could overflow.
template <typename R>
struct NormGradient {
  R ratio, from_y, from_x;
};

template <Norm norm, typename C>
EMBER_HD C norm_slope(C v) {
  return norm == Norm::l2 ? v : C(v > 0) - C(v < 0);
}

template <Norm norm>
NormGradient<double> norm_gradient(const RowNorms& norms, double dot, double eps) {
  if (norms.x == 0) return {0, 0, 0};
  const double c = dot / (norms.y + eps);
  NormGradient<double> g{norms.ratio, -c * norms.ratio, c};
  if (norm == Norm::l2) {
    g.from_y = norms.y > 0 ? g.from_y / norms.y : 0;
    g.from_x /= norms.x;
  }
  return g;
}

// Row buffers and running sums of one thread.
template <typename C>
struct Scratch {
  double* total;            // [3, units of a tile] over a block
  C* sums;                  // [3, columns of a tile] over a few rows, where columns are units
  C *fire, *smoulder;       // of a row
  C *x, *grad_y, *written;  // rows in their compute type, where they are stored in a narrower one

  Scratch(const LifGateParams& p, const ThreadPool& pool) {
    const int64_t cols = lif_gate_tile_cols(p);
    const int64_t units = p.unit_rows ? p.units : cols;
    total = reinterpret_cast<double*>(static_cast<char*>(p.thread_scratch) +
                                      pool.thread_index() * lif_gate_scratch_bytes(p));
    sums = reinterpret_cast<C*>(total + 3 * units);
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
template <Norm norm, bool want_sums, typename R, typename C, typename Gates>
EMBER_HD void backward_row(int64_t n, const C* x, const C* grad_y, const C* fires,
                           const C* smoulders, const Gates& gates, const NormGradient<R>& ng,
                           C* grad_x, C* sums, double* total, int64_t stride) {
  constexpr bool per_column = std::is_same<Gates, ColumnGates<C>>::value;
  const R ratio = ng.ratio, from_y = ng.from_y, from_x = ng.from_x;
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
        dy = C(ratio * dy + from_y * norm_slope<norm>(x[j] * value));
        dx = C(from_x * norm_slope<norm>(x[j]));
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
      total[0] += threshold_sum;
      total[stride] += leak_sum;
      total[2 * stride] += steepness_sum;
    }
  }
}

// The first loop over a row that has a norm: its sums, and what the second loop reads.
template <Norm norm, typename C, typename Gates>
EMBER_HD RowSums backward_sums(int64_t n, const C* x, const C* grad_y, const Gates& gates, C* fires,
                               C* smoulders, C* ys) {
  RowSums sums{};
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
      ys[j] = y;
      x_sum += norm_term<norm>(x[j]);
      y_sum += norm_term<norm>(y);
      dot += grad_y[j] * y;
    }
    sums.x += x_sum;
    sums.y += y_sum;
    sums.dot += dot;
  }
  return sums;
}

template <Norm norm, bool want_sums, typename C, typename Gates>
EMBER_HD void backward_whole_row(int64_t n, const C* x, const C* grad_y, const Gates& gates,
                                 double eps, const Scratch<C>& s, C* grad_x, double* total,
                                 int64_t stride) {
  const auto finish = [&](const auto& norm_gradient) {
    backward_row<norm, want_sums>(n, x, grad_y, s.fire, s.smoulder, gates, norm_gradient, grad_x,
                                  s.sums, total, stride);
  };
  if (norm == Norm::none) return finish(NormGradient<C>{});
  // grad_x is not read before the second loop writes it, so it can hold y until then.
  RowSums row = backward_sums<norm>(n, x, grad_y, gates, s.fire, s.smoulder, grad_x);
  const RowNorms norms = row_norms<norm>(n, x, grad_x, row, eps);
  if (row.template trustworthy<C>()) {
    const NormGradient<double> ng = norm_gradient<norm>(norms, row.dot, eps);
    return finish(NormGradient<C>{C(ng.ratio), C(ng.from_y), C(ng.from_x)});
  }
  row.dot = 0;
  for (int64_t j = 0; j < n; ++j) row.dot += double(grad_y[j]) * double(grad_x[j]);
  finish(norm_gradient<norm>(norms, row.dot, eps));
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
EMBER_HD void flush(int64_t n, C* sums, double* total) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    total[j] += sums[j];
    sums[j] = 0;
  }
}

// The rows [row, row_end) and columns [first, first + n): one block, or one tile of it.
template <typename T, Norm norm, bool per_column, bool want_sums>
void backward_block(const LifGateParams& p, const Scratch<compute_t<T>>& s, int64_t block,
                    int64_t first, int64_t n) {
  using C = compute_t<T>;
  const int64_t flush_rows = 32, block_rows = lif_gate_block_rows(p);
  const int64_t row_end = (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
  const int64_t units = per_column ? n : p.units;
  for (int64_t j = 0; want_sums && j < 3 * units; ++j) {
    s.sums[j] = 0;
    s.total[j] = 0;
  }
  for (int64_t row = block * block_rows; row < row_end; ++row) {
    const int64_t tile = lif_gate_tile_cols(p);
    double* total = per_column ? s.total : s.total + row / p.unit_rows % p.units;
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
      partial[parameter * p.units + j] = C(s.total[parameter * units + j]);
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
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * 3 * p.units + i];
      out[i] = C(sum);
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
