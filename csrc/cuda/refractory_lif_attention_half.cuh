// The forward pass of refractory LIF attention of 16-bit types up to 128 columns, whose scores stay
// in registers (refractory_half.cuh).
//
// The sweeps of refractory_lif_attention.cuh, with the sums of p over queries made by blocks that
// have keys for rows and walk the queries in order: the loads where each 16 queries begin come out
// of it, and nothing has to be added up over tiles.
//
//   rows     statistics of the rows
//   loads    P where each 16 queries begin, and at the end
//   out      the output, and 1 / R
//   weights  mean over heads of u
#pragma once

#include "refractory_half.cuh"

namespace ember {
namespace cuda {

// Grid: tiles of queries, the last ones first as they see most keys, x batch x heads. Writes two of
// row_stats.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : 3)
    refractory_lif_attention_half_rows_kernel(RefractoryLifAttentionParams p,
                                              RefractoryOptions options) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = (end + Layout::kRows - 1) / Layout::kRows;
    const auto bring = [&](int tile) {
      if (tile >= tiles) return;
      bring_rows<kSize>(head.key, tile * Layout::kRows,
                        shared + uint32_t(tile & 1) * Layout::kBytes);
      commit_copies();
    };
    const uint32_t query_place = shared + 2 * Layout::kBytes;
    bring_rows<kSize, kTile>(head.query, first, query_place);
    commit_copies();
    bring(0);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(query_place);
    __syncthreads();
    const KeptRows<T, kSize, true> query(query_place);

    HalfMaxima maxima;
    maxima.sweep<kSize>(p, head, query, shared, first, tiles, options.exponents, bring);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest, inverse_sum;
      maxima.finish(half, options, largest, inverse_sum);
      const int row = first + fragment_row() + 8 * half;
      if (fragment_column() > 0 || row >= int(p.queries)) continue;
      float* const stats = static_cast<float*>(p.row_stats) + head.row(row);
      stats[0] = largest;
      stats[p.batch * p.heads * p.queries] = inverse_sum;
    }
  }
}

// Grid: tiles of keys, the first ones first as most queries see them, x batch x heads. Writes
// block_loads and `probabilities`.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : 3)
    refractory_lif_attention_half_loads_kernel(RefractoryLifAttentionParams p,
                                               RefractoryOptions options) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kQueries = Layout::kRows, kChunks = kQueries / 16;
    const HalfBlock block(p, p.heads);
    const int first = block.tile * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    auto* const exponents =
        reinterpret_cast<QueryExponent*>(shared_memory<unsigned char>() + kHalfRowsBytes<kSize>);
    // Queries before the first tile do not see the keys.
    const int later = int(p.keys) - int(p.queries);
    const int begin = first > later ? (first - later) / kTile * kTile : 0;
    const auto bring = [&](int queries) {
      if (queries >= int(p.queries)) return;
      const int parity = queries / kQueries & 1;
      bring_rows<kSize>(head.query, queries, shared + uint32_t(parity) * Layout::kBytes);
      commit_copies();
      const int n = in_place(int(threadIdx.x));
      if (n < kQueries) {
        exponents[parity * kQueries + n] = QueryExponent(head, queries + n);
      }
    };
    const uint32_t key_place = shared + 2 * Layout::kBytes;
    bring_rows<kSize, kTile>(head.key, first, key_place);
    commit_copies();
    bring(begin);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(key_place);
    __syncthreads();
    const KeptRows<T, kSize, true> key(key_place);

    const int64_t pair = head.batch * p.heads + head.head;
    const int key_row = first + fragment_row();
    float sums[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = key_row + 8 * half;
      sums[half] = p.past_probabilities && j < later
                       ? static_cast<const float*>(p.past_probabilities)[pair * later + j]
                       : 0.0f;
    }
    // Of the lane's keys, at the place that a block of loads has in memory.
    float* to = static_cast<float*>(p.block_loads) +
                (p.look_ahead ? pair : pair * options.load_blocks) * p.keys + key_row;
    const bool writes = fragment_column() == 0;
    const bool exist[2] = {writes && key_row < int(p.keys), writes && key_row + 8 < int(p.keys)};
    // Of queries that see none of the keys.
    for (int queries = 0; !p.look_ahead && queries < begin; queries += kLoadRows, to += p.keys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (exist[half]) to[8 * half] = sums[half];
      }
    }
    for (int queries = begin; queries < int(p.queries); queries += kQueries) {
      wait_for_copies<0>();
      __syncthreads();
      bring(queries + kQueries);
      const int parity = queries / kQueries & 1;
      const auto columns = TileRows<kSize>::by_column(shared + uint32_t(parity) * Layout::kBytes);
      const QueryExponent* const of_queries = exponents + parity * kQueries + fragment_column();
      const bool whole = all_visible(head, first + int(threadIdx.x) / kWarp * 16, queries);
      const auto take = [&](auto whole, int c) {
        const unsigned visible =
            decltype(whole)::value
                ? 0xffu
                : visible_transposed(head, queries + 16 * c + fragment_column(), key_row);
        float scores[2][4] = {};
        key.multiply(columns, uint32_t(c * 16 * Layout::kRowBytes), scores);
        float more[2] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const QueryExponent query = of_queries[16 * c + n / 2 * 8 + n % 2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float prob = probability(scores[n / 2][2 * half + n % 2], options.exponents,
                                           query.exponent, query.inverse_sum);
            // Of a row of NaN what is not seen would be NaN, too, if its score were -infinity.
            more[half] += visible >> (n / 2 * 4 + 2 * half + n % 2) & 1 ? prob : 0.0f;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!p.look_ahead && exist[half]) to[8 * half] = sums[half];
          sums[half] += across_lanes<Sum>(more[half]);
        }
        if (!p.look_ahead) to += p.keys;
      };
      // The last block of queries may be the array's last.
      const int chunks = min(kChunks, (int(p.queries) - queries + 15) / 16);
      if (whole && chunks == kChunks) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) take(std::true_type(), c);
      } else {
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) take(std::false_type(), c);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!exist[half]) continue;
      if (p.look_ahead) to[8 * half] = sums[half];
      static_cast<float*>(p.probabilities)[pair * p.keys + key_row + 8 * half] = sums[half];
    }
  }
}

