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
//              rows     delta, sums of tau over tiles, the gates' gradients
//              scan     c where tiles end
//              queries  E = sum_j p dp, grad_query
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
  C* row_sums;    // backward: delta and E, [2, B, H, Q]
};

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

  // How many queries the load of query i is a mean over.
  __device__ __forceinline__ C count(int i) const {
    return C(r.look_ahead ? r.queries : r.keys - r.queries + i + 1);
  }

  __device__ __forceinline__ C previous_load(int i, int j) const {
    if (!r.previous_load) return C(0);
    return static_cast<const C*>(
        r.previous_load)[this->batch * r.previous_strides[0] + i * r.previous_strides[1] + j];
  }

  __device__ __forceinline__ C threshold_at(int i, int j, C load) const {
    return this->threshold + within * load + across * previous_load(i, j);
  }

  // Element of [B, H, tiles of queries, K], or of [B, H, 1, K] with look_ahead.
  __device__ __forceinline__ int64_t of_tile(int tile, int j) const {
    const int64_t tiles = r.look_ahead ? 1 : attention_tiles(r.queries);
    const int64_t first = (int64_t(this->batch) * r.heads + this->head) * tiles;
    return (first + (r.look_ahead ? 0 : tile)) * r.keys + j;
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
  static constexpr size_t kBytes = (kAcross + 1) * kTile * sizeof(C);  // beyond the products'

  Products products;
  C* totals;      // [kAcross, kTile]: sums over 4 queries; or what scale_rows() leaves
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
    rows(head.query, head.key, p);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const AttentionRowStats<C> stats(head, query(q));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        C& value = at(p, q, k);
        value = head.visible(query(q), key(k)) ? stats.probability(head, value) : C(0);
      }
    }
  }

  // sums = `start` of the key + values over the tile's queries up to each one, or from it on.
  template <bool from>
  __device__ __forceinline__ void scan(Values& values, const C (&start)[kPatch], Values& sums) {
    const int group = first_query() / kPatch;
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      C sum = 0;
#pragma unroll
      for (int n = 0; n < kPatch; ++n) {
        const int q = from ? kPatch - 1 - n : n;
        sum += at(values, q, k);
        at(sums, q, k) = sum;
      }
      totals[group * kTile + first_key() + k] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      C others = start[k];
      for (int g = from ? group + 1 : 0; g < (from ? kAcross : group); ++g) {
        others += totals[g * kTile + first_key() + k];
      }
#pragma unroll
      for (int q = 0; q < kPatch; ++q) at(sums, q, k) += others;
    }
    __syncthreads();
  }

  // Writes the sums over the tile's queries to `to`, one for each key that there is.
  __device__ __forceinline__ void sum_queries(const RefractoryLifAttentionParams& p, Values& values,
                                              C* to) {
    const int group = first_query() / kPatch;
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      C sum = 0;
#pragma unroll
      for (int q = 0; q < kPatch; ++q) sum += at(values, q, k);
      totals[group * kTile + first_key() + k] = sum;
    }
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column < kTile && keys + column < int(p.keys)) {
      C sum = 0;
      for (int g = 0; g < kAcross; ++g) sum += totals[g * kTile + column];
      to[keys + column] = sum;
    }
    __syncthreads();
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

  // An array [B, H, tiles, K] at the patch's keys.
  __device__ __forceinline__ void read_keys(const Head& head, const C* array,
                                            C (&values)[kPatch]) const {
#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
      values[k] = key(k) < int(head.r.keys) ? array[head.of_tile(queries / kTile, key(k))] : C(0);
    }
  }

  // The loads of the elements whose probabilities are `p`.
  __device__ __forceinline__ void loads(const Head& head, Values& p, Values& load) {
    C start[kPatch];
    read_keys(head, static_cast<const C*>(head.r.block_loads), start);
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
      const C inverse = C(1) / head.count(query(q));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) at(load, q, k) *= inverse;
    }
  }

  __device__ __forceinline__ GatedProbability<C> gated(const Head& head, Values& p, Values& load,
                                                       int q, int k) const {
    const int j = key(k) < int(head.r.keys) ? key(k) : 0;
    const int i = head.existing(query(q));
    return {head, at(p, q, k), head.threshold_at(i, j, at(load, q, k))};
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
      const int i = query(q);
      bool kept[kPatch];
      head.dropout(i, key(0), kept);
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        C& value = at(t, q, k);
        C sum = 0;
        if (head.visible(i, key(k))) {
          const int64_t row = head.batch * rows_above + (head.r.look_ahead ? 0 : i);
          sum = above[row * head.r.keys + key(k)] * share;
          if (kept[k]) sum += value * head.keep_factor;
        }
        value = sum;
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
  __device__ __forceinline__ C tau(const Head& head, const GatedProbability<C>& gate, C grad_weight,
                                   int q, int k) const {
    if (!head.visible(query(q), key(k))) return C(0);
    return grad_weight * gate_dy_dthreshold(gate.p, head.steepness, gate.slope);
  }

  // The gradients of p: h d w + c, where c is that of `ends` where the tile ends and what the tile
  // adds to it. The loads are lost.
  __device__ __forceinline__ void probability_gradients(const Head& head,
                                                        const AttentionRows<T>& grad_out,
                                                        const RefractoryScratch<C>& scratch,
                                                        Values& p, Values& load, Values& t) {
    weight_gradients(head, grad_out, scratch, t);
    C end[kPatch];
    read_keys(head, scratch.ends, end);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const C factor = head.within / head.count(query(q));
#pragma unroll
      for (int k = 0; k < kPatch; ++k) {
        const GatedProbability<C> gate = gated(head, p, load, q, k);
        at(load, q, k) = factor * tau(head, gate, at(t, q, k), q, k);
        at(t, q, k) *= gate.derivative;
      }
    }
    if (!head.r.look_ahead) scan<true>(load, end, load);
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
#pragma unroll
      for (int k = 0; k < kPatch; ++k) at(t, q, k) += head.r.look_ahead ? end[k] : at(load, q, k);
    }
  }
};

