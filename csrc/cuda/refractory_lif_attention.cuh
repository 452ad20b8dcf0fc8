// Refractory LIF attention on a GPU; common/refractory_lif_attention.h says what it computes.
//
// Tiles of 64 queries and 64 keys, like lif_attention.cuh, and with the same products. The sums
// over earlier queries, in hand where blocks could walk the queries in order, are here made in two
// steps, so that all tiles of queries run at once: sums over each tile, one thread for each key
// that adds the tiles up in order, and then, wherever a tile is worked on again, sums within it
// from where it begins. Nothing that has a row for each query and key is stored for a head: a
// tile's scores, loads and thresholds are computed again in every kernel that needs them. What sums
// over heads or is asked for as a result, [B, Q, K], is stored.
//
//   forward    rows     statistics of the rows, sums of p over tiles of queries
//              scan     P where tiles begin and at the end
//              out      the output, and 1 / R
//              weights  mean over heads of u;  next_load  its sums over queries
//   backward   above    a, the gradient of u from the loads
//              rows     delta, sums of tau over tiles, the gates' gradients, and of E = sum_j p dp
//                       all but sum_j p c with c where tiles end
//              scan     c where tiles end
//              queries  E, grad_query
//              keys     grad_key, grad_value;  previous  grad_previous_load
#pragma once

#include "../common/refractory_lif_attention.h"
#include "lif_attention.cuh"

namespace ember {
namespace cuda {

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

  // Of an array [B, H, tiles of queries, K], or [B, H, 1, K] with look_ahead: the keys j ... j + 3.
  __device__ __forceinline__ void read_tile(const C* array, int tile, int j,
                                            C (&values)[kPatch]) const {
    const int64_t pair = int64_t(this->batch) * r.heads + this->head;
    const int64_t row = r.look_ahead ? pair : pair * attention_tiles(r.queries) + tile;
    read_keys(array + row * r.keys, j, int(r.keys), values);
  }
};

// A tile: its scores' patches have queries for rows and keys for columns, or, with `keys_first`,
// the reverse. Elements are named by query and key, 0 ... 3 each, of the thread's patch.
template <typename T, bool matrix_units, bool keys_first>
struct RefractoryTile {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units>;
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

  // Writes the sums over the tile's queries to `to`, one for each key that there is. `totals` as in
  // scan().
  __device__ __forceinline__ void sum_queries(const RefractoryLifAttentionParams& p, Values& values,
                                              C* to) {
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
    if (column < kTile && keys + column < int(p.keys)) {
      C sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += totals[w * kTile + column];
      to[keys + column] = sum;
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
    if constexpr (std::is_same<Products, AttentionProducts<T, false>>::value) {
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
    head.read_tile(static_cast<const C*>(head.r.block_loads), queries / kTile, key(0), start);
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
    head.read_tile(ends, queries / kTile, key(0), end);
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

// Launch bounds of kernels that work on tiles, and of others.
#define EMBER_REFRACTORY_TILES(blocks) __global__ void __launch_bounds__(kAttentionThreads, blocks)
#define EMBER_REFRACTORY_KERNEL __global__ void __launch_bounds__(kAttentionThreads, 1)

// Grid: batch x heads x tiles of queries. Writes two of row_stats, and the sums of p over the
// queries of the tile to `sums` [B, H, tiles of queries, K].
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(kMostRefractoryBlocks))
refractory_lif_attention_rows_kernel(RefractoryLifAttentionParams p, compute_t<T>* sums) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  const int index = block.next(attention_tiles(p.queries)), first = index * kTile;
  const int head_index = block.next(p.heads);
  const RefractoryHead<T> head(p, {}, int(block.rest), head_index);
  const int end = head.end_of_keys(first + kTile - 1);

  C largest[kPatch], inverse_sum[kPatch];
  row_maxima(tile.products, head, first, end, largest, inverse_sum);
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const int row = first + patch_row() + r;
    if (patch_column() > 0 || row >= int(p.queries)) continue;
    C* stats = static_cast<C*>(p.row_stats) + head.row(row);
    stats[0] = largest[r];
    stats[p.batch * p.heads * p.queries] = inverse_sum[r];
  }
  __syncthreads();

  C* to =
      sums +
      ((int64_t(head.batch) * p.heads + head.head) * attention_tiles(p.queries) + index) * p.keys;
  C values[kPatch][kPatch];
  tile.queries = first;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.sum_queries(p, values, to);
  }
  for (int j = tile.keys + int(threadIdx.x); j < int(p.keys); j += kAttentionThreads) to[j] = 0;
}

// Grid: as many threads as there are keys in all heads. From sums of p over tiles of queries: P
// where each begins, and at the end.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_scan_kernel(RefractoryLifAttentionParams p,
                                                             const C* sums) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.heads * p.keys) return;
  const int64_t pair = index / p.keys, j = index % p.keys, earlier = p.keys - p.queries;
  const int64_t tiles = attention_tiles(p.queries);
  C* loads = static_cast<C*>(p.block_loads);
  C sum = 0;
  if (p.past_probabilities && j < earlier) {
    sum = static_cast<const C*>(p.past_probabilities)[pair * earlier + j];
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t element = (pair * tiles + tile) * p.keys + j;
    const C more = sums[element];
    if (!p.look_ahead) loads[element] = sum;
    sum += more;
  }
  if (p.look_ahead) loads[index] = sum;
  static_cast<C*>(p.probabilities)[index] = sum;
}

