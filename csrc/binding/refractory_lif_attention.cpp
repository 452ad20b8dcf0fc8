// ember_ext::refractory_lif_attention_forward and refractory_lif_attention_backward: tensors to
// RefractoryLifAttentionParams.
#include "../common/refractory_lif_attention.h"

#include <tuple>

#include "lif_attention.h"
#ifndef EMBER_CUDA
#include "../cpu/refractory_lif_attention.h"
#endif

EMBER_KERNEL(refractory_lif_attention_forward, RefractoryLifAttentionParams)
EMBER_KERNEL(refractory_lif_attention_backward, RefractoryLifAttentionParams)

#ifdef EMBER_CUDA
namespace ember {
namespace cuda {
int64_t refractory_lif_attention_scratch_bytes(const RefractoryLifAttentionParams& p,
                                               bool backward);
}
}  // namespace ember
#endif

namespace ember {
namespace binding {
namespace {

struct RefractoryInputs : AttentionInputs<RefractoryLifAttentionParams> {
  Tensor within, across;
  MaybeTensor previous_load;

  RefractoryInputs(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& threshold, const Tensor& leak, const Tensor& steepness,
                   const Tensor& within_, const Tensor& across_, const MaybeTensor& previous_load_,
                   const MaybeTensor& seed, double dropout, bool look_ahead, double scale,
                   double eps, int64_t block)
      : AttentionInputs(query, key, value, threshold, leak, steepness, std::nullopt, seed, dropout,
                        true, scale, eps),
        within(dense(within_)),
        across(dense(across_)) {
    check(p.keys >= p.queries && block > 0);
    p.look_ahead = look_ahead;
    p.block = block;
    for (const Tensor* t : {&within, &across}) {
      check_like(*t, query, {p.heads});
      check(t->scalar_type() == compute_type(query));
    }
    p.within = within.const_data_ptr();
    p.across = across.const_data_ptr();
    if (!previous_load_) return;
    check(previous_load_->dim() == 3);
    const int64_t rows = previous_load_->size(1);
    check(rows == p.queries || rows == 1);
    check_like(*previous_load_, query, {p.batch, rows, p.keys});
    check(previous_load_->scalar_type() == compute_type(query));
    previous_load = p.keys <= 1 || previous_load_->stride(2) == 1
                        ? *previous_load_
                        : torch::stable::contiguous(*previous_load_);
    p.previous_load = previous_load->const_data_ptr();
    p.previous_strides[0] = previous_load->stride(0);
    p.previous_strides[1] = rows == 1 ? 0 : previous_load->stride(1);
    // Not the stride, which is 0 for an expanded tensor, too, whose gradient has all its rows.
    p.one_previous_row = rows == 1;
  }