// A kernel's launch bounds: its tiles take more registers than plain attention's.
#define EMBER_REFRACTORY_KERNEL __global__ void __launch_bounds__(kAttentionThreads, 1)

// Grid: batch x heads x tiles of queries. Writes two of row_stats, and the sums of p over the
// queries of the tile to `sums` [B, H, tiles of queries, K].
template <typename T, bool matrix_units>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_rows_kernel(RefractoryLifAttentionParams p,
                                                             compute_t<T>* sums) {
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
EMBER_REFRACTORY_KERNEL refractory_lif_attention_out_kernel(RefractoryLifAttentionParams p,
                                                            AttentionDropout keep) {
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
  C values[kPatch][kPatch], load[kPatch][kPatch];
  typename Products::Result weighted;
  tile.queries = first;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.loads(head, values, load);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated = tile.gated(head, values, load, r, c);
        values[r][c] = gated.p * gated.gate;
        sum[r] += values[r][c];
      }
    }
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
EMBER_REFRACTORY_KERNEL refractory_lif_attention_weights_kernel(RefractoryLifAttentionParams p,
                                                                compute_t<T>* sums) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  tile.keys = block.next(attention_tiles(p.keys)) * kTile;
  const int64_t tiles = attention_tiles(p.queries);
  const int index = block.next(tiles), batch = int(block.rest);
  tile.queries = index * kTile;

  C values[kPatch][kPatch], load[kPatch][kPatch], mean[kPatch][kPatch] = {};
  const C share = C(1) / C(p.heads);
  for (int h = 0; h < int(p.heads); ++h) {
    const RefractoryHead<T> head(p, {}, batch, h);
    if (tile.keys >= head.end_of_keys(tile.queries + kTile - 1)) break;
    tile.probabilities(head, values);
    tile.loads(head, values, load);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const C factor = AttentionRowStats<C>(head, tile.query(r)).inverse_weight_sum * share;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated = tile.gated(head, values, load, r, c);
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

// Grid: as many threads as there are keys in the batch. From the mean of u, in next_load or `sums`:
// next_load and weights.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_next_load_kernel(RefractoryLifAttentionParams p,
                                                                  const C* sums) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.keys) return;
  const int64_t batch = index / p.keys, j = index % p.keys, earlier = p.keys - p.queries;
  C* next_load = static_cast<C*>(p.next_load);
  C sum = 0;
  if (p.look_ahead) {
    const int64_t tiles = attention_tiles(p.queries);
    for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[(batch * tiles + tile) * p.keys + j];
    next_load[index] = sum / C(p.queries);
  } else {
    if (p.past_weights && j < earlier) {
      sum = static_cast<const C*>(p.past_weights)[batch * earlier + j];
    }
    for (int64_t i = 0; i < p.queries; ++i) {
      C& load = next_load[(batch * p.queries + i) * p.keys + j];
      sum += load;
      load = sum / C(earlier + i + 1);
    }
  }
  static_cast<C*>(p.weights)[index] = sum;
}

