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

  // What forward leaves for backward, C [slots, units, batch] on a CPU, [batch, slots, units] on a
  // GPU. With chunk = 0 slot 0 is h0 and slot 1 + t * unfolds + k the state after solver step k of
  // time step t; else slot i is the state at the start of chunk i. Null if nothing is wanted. Rows
  // that have ended leave anything.
  void* saved;
  int64_t chunk;

  const void* grad_y;       // T [batch, steps, outputs]
  const void* grad_h_last;  // C [batch, units]
  void* grad_x;             // T [batch, steps, inputs], or null
  void* grad_h0;            // C [batch, units]
  void* grad_timespans;     // C [batch, steps]

  // ltc_workspace() elements of C, on a GPU those of the launchers' ltc_scan_workspace().
  void* workspace;

  // CPU only: the network as ltc_scan_pack() laid it out, ltc_packed_size() elements of C; null to
  // have forward lay it out. With it, C [2, inputs] and [2, outputs] scale and shift inputs and
  // outputs, or null.
  void* packed;
  const void* input_map;
  const void* output_map;
};

// Beyond these, sizes and offsets would overflow.
constexpr int64_t ltc_max_unfolds = int64_t(1) << 30;
constexpr int64_t ltc_max_synapses = int64_t(1) << 26;

inline namespace EMBER_ISA {

// Every piece of memory begins at a line of the cache.
EMBER_HD int64_t ltc_pad(int64_t elements) {
  return (elements + 15) / 16 * 16;
}

// Lanes of a vector and rows of a group at most, whatever the instruction set.
constexpr int64_t ltc_max_lanes = 16;
constexpr int64_t ltc_max_width = 32;
// Partial sums of the weights' gradients, to which groups of rows are assigned.
constexpr int64_t ltc_max_partials = 64;

// Elements of a network that is laid out for groups of rows, on the CPU.
EMBER_HD int64_t ltc_network_size(const LtcScanParams& p) {
  const int64_t synapses = p.sensory.count + p.recurrent.count;
  return 5 * synapses + 6 * p.units + 8 * ltc_max_lanes;
}

// And for single rows: each kind of synapses is filled up to whole vectors.
EMBER_HD int64_t ltc_columns_size(const LtcSynapses& s, int64_t units) {
  const int64_t filled = s.count + ltc_max_lanes * (s.num_sources + 2) + units;
  return 5 * filled + 2 * units + s.num_sources + 8 * ltc_max_lanes;
}
EMBER_HD int64_t ltc_row_network_size(const LtcScanParams& p) {
  return ltc_columns_size(p.sensory, p.units) + ltc_columns_size(p.recurrent, p.units) +
         4 * p.units + 8 * ltc_max_lanes;
}

// Elements of both.
EMBER_HD int64_t ltc_packed_size(const LtcScanParams& p) {
  return ltc_pad(ltc_network_size(p)) + ltc_row_network_size(p);
}

// Elements of C that a thread of the CPU kernels works in.
EMBER_HD int64_t ltc_scratch_size(const LtcScanParams& p, bool backward) {
  const int64_t pieces = 48 * ltc_max_lanes, sources = p.inputs + 6 * p.units + 2;
  if (!backward) {
    // A single row has no lanes to itself.
    return ltc_pad(pieces + sources * (p.batch > 1 ? ltc_max_width : 1));
  }
  const int64_t tape = p.chunk ? (p.chunk * p.unfolds + 1) * p.units : 0;
  const int64_t synapses = p.sensory.count + p.recurrent.count;
  const int64_t rows = sources + tape + 2 * p.inputs + 12 * p.units + 2 * p.sensory.count + 2;
  return ltc_pad(pieces + rows * ltc_max_width + (4 * synapses + 3 * p.units) * ltc_max_lanes);
}

// Elements of a partial sum of the weights' gradients, which are doubles.
EMBER_HD int64_t ltc_partial_size(const LtcScanParams& p) {
  const int64_t doubles = 4 * (p.sensory.count + p.recurrent.count) + 3 * p.units;
  return ltc_pad(p.dtype == DType::f64 ? doubles : 2 * doubles);
}

// Elements of the CPU kernels' workspace.
EMBER_HD int64_t ltc_workspace(const LtcScanParams& p, int64_t threads, bool backward) {
  const int64_t scratch = threads * ltc_scratch_size(p, backward);
  if (!backward) return scratch + (p.packed ? 0 : ltc_packed_size(p));
  const int64_t partials = p.batch < ltc_max_partials ? p.batch : ltc_max_partials;
  return scratch + 2 * ltc_pad(ltc_network_size(p)) + partials * ltc_partial_size(p);
}

// Elements of `saved`, unless nothing is.
EMBER_HD int64_t ltc_saved_size(const LtcScanParams& p) {
  const int64_t slots = p.chunk ? count_chunks(p.steps, p.chunk) : p.steps * p.unfolds + 1;
  return slots * p.units * p.batch;
}

}  // namespace EMBER_ISA
}  // namespace ember