// Grid: batch x heads x tiles of queries x 64 columns. Writes the output and the last of row_stats.
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(kMostRefractoryBlocks))
refractory_lif_attention_out_kernel(RefractoryLifAttentionParams p, AttentionDropout keep) {
  using C = compute_t<T>;
  using Tile = RefractoryTile<T, matrix_units, false>;
  using Products = typename Tile::Products;
  Tile tile;
  AttentionBlock block;
  const int columns = int(attention_columns(p));
  const int column = block.next(columns) * kTile;
  const int first = block.next(attention_tiles(p.queries)) * kTile;
  const int head_index = block.next(p.heads);
  const RefractoryHead<T> head(p, keep, int(block.rest), head_index);
  const int end = head.end_of_keys(first + kTile - 1), row = first + patch_row();

  C sum[kPatch] = {}, rounded_sum[kPatch] = {}, units[kPatch];
  C values[kPatch][kPatch], threshold[kPatch][kPatch];
  typename Products::Result weighted;
  tile.queries = first;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.thresholds(head, values, threshold);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        values[r][c] *= GatedProbability<C>(head, values[r][c], threshold[r][c]).gate;
        sum[r] += values[r][c];
      }
    }
    __syncthreads();  // scale_rows() writes what the loads were summed up in
    // Thresholds differ from key to key: no bound on a row's weights is known before its end.
    Products::scale_rows(values, tile.totals, units);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      bool kept[kPatch];
      head.dropout(row + r, tile.key(0), kept);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const C weight = Products::rounded(values[r][c]);
        rounded_sum[r] += weight * units[r];
        values[r][c] = kept[c] ? weight : C(0);
      }
    }
    tile.products.store(values);
    tile.products.add_scaled_rows(head.value, tile.keys, column, tile.totals, weighted);
  }
  tile.products.read(weighted, values);
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C total = across_columns<Sum>(sum[r]), rounded = across_columns<Sum>(rounded_sum[r]);
    const C inverse_sum = AttentionRowStats<C>(head, row + r).inverse_sum;
    const C factor = inverse_sum == 0 ? C(0) : C(1) / (rounded + C(p.eps)) * head.keep_factor;
