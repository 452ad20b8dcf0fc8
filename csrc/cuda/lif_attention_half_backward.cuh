// The backward pass of LIF attention of 16-bit types; lif_attention_half.cuh has its formulas.
#pragma once

#include "half_scores.cuh"

namespace ember {
namespace cuda {

// Blocks of backward's first kernel that share a multiprocessor: what nvcc needs for the newest
// GPUs is a few registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kHalfQueriesBlocks = 2;
#else
constexpr int kHalfQueriesBlocks = 3;
#endif

// Sums over a row's keys, with s = t - delta as rounded: of w s, v s, p v s and u s, and of v, p v
// and u, where v = p f (1 - f) and u = p (1 - f).
struct HalfRowSums {
  float w_s = 0, v_s = 0, pv_s = 0, u_s = 0, v = 0, pv = 0, u = 0;

  __device__ __forceinline__ void add_up() {
    for (float* sum : {&w_s, &v_s, &pv_s, &u_s, &v, &pv, &u}) *sum = across_lanes<Sum>(*sum);
  }
};

// The true probability over the computed one. The computed one's exponent holds the logarithm of
// the sum, and is rounded where scores are large. Steep gates need a more exact p. The kernel for
// keys does without: its gradients are of 16 bits.
__device__ __forceinline__ float lost_by_exponent(const AttentionRowStats<float>& stats,
                                                  float exponent) {
  if (exponent == kInfinity) return 1;
  return stats.inverse_sum * exp2f(exponent - largest_exponent(stats.largest));
}

// sum_d a_d b_d of rows [first, + kTile), to shared memory.
template <typename T, int kSize>
__device__ __forceinline__ void row_products(const AttentionRows<T>& a, const AttentionRows<T>& b,
                                             int first, float* to) {
  constexpr int kPieces = kSize / 8, kStep = kFragmentThreads / kPieces;
  const int row = int(threadIdx.x) / kPieces, piece = int(threadIdx.x) % kPieces;

#pragma unroll 1
  for (int n = 0; n < kTile; n += kStep) {
    const WidestPack<T> left = a.pack(first + row + n, piece * 8, true);
    const WidestPack<T> right = b.pack(first + row + n, piece * 8, true);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += widen(left.values[i]) * widen(right.values[i]);
#pragma unroll
    for (int offset = kPieces / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (piece == 0) to[row + n] = sum;
  }
}

// Grid: tiles of queries, the last ones first, x batch x heads. Writes grad_query, `rows` [B, H, Q]
// and `gate_partials` [B, H, tiles of queries, 3].
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : kHalfQueriesBlocks)
    lif_attention_half_backward_queries_kernel(LifAttentionParams p, HalfOptions options,
                                               HalfQuery* rows_out, double* gate_partials) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const HalfGate<T> gate(head);
    const AttentionRows<T> grad_out(p.grad_out, block.batch, block.head, p.queries, p.size);
    const AttentionRows<T> result(p.out, block.batch, block.head, p.queries, p.size);

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    constexpr uint32_t kValues = 2 * Layout::kBytes;  // from a tile of keys to that of their values
    const uint32_t key_tiles = shared, value_tiles = shared + kValues;
    float* const deltas =
        reinterpret_cast<float*>(shared_memory<unsigned char>() + kHalfKept<kSize>);
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = end > 0 ? (end + kKeys - 1) / kKeys : 0;
    const auto bring = [&](int tile) {
      if (tile >= tiles) return;
      const uint32_t place = uint32_t(tile & 1) * Layout::kBytes;
      bring_rows<kSize>(head.key, tile * kKeys, key_tiles + place);
      bring_rows<kSize>(head.value, tile * kKeys, value_tiles + place);
      commit_copies();
    };
    const uint32_t query_place = key_tiles + (kHalfInRegisters<kSize> ? 1 : 4) * Layout::kBytes;
    const uint32_t grad_place = kHalfInRegisters<kSize> ? value_tiles + Layout::kBytes
                                                        : query_place + kTile * Layout::kRowBytes;
    bring_rows<kSize, kTile>(head.query, first, query_place);
    bring_rows<kSize, kTile>(grad_out, first, grad_place);
    commit_copies();
    bring(0);
    row_products<T, kSize>(grad_out, result, first, deltas);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(query_place);
    __syncthreads();
    const KeptRows<T, kSize, kHalfInRegisters<kSize>> query(query_place), grads(grad_place);

    const float slope = head.steepness * gate.open;

    const float* const delta = deltas + fragment_row();  // of both rows, 8 further
    float exponent[2], rate[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + fragment_row() + 8 * half;
      const AttentionRowStats<float> stats(head, row);
      const bool exists = row < int(p.queries) && stats.inverse_sum != 0;
      exponent[half] =
          exists ? largest_exponent(stats.largest) - log2f(stats.inverse_sum) : kInfinity;
      rate[half] = gate.rate * lost_by_exponent(stats, exponent[half]);
    }

