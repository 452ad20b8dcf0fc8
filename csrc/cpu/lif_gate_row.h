// A row through the LIF gate on the CPU, forward and backward. It stays in the first-level cache
// between the two loops over it that a norm needs. The loops carry `omp simd` so that sums may be
// split over vector lanes.
#pragma once

#include "lif_gate_careful_row.h"

namespace ember {
inline namespace EMBER_ISA {

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

// The gradients of a row, with the sums over it that a norm needs first. `fires` and `smoulders`
// [n] are written on the way.
template <Norm norm, bool want_sums, typename C, typename Gates>
EMBER_HD void backward_whole_row(int64_t n, const C* x, const C* grad_y, const Gates& gates,
                                 double eps, C* fires, C* smoulders, C* grad_x, C* sums,
                                 const Totals& total, int64_t stride) {
  NormGradient<C> ng{};
  if (norm != Norm::none) {
    const RowSums row = backward_sums<norm>(n, x, grad_y, gates, fires, smoulders);
    if (!row.trustworthy<C>()) {
      return careful_backward_row<norm, want_sums>(n, x, grad_y, gates, eps, grad_x, sums, total,
                                                   stride);
    }
    ng = norm_gradient<norm, C>(row, eps);
  }
  backward_row<norm, want_sums>(n, x, grad_y, fires, smoulders, gates, ng, grad_x, sums, total,
                                stride);
}

}  // namespace EMBER_ISA
}  // namespace ember