// A power of two for each of a lane's rows, by which weights that a product takes rounded to fp16
// are multiplied: thresholds differ from key to key, and no bound on a row's weights is known
// before its end. It shrinks, and the row's sums with it, when a weight calls for that.
template <typename T>
struct HalfRowScale {
  static constexpr bool kScales = AttentionProducts<T, true>::kScales;
  float factor[2];

  __device__ __forceinline__ HalfRowScale() {
    factor[0] = factor[1] = kScales ? AttentionProducts<T, true>::scale_for(0).factor : 1.0f;
  }

  // Scales values >= 0. All lanes of the warp must call together.
  template <int n>
  __device__ __forceinline__ void apply(float (&values)[2][4], float (&sums)[n][4],
                                        float (&more)[1][4]) {
    if constexpr (kScales) {
      float most[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        most[half] = fmaxf(fmaxf(values[0][2 * half], values[0][2 * half + 1]),
                           fmaxf(values[1][2 * half], values[1][2 * half + 1]));
      }
      if (__any_sync(kAllLanes, most[0] * factor[0] > 32768.0f || most[1] * factor[1] > 32768.0f)) {
        float ratio[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float row = across_lanes<FastMaximum>(most[half]), before = factor[half];
          if (row * before > 32768.0f) {
            factor[half] = AttentionProducts<T, true>::scale_for(row).factor;
          }
          ratio[half] = factor[half] / before;
        }
        scale_rows(sums, ratio[0], ratio[1]);
        scale_rows(more, ratio[0], ratio[1]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i / 4][i % 4] *= factor[i / 2 % 2];
    }
  }
};

// Grid: as `rows`. Writes the output and the last of row_stats.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : 3)
    refractory_lif_attention_half_out_kernel(RefractoryLifAttentionParams p,
                                             RefractoryOptions options) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const HalfThresholds gate(p, head.head);

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    constexpr uint32_t kValues = 2 * Layout::kBytes;  // from a tile of keys to that of their values
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = (end + kKeys - 1) / kKeys;
    const auto bring = [&](int tile) {
      if (tile >= tiles) return;
      const uint32_t place = shared + uint32_t(tile & 1) * Layout::kBytes;
      bring_rows<kSize>(head.key, tile * kKeys, place);
      bring_rows<kSize>(head.value, tile * kKeys, place + kValues);
      commit_copies();
    };
    const uint32_t query_place = shared + (kHalfInRegisters<kSize> ? 3 : 4) * Layout::kBytes;
    bring_rows<kSize, kTile>(head.query, first, query_place);
    commit_copies();
    bring(0);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(query_place);
    __syncthreads();
    KeptRows<T, kSize, true> query(query_place);

