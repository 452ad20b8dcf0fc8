// Kernels of the backward pass of refractory LIF attention of 16-bit types with keys as rows:
// `keys` and `means` (refractory_lif_attention_half_backward.cuh).
#pragma once

#include "refractory_half_gradients.cuh"

namespace ember {
namespace cuda {

// What `keys` needs of a query besides: 1 / n, and 1 over the sum of exponentials.
struct QuerySum {
  float inverse_count, inverse_sum;
};

// Shared memory of `keys`: as of LIF attention's, and these.
template <int kSize>
constexpr size_t kRefractoryKeysBytes =
    kHalfKeysBytes<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(QuerySum);
// Of `means`: two tiles of queries, the keys, and what is needed of queries.
template <int kSize>
constexpr size_t kHalfMeansBytes =
    kHalfRowsBytes<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(HalfQuery);

// Calls use(pair, n, half) with the lane's pairs of numbers of scratch.grad_key, the n-th 8 columns
// of each of its two rows, of which `key_row` is the first.
template <int kSize, typename Use>
__device__ __forceinline__ void known_rows(const RefractoryLifAttentionParams& p, float* grad_key,
                                           const HalfBlock& block, int key_row, const Use& use) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = key_row + 8 * half;
    float* const row = grad_key + ((block.batch * p.groups + block.head) * p.keys + j) * p.size +
                       fragment_column();
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      if (j < int(p.keys) && 8 * n < int(p.size)) {
        use(*reinterpret_cast<Pack<float, 2>*>(row + 8 * n), n, half);
      }
    }
  }
}

