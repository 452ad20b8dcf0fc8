// ember_ext::lif_attention_forward and lif_attention_backward: tensors to LifAttentionParams.
//
// All that memory safety rests on is checked here, with a terse message; ops/lif_attention.py tells
// the user what is wrong.
#include "../common/lif_attention.h"

#include <initializer_list>
#include <optional>
#include <tuple>

#include "device.h"

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

using MaybeTensor = std::optional<Tensor>;

void check(bool good) {
  STD_TORCH_CHECK(good, "ember_ext.lif_attention: invalid arguments");
}

void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  check(t.dim() == int64_t(shape.size()) && t.device() == like.device());
  int64_t d = 0;
  for (int64_t n : shape) check(t.size(d++) == n);
}

AttentionTensor describe(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// [batch, heads, tokens, size], laid out as [batch, tokens, heads, size].
Tensor new_joined(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t size) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, size}), 1,
                                  2);
}

Tensor new_joined_like(const Tensor& t) {
  return new_joined(t, t.size(0), t.size(1), t.size(2), t.size(3));
}

// `t` itself where its last dimension is dense, else one copy.
Tensor dense_rows(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// What a call reads, alive for as long as the parameters that point to it.
struct Inputs {
  Tensor query, key, value, threshold, leak, steepness;
  MaybeTensor mask, seed;
  LifAttentionParams p{};

  Inputs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& threshold_,
         const Tensor& leak_, const Tensor& steepness_, const MaybeTensor& mask_,
         const MaybeTensor& seed_, double dropout, bool causal, double scale, double eps, bool tf32)
      : query(dense_rows(query_)),
        key(dense_rows(key_)),
        value(dense_rows(value_)),
        threshold(dense(threshold_)),
        leak(dense(leak_)),
        steepness(dense(steepness_)),
        mask(mask_),
        seed(seed_) {
    check(query.dim() == 4 && key.dim() == 4);
    p.dtype = dtype_of(query);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.groups = key.size(1);
    p.queries = query.size(2);
    p.keys = key.size(2);
    p.size = query.size(3);
    check(p.groups > 0 ? p.heads % p.groups == 0 : p.heads == 0);
    for (const Tensor* t : {&key, &value}) {
      check_like(*t, query, {p.batch, p.groups, p.keys, p.size});
      check(t->scalar_type() == query.scalar_type());
    }
    for (const Tensor* t : {&threshold, &leak, &steepness}) {
      check_like(*t, query, {p.heads});
      check(t->scalar_type() == compute_type(query));
    }
    p.causal = causal;
    p.tf32 = tf32;
    p.scale = scale;
    p.eps = eps;
    p.dropout = dropout;
    p.query = describe(query);
    p.key = describe(key);
    p.value = describe(value);
    p.threshold = threshold.const_data_ptr();
    p.leak = leak.const_data_ptr();
    p.steepness = steepness.const_data_ptr();
    if (mask) {
      check_like(*mask, query, {p.batch, p.heads, p.queries, p.keys});
      check(mask->scalar_type() == ScalarType::Bool);
      p.mask = static_cast<const bool*>(mask->const_data_ptr());
      for (int d = 0; d < 4; ++d) p.mask_strides[d] = mask->stride(d);
    }
    if (seed) {
      check_like(*seed, query, {});
      check(seed->scalar_type() == ScalarType::Long);
      p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    check(valid_gates(p.dtype, p.heads, p.threshold, p.leak, p.steepness));
  }

  bool empty() const { return p.batch * p.heads * p.queries * p.keys * p.size == 0; }
};

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
  Inputs inputs(query, key, value, threshold, leak, steepness, mask, seed, dropout, causal, scale,
                eps, tf32);
  LifAttentionParams& p = inputs.p;
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
  if (inputs.empty()) {
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

// Gradients of query, key and value, and of the gates' parameters, [3, H].
std::tuple<Tensor, Tensor, Tensor, Tensor> lif_attention_backward(
    const Tensor& grad_out_, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& threshold, const Tensor& leak, const Tensor& steepness, const Tensor& row_stats_,
    const MaybeTensor& mask, const MaybeTensor& seed, double dropout, bool causal, double scale,
    double eps, bool tf32) {
  Inputs inputs(query, key, value, threshold, leak, steepness, mask, seed, dropout, causal, scale,
                eps, tf32);
  LifAttentionParams& p = inputs.p;
  const Tensor &gates = inputs.threshold, grad_out = dense_rows(grad_out_),
               row_stats = dense(row_stats_);
  Tensor grad_query = new_joined_like(inputs.query), grad_key = new_joined_like(inputs.key),
         grad_value = new_joined_like(inputs.value);
  Tensor grad_gates = torch::stable::new_empty(gates, {3, p.heads});
  if (inputs.empty()) {
    for (Tensor* t : {&grad_query, &grad_key, &grad_value, &grad_gates}) torch::stable::zero_(*t);
    return {grad_query, grad_key, grad_value, grad_gates};
  }
  check_like(grad_out, inputs.query, {p.batch, p.heads, p.queries, p.size});
  check_like(row_stats, inputs.query, {3, p.batch, p.heads, p.queries});
  check(grad_out.scalar_type() == inputs.query.scalar_type() &&
        row_stats.scalar_type() == gates.scalar_type());
  p.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  p.grad_out = describe(grad_out);
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
