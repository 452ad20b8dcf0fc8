// The arguments of the CfC scan's kernels, the same for every device.
#pragma once

#include "cfc_math.h"
#include "types.h"

namespace ember {

enum class CfcMode : int32_t { gated, pure, no_gate };

// One affine map of the cell: a backbone layer, or last, the heads. Its output is `segments` rows
// of `units`: 1 x U for a backbone layer, heads x H for the heads.
//
// The tape holds, for every slot (time step) and row b, pieces of the widths below, each piece as
// [slots, batch, stride] at `offset` * slots * batch:
//   input    what the map is applied to, [1, values..., padding]; the bias is the weight of the 1
//   kept     for a backbone layer the slopes of its activation, [units]; for the heads what the
//            cell's derivatives need, [heads, padded units]
// and the gradient tape likewise the gradients of the map's output, [segments, padded units].
struct CfcLayer {
  const void* weight;  // C [segments * units, 1 + inputs], the bias first
  void* grad_weight;   // the same, or null
  int64_t inputs, segments, units;
  int64_t input_offset, input_stride;
  int64_t kept_offset, kept_stride;
  int64_t grad_offset, grad_stride;
};

// T is the type that `dtype` names, C its compute type (types.h). Row-major, no padding where none
// is mentioned.
struct CfcScanParams {
  DType dtype;
  CfcMode mode;
  CfcActivation activation;
  int64_t batch, steps, inputs, hidden;
  int64_t heads;  // ff1, ff2, gate; ff1, ff2, time_a, time_b with varying time spans; pure: ff1
  int64_t num_layers;
  const CfcLayer* layers;  // [num_layers]: the backbone, then the heads; host memory

  const void* x;              // T [batch, steps, inputs]
  const void* h0;             // C [batch, hidden], rows h_stride apart
  const void* timespans;      // C [batch, steps] with four heads or in mode pure, else null
  const int64_t* lengths;     // [batch], or null
  const void* dropout_scale;  // C [batch, steps, num_layers - 2, U], or null
  const void* decay;          // C [2, hidden]: w_tau and A, in mode pure; else null

  void* y;       // T [batch, steps, hidden], written by forward
  void* h_last;  // C [batch, hidden], rows h_stride apart, written by forward
  int64_t h_stride;

  // CPU only: the weights as cfc_scan_pack() laid them out, cfc_packed_size() elements of C; null
  // to have forward pack them.
  void* packed;

  // What forward leaves for backward: with chunk = 0 the tape of all steps; else the states at the
  // start of every chunk of that many steps, C [chunks, batch, hidden]; null if nothing is wanted.
  void* saved;
  int64_t chunk;

  const void* grad_y;       // T [batch, steps, hidden]
  const void* grad_h_last;  // C [batch, hidden]
  void* grad_x;             // T [batch, steps, inputs], or null
  void* grad_h0;            // C [batch, hidden]
  void* grad_timespans;     // C [batch, steps], or null
  void* grad_decay;         // C [2, hidden], or null

  // cfc_workspace().size elements of C; on a GPU as many as ember::cuda::cfc_scan_workspace() says.
  void* workspace;
};

inline namespace EMBER_ISA {

// Rows are padded so that whole vectors can be read and written at their end, and to an odd number
// of cache lines so that a column of many rows does not fall into few sets of the cache.
EMBER_HD int64_t cfc_pad(int64_t n) {
  return (n + 15) / 16 * 16;
}
EMBER_HD int64_t cfc_stride(int64_t n) {
  return ((n + 15) / 16 | 1) * 16;
}

// Fills in where the layers' pieces lie in the tapes.
inline __attribute__((always_inline)) void cfc_lay_out(CfcScanParams& p, CfcLayer* layers) {
  int64_t tape = 0, grads = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    CfcLayer& layer = layers[l];
    const bool is_heads = l + 1 == p.num_layers;
    layer.kept_offset = tape;
    layer.kept_stride = layer.segments * cfc_pad(layer.units);
    tape += layer.kept_stride;
    layer.grad_offset = grads;
    layer.grad_stride = cfc_stride(layer.kept_stride);
    grads += layer.grad_stride;
    if (!is_heads) {
      layers[l + 1].input_offset = tape;
      layers[l + 1].input_stride = cfc_stride(1 + cfc_pad(layer.units));
      tape += layers[l + 1].input_stride;
    }
  }
  // [1, x, h]: last, because it has one more slot, for the state after the last step.
  layers[0].input_offset = tape;
  layers[0].input_stride = cfc_stride(1 + p.inputs + cfc_pad(p.hidden));
  p.layers = layers;
}

// Elements of a tape of `slots` steps, and of a gradient tape.
inline __attribute__((always_inline)) int64_t cfc_tape_size(const CfcScanParams& p, int64_t slots) {
  const CfcLayer& first = p.layers[0];
  return (slots * (first.input_offset + first.input_stride) + first.input_stride) * p.batch;
}
inline __attribute__((always_inline)) int64_t cfc_grad_tape_size(const CfcScanParams& p,
                                                                 int64_t slots) {
  const CfcLayer& heads = p.layers[p.num_layers - 1];
  return slots * (heads.grad_offset + heads.grad_stride) * p.batch;
}

// Steps that are worked on between two barriers: the tape's length when no activations are saved,
// and the gradient tape's.
inline __attribute__((always_inline)) int64_t cfc_chunk_steps(const CfcScanParams& p,
                                                              bool backward) {
  int64_t steps = backward ? 2048 / (p.batch + 1) : p.batch <= 4 ? 32 : 8;
  if (backward && steps < 16) steps = 16;
  if (p.chunk && (backward || p.saved)) steps = p.chunk;
  if (steps > p.steps) steps = p.steps;
  return steps > 1 ? steps : 1;
}

// Elements of the packed weights: padded to the widest vectors of any instruction set, twice.
inline __attribute__((always_inline)) int64_t cfc_packed_size(const CfcScanParams& p) {
  const int64_t lanes = 32;
  int64_t size = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const CfcLayer& layer = p.layers[l];
    size += layer.segments * (layer.units + lanes) * (1 + layer.inputs);
  }
  return size;
}

// Where the parts of the workspace begin, in elements of C, for the forward or the backward pass.
struct CfcWorkspace {
  int64_t packed, transposed, tape, grad_tape, carry, weight_grads, decay_grads, size;
};

inline __attribute__((always_inline)) CfcWorkspace cfc_workspace(const CfcScanParams& p,
                                                                 bool backward) {
  const int64_t steps = cfc_chunk_steps(p, backward), lanes = 32;
  const bool runs_forward = !backward || p.chunk;
  int64_t transposed = 0, grads = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const CfcLayer& layer = p.layers[l];
    transposed += layer.segments * layer.units * (layer.inputs + 2 * lanes);
    grads += layer.segments * layer.units * layer.input_stride;
  }
  CfcWorkspace w{};
  const auto take = [&w](int64_t& part, int64_t elements) {
    part = w.size;
    w.size += cfc_pad(elements);
  };
  if (runs_forward) {
    take(w.packed, p.packed ? 0 : cfc_packed_size(p));
    take(w.tape, p.saved && !p.chunk ? 0 : cfc_tape_size(p, steps));
  }
  if (backward) {
    take(w.transposed, transposed);
    take(w.grad_tape, cfc_grad_tape_size(p, steps));
    take(w.carry, p.batch * cfc_pad(p.hidden));
    take(w.weight_grads, grads);
    take(w.decay_grads, p.grad_decay ? p.batch * 2 * cfc_pad(p.hidden) : 0);
  }
  return w;
}

}  // namespace EMBER_ISA
}  // namespace ember
