// The arguments of the LIF attention's kernels, the same for every device.
#pragma once

#include <cstdint>

#include "types.h"

namespace ember {

// Elements [batch, head, token, 0 ... size); strides in elements, the last dimension dense.
struct AttentionTensor {
  void* data;
  int64_t batch, head, token;
};

// T is the type that `dtype` names, C its compute type (types.h). B = batch, H = heads, G = groups,
// Q = queries, K = keys, D = size. Query head h belongs to the key and value head h / (H / G).
struct LifAttentionParams {
  DType dtype;
  int64_t batch, heads, groups, queries, keys, size;
  bool causal;  // query i sees the keys j <= i + K - Q
  bool tf32;    // CUDA: fp32 products may round their factors to tf32
  double scale, eps, dropout;

  AttentionTensor query, key, value;  // T
  const void* threshold;              // C [H]
  const void* leak;                   // C [H]
  const void* steepness;              // C [H]
  const bool* mask;                   // [B, H, Q, K] by `mask_strides`, or null
  int64_t mask_strides[4];            // in elements; 0 where the mask is broadcast
  const int64_t* seed;                // scalar, or null without dropout

  AttentionTensor out;  // T, written by forward; CUDA: read by backward, or null
  // Of each row: its largest score m, 1 / sum of exp(score - m), and 1 / (sum of w + eps); zeros
  // for a row without visible keys. Written by forward and read by backward.
  void* row_stats;  // C [3, B, H, Q]

  void* summary;             // C [4, B, H]: entropy, support, first token, fire rate; or null
  void* load;                // C [B, H, K]; null with summary
  double* summary_partials;  // CPU: [tasks, 5 + K], scratch; null with summary

  AttentionTensor grad_out;                          // T
  AttentionTensor grad_query, grad_key, grad_value;  // T, written by backward
  void* grad_gates;                                  // C [3, H]: threshold, leak, steepness
  double* gate_partials;                             // CPU: [tasks, 3], scratch
  void* key_partials;  // CPU: C [tasks, 2, K, D], scratch; null unless lif_attention_sums_keys()

  // The device's lif_attention_scratch_bytes(), on a CPU for each thread.
  void* scratch;
};

}  // namespace ember
