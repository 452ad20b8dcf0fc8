// Shared by the kernels of refractory LIF attention: heads with their thresholds, tiles of scores,
// and sums over queries.
#pragma once

#include "../common/refractory_lif_attention.h"
#include "lif_attention.cuh"

namespace ember {
namespace cuda {

// Queries from one saved load to the next are a tile, or the rows that a warp has where scores stay
// in registers.
constexpr int kLoadRows = 16;
static_assert(kTile == 64 && kLoadRows == 16, "of which read_block() knows the logarithms");

// Arrays between the kernels of one call. With look_ahead, loads and gradients that are the same
// for all queries have one row: `rows` is 1, otherwise Q.
template <typename C>
struct RefractoryScratch {
  double* gates;  // backward: [B, H, tiles of queries, 5]
  C* sums;        // [B, H, tiles of queries, K]: of p, or in backward of tau / n
  C* ends;        // backward: c, like `sums` and in its place, or [B, H, 1, K]
  C* mean_sums;   // [B, tiles of queries, K]: of the mean u, or in backward of across tau
  C* above;       // backward: a, [B, rows, K]
  C* row_sums;    // backward: delta, E without what comes from `ends`, and E, [3, B, H, Q]
};

// The elements j ... j + 3 of a row of `keys`, 0 past the end; j is a multiple of 4.
template <typename C>
__device__ __forceinline__ void read_keys(const C* row, int j, int keys, C (&values)[kPatch]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 == 0 && j + kPatch <= keys) {
    const auto pack = *reinterpret_cast<const Pack<C, kPatch>*>(row + j);
#pragma unroll
    for (int k = 0; k < kPatch; ++k) values[k] = pack.values[k];
  } else {
#pragma unroll
    for (int k = 0; k < kPatch; ++k) values[k] = j + k < keys ? row[j + k] : C(0);
  }
}

// One head, with what makes its thresholds.
template <typename T>
struct RefractoryHead : AttentionHead<T> {
  using C = compute_t<T>;

  const RefractoryLifAttentionParams& r;
  C within, across;

  __device__ __forceinline__ RefractoryHead(const RefractoryLifAttentionParams& r,
                                            AttentionDropout keep, int batch, int head)
      : AttentionHead<T>(r, keep, batch, head),
        r(r),
        within(static_cast<const C*>(r.within)[head]),
        across(static_cast<const C*>(r.across)[head]) {}

  // The last key that query i sees; there is never a mask. -1 if there is no such query.
  __device__ __forceinline__ int last_key(int i) const {
    return i < int(r.queries) ? i + int(r.keys) - int(r.queries) : -1;
  }

  // How many queries the load of query i is a mean over.
  __device__ __forceinline__ C count(int i) const {
    return C(r.look_ahead ? r.queries : r.keys - r.queries + i + 1);
  }

  // The previous loads of query i and the keys j ... j + 3.
  __device__ __forceinline__ void previous_loads(int i, int j, C (&values)[kPatch]) const {
    const C* const row = static_cast<const C*>(r.previous_load) +
                         this->batch * r.previous_strides[0] +
                         this->existing(i) * r.previous_strides[1];
    read_keys(row, j, r.previous_load ? int(r.keys) : 0, values);
  }

  __device__ __forceinline__ C threshold_at(C load, C previous_load) const {
    return this->threshold + within * load + across * previous_load;
  }

  // Of an array [B, H, blocks of `block` queries, K], or [B, H, 1, K] with look_ahead: the keys
  // j ... j + 3 of the block that begins with query i.
  __device__ __forceinline__ void read_block(const C* array, int block, int i, int j,
                                             C (&values)[kPatch]) const {
    const int64_t pair = int64_t(this->batch) * r.heads + this->head;
    const int shift = block == kTile ? 6 : 4;
    const int64_t row =
        r.look_ahead ? pair : pair * ((int(r.queries) + block - 1) >> shift) + (i >> shift);
    read_keys(array + row * r.keys, j, int(r.keys), values);
  }
};

// A tile: its scores' patches have queries for rows and keys for columns, or, with `keys_first`,
// the reverse. Elements are named by query and key, 0 ... 3 each, of the thread's patch.
template <typename T, bool matrix_units, bool keys_first>
struct RefractoryTile {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units, false>;
  using Head = RefractoryHead<T>;
  using Values = C[kPatch][kPatch];
  // With keys first and matrix units two blocks share a multiprocessor if p waits in shared memory.
  static constexpr bool kParks = keys_first && matrix_units;
  static constexpr size_t kBytes =  // beyond the products'
      (keys_first ? kParks * kTile : kAcross + 1) * kTile * sizeof(C);