#pragma unroll
    for (int c = 0; c < kPatch; ++c) values[r][c] *= factor;
    if (column == 0 && patch_column() == 0 && row + r < int(p.queries)) {
      static_cast<C*>(p.row_stats)[2 * p.batch * p.heads * p.queries + head.row(row + r)] =
          inverse_sum == 0 ? C(0) : C(1) / (total + C(p.eps));
    }
  }
  store_patch<T>(p.out, head.batch, head.head, row, p.queries, column + patch_column(), p.size,
                 values);
}

// Grid: batch x tiles of queries x tiles of keys. The mean of u over heads, to next_load, or with
// look_ahead its sums over the tile's queries to `sums` [B, tiles of queries, K].
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(kMostRefractoryBlocks))
refractory_lif_attention_weights_kernel(RefractoryLifAttentionParams p, compute_t<T>* sums) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  tile.keys = block.next(attention_tiles(p.keys)) * kTile;
  const int64_t tiles = attention_tiles(p.queries);
  const int index = block.next(tiles), batch = int(block.rest);
  tile.queries = index * kTile;

  C values[kPatch][kPatch], threshold[kPatch][kPatch], mean[kPatch][kPatch] = {};
  const C share = C(1) / C(p.heads);
  for (int h = 0; h < int(p.heads); ++h) {
    const RefractoryHead<T> head(p, {}, batch, h);
    if (tile.keys >= head.end_of_keys(tile.queries + kTile - 1)) break;
    tile.probabilities(head, values);
    tile.thresholds(head, values, threshold);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const C factor = AttentionRowStats<C>(head, tile.query(r)).inverse_weight_sum * share;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated(head, values[r][c], threshold[r][c]);
        mean[r][c] += gated.p * gated.gate * factor;
      }
    }
  }
  if (p.look_ahead) {
    tile.sum_queries(p, mean, sums + (batch * tiles + index) * p.keys);
    return;
  }
  tile.store_pairs(p, batch, mean, static_cast<C*>(p.next_load));
}

// Sums over queries for 32 keys, one to a lane; each warp takes its part of the `count` queries.
// Hands put(n, sum of `start` and of value(0 ... n)) out, and returns to the last warp the sum of
// all.
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

// Grid: a block for each 32 keys in the batch. From the mean of u, in next_load or `sums`:
// next_load and weights.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_next_load_kernel(RefractoryLifAttentionParams p,
                                                                  const C* sums) {
  const int64_t index = scanned_key(), earlier = p.keys - p.queries;
  const bool exists = index < p.batch * p.keys;
  const int64_t batch = index / p.keys, j = index % p.keys;
  C* const next_load = static_cast<C*>(p.next_load);
  C start = 0;
  if (exists && p.past_weights && j < earlier) {
    start = static_cast<const C*>(p.past_weights)[batch * earlier + j];
  }
  const int count = int(p.look_ahead ? attention_tiles(p.queries) : p.queries);
  const int64_t first = batch * count * p.keys + j;
  const C* const from = (p.look_ahead ? sums : next_load) + first;
  const C sum = scan_queries(
      exists ? count : 0, start, [&](int i) { return from[i * p.keys]; },
      [&](int i, C sum) {
        if (!p.look_ahead) next_load[first + i * p.keys] = sum / C(earlier + i + 1);
      });
  if (!exists || !has_all_queries()) return;
  if (p.look_ahead) next_load[index] = sum / C(p.queries);
  static_cast<C*>(p.weights)[index] = sum;
}

// Grid: as next_load. Writes `above` [B, rows, K], and the gradient of past_weights.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_above_kernel(RefractoryLifAttentionParams p,
                                                              C* above) {
  const int64_t index = scanned_key(), earlier = p.keys - p.queries;
  const bool exists = index < p.batch * p.keys;
  const int64_t batch = index / p.keys, j = index % p.keys;
  const C* const gradient = static_cast<const C*>(p.grad_next_load);
  const C start = exists && p.grad_weights ? static_cast<const C*>(p.grad_weights)[index] : C(0);
  if (p.look_ahead) {
    if (!exists || !has_all_queries()) return;
    above[index] = start + (gradient ? gradient[index] / C(p.queries) : C(0));
    return;
  }
  // From the last query back.
  const int64_t last = (batch * p.queries + p.queries - 1) * p.keys + j;
  const C sum = scan_queries(
      exists ? int(p.queries) : 0, start,
      [&](int n) { return gradient ? gradient[last - n * p.keys] / C(p.keys - n) : C(0); },
      [&](int n, C sum) { above[last - n * p.keys] = sum; });
  if (exists && has_all_queries() && p.grad_past_weights && j < earlier) {
    static_cast<C*>(p.grad_past_weights)[batch * earlier + j] = sum;
  }
}

