// The CfC cell on one unit, and its derivatives (section 2.3 of the paper).
//
// With a, b, s the values of the heads ff1, ff2 and of the gate's exponent before activation, and
// dt the time span:
//   default   h = tanh(a) (1 - g) + tanh(b) g,  g = sigmoid(s)
//   no_gate   h = tanh(a) + tanh(b) g
//   pure      h = A - A e a,  e = exp(-dt (|w| + |a|))
#pragma once

#include "elementwise_math.h"

namespace ember {
inline namespace EMBER_ISA {

// What a gated cell (default or no_gate) keeps for the backward pass.
template <typename T>
struct GatedCell {
  T first, second, gate;  // tanh(a), tanh(b), g
};

template <typename T>
EMBER_HD GatedCell<T> gated_cell(T a, T b, T s) {
  // (1 + tanh(s / 2)) / 2 would take less time, but is off by up to 2^-24 where the gate is closed:
  // the gradient of s is then multiplied by the time span, which may be large.
  return {hyperbolic_tangent(a), hyperbolic_tangent(b), sigmoid(s)};
}

template <bool no_gate, typename T>
EMBER_HD T gated_state(const GatedCell<T>& c) {
  return no_gate ? c.first + c.second * c.gate : c.first + (c.second - c.first) * c.gate;
}

// Gradients of h with respect to a, b and s, times grad_h.
template <bool no_gate, typename T>
EMBER_HD GatedCell<T> gated_gradients(const GatedCell<T>& c, T grad_h) {
  const T keep = no_gate ? T(1) : T(1) - c.gate;
  const T swing = no_gate ? c.second : c.second - c.first;
  return {grad_h * keep * (T(1) - c.first * c.first),
          grad_h * c.gate * (T(1) - c.second * c.second),
          grad_h * swing * c.gate * (T(1) - c.gate)};
}

template <typename T>
EMBER_HD T pure_decay(T a, T w, T dt) {
  return exponential(-dt * (absolute(w) + absolute(a)));
}

template <typename T>
EMBER_HD T pure_state(T a, T w, T amplitude, T dt) {
  return amplitude - amplitude * pure_decay(a, w, dt) * a;
}

template <typename T>
struct PureGradients {
  T a, w, amplitude, dt;
};

template <typename T>
EMBER_HD PureGradients<T> pure_gradients(T a, T w, T amplitude, T dt, T grad_h) {
  const T decay = pure_decay(a, w, dt), scaled = grad_h * amplitude * decay;
  const T sign = T(w > 0) - T(w < 0);
  return {-scaled * (T(1) - dt * absolute(a)), scaled * a * dt * sign, grad_h * (T(1) - decay * a),
          scaled * a * (absolute(w) + absolute(a))};
}

// The activations of a backbone.
enum class CfcActivation : int32_t { lecun_tanh, tanh, relu, silu, gelu };

template <typename T>
struct Activated {
  T value, slope;
};

EMBER_HD float error_function(float x) {
  return __builtin_erff(x);
}
EMBER_HD double error_function(double x) {
  return __builtin_erf(x);
}

template <CfcActivation activation, typename T>
EMBER_HD Activated<T> activated(T u) {
  switch (activation) {
    case CfcActivation::lecun_tanh: {
      const T v = hyperbolic_tangent(T(0.666) * u);
      return {T(1.7159) * v, T(1.7159 * 0.666) * (T(1) - v * v)};
    }
    case CfcActivation::tanh: {
      const T v = hyperbolic_tangent(u);
      return {v, T(1) - v * v};
    }
    case CfcActivation::relu:
      // Written so that NaN passes.
      return {u < 0 ? T(0) : u, T(u > 0)};
    case CfcActivation::silu: {
      const T s = sigmoid(u);
      return {u * s, s + u * s * (T(1) - s)};
    }
    default: {
      const T below = T(0.5) * (T(1) + error_function(u * T(0.70710678118654752)));
      return {u * below, below + u * T(0.39894228040143268) * exponential(T(-0.5) * u * u)};
    }
  }
}

}  // namespace EMBER_ISA
}  // namespace ember
