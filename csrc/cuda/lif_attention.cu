// Launchers of LIF attention's kernels.
#include <type_traits>

#include "half_launch.cuh"
#include "lif_attention.cuh"
#include "lif_attention_half.cuh"
#include "lif_attention_half_backward.cuh"

namespace ember {
namespace cuda {
namespace {

struct Scratch {
  int64_t gates;  // in bytes, like the rest
  int64_t bytes;
};

// Backward's scratch: row gradients [2, B, H, Q], or a HalfQuery for each row, then gate partials
// [B, H, tiles, 3].
Scratch backward_scratch(const LifAttentionParams& p) {
  const int64_t pairs = p.batch * p.heads;
  const int64_t row = p.dtype == DType::f64 || may_be_half(p) ? 16 : 8;
  static_assert(sizeof(HalfQuery) == 16, "as large as two numbers of fp64");
  const int64_t rows = pairs * p.queries * row;
  return {rows, rows + pairs * attention_tiles(p.queries) * 3 * int64_t(sizeof(double))};
}

// Compiled like all of the kernels for 16-bit types.
const auto kHalfProbe = lif_attention_half_forward_kernel<bfloat16, 64>;

template <typename T>
cudaError_t half_forward(const LifAttentionParams& p, cudaStream_t stream) {
  return dispatch_size(p, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    return launch(lif_attention_half_forward_kernel<T, kSize>,
                  p.batch * p.heads * attention_tiles(p.queries), kFragmentThreads,
                  kHalfForwardBytes<kSize>, stream, p, HalfOptions(p));
  });
}

template <typename T, bool matrix_units>
cudaError_t forward(const LifAttentionParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  const int64_t pairs = p.batch * p.heads;
  const size_t shared = attention_shared_bytes<T, matrix_units>();
  bool half = false;
  cudaError_t status = runs_half<T>(p, kHalfProbe, {p.out}, half);
  if (status != cudaSuccess) return status;
  if constexpr (is_half<T>()) {
    if (half) status = half_forward<T>(p, stream);
  }
  if (!half) {
    status = launch(lif_attention_forward_kernel<T, matrix_units>,
                    pairs * attention_tiles(p.queries) * attention_columns(p), kAttentionThreads,
                    shared, stream, p, dropout_of(p));
  }
  if (status != cudaSuccess || !p.summary) return status;
  double* partials = static_cast<double*>(p.scratch);
  status = launch(lif_attention_summary_kernel<T, matrix_units>, pairs * attention_tiles(p.keys),
                  kAttentionThreads, shared, stream, p, partials);
  if (status != cudaSuccess) return status;
  return launch(lif_attention_sum_summary_kernel<C>, pairs, kAttentionThreads, kReductionBytes,
                stream, p, static_cast<const double*>(partials));
}

template <typename T, bool matrix_units>
cudaError_t wide_backward(const LifAttentionParams& p, double* gate_partials, cudaStream_t stream) {
  using C = compute_t<T>;
  const size_t shared = attention_shared_bytes<T, matrix_units>();
  const AttentionDropout keep = dropout_of(p);
  C* row_gradients = static_cast<C*>(p.scratch);
  const int64_t columns = attention_columns(p);
  const cudaError_t status =
      launch(lif_attention_backward_queries_kernel<T, matrix_units>,
             p.batch * p.heads * attention_tiles(p.queries) * columns, kAttentionThreads, shared,
             stream, p, keep, row_gradients, gate_partials);
  if (status != cudaSuccess) return status;
  return launch(lif_attention_backward_keys_kernel<T, matrix_units>,
                p.batch * p.groups * attention_tiles(p.keys) * columns, kAttentionThreads, shared,
                stream, p, keep, static_cast<const C*>(row_gradients));
}

template <typename T>
cudaError_t half_backward(const LifAttentionParams& p, double* gate_partials, cudaStream_t stream) {
  return dispatch_size(p, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    const HalfOptions options(p);
    HalfQuery* rows = static_cast<HalfQuery*>(p.scratch);
    const cudaError_t status =
        launch(lif_attention_half_backward_queries_kernel<T, kSize>,
               p.batch * p.heads * attention_tiles(p.queries), kFragmentThreads,
               kHalfQueriesBytes<kSize>, stream, p, options, rows, gate_partials);
    if (status != cudaSuccess) return status;
    return launch(lif_attention_half_backward_keys_kernel<T, kSize>,
                  p.batch * p.groups * attention_tiles(p.keys), kFragmentThreads,
                  kHalfKeysBytes<kSize>, stream, p, options, static_cast<const HalfQuery*>(rows));
  });
}

template <typename T, bool matrix_units>
cudaError_t backward(const LifAttentionParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  double* gate_partials =
      reinterpret_cast<double*>(static_cast<char*>(p.scratch) + backward_scratch(p).gates);
  bool half = false;
  cudaError_t status = runs_half<T>(
      p, kHalfProbe, {p.out, p.grad_out, p.grad_query, p.grad_key, p.grad_value}, half);
  if (status != cudaSuccess) return status;
  if (half && p.out.data) {
    if constexpr (is_half<T>()) status = half_backward<T>(p, gate_partials, stream);
  } else {
    status = wide_backward<T, matrix_units>(p, gate_partials, stream);
  }
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