// Grid: batch x heads x tiles of queries. Writes delta, E without what comes from c where the tile
// ends, the sums of tau / n over the tile's queries, and the gates' gradients.
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(sizeof(T) == 2 ? kMostBlocks : kMostRefractoryBlocks))
refractory_lif_attention_backward_rows_kernel(RefractoryLifAttentionParams p, AttentionDropout keep,
                                              RefractoryScratch<compute_t<T>> scratch) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  const int tiles = int(attention_tiles(p.queries)), index = block.next(tiles);
  const int head_index = block.next(p.heads);
  const RefractoryHead<T> head(p, keep, int(block.rest), head_index);
  const AttentionRows<T> grad_out(p.grad_out, head.batch, head.head, p.queries, p.size);
  tile.queries = index * kTile;
  const int end = head.end_of_keys(tile.queries + kTile - 1);

  C values[kPatch][kPatch], load[kPatch][kPatch], t[kPatch][kPatch];
  C delta[kPatch] = {}, mean[kPatch] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.thresholds(head, values, load);
    tile.through_weights(head, grad_out, scratch.above, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated(head, values[r][c], load[r][c]);
        delta[r] += gated.p * gated.gate * t[r][c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const int i = tile.query(r);
    const C sum = across_columns<Sum>(delta[r]);
    if (patch_column() == 0 && i < int(p.queries)) {
      scratch.row_sums[head.row(i)] = sum * AttentionRowStats<C>(head, i).inverse_weight_sum;
    }
  }
  __syncthreads();

  const int64_t pair = int64_t(head.batch) * p.heads + head.head;
  const auto to = [&] { return scratch.sums + (pair * tiles + tile.queries / kTile) * p.keys; };
  double gates[3] = {}, couplings[3] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    // With matrix units two blocks share a multiprocessor if t comes first: then no patch but it
    // waits while products are made.
    if constexpr (matrix_units) tile.weight_gradients(head, grad_out, scratch, t);
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    if constexpr (!matrix_units) tile.weight_gradients(head, grad_out, scratch, t);
    C tile_gates[3] = {}, tile_couplings[2] = {};
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const C inverse_count = quotient(C(1), head.count(tile.query(r)));
      C previous[kPatch];
      head.previous_loads(tile.query(r), tile.key(0), previous);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const C threshold = head.threshold_at(load[r][c], previous[c]);
        const GatedProbability<C> gated(head, values[r][c], threshold);
        const C tau = tile.tau(head, gated, t[r][c]);
        if (gated.p != 0) {
          tile_gates[0] += tau;
          tile_gates[1] += t[r][c] * gated.p * gated.smoulder;
          tile_gates[2] += t[r][c] * gate_dy_dsteepness(gated.p, gated.p, threshold, gated.slope);
          tile_couplings[0] += tau * load[r][c];
          tile_couplings[1] += tau * previous[c];
          mean[r] += gated.p * gated.derivative * t[r][c];
        }
        load[r][c] = tau * inverse_count;
      }
    }
#pragma unroll
    for (int n = 0; n < 3; ++n) gates[n] += double(tile_gates[n]);