// Grid: tiles of keys, the first ones first as most queries see them, x batch x groups. Writes
// grad_value, or `ends`, scratch.grad_key and the gradient of past_probabilities, or all of it: of
// 128 columns there are not the registers for two results.
template <typename T, int kSize, bool for_key, bool for_value>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_backward_keys_kernel(RefractoryLifAttentionParams p,
                                                       RefractoryOptions options,
                                                       RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kQueries = Layout::kRows, kChunks = kQueries / 16;
    const HalfBlock block(p, p.groups);
    const int group = block.head, batch = block.batch, first = block.tile * kTile;

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    constexpr uint32_t kGrads = 2 * Layout::kBytes;  // from a tile of queries to their gradients'
    unsigned char* const shared_rows = shared_memory<unsigned char>() + kHalfKept<kSize>;
    auto* const query_sums =
        reinterpret_cast<QuerySum*>(shared_memory<unsigned char>() + kHalfKeysBytes<kSize>);
    const int later = int(p.keys) - int(p.queries);
    // Queries before the first tile do not see the keys.
    const int begin = first > later ? (first - later) / kTile * kTile : 0;
    const int last = (int(p.queries) - 1) / kQueries * kQueries;
    // The queries of head `h` from `queries` on, to tile `step`.
    const auto bring = [&](int step, int h, int queries) {
      const uint32_t place = shared + uint32_t(step & 1) * Layout::kBytes;
      bring_rows<kSize>(AttentionRows<T>(p.query, batch, h, p.queries, p.size), queries, place);
      bring_rows<kSize>(AttentionRows<T>(p.grad_out, batch, h, p.queries, p.size), queries,
                        place + kGrads);
      const int n = in_place(int(threadIdx.x));
      if (n < kQueries) {
        const int at = (step & 1) * kQueries + n;
        copy_async(shared_address(shared_rows) + uint32_t(at) * 16,
                   scratch.rows + (batch * p.heads + h) * p.queries + queries + n,
                   queries + n < int(p.queries));
        const AttentionRowStats<float> stats(AttentionHead<T>(p, options.keep, batch, h),
                                             queries + n);
        query_sums[at] = {inverse_count(p, queries + n), stats.inverse_sum};
      }
      commit_copies();
    };
    const uint32_t key_place = shared + (kHalfInRegisters<kSize> ? 1 : 4) * Layout::kBytes;
    const uint32_t value_place = kHalfInRegisters<kSize> ? shared + kGrads + Layout::kBytes
                                                         : key_place + kTile * Layout::kRowBytes;
    bring_rows<kSize, kTile>(AttentionRows<T>(p.key, batch, group, p.keys, p.size), first,
                             key_place);
    bring_rows<kSize, kTile>(AttentionRows<T>(p.value, batch, group, p.keys, p.size), first,
                             value_place);
    commit_copies();
    bring(0, group * options.shared_by, last);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(key_place);
    __syncthreads();
    const KeptRows<T, kSize, kHalfInRegisters<kSize>> key(key_place), value(value_place);

    const LoadSums loads;
    const TauSums later_taus;
    HalfScale<T> stored;
    float grad_key[kSize / 8][4] = {}, grad_value[kSize / 8][4] = {};
    int step = 0;
    const auto last_head = [&] {
      return (HalfBlock::again(p, p.groups).head + 1) * options.shared_by - 1;
    };
    for (int h = group * options.shared_by; h <= last_head(); ++h) {
      const AttentionHead<T> head(p, options.keep, batch, h);
      const GradientGate gate(p, h);
      const int64_t pair = batch * p.heads + h;
      const int key_row = first + fragment_row();
      const bool exist[2] = {key_row < int(p.keys), key_row + 8 < int(p.keys)};
      // c, which with look_ahead is complete at the end only.
      float ending[2];
      const auto given = [&](int half, int row) {
        return p.grad_probabilities && row + 8 * half < int(p.keys)
                   ? static_cast<const float*>(p.grad_probabilities)[pair * p.keys + row + 8 * half]
                   : 0.0f;
      };
#pragma unroll
      for (int half = 0; half < 2; ++half) ending[half] = given(half, key_row);
      // Of the lane's keys, where the loads of a block of queries are.
      int64_t saved = (pair + 1) * options.load_blocks * p.keys - p.keys + key_row;
      const auto take_tile = [&](int queries, int tile) {
        const uint32_t place = shared + uint32_t(tile) * Layout::kBytes;
        const auto columns = TileRows<kSize>::by_column(place);
        const auto rows = TileRows<kSize>::by_row(place);
        const HalfQuery* const of_queries =
            reinterpret_cast<const HalfQuery*>(shared_rows) + tile * kQueries + fragment_column();
        const QuerySum* const of_sums = query_sums + tile * kQueries + fragment_column();
        const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
        // A lane's first query and key, and all of one query's keys.
        const auto take = [&](auto whole, int c) {
          constexpr bool kWhole = decltype(whole)::value;
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          const int column = queries + 16 * c, i = column + fragment_column();
          const int64_t place = saved;
          if (!p.look_ahead) saved -= p.keys;
          if (for_key && !p.look_ahead && fragment_column() == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (exist[half]) scratch.ends[place + 8 * half] = ending[half];
            }
          }
          if (!kWhole && warp_first >= head.end_of_keys(column + 15)) return;
          const unsigned kept = !kWhole && p.seed ? kept_transposed(head, row, column) : 0xffu;
          const unsigned visible = kWhole ? 0xffu : visible_transposed(head, i, row);
          float sums[2][4], bases[2][4] = {}, more[2][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float start = kWhole || exist[half]
                                    ? static_cast<const float*>(p.block_loads)[place + 8 * half]
                                    : 0.0f;
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[n / 2][2 * half + n % 2] = start;
          }
          if (p.previous_load) {
            read_transposed<kWhole>(static_cast<const float*>(p.previous_load) +
                                        batch * p.previous_strides[0] + i * p.previous_strides[1] +
                                        row,
                                    p.previous_strides[1], visible, bases);
          }
          if (for_key && scratch.above) {
            const int64_t stride = p.look_ahead ? 0 : p.keys;
            const float* const from =
                scratch.above + (p.look_ahead ? batch : batch * p.queries) * p.keys;
            read_transposed<kWhole>(from + i * stride + row, stride, visible, more);
          }
          float scores[2][4] = {}, t[2][4] = {};
          key.multiply(columns, offset, scores);
          if constexpr (for_key) {
            value.multiply(columns, offset + kGrads, t);
            add_above<kWhole>(head, kept, options.share, more, t);
          }
          if (!kWhole) hide_scores(scores, visible);
          // Of the queries what is needed at once: together it would take registers.
          const HalfQuery* const here = of_queries + 16 * c;
          const auto query_of = [](int n) { return n / 4 * 8 + n % 2; };
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float& score = scores[n / 4][n % 4];
            score = probability(score, options.exponents, here[query_of(n)].exponent,
                                of_sums[16 * c + query_of(n)].inverse_sum);
          }
          if (!p.look_ahead) loads.template add_columns<2>(scores, sums);
          __syncwarp();
          float derivatives[2][4];
          uint32_t weights[4];
          float tau_sum[2] = {};
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const HalfQuery& of = here[query_of(n)];
            const float inverse = of_sums[16 * c + query_of(n)].inverse_count;
            float& prob = scores[n / 4][n % 4];
            float& value = t[n / 4][n % 4];
            float& tau = sums[n / 4][n % 4];
            const float base = fmaf(tau, gate.within * inverse,
                                    fmaf(bases[n / 4][n % 4], gate.across, gate.start));
            const GateTerms terms(prob, gate.fire(prob, base), gate.leak, gate.steep);
            const float dw = (value - of.delta) * of.inverse_weight_sum;
            tau = terms.slope * dw * (gate.tau * inverse);
            tau_sum[n / 2 % 2] += tau;
            derivatives[n / 4][n % 4] = terms.derivative * dw;
            value = terms.weight * (of.inverse_weight_sum * kHalfWeight<T>);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float start = p.look_ahead ? given(half, row) : ending[half];
#pragma unroll
            for (int n = 0; n < 4; ++n) bases[n / 2][2 * half + n % 2] = start;
          }
          left_operand<T>(t, weights);
          if (!kWhole && p.seed) {
#pragma unroll
            for (int n = 0; n < 4; ++n) weights[n] = kept_pair(weights[n], kept >> 2 * n);
          }
          if constexpr (for_value) {
            add_rows<T, kSize>(weights, rows, offset + kGrads, grad_value);
          }
          if constexpr (for_key) {
            if (!p.look_ahead) later_taus.template add_columns<kTauParts<T>>(sums, bases);
            __syncwarp();
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              float& score = scores[n / 4][n % 4];
              score = fmaf(score, bases[n / 4][n % 4] - here[query_of(n)].mean,
                           derivatives[n / 4][n % 4]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              ending[half] += across_lanes<Sum>(tau_sum[half]);
            }
            stored.apply(scores, grad_key);
            uint32_t gradients[4];
            left_operand<T>(scores, gradients);
            add_rows<T, kSize>(gradients, rows, offset, grad_key);
          }
        };
        if (!p.seed && all_visible(head, warp_first, queries) &&
            queries + kQueries <= int(p.queries)) {
          each_chunk<kChunks>([&](int c) { take(std::true_type(), kChunks - 1 - c); });
        } else {
          // Those past the last query have no loads.
          const int chunks = min(kChunks, (int(p.queries) - queries + 15) / 16);
          each_chunk<kChunks>([&](int c) {
            if (kChunks - 1 - c < chunks) take(std::false_type(), kChunks - 1 - c);
          });
        }
      };
      walk_queries<-kQueries>(last, begin - kQueries, h, last_head, step, bring, take_tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!for_key || fragment_column() > 0 || !exist[half]) continue;
        const int j = key_row + 8 * half;
        if (p.look_ahead) scratch.ends[pair * p.keys + j] = ending[half];
        if (p.grad_past_probabilities && j < later) {
          static_cast<float*>(p.grad_past_probabilities)[pair * later + j] = ending[half];
        }
      }
    }
    const HalfBlock here = HalfBlock::again(p, p.groups);
    if constexpr (for_value) {
      const float factor = options.keep_factor / kHalfWeight<T>;
      scale_rows(grad_value, factor, factor);
      store_rows<T, kSize>(p.grad_value, here.batch, here.head, here.tile * kTile, int(p.keys),
                           int(p.size), grad_value);
    }
    if constexpr (for_key) {
      const float factor = options.scale / stored.factor;
      known_rows<kSize>(
          p, scratch.grad_key, here, here.tile * kTile + fragment_row(),
          [&](Pack<float, 2>& pair, int n, int half) {
            pair = {{grad_key[n][2 * half] * factor, grad_key[n][2 * half + 1] * factor}};
          });
    }
  }
}