    HalfRowSums sums[2];
    HalfScale<T> stored;
    RoundedSums<T> rounded;
    float gradient[kSize / 8][4] = {}, mean_key[kSize / 8][4] = {};
    // Turns scores into probabilities and t - delta into what multiplies the keys.
    const auto differentiate = [&](auto whole, float (&scores)[2][4], float (&shifted)[2][4]) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int half = n / 2 % 2;
        HalfRowSums& sum = sums[half];
        const float s = shifted[n / 4][n % 4];
        const float prob =
            fast_exp2(fmaf(scores[n / 4][n % 4], options.exponents, -exponent[half]));
        const float fire = gate.template fire<decltype(whole)::value>(prob, rate[half]);
        const float fired = prob * fire, u = prob - fired, pv = fired * u;
        const float v = fmaf(-fired, fire, fired), w = fmaf(u, gate.leak, fired);
        sum.w_s = fmaf(w, s, sum.w_s);
        sum.v_s = fmaf(v, s, sum.v_s);
        sum.pv_s = fmaf(pv, s, sum.pv_s);
        sum.u_s = fmaf(u, s, sum.u_s);
        sum.v += v;
        sum.pv += pv;
        sum.u += u;
        scores[n / 4][n % 4] = prob;
        shifted[n / 4][n % 4] = fmaf(pv, slope, w) * s;
      }
    };
    const auto add = [&](float (&scores)[2][4], float (&shifted)[2][4], const TileRows<kSize>& rows,
                         uint32_t offset) {
      stored.apply(shifted, gradient, rounded);
      uint32_t probabilities[4], gradients[4];
      left_operand<T>(scores, probabilities);
      left_operand<T>(shifted, gradients);
      rounded.add(gradients, probabilities);
      add_rows<T, kSize>(gradients, probabilities, rows, offset, gradient, mean_key);
    };
    walk_keys<kSize>(head, first, tiles, 0, bring, [&](const KeyTile& tile) {
      const bool easy = !p.mask && !p.seed && !gate.bounded;
      const auto columns = TileRows<kSize>::by_column(key_tiles + tile.place);
      const auto rows = TileRows<kSize>::by_row(key_tiles + tile.place);
      if (easy && tile.all_visible(head, kKeys)) {
#pragma unroll 1
        for (int c = in_place(0); c < kChunks; ++c) {
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          __syncwarp();
          float scores[2][4] = {}, shifted[2][4];
#pragma unroll
          for (int n = 0; n < 8; ++n) shifted[n / 4][n % 4] = -delta[n / 2 % 2 * 8];
          query.multiply(columns, offset, scores);
          grads.multiply(columns, offset + kValues, shifted);
          differentiate(std::true_type(), scores, shifted);
          add(scores, shifted, rows, offset);
        }
      } else {
#pragma unroll 1
        for (int c = in_place(0); c < kChunks; ++c) {
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          // Before there are scores to keep in registers.
          const int here = first + in_place(fragment_row());
          const unsigned kept = p.seed ? kept_scores(head, here, tile.keys + 16 * c) : 0xffu;
          const unsigned visible =
              visible_scores(head, here, tile.keys + 16 * c + fragment_column());
          float scores[2][4] = {}, shifted[2][4] = {};
          query.multiply(columns, offset, scores);
          grads.multiply(columns, offset + kValues, shifted);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float& value = shifted[n / 4][n % 4];
            value = (kept >> n & 1 ? value * options.keep_factor : 0.0f) - delta[n / 2 % 2 * 8];
          }
          hide_scores(scores, visible);
          differentiate(std::false_type(), scores, shifted);
          add(scores, shifted, rows, offset);
        }
      }
    });

    double gates[3] = {};
    float factor[2];
    const HalfBlock here = HalfBlock::again(p, p.heads);
    const int query_tile = int(attention_tiles(p.queries)) - 1 - here.tile;
    const int row = query_tile * kTile + fragment_row();
    const int64_t head_rows = (here.batch * p.heads + here.head) * p.queries;
    const float threshold = static_cast<const float*>(p.threshold)[here.head];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      HalfRowSums& sum = sums[half];
      sum.add_up();
      const float inverse =
          exponent[half] == kInfinity
              ? 0.0f
              : static_cast<const float*>(
                    p.row_stats)[2 * p.batch * p.heads * p.queries + head_rows + row + 8 * half];
      // What delta errs by, and E R as the sweep found it.
      const float error = inverse * (sum.w_s - delta[8 * half] * options.eps);
      const float mean = fmaf(sum.pv_s, slope, sum.w_s);
      factor[half] = options.scale * inverse / stored.factor;
      if (fragment_column() > 0 || row + 8 * half >= int(p.queries)) continue;
      const float v = inverse * (sum.v_s - error * sum.v);
      const float pv = inverse * (sum.pv_s - error * sum.pv);
      gates[0] += double(-slope * v);
      gates[1] += double(inverse * (sum.u_s - error * sum.u));
      const AttentionRowStats<float> stats(AttentionHead<T>(p, options.keep, here.batch, here.head),
                                           row + 8 * half);
      const float exact_pv = pv * lost_by_exponent(stats, exponent[half]);
      gates[2] += double(gate.open * (exact_pv - threshold * v));
      // sum_j p_j h_j
      const float all = inverse == 0 ? 0.0f : fmaf(sum.pv, slope, 1 / inverse - options.eps);
      rows_out[head_rows + row + 8 * half] = {exponent[half], delta[8 * half] + error, inverse,
                                              (mean - error * all) * kHalfWeight<T>};
    }
    rounded.divide(mean_key);
    rounded.centre(mean_key, gradient);
    scale_rows(gradient, factor[0], factor[1]);
    store_rows<T, kSize>(p.grad_query, here.batch, here.head, query_tile * kTile, int(p.queries),
                         int(p.size), gradient);
    __syncthreads();
    Team<double>{kFragmentThreads, shared_memory<double>()}.template reduce<Sum>(gates);
    if (threadIdx.x > 0) return;
    const int64_t to = here.batch * p.heads + here.head;
    for (int k = 0; k < 3; ++k) {
      gate_partials[(to * attention_tiles(p.queries) + query_tile) * 3 + k] = gates[k];
    }
  }
}

