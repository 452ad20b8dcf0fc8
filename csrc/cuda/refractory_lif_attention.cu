// Launchers of refractory LIF attention's kernels.
#include <type_traits>

#include "half_launch.cuh"
#include "refractory_lif_attention.cuh"
#include "refractory_lif_attention_backward.cuh"
#include "refractory_lif_attention_half.cuh"
#include "refractory_lif_attention_half_backward.cuh"

namespace ember {
namespace cuda {
namespace {

// Lays arrays out one after the other; with a null `base`, only counts their bytes.
struct Arena {
  char* base;
  int64_t bytes = 0;

  template <typename T>
  T* take(int64_t count) {
    T* const array = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return array;
  }
};

template <typename C>
RefractoryScratch<C> lay_out(const RefractoryLifAttentionParams& p, bool backward, Arena& arena) {
  const int64_t tiles = attention_tiles(p.queries), pairs = p.batch * p.heads;
  RefractoryScratch<C> scratch{};
  // Without look_ahead forward's sums begin in block_loads and next_load.
  if (backward || p.look_ahead) scratch.sums = arena.take<C>(pairs * tiles * p.keys);
  if (!backward) {
    if (p.look_ahead) scratch.mean_sums = arena.take<C>(p.batch * tiles * p.keys);
    return scratch;
  }
  scratch.ends = p.look_ahead ? arena.take<C>(pairs * p.keys) : scratch.sums;
  scratch.gates = arena.take<double>(pairs * tiles * 5);
  scratch.above = arena.take<C>(p.batch * (p.look_ahead ? 1 : p.queries) * p.keys);
  scratch.row_sums = arena.take<C>(3 * pairs * p.queries);
  if (p.one_previous_row) scratch.mean_sums = arena.take<C>(p.batch * tiles * p.keys);
  return scratch;
}

// The same for kernels whose scores stay in registers.
RefractoryHalfScratch lay_out_half(const RefractoryLifAttentionParams& p, Arena& arena) {
  const int64_t tiles = attention_tiles(p.queries), pairs = p.batch * p.heads;
  RefractoryHalfScratch scratch{};
  scratch.gates = arena.take<double>(pairs * tiles * 5);
  scratch.rows = arena.take<HalfQuery>(pairs * p.queries);
  scratch.rest = arena.take<float>(pairs * p.queries);
  scratch.ends = arena.take<float>(pairs * RefractoryOptions(p).load_blocks * p.keys);
  scratch.above = arena.take<float>(p.batch * (p.look_ahead ? 1 : p.queries) * p.keys);
  if (!p.grad_next_load && !p.grad_weights && !p.grad_past_weights) scratch.above = nullptr;
  scratch.grad_key = arena.take<float>(p.batch * p.groups * p.keys * p.size);
  if (p.one_previous_row) scratch.mean_sums = arena.take<float>(p.batch * tiles * p.keys);
  return scratch;
}

// `block` is of no meaning with look_ahead, where kernels take sums over tiles.
RefractoryLifAttentionParams with_block(RefractoryLifAttentionParams p) {
  if (p.look_ahead) p.block = kTile;
  return p;
}

// What the launches of one call have in common.
template <typename T, bool matrix_units>
struct Launches {
  using C = compute_t<T>;
  // Of a kernel whose tiles have keys or queries for rows.
  template <bool keys_first>
  static constexpr size_t shared() {
    return attention_shared_bytes<T, matrix_units>() +
           RefractoryTile<T, matrix_units, keys_first>::kBytes;
  }

  const RefractoryLifAttentionParams& p;
  cudaStream_t stream;
  AttentionDropout keep = dropout_of(p);
  int64_t pairs = p.batch * p.heads, query_tiles = attention_tiles(p.queries),
          key_tiles = attention_tiles(p.keys), columns = attention_columns(p);
  cudaError_t status = cudaSuccess;

  // Does nothing once a launch has failed.
  template <bool keys_first = false, typename... P, typename... A>
  void tiles(int64_t blocks, void (*kernel)(RefractoryLifAttentionParams, P...), A... arguments) {
    if (status != cudaSuccess) return;
    status =
        launch(kernel, blocks, kAttentionThreads, shared<keys_first>(), stream, p, arguments...);
  }

  // A thread for each of `count`.
  template <typename... P, typename... A>
  void each(int64_t count, void (*kernel)(RefractoryLifAttentionParams, P...), A... arguments) {
    if (status != cudaSuccess) return;
    status = launch(kernel, ceil_div(count, kAttentionThreads), kAttentionThreads, 0, stream, p,
                    arguments...);
  }