// Grid: as `keys`. Writes grad_key.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : 3)
    refractory_lif_attention_half_means_kernel(RefractoryLifAttentionParams p,
                                               RefractoryOptions options,
                                               RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kQueries = Layout::kRows, kChunks = kQueries / 16;
    const HalfBlock block(p, p.groups);
    const int group = block.head, batch = block.batch, first = block.tile * kTile;
    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    unsigned char* const shared_rows = shared_memory<unsigned char>() + kHalfRowsBytes<kSize>;
    const int later = int(p.keys) - int(p.queries);
    const int begin = first > later ? (first - later) / kTile * kTile : 0;
    const auto bring = [&](int step, int h, int queries) {
      bring_rows<kSize>(AttentionRows<T>(p.query, batch, h, p.queries, p.size), queries,
                        shared + uint32_t(step & 1) * Layout::kBytes);
      const int n = in_place(int(threadIdx.x));
      if (n < kQueries) {
        copy_async(shared_address(shared_rows) + uint32_t((step & 1) * kQueries + n) * 16,
                   scratch.rows + (batch * p.heads + h) * p.queries + queries + n,
                   queries + n < int(p.queries));
      }
      commit_copies();
    };
    const uint32_t key_place = shared + 2 * Layout::kBytes;
    bring_rows<kSize, kTile>(AttentionRows<T>(p.key, batch, group, p.keys, p.size), first,
                             key_place);
    commit_copies();
    bring(0, group * options.shared_by, begin);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(key_place);
    __syncthreads();
    const KeptRows<T, kSize, true> key(key_place);

    HalfScale<T> stored;
    float grad_key[kSize / 8][4] = {};
    int step = 0;
    const auto last_head = [&] { return (group + 1) * options.shared_by - 1; };
    for (int h = group * options.shared_by; h <= last_head(); ++h) {
      const AttentionHead<T> head(p, options.keep, batch, h);
      // What `keys` did not know of c.
      float ending[2] = {};
      if (p.look_ahead) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = first + fragment_row() + 8 * half;
          if (j >= int(p.keys)) continue;
          const int64_t at = (batch * p.heads + h) * p.keys + j;
          ending[half] = scratch.ends[at];
          if (p.grad_probabilities) {
            ending[half] -= static_cast<const float*>(p.grad_probabilities)[at];
          }
        }
      }
      const auto take_tile = [&](int queries, int tile) {
        const uint32_t place = shared + uint32_t(tile) * Layout::kBytes;
        const auto columns = TileRows<kSize>::by_column(place);
        const auto rows = TileRows<kSize>::by_row(place);
        const HalfQuery* const of_queries =
            reinterpret_cast<const HalfQuery*>(shared_rows) + tile * kQueries + fragment_column();
        const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
        if (warp_first >= head.end_of_keys(queries + kQueries - 1)) return;
        const auto take = [&](auto whole, int c) {
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          float scores[2][4] = {};
          key.multiply(columns, offset, scores);
          if (!decltype(whole)::value) {
            hide_scores(scores,
                        visible_transposed(head, queries + 16 * c + fragment_column(), row));
          }
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const HalfQuery& here = of_queries[16 * c + n / 4 * 8 + n % 2];
            float& score = scores[n / 4][n % 4];
            score = probability(score, options.exponents, here.exponent, here.delta) *
                    (ending[n / 2 % 2] - here.mean);
          }
          stored.apply(scores, grad_key);
          uint32_t gradients[4];
          left_operand<T>(scores, gradients);
          add_rows<T, kSize>(gradients, rows, offset, grad_key);
        };
        each_chunk<kChunks>(
            all_visible(head, warp_first, queries) && queries + kQueries <= int(p.queries), take);
      };
      walk_queries<kQueries>(begin, int(p.queries), h, last_head, step, bring, take_tile);
    }
    const float factor = options.scale / stored.factor;
    scale_rows(grad_key, factor, factor);
    known_rows<kSize>(p, scratch.grad_key, block, first + fragment_row(),
                      [&](const Pack<float, 2>& pair, int n, int half) {
                        grad_key[n][2 * half] += pair.values[0];
                        grad_key[n][2 * half + 1] += pair.values[1];
                      });
    store_rows<T, kSize>(p.grad_key, block.batch, block.head, first, int(p.keys), int(p.size),
                         grad_key);
  }
}

}  // namespace cuda
}  // namespace ember