#pragma unroll
    for (int n = 0; n < 2; ++n) couplings[n] += double(tile_couplings[n]);
    // No product parts it from the sums that the loads were made of.
    if constexpr (matrix_units) __syncthreads();
    tile.template scan<true>(load, {}, load);
    // With look_ahead c is the same for all queries, and none of it comes from within the tile.
    const C within = p.look_ahead ? C(0) : head.within;
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      if (patch_row() == 0 && tile.key(c) < int(p.keys)) to()[tile.key(c)] = load[0][c];
#pragma unroll
      for (int r = 0; r < kPatch; ++r) mean[r] += values[r][c] * (within * load[r][c]);
    }
  }
  for (int j = tile.keys + int(threadIdx.x); j < int(p.keys); j += kAttentionThreads) to()[j] = 0;
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const int i = tile.query(r);
    const C sum = across_columns<Sum>(mean[r]);
    if (patch_column() == 0 && i < int(p.queries)) {
      scratch.row_sums[p.batch * p.heads * p.queries + head.row(i)] = sum;
    }
  }
  __syncthreads();
  const Team<double> team{kAttentionThreads, shared_memory<double>()};
  team.template reduce<Sum>(gates);
  team.template reduce<Sum>(couplings);
  if (threadIdx.x > 0) return;
  double* partial = scratch.gates + (pair * tiles + index) * 5;
  for (int n = 0; n < 3; ++n) partial[n] = gates[n];
  for (int n = 0; n < 2; ++n) partial[3 + n] = couplings[n];
}

// Grid: as many threads as there are keys in all heads. From sums of tau / n over tiles of queries,
// c where each tile ends, which may take their place; with look_ahead c, [B, H, 1, K].
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_backward_scan_kernel(
    RefractoryLifAttentionParams p, const C* sums, C* ends) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.heads * p.keys) return;
  const int64_t pair = index / p.keys, j = index % p.keys, earlier = p.keys - p.queries;
  const int64_t tiles = attention_tiles(p.queries);
  const C within = static_cast<const C*>(p.within)[pair % p.heads];
  C sum = p.grad_probabilities ? static_cast<const C*>(p.grad_probabilities)[index] : C(0);
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t element = (pair * tiles + tile) * p.keys + j;
    const C more = sums[element];
    if (!p.look_ahead) ends[element] = sum;
    sum += within * more;
  }
  if (p.look_ahead) ends[index] = sum;
  if (p.grad_past_probabilities && j < earlier) {
    static_cast<C*>(p.grad_past_probabilities)[pair * earlier + j] = sum;
  }
}

// Grid: batch x heads x tiles of queries x 64 columns. Writes E and grad_query.
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(kMostRefractoryBlocks))
refractory_lif_attention_backward_queries_kernel(RefractoryLifAttentionParams p,
                                                 AttentionDropout keep,
                                                 RefractoryScratch<compute_t<T>> scratch) {
  using C = compute_t<T>;
  using Tile = RefractoryTile<T, matrix_units, false>;
  Tile tile;
  AttentionBlock block;
  const int columns = int(attention_columns(p));
  const int column = block.next(columns) * kTile;
  tile.queries = block.next(attention_tiles(p.queries)) * kTile;
  const int head_index = block.next(p.heads);
  const RefractoryHead<T> head(p, keep, int(block.rest), head_index);
  const AttentionRows<T> grad_out(p.grad_out, head.batch, head.head, p.queries, p.size);
  const int end = head.end_of_keys(tile.queries + kTile - 1);

  C values[kPatch][kPatch], threshold[kPatch][kPatch], t[kPatch][kPatch];
  C mean[kPatch] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    C ending[kPatch];
    head.read_tile(scratch.ends, tile.queries / kTile, tile.key(0), ending);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) mean[r] += values[r][c] * ending[c];
    }
  }
  const int64_t rows = p.batch * p.heads * p.queries;
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const int i = tile.query(r);
    const C sum =
        across_columns<Sum>(mean[r]) + scratch.row_sums[rows + head.row(head.existing(i))];
    if (patch_column() > 0) continue;
    tile.row_values[patch_row() + r] = sum;
    if (column == 0 && i < int(p.queries)) scratch.row_sums[2 * rows + head.row(i)] = sum;
  }
  __syncthreads();

  typename Tile::Products::Result weighted;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.thresholds(head, values, threshold);
    tile.weight_gradients(head, grad_out, scratch, t);
    tile.probability_gradients(head, scratch.ends, values, threshold, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const C sum = tile.row_values[patch_row() + r];
#pragma unroll
      for (int c = 0; c < kPatch; ++c) values[r][c] *= t[r][c] - sum;
    }
    tile.products.store_scaled(values);
    tile.products.template add_tile<true>(head.key, tile.keys, column, weighted);
  }
  tile.products.read(weighted, values);
  scale_patch(values, head.scale);
  store_patch<T>(p.grad_query, head.batch, head.head, tile.query(0), p.queries,
                 column + patch_column(), p.size, values);
}