// Grid: as many threads as there are keys in the batch. Writes a to `above` [B, rows, K], and the
// gradient of past_weights.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_above_kernel(RefractoryLifAttentionParams p,
                                                              C* above) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.keys) return;
  const int64_t batch = index / p.keys, j = index % p.keys, earlier = p.keys - p.queries;
  const C* gradient = static_cast<const C*>(p.grad_next_load);
  C sum = p.grad_weights ? static_cast<const C*>(p.grad_weights)[index] : C(0);
  if (p.look_ahead) {
    above[index] = sum + (gradient ? gradient[index] / C(p.queries) : C(0));
    return;
  }
  for (int64_t i = p.queries - 1; i >= 0; --i) {
    const int64_t element = (batch * p.queries + i) * p.keys + j;
    if (gradient) sum += gradient[element] / C(earlier + i + 1);
    above[element] = sum;
  }
  if (p.grad_past_weights && j < earlier) {
    static_cast<C*>(p.grad_past_weights)[batch * earlier + j] = sum;
  }
}

// Grid: batch x heads x tiles of queries. Writes delta, the sums of tau / n over the tile's
// queries, and the gates' gradients.
template <typename T, bool matrix_units>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_backward_rows_kernel(
    RefractoryLifAttentionParams p, AttentionDropout keep,
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
  C delta[kPatch] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    tile.through_weights(head, grad_out, scratch.above, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated = tile.gated(head, values, load, r, c);
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
  C* to = scratch.sums + (pair * tiles + index) * p.keys;
  double gates[3] = {}, couplings[3] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    tile.weight_gradients(head, grad_out, scratch, t);
    C tile_gates[3] = {}, tile_couplings[2] = {};
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const C inverse_count = C(1) / head.count(tile.query(r));
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const GatedProbability<C> gated = tile.gated(head, values, load, r, c);
        const C tau = tile.tau(head, gated, t[r][c], r, c);
        if (head.visible(tile.query(r), tile.key(c))) {
          const C previous = head.previous_load(tile.query(r), tile.key(c));
          const C threshold = head.threshold_at(tile.query(r), tile.key(c), load[r][c]);
          tile_gates[0] += tau;
          tile_gates[1] += t[r][c] * gated.p * gated.smoulder;
          tile_gates[2] += t[r][c] * gate_dy_dsteepness(gated.p, gated.p, threshold, gated.slope);
          tile_couplings[0] += tau * load[r][c];
          tile_couplings[1] += tau * previous;
        }
        values[r][c] = tau * inverse_count;
      }
    }
#pragma unroll
    for (int n = 0; n < 3; ++n) gates[n] += double(tile_gates[n]);
