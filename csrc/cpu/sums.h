// Sums of many terms. Adding n terms one by one errs by up to n / 3 units in the last place, for
// the roundings of equal terms do not cancel. So each lane of a vector adds few terms, and their
// sums are added up in something better than the terms' type.
#pragma once

#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {

// Terms along a row that are added up by vector lanes, 16 each.
template <typename C>
constexpr int64_t sum_segment = 16 * lanes<C>;

// sum + rest += term, with what rounding takes from the sum in `rest` (Knuth's two-sum).
EMBER_HD void add_exactly(double term, double& sum, double& rest) {
  const double next = sum + term, added = next - sum;
  rest += (sum - (next - added)) + (term - added);
  sum = next;
}

// A sum of terms of C: in double, and for double in two of them.
template <typename C>
class LongSum {
 public:
  EMBER_HD void add(C term) { sum_ += double(term); }
  EMBER_HD double value() const { return sum_; }

 private:
  double sum_ = 0;
};
template <>
class LongSum<double> {
 public:
  EMBER_HD void add(double term) { add_exactly(term, sum_, rest_); }
  // What overflows has no rest.
  EMBER_HD double value() const { return rest_ - rest_ == 0 ? sum_ + rest_ : sum_; }

 private:
  double sum_ = 0, rest_ = 0;
};

}  // namespace EMBER_ISA
}  // namespace ember
