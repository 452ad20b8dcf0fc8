// A synapse of a liquid time-constant network, and its derivatives.
//
// From a potential v it conducts a = w s, s = sigmoid(sigma (v - mu)), and adds a erev to the
// numerator and a to the denominator of its target's next state. C may be a vector for V's and S a
// scalar, or the other way round where lanes are synapses.
#pragma once

#include "elementwise_math.h"

namespace ember {
inline namespace EMBER_ISA {

// What a synapse's output comes to, differentiated: `w` and `erev` are the weights' own gradients,
// `slope` that of sigma (v - mu).
template <typename V>
struct SynapseGradients {
  V w, erev_over_w, slope;
};

// The gradients of the numerator and denominator that the synapse adds to are given.
template <typename V, typename S>
EMBER_HD SynapseGradients<V> synapse_gradients(V open, S w, S erev, V numerator, V denominator) {
  const V conductance = numerator * erev + denominator;
  return {conductance * open, numerator * open, conductance * w * (open * (S(1) - open))};
}

}  // namespace EMBER_ISA
}  // namespace ember