// Grid: batch x groups x tiles of keys x 64 columns. Writes grad_key or grad_value, or both: in
// fp64 there are not the registers for two results, in fp32 not those for two blocks.
template <typename T, bool matrix_units, bool for_key, bool for_value>
EMBER_REFRACTORY_TILES(matrix_units ? kMostRefractoryBlocks : 1)
refractory_lif_attention_backward_keys_kernel(RefractoryLifAttentionParams p, AttentionDropout keep,
                                              RefractoryScratch<compute_t<T>> scratch) {
  using C = compute_t<T>;
  using Tile = RefractoryTile<T, matrix_units, true>;
  Tile tile;
  AttentionBlock block;
  const int columns = int(attention_columns(p));
  const int column = block.next(columns) * kTile;
  tile.keys = block.next(attention_tiles(p.keys)) * kTile;
  const int group = block.next(p.groups), batch = int(block.rest);
  const int heads = int(unsigned(p.heads) / unsigned(p.groups));
  // Queries before this one do not see the tile.
  const int later = int(p.keys) - int(p.queries);
  const int begin = tile.keys > later ? tile.keys - later : 0;

  C values[kPatch][kPatch], threshold[kPatch][kPatch], t[kPatch][kPatch];
  typename Tile::Products::Result weighted_query, weighted_grad;
  for (int h = group * heads; h < (group + 1) * heads; ++h) {
    const RefractoryHead<T> head(p, keep, batch, h);
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    for (tile.queries = begin / kTile * kTile; tile.queries < int(p.queries);
         tile.queries += kTile) {
      tile.probabilities(head, values);
      tile.thresholds(head, values, threshold);
      if constexpr (for_value) {
#pragma unroll
        for (int q = 0; q < kPatch; ++q) {
          const C inverse = AttentionRowStats<C>(head, tile.query(q)).inverse_weight_sum;
          bool kept[kPatch];
          head.dropout(tile.query(q), tile.key(0), kept);
#pragma unroll
          for (int k = 0; k < kPatch; ++k) {
            const GatedProbability<C> gated(head, values[k][q], threshold[k][q]);
            t[k][q] = kept[k] ? gated.p * gated.gate * inverse : C(0);
          }
        }
        if constexpr (Tile::kParks) tile.park(values);
        tile.products.store(t);
        tile.add_apart(grad_out, tile.queries, column, weighted_grad);
      }
      if constexpr (for_key) {
        tile.weight_gradients(head, grad_out, scratch, t);
        if constexpr (for_value && Tile::kParks) tile.unpark(values);
        tile.probability_gradients(head, scratch.ends, values, threshold, t);
#pragma unroll
        for (int q = 0; q < kPatch; ++q) {
          const int i = head.existing(tile.query(q));
          const C mean = scratch.row_sums[2 * p.batch * p.heads * p.queries + head.row(i)];
#pragma unroll
          for (int k = 0; k < kPatch; ++k) values[k][q] *= t[k][q] - mean;
        }
        tile.products.store_scaled(values);
        tile.template add_apart<true>(head.query, tile.queries, column, weighted_query);
      }
    }
  }
  if constexpr (for_key) {
    tile.products.read(weighted_query, values);
    scale_patch(values, C(p.scale));
    store_patch<T>(p.grad_key, batch, group, tile.key(0), p.keys, column + patch_column(), p.size,
                   values);
  }
  if constexpr (for_value) {
    tile.products.read(weighted_grad, values);
    scale_patch(values, C(keep.factor));
    store_patch<T>(p.grad_value, batch, group, tile.key(0), p.keys, column + patch_column(), p.size,
                   values);
  }
}

