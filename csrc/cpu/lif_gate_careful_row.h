// Rows of the LIF gate on the CPU whose sums cannot be trusted in their own type.
#pragma once

#include "lif_gate_parts.h"

namespace ember {
inline namespace EMBER_ISA {

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

}  // namespace EMBER_ISA
}  // namespace ember
