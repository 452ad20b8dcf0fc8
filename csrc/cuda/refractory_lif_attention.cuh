// Refractory LIF attention on a GPU; common/refractory_lif_attention.h says what it computes.
//
// Tiles of 64 queries and 64 keys, like lif_attention.cuh, and with the same products. The sums
// over earlier queries, in hand where blocks could walk the queries in order, are here made in two
// steps, so that all tiles of queries run at once: sums over each tile, one thread for each key
// that adds the tiles up in order, and then, wherever a tile is worked on again, sums within it
// from where it begins. Nothing that has a row for each query and key is stored for a head: a
// tile's scores, loads and thresholds are computed again in every kernel that needs them. What sums
// over heads or is asked for as a result, [B, Q, K], is stored. Of 16-bit types these kernels take
// what those of refractory_lif_attention_half.cuh leave.
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

#include "refractory_tile.cuh"

namespace ember {
namespace cuda {

// Grid: batch x heads x tiles of queries. Writes two of row_stats, and the sums of p over blocks of
// queries to `sums` [B, H, blocks, K].
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

  const int size = int(p.block), parts = size == kTile ? 1 : kTile / kLoadRows;
  const int blocks = (int(p.queries) + size - 1) / size, begin = index * parts;
  C* to = sums + ((int64_t(head.batch) * p.heads + head.head) * blocks + begin) * p.keys;
  C values[kPatch][kPatch];
  tile.queries = first;
  for (tile.keys = 0; tile.keys < end; tile.keys += kTile) {
    tile.probabilities(head, values);
    tile.sum_queries(p, values, to, size);
  }
  for (int n = begin; n < blocks && n < begin + parts; ++n) {
    for (int j = tile.keys + int(threadIdx.x); j < int(p.keys); j += kAttentionThreads) to[j] = 0;
    to += p.keys;
  }
}

// Grid: as many threads as there are keys in all heads. From sums of p over blocks of queries: P
// where each begins, and at the end.
template <typename C>
EMBER_REFRACTORY_KERNEL refractory_lif_attention_scan_kernel(RefractoryLifAttentionParams p,
                                                             const C* sums) {
  const int64_t index = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (index >= p.batch * p.heads * p.keys) return;
  const int64_t pair = index / p.keys, j = index % p.keys, earlier = p.keys - p.queries;
  const int64_t blocks = ceil_div(p.queries, p.block);
  C* loads = static_cast<C*>(p.block_loads);
  C sum = 0;
  if (p.past_probabilities && j < earlier) {
    sum = static_cast<const C*>(p.past_probabilities)[pair * earlier + j];
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t element = (pair * blocks + block) * p.keys + j;
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

}  // namespace cuda
}  // namespace ember
