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

  AttentionTensor out;  // T, written by forward
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

  // lif_attention_scratch_bytes(), on a CPU for each thread.
  void* scratch;
};

inline namespace EMBER_ISA {

// The CPU's split of the work. It depends on the shape alone, so results do not change with the
// number of threads. A task is a segment of the queries of one batch entry and head.

inline int64_t lif_attention_segments(const LifAttentionParams& p) {
  const int64_t enough_tasks = 16, fewest_queries = 256;
  const int64_t pairs = p.batch * p.heads;
  if (pairs >= enough_tasks || pairs == 0) return 1;
  const int64_t wanted = (enough_tasks + pairs - 1) / pairs;
  const int64_t most = (p.queries + fewest_queries - 1) / fewest_queries;
  return wanted < most ? wanted : most > 0 ? most : 1;
}

inline int64_t lif_attention_tasks(const LifAttentionParams& p) {
  return p.batch * p.heads * lif_attention_segments(p);
}

// Whether gradients of keys and values are sums over several tasks.
inline bool lif_attention_sums_keys(const LifAttentionParams& p) {
  return lif_attention_segments(p) > 1 || p.heads != p.groups;
}

// Queries whose scores against all keys are held at once.
inline int64_t lif_attention_strip_rows(const LifAttentionParams& p) {
  const int64_t most = 48;
  return p.queries < most ? p.queries : most;
}

// Room for whole vectors of any instruction set.
inline int64_t lif_attention_padded(int64_t n) {
  return (n + 31) / 32 * 32;
}

// Elements from one row of a strip to the next; not a power of two, which would crowd few cache
// sets.
inline int64_t lif_attention_strip_stride(const LifAttentionParams& p) {
  return lif_attention_padded(p.keys) + 16;
}

inline int64_t lif_attention_scratch_bytes(const LifAttentionParams& p, bool backward) {
  // See Workspace in csrc/cpu/lif_attention.cpp.
  const int64_t rows = lif_attention_strip_rows(p), size = lif_attention_padded(p.size);
  const int64_t strips = backward ? 2 : 1, operands = backward ? 5 : 2, matrices = backward ? 6 : 2;
  const int64_t elements = (strips * rows + 5) * lif_attention_strip_stride(p) +
                           operands * rows * size + matrices * lif_attention_padded(p.keys) * size;
  return (elements * (p.dtype == DType::f64 ? 8 : 4) + p.keys * 8 + 63) / 64 * 64;
}

}  // namespace EMBER_ISA
}  // namespace ember
