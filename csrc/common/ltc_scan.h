// The arguments of the LTC scan's kernels, the same for every device.
#pragma once

#include "chunks.h"
#include "ltc_math.h"
#include "types.h"

namespace ember {

// The synapses from the inputs or from the units, sorted by target, then source.
struct LtcSynapses {
  int64_t count;
  int64_t num_sources;       // inputs or units
  const int64_t* sources;    // [count]
  const int64_t* targets;    // [count], not descending
  const int64_t* by_source;  // [count]: positions in these lists, sorted by source, then target
  const void* weights;       // C [4, count]: w, mu, sigma, erev
  void* grad_weights;        // the same, or null
};

// T is the type that `dtype` names, C its compute type (types.h). Row-major, without padding.
struct LtcScanParams {
  DType dtype;
  int64_t batch, steps, inputs, units;
  int64_t outputs;  // units whose states are wanted, beginning with the first
  int64_t unfolds;  // solver steps per time step
  double eps;
  LtcSynapses sensory, recurrent;
  const void* unit_weights;  // C [3, units]: cm, gleak, vleak
  void* grad_unit_weights;   // the same, or null where grad_weights are, too

  const void* x;           // T [batch, steps, inputs]
  const void* h0;          // C [batch, units], for forward
  const void* timespans;   // C [batch, steps]
  const int64_t* lengths;  // [batch], or null
  void* y;                 // T [batch, steps, outputs], written by forward
  void* h_last;            // C [batch, units], written by forward

  // What forward leaves for backward, in slots of C [units, batch]. With chunk = 0 slot 0 is h0 and
  // slot 1 + t * unfolds + k the state after solver step k of time step t; else slot i is the state
  // at the start of chunk i. Null if nothing is wanted. Rows that have ended leave anything.
  void* saved;
  int64_t chunk;

  const void* grad_y;       // T [batch, steps, outputs]
  const void* grad_h_last;  // C [batch, units]
  void* grad_x;             // T [batch, steps, inputs], or null
  void* grad_h0;            // C [batch, units]
  void* grad_timespans;     // C [batch, steps]

  // CPU only: ltc_workspace() elements of C, and the network as ltc_scan_pack() laid it out,
  // ltc_network_size() elements, or null to have forward lay it out.
  void* workspace;
  void* packed;
};

inline namespace EMBER_ISA {

// Elements of the network as the CPU kernels lay it out.
EMBER_HD int64_t ltc_network_size(const LtcScanParams& p) {
  return ((p.sensory.count + p.recurrent.count) * 5 + 2 * (p.units + 1) + 15) / 16 * 16;
}

// Rows that a group has at most, whatever the instruction set, and partial sums of the weights'
// gradients, which the rows are shared out to.
constexpr int64_t ltc_max_width = 32;
constexpr int64_t ltc_max_partials = 64;

// Elements of C that a thread of the CPU kernels works in.
EMBER_HD int64_t ltc_scratch_size(const LtcScanParams& p, bool backward) {
  const int64_t synapses = p.sensory.count + p.recurrent.count, padding = 1024;
  const int64_t forward = ltc_max_width * (p.inputs + 5 * p.units + 2) + padding;
  if (!backward) return forward;
  const int64_t tape = p.chunk ? (p.chunk * p.unfolds + 1) * p.units * ltc_max_width : 0;
  const int64_t sums = 4 * synapses + 3 * p.units;
  return forward + tape + padding + ltc_max_width * sums +
         ltc_max_width * (2 * p.inputs + 9 * p.units + p.sensory.count + 2);
}

// Elements of a partial sum of the weights' gradients, which are doubles.
EMBER_HD int64_t ltc_partial_size(const LtcScanParams& p) {
  const int64_t doubles = 4 * (p.sensory.count + p.recurrent.count) + 3 * p.units;
  return p.dtype == DType::f64 ? doubles : 2 * doubles;
}

// Elements of the CPU kernels' workspace.
EMBER_HD int64_t ltc_workspace(const LtcScanParams& p, int64_t threads, bool backward) {
  const int64_t partials = p.batch < ltc_max_partials ? p.batch : ltc_max_partials;
  return (p.packed ? 0 : ltc_network_size(p)) * (backward ? 2 : 1) +
         threads * ltc_scratch_size(p, backward) + (backward ? partials * ltc_partial_size(p) : 0) +
         64;
}

// Elements of `saved`, unless nothing is.
EMBER_HD int64_t ltc_saved_size(const LtcScanParams& p) {
  const int64_t slots = p.chunk ? count_chunks(p.steps, p.chunk) : p.steps * p.unfolds + 1;
  return slots * p.units * p.batch;
}

}  // namespace EMBER_ISA
}  // namespace ember
