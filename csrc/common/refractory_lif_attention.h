// The arguments of the refractory LIF attention's kernels, the same for every device, and what they
// compute. B, H, G, Q, K, D, T and C as in LifAttentionParams; S = K - Q >= 0 keys lie before the
// first query; n_i = S + i + 1 is the number of keys that query i sees; always causal, no mask.
//
// Forward, for each batch entry and head (over keys j <= S + i):
//   p_ij = exp(s_ij - m_i) / l_i
//   P_ij = past_j + sum_{i' <= i} p_i'j,  load_ij = P_ij / n_i        causal
//   P_j  =          sum_{i'} p_i'j,       load_ij = P_j / Q           look_ahead
//   theta_ij = theta + within load_ij + across previous_load_ij
//   f = sigmoid(k (p - theta_ij)),  g = f + lambda (1 - f),  u = p g / R_i,  R_i = sum_j p g + eps
//   out_i = sum_j u_ij M_ij v_j,  M the dropout mask over 1 - dropout
// and over the heads, before dropout:
//   U_ij = past_weights_j + sum_{i' <= i} mean_h u_i'j,  next_load_ij = U_ij / n_i   causal
//   U_j  =                  sum_{i'} mean_h u_i'j,       next_load_j  = U_j / Q      look_ahead
// Results: out, next_load, and the final P (`probabilities`) and U (`weights`) to carry on from.
//
// Sweeps. causal: one pass over blocks of queries in order, the running P in hand; blocks that run
// at the same time first need the sums of p over each block, and then P at their start. look_ahead:
// P needs every query's p before any gate, so p is computed twice or kept. Saved for backward: the
// rows' statistics, and P where each block of `block` queries begins (look_ahead: the final P).
//
// Backward, with F = d next_load, dP = d probabilities, dU = d weights as given:
//   a_ij = dU_j + sum_{i' >= i} F_i'j / n_i'        (causal),  dU_j + F_j / Q        (look_ahead)
//   t_ij = M_ij (d out_i . v_j) + a_ij / H,  delta_i = sum_j u_ij t_ij
//   dw_ij = (t_ij - delta_i) / R_i
//   tau_ij = d theta_ij = -k p (1 - lambda) f (1 - f) dw_ij
//   c_ij = dP_j + within sum_{i' >= i} tau_i'j / n_i'  (causal),
//          dP_j + within sum_{i'} tau_i'j / Q          (look_ahead)
//   dp_ij = h_ij dw_ij + c_ij,  h = d(p g)/dp = g + k p (1 - lambda) f (1 - f)
//   ds_ij = p_ij (dp_ij - sum_j' p_ij' dp_ij')
//   d value_j = sum_i u_ij M_ij d out_i,  d query_i = scale sum_j ds_ij key_j,
//   d key_j = scale sum_i ds_ij query_i
//   d theta = sum tau_ij,  d lambda = sum p (1 - f) dw_ij,
//   d k = sum p (p - theta_ij) (1 - lambda) f (1 - f) dw_ij,
//   d within = sum tau_ij load_ij,  d across = sum tau_ij previous_load_ij
//   d previous_load_ij = sum_h across tau_ij, summed over i too if there is one row for all queries
//   d past_probabilities_j = c_0j,  d past_weights_j = a_0j,  for j < S (causal only)
// The sums over i' >= i ask for one pass over the queries in reverse; look_ahead needs tau of every
// query before any ds. P within a block is summed up again from the block's start: taking p away
// from the final P would lose the early, small sums to rounding.
#pragma once

#include "lif_attention.h"

namespace ember {

// Of the inherited members mask, summary and load are null, and causal is true.
struct RefractoryLifAttentionParams : LifAttentionParams {
  bool look_ahead;  // loads are means over all queries, not over those up to the present one
  int64_t block;    // queries from one saved P to the next, > 0; of no meaning with look_ahead

  const void* within;              // C [H]
  const void* across;              // C [H]
  const void* previous_load;       // C [B, Q, K], keys dense, or null for zeros
  int64_t previous_strides[2];     // of batch and query, in elements; 0 where broadcast
  bool one_previous_row;           // previous_load is C [B, 1, K], the same for all queries
  const void* past_probabilities;  // C [B, H, S], or null for zeros; null with look_ahead
  const void* past_weights;        // C [B, S]; null like past_probabilities

  // Written by forward.
  void* next_load;      // C [B, Q, K], zero where j > S + i; [B, 1, K] with look_ahead
  void* probabilities;  // C [B, H, K]
  void* weights;        // C [B, K]
  void* block_loads;    // C [B, H, ceil(Q / block), K]; [B, H, 1, K] with look_ahead; see above

  // Read by backward; any may be null for zeros.
  const void* grad_next_load;      // as next_load
  const void* grad_probabilities;  // C [B, H, K]
  const void* grad_weights;        // C [B, K]

  // Written by backward, besides grad_query, grad_key, grad_value. grad_gates is C [5, H]:
  // threshold, leak, steepness, within, across.
  void* grad_previous_load;       // C, dense, of previous_load's shape, or null: not wanted
  void* grad_past_probabilities;  // C [B, H, S], or null: not wanted
  void* grad_past_weights;        // C [B, S]; null like grad_past_probabilities
};

}  // namespace ember