  // Rows of the gradient of previous_load.
  int64_t previous_rows() const { return previous_load ? previous_load->size(1) : 0; }
  int64_t earlier() const { return p.keys - p.queries; }
};

Tensor new_scratch(RefractoryLifAttentionParams& p, const Tensor& like, bool backward) {
#ifdef EMBER_CUDA
  const int64_t bytes = cuda::refractory_lif_attention_scratch_bytes(p, backward);
#else
  const int64_t bytes = refractory_scratch_bytes(p, backward, torch_threads().threads);
#endif
  Tensor scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  p.scratch = scratch.mutable_data_ptr();
  return scratch;
}

// `t`, dense, of `shape` and of the type of `like`; null without one.
const void* describe_sums(const MaybeTensor& t, MaybeTensor& keep, const Tensor& like,
                          std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_like(*t, like, shape);
  check(t->scalar_type() == like.scalar_type());
  keep = dense(*t);
  return keep->const_data_ptr();
}

// The output; the load for the next layer; the sums of probabilities, [B, H, K], and of weights,
// [B, K], to carry on from; for backward, statistics of the rows and the loads where blocks begin.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> refractory_lif_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& threshold,
    const Tensor& leak, const Tensor& steepness, const Tensor& within, const Tensor& across,
    const MaybeTensor& previous_load, const MaybeTensor& past_probabilities,
    const MaybeTensor& past_weights, const MaybeTensor& seed, double dropout, bool look_ahead,
    double scale, double eps, int64_t block) {
  RefractoryInputs inputs(query, key, value, threshold, leak, steepness, within, across,
                          previous_load, seed, dropout, look_ahead, scale, eps, block);
  RefractoryLifAttentionParams& p = inputs.p;
  const Tensor& gates = inputs.threshold;
  check(!look_ahead || !(past_probabilities || past_weights));
  MaybeTensor kept_probabilities, kept_weights;
  p.past_probabilities = describe_sums(past_probabilities, kept_probabilities, gates,
                                       {p.batch, p.heads, inputs.earlier()});
  p.past_weights = describe_sums(past_weights, kept_weights, gates, {p.batch, inputs.earlier()});
  const int64_t rows = look_ahead ? 1 : p.queries;
  const int64_t blocks = look_ahead ? 1 : (p.queries + block - 1) / block;
  Tensor out = new_joined_like(inputs.query);
  Tensor next_load = torch::stable::new_empty(gates, {p.batch, rows, p.keys});
  Tensor probabilities = torch::stable::new_empty(gates, {p.batch, p.heads, p.keys});
  Tensor weights = torch::stable::new_empty(gates, {p.batch, p.keys});
  Tensor row_stats = torch::stable::new_empty(gates, {3, p.batch, p.heads, p.queries});
  // Flat: a dimension that may be 1, as `blocks`, would bind an exported graph to its value.
  Tensor block_loads = torch::stable::new_empty(gates, {p.batch * p.heads * blocks * p.keys});
  if (p.batch * p.heads * p.queries == 0) {
    for (Tensor* t : {&out, &next_load, &probabilities, &weights, &row_stats, &block_loads}) {
      torch::stable::zero_(*t);
    }
    // Without queries there is nothing to add to the sums, and K = S.
    if (p.queries == 0 && past_probabilities)
      torch::stable::copy_(probabilities, *past_probabilities);
    if (p.queries == 0 && past_weights) torch::stable::copy_(weights, *past_weights);
    return {out, next_load, probabilities, weights, row_stats, block_loads};
  }
  p.out = describe(out);
  p.row_stats = row_stats.mutable_data_ptr();
  p.next_load = next_load.mutable_data_ptr();
  p.probabilities = probabilities.mutable_data_ptr();
  p.weights = weights.mutable_data_ptr();
  p.block_loads = block_loads.mutable_data_ptr();
  const Tensor scratch = new_scratch(p, gates, false);
  EMBER_LAUNCH(refractory_lif_attention_forward, p, inputs.query);
  return {out, next_load, probabilities, weights, row_stats, block_loads};
}

// Gradients of query, key and value; of the gates' parameters and couplings, [5, H]; of
// previous_load and of the past sums, each empty unless asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
refractory_lif_attention_backward(const Tensor& grad_out_, const MaybeTensor& grad_next_load,
                                  const MaybeTensor& grad_probabilities,
                                  const MaybeTensor& grad_weights, const Tensor& query,
                                  const Tensor& key, const Tensor& value, const Tensor& threshold,
                                  const Tensor& leak, const Tensor& steepness, const Tensor& within,
                                  const Tensor& across, const Tensor& row_stats_,
                                  const Tensor& block_loads_, const MaybeTensor& previous_load,
                                  const MaybeTensor& seed, double dropout, bool look_ahead,
                                  double scale, double eps, int64_t block,
                                  bool previous_load_gradient, bool past_gradients) {
  RefractoryInputs inputs(query, key, value, threshold, leak, steepness, within, across,
                          previous_load, seed, dropout, look_ahead, scale, eps, block);
  RefractoryLifAttentionParams& p = inputs.p;
  const Tensor &gates = inputs.threshold, grad_out = dense_rows(grad_out_),
               row_stats = dense(row_stats_), block_loads = dense(block_loads_);
  check(!(previous_load_gradient && !previous_load) && !(past_gradients && look_ahead));
  Tensor grad_query = new_joined_like(inputs.query), grad_key = new_joined_like(inputs.key),
         grad_value = new_joined_like(inputs.value);
  Tensor grad_gates = torch::stable::new_empty(gates, {5, p.heads});
  Tensor grad_previous, grad_past_probabilities, grad_past_weights;
  const int64_t earlier = inputs.earlier();
  if (previous_load_gradient) {
    grad_previous = torch::stable::new_empty(gates, {p.batch, inputs.previous_rows(), p.keys});
  } else {
    grad_previous = torch::stable::new_empty(gates, {0});
  }
  if (past_gradients) {
    grad_past_probabilities = torch::stable::new_empty(gates, {p.batch, p.heads, earlier});
    grad_past_weights = torch::stable::new_empty(gates, {p.batch, earlier});
  } else {
    grad_past_probabilities = torch::stable::new_empty(gates, {0});
    grad_past_weights = torch::stable::new_empty(gates, {0});
  }
  MaybeTensor kept[3];
  const int64_t rows = look_ahead ? 1 : p.queries;
  const int64_t blocks = look_ahead ? 1 : (p.queries + block - 1) / block;
  p.grad_next_load = describe_sums(grad_next_load, kept[0], gates, {p.batch, rows, p.keys});
  p.grad_probabilities =
      describe_sums(grad_probabilities, kept[1], gates, {p.batch, p.heads, p.keys});
  p.grad_weights = describe_sums(grad_weights, kept[2], gates, {p.batch, p.keys});
  if (p.batch * p.heads * p.queries == 0) {
    for (Tensor* t : {&grad_query, &grad_key, &grad_value, &grad_gates, &grad_previous,
                      &grad_past_probabilities, &grad_past_weights}) {
      torch::stable::zero_(*t);
    }
    if (past_gradients && p.queries == 0) {
      if (kept[1]) torch::stable::copy_(grad_past_probabilities, *kept[1]);
      if (kept[2]) torch::stable::copy_(grad_past_weights, *kept[2]);
    }
    return {grad_query,       grad_key,      grad_value,
            grad_gates,       grad_previous, grad_past_probabilities,
            grad_past_weights};
  }
  check_like(grad_out, inputs.query, {p.batch, p.heads, p.queries, p.size});
  check_like(row_stats, inputs.query, {3, p.batch, p.heads, p.queries});
  check_like(block_loads, inputs.query, {p.batch * p.heads * blocks * p.keys});
  check(grad_out.scalar_type() == inputs.query.scalar_type() &&
        row_stats.scalar_type() == gates.scalar_type() &&
        block_loads.scalar_type() == gates.scalar_type());
  p.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  p.block_loads = const_cast<void*>(block_loads.const_data_ptr());
  p.grad_out = describe(grad_out);
  p.grad_query = describe(grad_query);
  p.grad_key = describe(grad_key);
  p.grad_value = describe(grad_value);
  p.grad_gates = grad_gates.mutable_data_ptr();
  if (previous_load_gradient) p.grad_previous_load = grad_previous.mutable_data_ptr();
  if (past_gradients) {
    p.grad_past_probabilities = grad_past_probabilities.mutable_data_ptr();
    p.grad_past_weights = grad_past_weights.mutable_data_ptr();
  }
  const Tensor scratch = new_scratch(p, gates, true);
  EMBER_LAUNCH(refractory_lif_attention_backward, p, inputs.query);
  return {grad_query,       grad_key,      grad_value,
          grad_gates,       grad_previous, grad_past_probabilities,
          grad_past_weights};
}

}  // namespace

void register_refractory_lif_attention(torch::stable::detail::StableLibrary& library) {
  library.impl("refractory_lif_attention", TORCH_BOX(&refractory_lif_attention_forward));
  library.impl("refractory_lif_attention_forward", TORCH_BOX(&refractory_lif_attention_forward));
  library.impl("refractory_lif_attention_backward", TORCH_BOX(&refractory_lif_attention_backward));
}

}  // namespace binding
}  // namespace ember