// Grid: tiles of keys, the first ones first as most queries see them, x batch x groups. Writes
// grad_key and grad_value.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    lif_attention_half_backward_keys_kernel(LifAttentionParams p, HalfOptions options,
                                            const HalfQuery* query_rows) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kQueries = Layout::kRows, kChunks = kQueries / 16;
    const HalfBlock block(p, p.groups);
    const int group = block.head, batch = block.batch, first = block.tile * kTile;

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    constexpr uint32_t kGrads = 2 * Layout::kBytes;  // from a tile of queries to their gradients'
    const uint32_t query_tiles = shared, grad_tiles = shared + kGrads;
    unsigned char* const shared_rows = shared_memory<unsigned char>() + kHalfKept<kSize>;
    // Queries before the first tile do not see the keys.
    const auto first_tile = [&](int first) {
      const int later = int(p.keys) - int(p.queries);
      return p.causal && first > later ? (first - later) / kQueries * kQueries : 0;
    };
    // The queries of head `h` from `queries` on, to tile `step`.
    const auto bring = [&](int step, int h, int queries) {
      const uint32_t place = uint32_t(step & 1) * Layout::kBytes;
      bring_rows<kSize>(AttentionRows<T>(p.query, batch, h, p.queries, p.size), queries,
                        query_tiles + place);
      bring_rows<kSize>(AttentionRows<T>(p.grad_out, batch, h, p.queries, p.size), queries,
                        grad_tiles + place);
      const int n = in_place(int(threadIdx.x));
      if (n < kQueries) {
        copy_async(shared_address(shared_rows) + uint32_t((step & 1) * kQueries + n) * 16,
                   query_rows + (batch * p.heads + h) * p.queries + queries + n,
                   queries + n < int(p.queries));
      }
      commit_copies();
    };
    const uint32_t key_place = query_tiles + (kHalfInRegisters<kSize> ? 1 : 4) * Layout::kBytes;
    const uint32_t value_place = kHalfInRegisters<kSize> ? grad_tiles + Layout::kBytes
                                                         : key_place + kTile * Layout::kRowBytes;
    const AttentionRows<T> keys(p.key, batch, group, p.keys, p.size);
    const AttentionRows<T> values(p.value, batch, group, p.keys, p.size);
    bring_rows<kSize, kTile>(keys, first, key_place);
    bring_rows<kSize, kTile>(values, first, value_place);
    commit_copies();
    const int begin = first_tile(first);
    const bool any = begin < int(p.queries);
    if (any) bring(0, group * options.shared_by, begin);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(key_place);
    __syncthreads();
    const KeptRows<T, kSize, kHalfInRegisters<kSize>> key(key_place), value(value_place);

    HalfScale<T> stored;
    float grad_key[kSize / 8][4] = {}, grad_value[kSize / 8][4] = {};
    int step = 0;
    const auto last_head = [&] {
      return (HalfBlock::again(p, p.groups).head + 1) * options.shared_by - 1;
    };
    for (int h = group * options.shared_by; any && h <= last_head(); ++h) {
      const AttentionHead<T> head(p, options.keep, batch, h);
      const HalfGate<T> gate(head);
      const float open = gate.open * kHalfWeight<T>, leak = gate.leak * kHalfWeight<T>;
      const float slope = head.steepness * open;
      const bool easy = !p.mask && !p.seed && !gate.bounded;
      // Turns scores into weights and t into gradients of scores.
      const auto differentiate = [&](auto whole, const HalfQuery(&queries)[4],
                                     float (&scores)[2][4], float (&shifted)[2][4]) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const HalfQuery& query = queries[n / 4 * 2 + n % 2];
          float &score = scores[n / 4][n % 4], &s = shifted[n / 4][n % 4];
          const float prob = fast_exp2(fmaf(score, options.exponents, -query.exponent));
          const float fire = gate.template fire<decltype(whole)::value, false>(prob, gate.rate);
          const float g = fmaf(fire, open, leak), v = prob * fmaf(-fire, fire, fire);
          const float share = prob * query.inverse_weight_sum;
          score = share * g;
          s = share * fmaf(fmaf(v, slope, g), s - query.delta, -query.mean);
        }
      };
      const auto take_tile = [&](int queries, int tile) {
        // Worked out anew for each tile: the registers are for scores.
        const int warp_first = first + in_place(int(threadIdx.x)) / kWarp * kFragmentRows;
        if (warp_first >= head.end_of_keys(queries + kQueries - 1)) return;
        const uint32_t place = query_tiles + uint32_t(tile) * Layout::kBytes;
        const auto columns = TileRows<kSize>::by_column(place);
        const auto rows = TileRows<kSize>::by_row(place);
        const HalfQuery* const of_queries =
            reinterpret_cast<const HalfQuery*>(shared_rows) + tile * kQueries + fragment_column();
        const auto add = [&](float (&scores)[2][4], float (&shifted)[2][4], uint32_t offset) {
          stored.apply(shifted, grad_key);
          uint32_t weights[4], gradients[4];
          left_operand<T>(scores, weights);
          left_operand<T>(shifted, gradients);
          add_rows<T, kSize>(weights, rows, offset + kGrads, grad_value);
          add_rows<T, kSize>(gradients, rows, offset, grad_key);
        };
        if (easy && all_visible(head, warp_first, queries)) {
#pragma unroll 1
          for (int c = in_place(0); c < kChunks; ++c) {
            const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
            __syncwarp();
            float scores[2][4] = {}, shifted[2][4] = {};
            key.multiply(columns, offset, scores);
            value.multiply(columns, offset + kGrads, shifted);
            HalfQuery here[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) here[n] = of_queries[16 * c + n / 2 * 8 + n % 2];
            differentiate(std::true_type(), here, scores, shifted);
            add(scores, shifted, offset);
          }
        } else {
#pragma unroll 1
          for (int c = in_place(0); c < kChunks; ++c) {
            const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
            const int key_row = first + in_place(fragment_row());
            const unsigned kept = p.seed ? kept_transposed(head, key_row, queries + 16 * c) : 0xffu;
            const unsigned visible =
                visible_transposed(head, queries + 16 * c + fragment_column(), key_row);
            float scores[2][4] = {}, shifted[2][4] = {};
            key.multiply(columns, offset, scores);
            value.multiply(columns, offset + kGrads, shifted);
            HalfQuery here[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) here[n] = of_queries[16 * c + n / 2 * 8 + n % 2];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              float& s = shifted[n / 4][n % 4];
              s = kept >> n & 1 ? s * options.keep_factor : 0.0f;
            }
            hide_scores(scores, visible);
            differentiate(std::false_type(), here, scores, shifted);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              if (!(kept >> n & 1)) scores[n / 4][n % 4] = 0;
            }
            add(scores, shifted, offset);
          }
        }
      };
      walk_queries<kQueries>(first_tile(in_place(first)), int(p.queries), h, last_head, step, bring,
                             take_tile);
    }
    const float key_factor = options.scale / (stored.factor * kHalfWeight<T>);
    const float value_factor = options.keep_factor / kHalfWeight<T>;
    scale_rows(grad_key, key_factor, key_factor);
    scale_rows(grad_value, value_factor, value_factor);
    const HalfBlock here = HalfBlock::again(p, p.groups);
    store_rows<T, kSize>(p.grad_key, here.batch, here.head, here.tile * kTile, int(p.keys),
                         int(p.size), grad_key);
    store_rows<T, kSize>(p.grad_value, here.batch, here.head, here.tile * kTile, int(p.keys),
                         int(p.size), grad_value);
  }
}

}  // namespace cuda
}  // namespace ember