// Grid: batch x tiles of queries x tiles of keys. Writes grad_previous_load, or, if that has one
// row for all queries, its sums over the tile's to `scratch.mean_sums`.
template <typename T, bool matrix_units>
EMBER_REFRACTORY_TILES(refractory_blocks<T>(kMostPreviousBlocks))
refractory_lif_attention_previous_kernel(RefractoryLifAttentionParams p, AttentionDropout keep,
                                         RefractoryScratch<compute_t<T>> scratch) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  tile.keys = block.next(attention_tiles(p.keys)) * kTile;
  const int64_t tiles = attention_tiles(p.queries);
  const int index = block.next(tiles), batch = int(block.rest);
  tile.queries = index * kTile;

  C values[kPatch][kPatch], threshold[kPatch][kPatch], t[kPatch][kPatch];
  C sum[kPatch][kPatch] = {};
  for (int h = 0; h < int(p.heads); ++h) {
    const RefractoryHead<T> head(p, keep, batch, h);
    if (tile.keys >= head.end_of_keys(tile.queries + kTile - 1)) break;
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    tile.probabilities(head, values);
    tile.thresholds(head, values, threshold);
    tile.weight_gradients(head, grad_out, scratch, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated(head, values[r][c], threshold[r][c]);
        sum[r][c] += head.across * tile.tau(head, gated, t[r][c]);
      }
    }
  }
  if (p.one_previous_row) {
    tile.sum_queries(p, sum, scratch.mean_sums + (batch * tiles + index) * p.keys);
    return;
  }
  tile.store_pairs(p, batch, sum, static_cast<C*>(p.grad_previous_load));
}

// Grid: as many threads as there are keys in the batch. grad_previous_load [B, 1, K] from sums over
// tiles of queries, [B, tiles, K].
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_sum_previous_kernel(RefractoryLifAttentionParams p,
                                                                     const C* sums) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.keys) return;
  const int64_t batch = index / p.keys, j = index % p.keys, tiles = attention_tiles(p.queries);
  C sum = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[(batch * tiles + tile) * p.keys + j];
  static_cast<C*>(p.grad_previous_load)[index] = sum;
}

// Grid: heads. grad_gates [5, H] from partials [B, H, tiles, 5].
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_sum_gates_kernel(RefractoryLifAttentionParams p,
                                                                  const double* partials) {
  const int64_t tiles = attention_tiles(p.queries), head = blockIdx.x;
  double gates[3] = {}, couplings[3] = {};
  for (int64_t n = threadIdx.x; n < p.batch * tiles; n += kAttentionThreads) {
    const double* from = partials + ((n / tiles * p.heads + head) * tiles + n % tiles) * 5;
    for (int k = 0; k < 3; ++k) gates[k] += from[k];
    for (int k = 0; k < 2; ++k) couplings[k] += from[3 + k];
  }
  const Team<double> team{kAttentionThreads, shared_memory<double>()};
  team.template reduce<Sum>(gates);
  team.template reduce<Sum>(couplings);
  if (threadIdx.x > 0) return;
  C* to = static_cast<C*>(p.grad_gates) + head;
  for (int k = 0; k < 3; ++k) to[k * p.heads] = C(gates[k]);
  for (int k = 0; k < 2; ++k) to[(3 + k) * p.heads] = C(couplings[k]);
}

#undef EMBER_REFRACTORY_KERNEL
#undef EMBER_REFRACTORY_TILES

}  // namespace cuda
}  // namespace ember
