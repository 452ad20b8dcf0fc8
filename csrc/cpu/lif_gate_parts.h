// What the rows of the LIF gate on the CPU are made of: the parameters of an element, the norms and
// their slopes, and the sums of a row and of a block of rows.
#pragma once

#include <type_traits>

#include "../common/lif_gate.h"
#include "../common/lif_gate_math.h"
#include "sums.h"

namespace ember {
inline namespace EMBER_ISA {

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

}  // namespace EMBER_ISA
}  // namespace ember
