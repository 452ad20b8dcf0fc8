// A synapse of a liquid time-constant network, and its derivatives.
//
// From a potential v it conducts a = w s, s = sigmoid(sigma (v - mu)), and adds a erev to the
// numerator and a to the denominator of its target's next state. C may be a vector for V's and S a
// scalar, or the other way round where lanes are synapses.
#pragma once

#include "elementwise_math.h"

namespace ember {
inline namespace EMBER_ISA {

// The next potential of a unit from its potential v, with c = cm / (dt / unfolds), its leak's
// conductance and the current gleak vleak of it, and what its synapses add.
template <typename V, typename S, typename E>
EMBER_HD V ltc_next_state(V c, V v, S leak, S current, V numerator, V denominator, E eps) {
  return (c * v + current + numerator) / (c + leak + denominator + eps);
}

// The affine map of an input or output.
template <typename V>
EMBER_HD V ltc_mapped(V value, V scale, V shift) {
  return value * scale + shift;
}

// What a synapse's output comes to, differentiated: `w` and `erev` are the weights' own gradients,
// `slope` that of sigma (v - mu).
template <typename V>
struct SynapseGradients {
  V w, erev_over_w, slope;
};

// The gradients of the numerator and denominator that the synapse adds to are given. `opening` is
// the sigmoid's slope, s (1 - s): where s nears 1, a rounded s does not tell how far it is from it.
template <typename V, typename S>
EMBER_HD SynapseGradients<V> synapse_gradients(V open, V opening, S w, S erev, V numerator,
                                               V denominator) {
  const V conductance = numerator * erev + denominator;
  return {conductance * open, numerator * open, conductance * w * opening};
}

}  // namespace EMBER_ISA
}  // namespace ember