  // A block for each 32 keys of the batch.
  template <typename... P, typename... A>
  void scan_queries(void (*kernel)(RefractoryLifAttentionParams, P...), A... arguments) {
    if (status != cudaSuccess) return;
    status = launch(kernel, ceil_div(p.batch * p.keys, kWarp), kAttentionThreads,
                    kAttentionThreads * sizeof(C), stream, p, arguments...);
  }

  // A kernel for 16-bit types whose scores stay in registers.
  template <typename... P, typename... A>
  void half(int64_t blocks, size_t shared,
            void (*kernel)(RefractoryLifAttentionParams, RefractoryOptions, P...), A... arguments) {
    if (status != cudaSuccess) return;
    status = launch(kernel, blocks, kFragmentThreads, shared, stream, p, RefractoryOptions(p),
                    arguments...);
  }

  template <int kSize>
  void half_forward(C* mean_sums) {
    half(pairs * query_tiles, kHalfRowsBytes<kSize>,
         refractory_lif_attention_half_rows_kernel<T, kSize>);
    half(pairs * key_tiles, kHalfLoadsBytes<kSize>,
         refractory_lif_attention_half_loads_kernel<T, kSize>);
    half(pairs * query_tiles, kHalfForwardBytes<kSize>,
         refractory_lif_attention_half_out_kernel<T, kSize>);
    half(p.batch * query_tiles * key_tiles, kHalfPairBytes<kSize, 2>,
         refractory_lif_attention_half_weights_kernel<T, kSize>, mean_sums);
  }

  // Whether the kernels for 16-bit types run, of which `others` are to be aligned, too.
  bool runs_in_registers(std::initializer_list<AttentionTensor> others) {
    if constexpr (is_half<T>()) {
      bool runs = false;
      status =
          runs_half<T>(p, refractory_lif_attention_half_rows_kernel<bfloat16, 64>, others, runs);
      return runs && (p.look_ahead || p.block == kLoadRows);
    } else {
      return false;
    }
  }

  template <int kSize>
  void half_backward(const RefractoryHalfScratch& scratch) {
    if (scratch.above) scan_queries(refractory_lif_attention_above_kernel<C>, scratch.above);
    half(pairs * query_tiles, kHalfKept<kSize>,
         refractory_lif_attention_half_delta_kernel<T, kSize>, scratch);
    if (p.grad_previous_load) {
      half(p.batch * query_tiles * ceil_div(p.keys, kPreviousKeys), kHalfPairBytes<kSize, 3>,
           refractory_lif_attention_half_previous_kernel<T, kSize>, scratch);
    }
    const int64_t key_blocks = p.batch * p.groups * key_tiles;
    constexpr bool at_once = kSize <= 64;
    half(key_blocks, kRefractoryKeysBytes<kSize>,
         refractory_lif_attention_half_backward_keys_kernel<T, kSize, true, at_once>, scratch);
    if constexpr (!at_once) {
      half(key_blocks, kRefractoryKeysBytes<kSize>,
           refractory_lif_attention_half_backward_keys_kernel<T, kSize, false, true>, scratch);
    }
    half(pairs * query_tiles, kHalfKept<kSize>,
         refractory_lif_attention_half_backward_queries_kernel<T, kSize, true, at_once>, scratch);
    if constexpr (!at_once) {
      half(pairs * query_tiles, kHalfKept<kSize>,
           refractory_lif_attention_half_backward_queries_kernel<T, kSize, false, true>, scratch);
    }
    half(key_blocks, kHalfMeansBytes<kSize>, refractory_lif_attention_half_means_kernel<T, kSize>,
         scratch);
  }

  cudaError_t forward() {
    const bool in_registers = runs_in_registers({p.out});
    Arena arena{static_cast<char*>(p.scratch)};
    const auto scratch = lay_out<C>(p, false, arena);
    if (in_registers) {
      if constexpr (is_half<T>()) {
        dispatch_size(p, [&](auto size) {
          half_forward<decltype(size)::value>(scratch.mean_sums);
          return status;
        });
      }
    } else {
      C* const sums = p.look_ahead ? scratch.sums : static_cast<C*>(p.block_loads);
      tiles(pairs * query_tiles, refractory_lif_attention_rows_kernel<T, matrix_units>, sums);
      each(pairs * p.keys, refractory_lif_attention_scan_kernel<C>, static_cast<const C*>(sums));
      tiles(pairs * query_tiles * columns, refractory_lif_attention_out_kernel<T, matrix_units>,
            keep);
      tiles(p.batch * query_tiles * key_tiles,
            refractory_lif_attention_weights_kernel<T, matrix_units>, scratch.mean_sums);
    }
    scan_queries(refractory_lif_attention_next_load_kernel<C>,
                 static_cast<const C*>(scratch.mean_sums));
    return status;
  }