    const LoadSums loads;
    const QueryExponents exponents(head, loads, first + fragment_row());
    query.clear(exponents.broken);
    const QueryLoads<T> thresholds(head, p, options, gate, first + fragment_row());
    const uint32_t ones = rounded_pair<T>(1, 1);
    HalfRowScale<T> stored;
    float weight_sum[2] = {}, rounded_sum[1][4] = {}, out[kSize / 8][4] = {};
    walk_keys<kSize>(head, first, tiles, 0, bring, [&](const KeyTile& tile) {
      const int row = tile.row;
      const uint32_t place = shared + tile.place;
      const auto columns = TileRows<kSize>::by_column(place);
      const auto rows = TileRows<kSize>::by_row(place);
      const auto take = [&](auto whole, int c) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
        const int column = tile.keys + 16 * c;
        const unsigned visible =
            kWhole ? 0xffu : visible_scores(head, row, column + fragment_column());
        float sums[2][4], bases[2][4], scores[2][4] = {};
        thresholds.template begin<kWhole>(column, visible, sums, bases);
        query.multiply(columns, offset, scores);
        if (!kWhole) hide_scores(scores, visible);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float& score = scores[n / 4][n % 4];
          score = exponents.probability(score, options.exponents, n / 2 % 2);
        }
        thresholds.finish(loads, scores, sums, bases);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float& prob = scores[n / 4][n % 4];
          prob *= fmaf(gate.fire(prob, bases[n / 4][n % 4]), gate.open, gate.leak);
          weight_sum[n / 2 % 2] += prob;
        }
        stored.apply(scores, out, rounded_sum);
        uint32_t weights[4];
        left_operand<T>(scores, weights);
        multiply_add<T>(rounded_sum[0], weights, ones, ones, rounded_sum[0]);
        if (!kWhole && p.seed) {
          const unsigned kept = kept_scores(head, row, column);
#pragma unroll
          for (int n = 0; n < 4; ++n) weights[n] = kept_pair(weights[n], kept >> 2 * n);
        }
        add_rows<T, kSize>(weights, rows, offset + kValues, out);
      };
      each_chunk<kChunks>(options.in_pairs && !p.seed && tile.all_visible(head, kKeys), take);
    });

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool broken = exponents.broken[half], any = broken || exponents.inverse_sum[half] != 0;
      const float total = across_lanes<Sum>(weight_sum[half]) + options.eps;
      // All columns of the product with ones are alike.
      const float rounded = fmaf(options.eps, stored.factor[half], rounded_sum[0][2 * half]);
      factor[half] = unless_broken(broken, any ? options.keep_factor / rounded : 0.0f);
      const int query_row = first + fragment_row() + 8 * half;
      if (fragment_column() > 0 || query_row >= int(p.queries)) continue;
      float* const stats = static_cast<float*>(p.row_stats) + head.row(query_row);
      stats[2 * p.batch * p.heads * p.queries] = unless_broken(broken, any ? 1 / total : 0.0f);
    }
    scale_rows(out, factor[0], factor[1]);
    store_rows<T, kSize>(p.out, block.batch, block.head, first, int(p.queries), int(p.size), out);
  }
}

// A tile of queries and keys: what a warp has of it, 16 queries and all of the keys.
template <int kKeys>
struct PairTile {
  float values[kKeys / 16][2][4] = {};

  // Writes it to `to` [B, Q, K].
  __device__ __forceinline__ void store(const RefractoryLifAttentionParams& p, bool in_pairs,
                                        int batch, int queries, int keys, float* to) const {
    to += batch * p.queries * p.keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = queries + fragment_row() + 8 * half;
      if (i >= int(p.queries)) continue;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const float (&of)[4] = values[n / 2][n % 2];
        const int j = keys + 8 * n + fragment_column();
        float* const place = to + i * p.keys + j;
        if (in_pairs && j < int(p.keys)) {
          *reinterpret_cast<Pack<float, 2>*>(place) = {{of[2 * half], of[2 * half + 1]}};
        } else {
          if (j < int(p.keys)) place[0] = of[2 * half];
          if (j + 1 < int(p.keys)) place[1] = of[2 * half + 1];
        }
      }
    }
  }

  // Writes the sums over the tile's queries to `to` [K]. `shared` is [4, kKeys].
  __device__ __forceinline__ void sum_queries(const RefractoryLifAttentionParams& p, int keys,
                                              float* shared, float* to) const {
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kKeys / 4; ++n) {
      const float (&of)[4] = values[n / 4][n / 2 % 2];
      float sum = of[n % 2] + of[2 + n % 2];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
      }
      if (lane < 4) shared[warp * kKeys + n / 2 * 8 + fragment_column() + n % 2] = sum;
    }
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column >= kKeys || keys + column >= int(p.keys)) return;
    float sum = shared[column];
    for (int w = 1; w < kFragmentThreads / kWarp; ++w) sum += shared[w * kKeys + column];
    to[keys + column] = sum;
  }
};