#pragma unroll
    for (int n = 0; n < 2; ++n) couplings[n] += double(tile_couplings[n]);
    tile.sum_queries(p, values, to);
  }
  for (int j = tile.keys + int(threadIdx.x); j < int(p.keys); j += kAttentionThreads) to[j] = 0;
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
EMBER_REFRACTORY_KERNEL refractory_lif_attention_backward_queries_kernel(
    RefractoryLifAttentionParams p, AttentionDropout keep,
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

  C values[kPatch][kPatch], load[kPatch][kPatch], t[kPatch][kPatch];
  C mean[kPatch] = {};
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    tile.probability_gradients(head, grad_out, scratch, values, load, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) mean[r] += values[r][c] * t[r][c];
    }
  }
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const int i = tile.query(r);
    const C sum = across_columns<Sum>(mean[r]);
    if (patch_column() > 0) continue;
    tile.row_values[patch_row() + r] = sum;
    if (column > 0 || i >= int(p.queries)) continue;
    scratch.row_sums[p.batch * p.heads * p.queries + head.row(i)] = sum;
  }
  __syncthreads();

  typename Tile::Products::Result weighted;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    tile.probability_gradients(head, grad_out, scratch, values, load, t);
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
// fp64 there are not the registers for two results.
template <typename T, bool matrix_units, bool for_key, bool for_value>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_backward_keys_kernel(
    RefractoryLifAttentionParams p, AttentionDropout keep,
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

  C values[kPatch][kPatch], load[kPatch][kPatch], t[kPatch][kPatch];
  typename Tile::Products::Result weighted_query, weighted_grad;
  for (int h = group * heads; h < (group + 1) * heads; ++h) {
    const RefractoryHead<T> head(p, keep, batch, h);
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    for (tile.queries = begin / kTile * kTile; tile.queries < int(p.queries);
         tile.queries += kTile) {
      tile.probabilities(head, values);
      tile.loads(head, values, load);
      if constexpr (for_value) {
#pragma unroll
        for (int q = 0; q < kPatch; ++q) {
          const C inverse = AttentionRowStats<C>(head, tile.query(q)).inverse_weight_sum;
          bool kept[kPatch];
          head.dropout(tile.query(q), tile.key(0), kept);
#pragma unroll
          for (int k = 0; k < kPatch; ++k) {
            const GatedProbability<C> gated = tile.gated(head, values, load, q, k);
            t[k][q] = kept[k] ? gated.p * gated.gate * inverse : C(0);
          }
        }
        tile.products.store(t);
        tile.products.add_tile(grad_out, tile.queries, column, weighted_grad);
      }
      if constexpr (for_key) {
        tile.probability_gradients(head, grad_out, scratch, values, load, t);
#pragma unroll
        for (int q = 0; q < kPatch; ++q) {
          const int i = head.existing(tile.query(q));
          const C mean = scratch.row_sums[p.batch * p.heads * p.queries + head.row(i)];
#pragma unroll
          for (int k = 0; k < kPatch; ++k) values[k][q] *= t[k][q] - mean;
        }
        tile.products.store_scaled(values);
        tile.products.template add_tile<true>(head.query, tile.queries, column, weighted_query);
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
EMBER_REFRACTORY_KERNEL refractory_lif_attention_previous_kernel(
    RefractoryLifAttentionParams p, AttentionDropout keep,
    RefractoryScratch<compute_t<T>> scratch) {
  using C = compute_t<T>;
  RefractoryTile<T, matrix_units, false> tile;
  AttentionBlock block;
  tile.keys = block.next(attention_tiles(p.keys)) * kTile;
  const int64_t tiles = attention_tiles(p.queries);
  const int index = block.next(tiles), batch = int(block.rest);
  tile.queries = index * kTile;

  C values[kPatch][kPatch], load[kPatch][kPatch], t[kPatch][kPatch];
  C sum[kPatch][kPatch] = {};
  for (int h = 0; h < int(p.heads); ++h) {
    const RefractoryHead<T> head(p, keep, batch, h);
    if (tile.keys >= head.end_of_keys(tile.queries + kTile - 1)) break;
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    tile.probabilities(head, values);
    tile.loads(head, values, load);
    tile.weight_gradients(head, grad_out, scratch, t);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        sum[r][c] +=
            head.across * tile.tau(head, tile.gated(head, values, load, r, c), t[r][c], r, c);
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

}  // namespace cuda
}  // namespace ember
