// ember_ext::lif_attention_forward and lif_attention_backward: tensors to LifAttentionParams.
#include "lif_attention.h"

#include <tuple>

#ifndef EMBER_CUDA
#include "../cpu/lif_attention.h"
#endif

EMBER_KERNEL(lif_attention_forward, LifAttentionParams)
EMBER_KERNEL(lif_attention_backward, LifAttentionParams)

#ifdef EMBER_CUDA
namespace ember {
namespace cuda {
int64_t lif_attention_scratch_bytes(const LifAttentionParams& p, bool backward);
}
}  // namespace ember
#endif

namespace ember {
namespace binding {
namespace {

Tensor new_scratch(LifAttentionParams& p, const Tensor& like, bool backward) {
#ifdef EMBER_CUDA
  const int64_t bytes = cuda::lif_attention_scratch_bytes(p, backward);
#else
  const int64_t bytes = lif_attention_scratch_bytes(p, backward) * torch_threads().threads;
#endif
  Tensor scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  p.scratch = scratch.mutable_data_ptr();
  return scratch;
}

// The output; statistics of its rows for backward, [3, B, H, Q]; entropy, support, mass of the
// first token and fire rate, [4, B, H], and the keys' loads, [B, H, K], both empty unless asked
// for.
std::tuple<Tensor, Tensor, Tensor, Tensor> lif_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& threshold,
    const Tensor& leak, const Tensor& steepness, const MaybeTensor& mask, const MaybeTensor& seed,
    double dropout, bool causal, double scale, double eps, bool tf32, bool summary) {
  AttentionInputs<LifAttentionParams> inputs(query, key, value, threshold, leak, steepness, mask,
                                             seed, dropout, causal, scale, eps);
  LifAttentionParams& p = inputs.p;
  p.tf32 = tf32;
  const Tensor& gates = inputs.threshold;
  Tensor out = new_joined_like(inputs.query);
  Tensor row_stats = torch::stable::new_empty(gates, {3, p.batch, p.heads, p.queries});
  Tensor sums, load, partials;
  if (summary) {
    sums = torch::stable::new_empty(gates, {4, p.batch, p.heads});
    load = torch::stable::new_empty(gates, {p.batch, p.heads, p.keys});
  } else {
    sums = torch::stable::new_empty(gates, {0});
    load = torch::stable::new_empty(gates, {0});
  }
  // Without columns there still are weights to summarise.
  if (!inputs.has_pairs() || (p.size == 0 && !summary)) {
    for (Tensor* t : {&out, &row_stats, &sums, &load}) torch::stable::zero_(*t);
    return {out, row_stats, sums, load};
  }
  p.out = describe(out);
  p.row_stats = row_stats.mutable_data_ptr();
  if (summary) {
    p.summary = sums.mutable_data_ptr();
    p.load = load.mutable_data_ptr();
#ifndef EMBER_CUDA
    partials =
        torch::stable::new_empty(gates, {lif_attention_tasks(p), 5 + p.keys}, ScalarType::Double);
    p.summary_partials = static_cast<double*>(partials.mutable_data_ptr());
#endif
  }
  const Tensor scratch = new_scratch(p, gates, false);
  EMBER_LAUNCH(lif_attention_forward, p, inputs.query);
  return {out, row_stats, sums, load};
}

// Gradients of query, key and value, and of the gates' parameters, [3, H]. `out` is forward's
// output, which saves kernels that take it a sweep.
std::tuple<Tensor, Tensor, Tensor, Tensor> lif_attention_backward(
    const Tensor& grad_out_, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& threshold, const Tensor& leak, const Tensor& steepness, const MaybeTensor& out_,
    const Tensor& row_stats_, const MaybeTensor& mask, const MaybeTensor& seed, double dropout,
    bool causal, double scale, double eps, bool tf32) {
  AttentionInputs<LifAttentionParams> inputs(query, key, value, threshold, leak, steepness, mask,
                                             seed, dropout, causal, scale, eps);
  LifAttentionParams& p = inputs.p;
  p.tf32 = tf32;
  const Tensor &gates = inputs.threshold, grad_out = dense_rows(grad_out_),
               row_stats = dense(row_stats_);
  Tensor grad_query = new_joined_like(inputs.query), grad_key = new_joined_like(inputs.key),
         grad_value = new_joined_like(inputs.value);
  Tensor grad_gates = torch::stable::new_empty(gates, {3, p.heads});
  if (!inputs.has_pairs() || p.size == 0) {
    for (Tensor* t : {&grad_query, &grad_key, &grad_value, &grad_gates}) torch::stable::zero_(*t);
    return {grad_query, grad_key, grad_value, grad_gates};
  }
  check_like(grad_out, inputs.query, {p.batch, p.heads, p.queries, p.size});
  check_like(row_stats, inputs.query, {3, p.batch, p.heads, p.queries});
  check(grad_out.scalar_type() == inputs.query.scalar_type() &&
        row_stats.scalar_type() == gates.scalar_type());
  p.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  p.grad_out = describe(grad_out);
  MaybeTensor out;
  if (out_) {
    check_like(*out_, inputs.query, {p.batch, p.heads, p.queries, p.size});
    check(out_->scalar_type() == inputs.query.scalar_type());
    out = dense_rows(*out_);
    p.out = describe(*out);
  }
  p.grad_query = describe(grad_query);
  p.grad_key = describe(grad_key);
  p.grad_value = describe(grad_value);
  p.grad_gates = grad_gates.mutable_data_ptr();
#ifndef EMBER_CUDA
  const Tensor gate_partials =
      torch::stable::new_empty(gates, {lif_attention_tasks(p), 3}, ScalarType::Double);
  p.gate_partials = static_cast<double*>(gate_partials.mutable_data_ptr());
  Tensor key_partials;
  if (lif_attention_sums_keys(p)) {
    key_partials = torch::stable::new_empty(gates, {lif_attention_tasks(p), 2, p.keys, p.size});
    p.key_partials = key_partials.mutable_data_ptr();
  }
#endif
  const Tensor scratch = new_scratch(p, gates, true);
  EMBER_LAUNCH(lif_attention_backward, p, inputs.query);
  return {grad_query, grad_key, grad_value, grad_gates};
}

}  // namespace

void register_lif_attention(torch::stable::detail::StableLibrary& library) {
  library.impl("lif_attention", TORCH_BOX(&lif_attention_forward));
  library.impl("lif_attention_forward", TORCH_BOX(&lif_attention_forward));
  library.impl("lif_attention_backward", TORCH_BOX(&lif_attention_backward));
}

}  // namespace binding
}  // namespace ember
