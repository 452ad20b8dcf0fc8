// The gate on one element, and its derivatives (section 2.1 of the paper):
//
//   f = sigmoid(k (|x| - theta)),  g = f + lambda (1 - f),  y = x g
//
// Scalars in, scalars out: inside an `omp simd` loop gcc keeps structures in memory.
#pragma once

#include "elementwise_math.h"

namespace ember {
inline namespace EMBER_ISA {

// -z; exp of it is gate_odds.
template <typename T>
EMBER_HD T gate_exponent(T magnitude, T threshold, T steepness) {
  return steepness * (threshold - magnitude);
}

// (1 - f) / f. From it follow f = 1 / (1 + odds) and 1 - f = odds * f, the latter without the
// cancellation that subtracting would bring as f approaches 1.
template <typename T>
EMBER_HD T gate_odds(T magnitude, T threshold, T steepness) {
  return exponential(gate_exponent(magnitude, threshold, steepness));
}

// g; `smoulder` is 1 - f.
template <typename T>
EMBER_HD T gate_value(T fire, T smoulder, T leak) {
  return fire + leak * smoulder;
}

// dg/dz at z = k (|x| - theta).
template <typename T>
EMBER_HD T gate_slope(T fire, T smoulder, T leak) {
  return (T(1) - leak) * fire * smoulder;
}

// Derivatives of y = x g. That with respect to lambda is x * smoulder.
template <typename T>
EMBER_HD T gate_dy_dx(T magnitude, T steepness, T value, T slope) {
  return value + magnitude * (steepness * slope);
}
template <typename T>
EMBER_HD T gate_dy_dthreshold(T x, T steepness, T slope) {
  return -steepness * (x * slope);
}
template <typename T>
EMBER_HD T gate_dy_dsteepness(T x, T magnitude, T threshold, T slope) {
  return (magnitude - threshold) * (x * slope);
}

}  // namespace EMBER_ISA
}  // namespace ember
