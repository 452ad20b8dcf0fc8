// Launchers of LIF attention's kernels.
#include <type_traits>

#include "lif_attention.cuh"

namespace ember {
namespace cuda {
namespace {

struct Scratch {
  int64_t row_gradients;  // in bytes, like the rest
  int64_t bytes;
};

// Backward's scratch: gate partials [B, H, tiles, 3], then row gradients [2, B, H, Q].
Scratch backward_scratch(const LifAttentionParams& p) {
  const int64_t pairs = p.batch * p.heads;
  const int64_t gates = pairs * attention_tiles(p.queries) * 3 * int64_t(sizeof(double));
  const int64_t element = p.dtype == DType::f64 ? 8 : 4;
  return {gates, gates + 2 * pairs * p.queries * element};
}

template <typename T, bool matrix_units>
cudaError_t forward(const LifAttentionParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  const int64_t pairs = p.batch * p.heads;
  const size_t shared = attention_shared_bytes<T, matrix_units>();
  cudaError_t status = launch(lif_attention_forward_kernel<T, matrix_units>,
                              pairs * attention_tiles(p.queries) * attention_columns(p),
                              kAttentionThreads, shared, stream, p, dropout_of(p));
  if (status != cudaSuccess || !p.summary) return status;
  double* partials = static_cast<double*>(p.scratch);
  status = launch(lif_attention_summary_kernel<T, matrix_units>, pairs * attention_tiles(p.keys),
                  kAttentionThreads, shared, stream, p, partials);
  if (status != cudaSuccess) return status;
  return launch(lif_attention_sum_summary_kernel<C>, pairs, kAttentionThreads, kReductionBytes,
                stream, p, static_cast<const double*>(partials));
}

template <typename T, bool matrix_units>
cudaError_t backward(const LifAttentionParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  const size_t shared = attention_shared_bytes<T, matrix_units>();
  const AttentionDropout keep = dropout_of(p);
  double* gate_partials = static_cast<double*>(p.scratch);
  C* row_gradients =
      reinterpret_cast<C*>(static_cast<char*>(p.scratch) + backward_scratch(p).row_gradients);
  const int64_t columns = attention_columns(p);
  cudaError_t status =
      launch(lif_attention_backward_queries_kernel<T, matrix_units>,
             p.batch * p.heads * attention_tiles(p.queries) * columns, kAttentionThreads, shared,
             stream, p, keep, row_gradients, gate_partials);
  if (status != cudaSuccess) return status;
  status = launch(lif_attention_backward_keys_kernel<T, matrix_units>,
                  p.batch * p.groups * attention_tiles(p.keys) * columns, kAttentionThreads, shared,
                  stream, p, keep, static_cast<const C*>(row_gradients));
  if (status != cudaSuccess) return status;
  return launch(lif_attention_sum_gates_kernel<C>, p.heads, kAttentionThreads, kReductionBytes,
                stream, p, static_cast<const double*>(gate_partials));
}

// Calls `body` with a null pointer of the element type and whether matrix units are wanted, as a
// type.
template <typename Body>
void dispatch(const LifAttentionParams& p, const Body& body) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if constexpr (std::is_same<T, float>::value) {
      if (p.tf32) return body(element, std::true_type());
    }
    body(element, std::bool_constant<sizeof(T) == 2>());
  });
}

}  // namespace

int64_t lif_attention_scratch_bytes(const LifAttentionParams& p, bool backward) {
  if (backward) return backward_scratch(p).bytes;
  return p.summary ? p.batch * p.heads * attention_tiles(p.keys) * 6 * int64_t(sizeof(double)) : 0;
}

cudaError_t lif_attention_forward(const LifAttentionParams& p, cudaStream_t stream) {
  if (!attention_fits(p)) return cudaErrorInvalidValue;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch(p, [&](auto* element, auto matrix_units) {
    using T = std::remove_pointer_t<decltype(element)>;
    status = forward<T, decltype(matrix_units)::value>(p, stream);
  });
  return status;
}

cudaError_t lif_attention_backward(const LifAttentionParams& p, cudaStream_t stream) {
  if (!attention_fits(p)) return cudaErrorInvalidValue;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch(p, [&](auto* element, auto matrix_units) {
    using T = std::remove_pointer_t<decltype(element)>;
    status = backward<T, decltype(matrix_units)::value>(p, stream);
  });
  return status;
}

}  // namespace cuda
}  // namespace ember