// Grid: tiles of keys x tiles of queries x batch. The mean of u over heads, to next_load, or with
// look_ahead its sums over the tile's queries to `sums` [B, tiles of queries, K].
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_weights_kernel(RefractoryLifAttentionParams p,
                                                 RefractoryOptions options, float* sums) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr uint32_t kTileBytes = kTile * Layout::kRowBytes;
    AttentionBlock block;
    const int keys = block.next(attention_tiles(p.keys)) * kTile;
    const int query_tile = block.next(attention_tiles(p.queries)), batch = int(block.rest);
    const int first = query_tile * kTile;
    const uint32_t key_place = shared_address(shared_memory<unsigned char>());
    const uint32_t query_place = key_place + kTileBytes;
    const LoadSums loads;
    PairTile<kTile> mean;
    for (int h = 0; h < int(p.heads); ++h) {
      const AttentionHead<T> head(p, options.keep, batch, h);
      if (keys >= head.end_of_keys(first + kTile - 1)) break;
      bring_rows<kSize, kTile>(head.key, keys, key_place);
      bring_rows<kSize, kTile>(head.query, first, query_place);
      commit_copies();
      const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
      const HalfThresholds gate(p, head.head);
      const QueryExponents exponents(head, loads, row);
      const QueryLoads<T> thresholds(head, p, options, gate, row);
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const AttentionRowStats<float> stats(head, row + 8 * half);
        factor[half] =
            unless_broken(exponents.broken[half], stats.inverse_weight_sum * options.share);
      }
      wait_for_copies<0>();
      if (p.scale < 0) negate_rows<kSize>(query_place);
      __syncthreads();
      if (keys < head.end_of_keys(warp_first + kFragmentRows - 1)) {
        KeptRows<T, kSize, true> query(query_place);
        query.clear(exponents.broken);
        const auto columns = TileRows<kSize>::by_column(key_place);
        const auto take = [&](auto whole, int c, float (&to)[2][4]) {
          constexpr bool kWhole = decltype(whole)::value;
          const int column = keys + 16 * c;
          const unsigned visible =
              kWhole ? 0xffu : visible_scores(head, row, column + fragment_column());
          float sums[2][4], bases[2][4], scores[2][4] = {};
          thresholds.template begin<kWhole>(column, visible, sums, bases);
          query.multiply(columns, uint32_t(c * 16 * Layout::kRowBytes), scores);
          if (!kWhole) hide_scores(scores, visible);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float& score = scores[n / 4][n % 4];
            score = exponents.probability(score, options.exponents, n / 2 % 2);
          }
          thresholds.finish(loads, scores, sums, bases);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float prob = scores[n / 4][n % 4];
            const float g = fmaf(gate.fire(prob, bases[n / 4][n % 4]), gate.open, gate.leak);
            float& sum = to[n / 4][n % 4];
            sum = fmaf(prob * g, factor[n / 2 % 2], sum);
          }
        };
        if (options.in_pairs && keys + kTile <= head.end_of_keys(warp_first)) {
#pragma unroll
          for (int c = 0; c < kTile / 16; ++c) take(std::true_type(), c, mean.values[c]);
        } else {
#pragma unroll
          for (int c = 0; c < kTile / 16; ++c) take(std::false_type(), c, mean.values[c]);
        }
      }
      // The next head's rows take the place of these.
      __syncthreads();
    }
    if (p.look_ahead) {
      mean.sum_queries(p, keys, shared_memory<float>(),
                       sums + (batch * attention_tiles(p.queries) + query_tile) * p.keys);
    } else {
      mean.store(p, options.in_pairs, batch, first, keys, static_cast<float*>(p.next_load));
    }
  }
}

}  // namespace cuda
}  // namespace ember