  void wide_backward(const RefractoryScratch<C>& scratch) {
    scan_queries(refractory_lif_attention_above_kernel<C>, scratch.above);
    tiles(pairs * query_tiles, refractory_lif_attention_backward_rows_kernel<T, matrix_units>, keep,
          scratch);
    each(pairs * p.keys, refractory_lif_attention_backward_scan_kernel<C>,
         static_cast<const C*>(scratch.sums), scratch.ends);
    tiles(pairs * query_tiles * columns,
          refractory_lif_attention_backward_queries_kernel<T, matrix_units>, keep, scratch);
    const int64_t key_blocks = p.batch * p.groups * key_tiles * columns;
    constexpr bool at_once = sizeof(T) < 8;
    tiles<true>(key_blocks,
                refractory_lif_attention_backward_keys_kernel<T, matrix_units, true, at_once>, keep,
                scratch);
    if constexpr (!at_once) {
      tiles<true>(key_blocks,
                  refractory_lif_attention_backward_keys_kernel<T, matrix_units, false, true>, keep,
                  scratch);
    }
    if (p.grad_previous_load) {
      tiles(p.batch * query_tiles * key_tiles,
            refractory_lif_attention_previous_kernel<T, matrix_units>, keep, scratch);
    }
  }

  cudaError_t backward() {
    const bool in_registers =
        runs_in_registers({p.grad_out, p.grad_query, p.grad_key, p.grad_value});
    Arena arena{static_cast<char*>(p.scratch)};
    const double* gates = nullptr;
    const C* mean_sums = nullptr;
    if (in_registers) {
      if constexpr (is_half<T>()) {
        const auto scratch = lay_out_half(p, arena);
        dispatch_size(p, [&](auto size) {
          half_backward<decltype(size)::value>(scratch);
          return status;
        });
        gates = scratch.gates;
        mean_sums = scratch.mean_sums;
      }
    } else {
      const auto scratch = lay_out<C>(p, true, arena);
      wide_backward(scratch);
      gates = scratch.gates;
      mean_sums = scratch.mean_sums;
    }
    if (p.grad_previous_load && p.one_previous_row) {
      each(p.batch * p.keys, refractory_lif_attention_sum_previous_kernel<C>, mean_sums);
    }
    if (status != cudaSuccess) return status;
    return launch(refractory_lif_attention_sum_gates_kernel<C>, p.heads, kAttentionThreads,
                  kReductionBytes, stream, p, gates);
  }
};

// Calls `body` with the launches for the type that `p` names; 16-bit types use matrix units.
template <typename Body>
cudaError_t dispatch(const RefractoryLifAttentionParams& p, cudaStream_t stream, const Body& body) {
  const bool knows_block = p.block == kTile || p.block == kLoadRows;
  if (!attention_fits(p) || !knows_block) return cudaErrorInvalidValue;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    status = body(Launches<T, sizeof(T) == 2>{p, stream});
  });
  return status;
}

}  // namespace

int64_t refractory_lif_attention_scratch_bytes(const RefractoryLifAttentionParams& params,
                                               bool backward) {
  const RefractoryLifAttentionParams p = with_block(params);
  Arena arena{nullptr};
  if (p.dtype == DType::f64) {
    lay_out<double>(p, backward, arena);
  } else {
    lay_out<float>(p, backward, arena);
  }
  if (backward && may_be_half(p)) {
    Arena half{nullptr};
    lay_out_half(p, half);
    if (half.bytes > arena.bytes) return half.bytes;
  }
  return arena.bytes;
}

cudaError_t refractory_lif_attention_forward(const RefractoryLifAttentionParams& p,
                                             cudaStream_t stream) {
  return dispatch(with_block(p), stream, [](auto launches) { return launches.forward(); });
}

cudaError_t refractory_lif_attention_backward(const RefractoryLifAttentionParams& p,
                                              cudaStream_t stream) {
  return dispatch(with_block(p), stream, [](auto launches) { return launches.backward(); });
}

}  // namespace cuda
}  // namespace ember