  Products products;
  C* totals;      // [warps, kTile]: sums over a warp's queries; or units of rows, or what is parked
  C* row_values;  // [kTile]: for the kernel's own use
  int queries = 0, keys = 0;

  __device__ __forceinline__ RefractoryTile()
      : totals(reinterpret_cast<C*>(shared_memory<unsigned char>() + Products::kBytes)),
        row_values(totals + kAcross * kTile) {}

  static __device__ __forceinline__ int first_query() {
    return keys_first ? patch_column() : patch_row();
  }
  static __device__ __forceinline__ int first_key() {
    return keys_first ? patch_row() : patch_column();
  }
  static __device__ __forceinline__ C& at(Values& values, int q, int k) {
    return keys_first ? values[k][q] : values[q][k];
  }
  __device__ __forceinline__ int query(int q) const { return queries + first_query() + q; }
  __device__ __forceinline__ int key(int k) const { return keys + first_key() + k; }

  // values = products of rows of a, which belong to queries, with rows of b, which belong to keys.
  __device__ __forceinline__ void rows(const AttentionRows<T>& a, const AttentionRows<T>& b,
                                       Values& values) {
    if (keys_first) {
      products.rows(b, keys, a, queries, values);
    } else {
      products.rows(a, queries, b, keys, values);
    }
  }

  // The probabilities; 0 where nothing is seen.
  __device__ __forceinline__ void probabilities(const Head& head, Values& p) {
    // The addresses of the queries' rows, kept from one tile of keys to the next, would take
    // registers that the patches need.
    queries = in_place(queries);
    rows(head.query, head.key, p);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const AttentionRowStats<C> stats(head, query(q));
      const int last = head.last_key(query(q));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        C& value = at(p, q, k);
        value = key(k) <= last ? stats.probability(head, value) : C(0);
      }
    }
  }

  // sums = `start` of the key + values over the tile's queries up to each one, or from it on.
  // Barriers must part it from other uses of `totals`; products bring them.
  template <bool from>
  __device__ __forceinline__ void scan(Values& values, const C (&start)[kPatch], Values& sums) {
    C others[kPatch];
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      C sum = 0;
#pragma unroll
      for (int n = 0; n < kPatch; ++n) {
        const int q = from ? kPatch - 1 - n : n;
        sum += at(values, q, k);
        at(sums, q, k) = sum;
      }
      others[k] = sum;
    }
    const int group = first_query() / kPatch;
    if constexpr (keys_first) {
      // The keys' sums lie in 16 lanes: moved on by one lane, they are added up.
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        others[k] = preceding<from>(others[k], group, 1);
#pragma unroll
        for (int offset = 1; offset < kAcross; offset *= 2) {
          others[k] += preceding<from>(others[k], group, offset);
        }
      }
    } else {
      total_warps(others);
      const bool second = group % 2 == (from ? 0 : 1);
#pragma unroll
      for (int k = 0; k < kPatch; ++k) others[k] = second ? others[k] : C(0);
      __syncthreads();
      const int warp = group / 2;
      for (int w = from ? warp + 1 : 0; w < (from ? kWarps : warp); ++w) {
        const auto pack =
            *reinterpret_cast<const Pack<C, kPatch>*>(totals + w * kTile + first_key());
#pragma unroll
        for (int k = 0; k < kPatch; ++k) others[k] += pack.values[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
#pragma unroll
      for (int q = 0; q < kPatch; ++q) at(sums, q, k) += start[k] + others[k];
    }
  }

  // Writes the sums over each `block` of the tile's queries to rows of `to`, one for each key that
  // there is. `totals` as in scan().
  __device__ __forceinline__ void sum_queries(const RefractoryLifAttentionParams& p, Values& values,
                                              C* to, int block = kTile) {
    C sums[kPatch];
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      sums[k] = 0;
#pragma unroll
      for (int q = 0; q < kPatch; ++q) sums[k] += at(values, q, k);
    }
    total_warps(sums);
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column >= kTile || keys + column >= int(p.keys)) return;
    constexpr int kQueries = kTile / kWarps;  // of a warp
    for (int first = 0; first < kTile && queries + first < int(p.queries); first += block) {
      C sum = 0;
      for (int w = 0; w < block / kQueries; ++w) {
        sum += totals[(first / kQueries + w) * kTile + column];
      }
      to[keys + column] = sum;
      to += p.keys;
    }
  }

  // Writes the tile to `to` [B, Q, K].
  __device__ __forceinline__ void store_pairs(const RefractoryLifAttentionParams& p, int batch,
                                              Values& values, C* to) const {
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        const int i = query(q), j = key(k);
        if (i >= int(p.queries) || j >= int(p.keys)) continue;
        to[(batch * p.queries + i) * p.keys + j] = at(values, q, k);
      }
    }
  }

  // Puts a patch aside, and takes it back.
  __device__ __forceinline__ void park(const Values& values) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      Pack<C, kPatch> row;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) row.values[c] = values[r][c];
      parked()[r * kAttentionThreads] = row;
    }
  }
  __device__ __forceinline__ void unpark(Values& values) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const Pack<C, kPatch> row = parked()[r * kAttentionThreads];
