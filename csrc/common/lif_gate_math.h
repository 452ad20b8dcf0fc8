// The gate on one element, and its derivatives (section 2.1 of the paper).
//
//   f = sigmoid(k (|x| - theta)),  g = f + lambda (1 - f),  y = x g
#pragma once

#include "elementwise_math.h"

namespace ember {
inline namespace EMBER_ISA {

template <typename T>
struct GateParameters {
  T threshold, leak, steepness;
};

// f, and 1 - f without the cancellation that subtracting would bring as f approaches 1.
template <typename T>
struct Firing {
  T fire, smoulder;
};

template <typename T>
EMBER_HD Firing<T> gate_firing(T magnitude, const GateParameters<T>& gate) {
  const T e = exponential(-gate.steepness * (magnitude - gate.threshold));
  const T fire = T(1) / (T(1) + e);
  return {fire, e * fire};
}

template <typename T>
EMBER_HD T gate_value(const Firing<T>& f, const GateParameters<T>& gate) {
  return f.fire + gate.leak * f.smoulder;
}

// Derivatives of y = x g with respect to x and the three parameters.
template <typename T>
struct GateDerivatives {
  T x, threshold, leak, steepness;
};

template <typename T>
EMBER_HD GateDerivatives<T> gate_derivatives(T x, const Firing<T>& f,
                                             const GateParameters<T>& gate) {
  const T magnitude = absolute(x);
  const T slope = (T(1) - gate.leak) * f.fire * f.smoulder;  // dg/d(k (|x| - theta))
  const T x_slope = x * slope;
  return {gate_value(f, gate) + magnitude * gate.steepness * slope, -gate.steepness * x_slope,
          x * f.smoulder, (magnitude - gate.threshold) * x_slope};
}

}  // namespace EMBER_ISA
}  // namespace ember
