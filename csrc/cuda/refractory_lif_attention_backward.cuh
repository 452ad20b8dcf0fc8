// The backward pass of refractory LIF attention on a GPU; refractory_lif_attention.cuh lists its
// kernels.
#pragma once

#include "refractory_tile.cuh"

namespace ember {
namespace cuda {

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
    head.read_block(scratch.ends, kTile, tile.queries, tile.key(0), ending);
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
    tile.products.add_in_parts(values, head.key, tile.keys, column, weighted);
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

}  // namespace cuda
}  // namespace ember