#pragma unroll
      for (int c = 0; c < kPatch; ++c) values[r][c] = row.values[c];
    }
  }

  // products.add_tile() for sums over many tiles. In registers each tile's is made by itself: over
  // the queries of all heads of a group, one sum would gather rounding errors.
  template <bool scaled = false>
  __device__ __forceinline__ void add_apart(const AttentionRows<T>& b, int first, int column,
                                            typename Products::Result& sums) {
    if constexpr (std::is_same<Products, RegisterProducts<T, false>>::value) {
      typename Products::Result product;
      products.add_tile(b, first, column, product);
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) sums.values[r][c] += product.values[r][c];
      }
    } else {
      products.template add_tile<scaled>(b, first, column, sums);
    }
  }

  // The loads of the elements whose probabilities are `p`.
  __device__ __forceinline__ void loads(const Head& head, Values& p, Values& load) {
    C start[kPatch];
    head.read_block(static_cast<const C*>(head.r.block_loads), int(head.r.block), queries, key(0),
                    start);
    if (head.r.look_ahead) {
#pragma unroll
      for (int q = 0; q < kPatch; ++q) {
#pragma unroll
        for (int k = 0; k < kPatch; ++k) at(load, q, k) = start[k];
      }
    } else {
      scan<false>(p, start, load);
    }
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const C inverse = quotient(C(1), head.count(query(q)));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) at(load, q, k) *= inverse;
    }
  }

  // Their thresholds.
  __device__ __forceinline__ void thresholds(const Head& head, Values& p, Values& threshold) {
    loads(head, p, threshold);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      C previous[kPatch];
      head.previous_loads(query(q), key(0), previous);
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        at(threshold, q, k) = head.threshold_at(at(threshold, q, k), previous[k]);
      }
    }
  }

  // What the weights' gradients are made of, t = M (grad_out . v) + a / H; 0 where nothing is seen.
  __device__ __forceinline__ void through_weights(const Head& head,
                                                  const AttentionRows<T>& grad_out, const C* above,
                                                  Values& t) {
    rows(grad_out, head.value, t);
    const int64_t rows_above = head.r.look_ahead ? 1 : head.r.queries;
    const C share = C(1) / C(head.r.heads);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const int i = query(q), last = head.last_key(i);
      const int64_t row = head.batch * rows_above + (head.r.look_ahead ? 0 : head.existing(i));
      bool kept[kPatch];
      head.dropout(i, key(0), kept);
      C through_load[kPatch];
      read_keys(above + row * head.r.keys, key(0), int(head.r.keys), through_load);
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        C& value = at(t, q, k);
        const C through_value = kept[k] ? value * head.keep_factor : C(0);
        value = key(k) <= last ? through_value + through_load[k] * share : C(0);
      }
    }
  }

  // The gradients of w = p g.
  __device__ __forceinline__ void weight_gradients(const Head& head,
                                                   const AttentionRows<T>& grad_out,
                                                   const RefractoryScratch<C>& scratch, Values& t) {
    through_weights(head, grad_out, scratch.above, t);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const int i = head.existing(query(q));
      const C delta = scratch.row_sums[head.row(i)];
      const C inverse = AttentionRowStats<C>(head, i).inverse_weight_sum;
#pragma unroll
      for (int k = 0; k < kPatch; ++k) at(t, q, k) = (at(t, q, k) - delta) * inverse;
    }
  }

  // The threshold's gradient, 0 where nothing is seen.
  __device__ __forceinline__ C tau(const Head& head, const GatedProbability<C>& gate,
                                   C grad_weight) const {
    return gate.p == 0 ? C(0)
                       : grad_weight * gate_dy_dthreshold(gate.p, head.steepness, gate.slope);
  }

  // From the gradients of w in `t` those of p: h d w + c, where c is that of `ends` where the tile
  // ends and what the tile adds to it. The thresholds are lost.
  __device__ __forceinline__ void probability_gradients(const Head& head, const C* ends, Values& p,
                                                        Values& threshold, Values& t) {
    C end[kPatch];
    head.read_block(ends, kTile, queries, key(0), end);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const C factor = quotient(head.within, head.count(query(q)));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        const GatedProbability<C> gate(head, at(p, q, k), at(threshold, q, k));
        at(threshold, q, k) = factor * tau(head, gate, at(t, q, k));
        at(t, q, k) *= gate.derivative;
      }
    }
    if (!head.r.look_ahead) scan<true>(threshold, end, threshold);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        at(t, q, k) += head.r.look_ahead ? end[k] : at(threshold, q, k);
      }
    }
  }

 private:
  static constexpr int kWarps = kAttentionThreads / kWarp;

  __device__ __forceinline__ Pack<C, kPatch>* parked() const {
    return reinterpret_cast<Pack<C, kPatch>*>(totals) + threadIdx.x;
  }

  // The value of the lane that has the keys of this one, one of 16, and the queries `offset` groups
  // before, or with `from` after, its own; 0 if there is none.
  template <bool from>
  static __device__ __forceinline__ C preceding(C value, int group, int offset) {
    const int source = from ? group + offset : group - offset;
    const C other = __shfl_sync(kAllLanes, value, source, kAcross);
    return source >= 0 && source < kAcross ? other : C(0);
  }

  // totals = sums over each warp of what its threads have for their keys; they get what the warp's
  // other half has.
  __device__ __forceinline__ void total_warps(C (&sums)[kPatch]) {
    Pack<C, kPatch> pack;
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      const C other = __shfl_xor_sync(kAllLanes, sums[k], kAcross);
      pack.values[k] = sums[k] + other;
      sums[k] = other;
    }
    if (threadIdx.x % kWarp >= kAcross) return;
    *reinterpret_cast<Pack<C, kPatch>*>(totals + threadIdx.x / kWarp * kTile + first_key()) = pack;
  }
};

// Blocks that share a multiprocessor if 128 registers a thread are enough. Compiled for some GPUs
// kernels would spill a few bytes: there one block has more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostRefractoryBlocks = 1;
#else
constexpr int kMostRefractoryBlocks = kMostBlocks;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900
constexpr int kMostPreviousBlocks = 1;
#else
constexpr int kMostPreviousBlocks = kMostBlocks;
#endif
template <typename T>
constexpr int refractory_blocks(int most) {
  return sizeof(T) == 8 ? 1 : most;
}

// Sums over queries for 32 keys, one to a lane; each warp takes its part of the `count` queries.
// Calls put(n, sum) with the sum of `start` and of value(0 ... n), and returns the sum of all to
// the last warp.
template <typename C, typename Value, typename Put>
__device__ __forceinline__ C scan_queries(int count, C start, const Value& value, const Put& put) {
  constexpr int kParts = kAttentionThreads / kWarp, kAhead = 8;
  C* const totals = shared_memory<C>();
  const int part = int(threadIdx.x) / kWarp, most = int(ceil_div(count, kParts));
  const int begin = part * most, end = begin + most < count ? begin + most : count;
  C sum = 0;
#pragma unroll kAhead
  for (int n = begin; n < end; ++n) sum += value(n);
  totals[threadIdx.x] = sum;
  __syncthreads();
  sum = start;
  for (int w = 0; w < part; ++w) sum += totals[w * kWarp + int(threadIdx.x) % kWarp];
  for (int first = begin; first < end; first += kAhead) {
    // put() may overwrite what value() reads, so that only by hand do loads run ahead.
    C values[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) values[n] = first + n < end ? value(first + n) : C(0);
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      sum += values[n];
      if (first + n < end) put(first + n, sum);
    }
  }
  return sum;
}

// The key of all in the batch that scan_queries() gives the thread, and whether it is of the last
// warp.
__device__ __forceinline__ int64_t scanned_key() {
  return int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
}
__device__ __forceinline__ bool has_all_queries() {
  return int(threadIdx.x) >= kAttentionThreads - kWarp;
}

// Launch bounds of kernels that work on tiles, and of others.
#define EMBER_REFRACTORY_TILES(blocks) __global__ void __launch_bounds__(kAttentionThreads, blocks)
#define EMBER_REFRACTORY_KERNEL __global__ void __launch_bounds__(kAttentionThreads, 1)

}  // namespace cuda
}  // namespace ember
