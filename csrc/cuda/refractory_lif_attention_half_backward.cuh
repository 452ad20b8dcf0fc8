// The backward pass of refractory LIF attention of 16-bit types
// (refractory_lif_attention_half.cuh).
//
//   above     a, the gradient of u from the loads (refractory_lif_attention_backward.cuh)
//   delta     delta, R, and of E = sum_j p dp all but what comes from tau
//   previous  grad_previous_load
//   keys      walks the queries in reverse with c in hand: c where each 16 queries end, grad_value,
//             and grad_key with what is known of E
//   queries   the rest of E, grad_query, the gates' gradients
//   means     grad_key with the rest of E
//
// Only c, which `keys` makes, says what E is, and only E what grad_key is. As grad_key is linear in
// E, another sweep of one product each and no gate does for the rest.
#pragma once

#include "refractory_lif_attention_half.cuh"

namespace ember {
namespace cuda {

// tau enters sums that a product takes, as numbers of bf16, which has the range of fp32: where
// results are of fp16, as two.
template <typename T>
constexpr int kTauParts = std::is_same<T, float16>::value ? 2 : 1;
using TauSums = QuerySums<bfloat16, true>;

// What `keys` needs of a query besides: 1 / n, and 1 over the sum of exponentials.
struct QuerySum {
  float inverse_count, inverse_sum;
};

// Shared memory of `keys`: as of LIF attention's, and these.
template <int kSize>
constexpr size_t kRefractoryKeysBytes =
    kHalfKeysBytes<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(QuerySum);
// Keys that a block of `previous` has, with all heads: of more, its sums would take too many
// registers.
constexpr int kPreviousKeys = 32;
// Of `means`: two tiles of queries, the keys, and what is needed of queries.
template <int kSize>
constexpr size_t kHalfMeansBytes =
    kHalfRowsBytes<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(HalfQuery);

// The gates of a head, and what their slopes are multiplied by in the gradients of p and of P.
struct GradientGate : HalfThresholds {
  float steep, tau;

  __device__ __forceinline__ GradientGate(const RefractoryLifAttentionParams& p, int head)
      : HalfThresholds(p, head),
        steep(static_cast<const float*>(p.steepness)[head] * open),
        tau(-steep * static_cast<const float*>(p.within)[head]) {}
};

// What a block that takes 64 queries past all keys and values keeps, as it begins.
template <typename T, int kSize>
struct GradientRows {
  using Layout = TileLayout<kSize>;
  static constexpr uint32_t kValues = 2 * Layout::kBytes;  // from a tile of keys to their values
  static constexpr bool kInRegisters = kHalfInRegisters<kSize>;
  uint32_t query_place, grad_place;

  __device__ __forceinline__ explicit GradientRows(uint32_t shared)
      : query_place(shared + (kInRegisters ? 1 : 4) * Layout::kBytes),
        grad_place(kInRegisters ? shared + kValues + Layout::kBytes
                                : query_place + kTile * Layout::kRowBytes) {}

  template <typename Bring>
  __device__ __forceinline__ void begin(const AttentionRows<T>& query,
                                        const AttentionRows<T>& grads, int first, bool negative,
                                        const Bring& bring) const {
    bring_rows<kSize, kTile>(query, first, query_place);
    bring_rows<kSize, kTile>(grads, first, grad_place);
    commit_copies();
    bring(0);
    wait_for_copies<0>();
    if (negative) negate_rows<kSize>(query_place);
    __syncthreads();
  }
};

// t = M (grad_out . v) + a / H, from products with v, of which `kept` says which dropout keeps.
template <bool whole, typename T>
__device__ __forceinline__ void add_above(const AttentionHead<T>& head, unsigned kept, float share,
                                          const float (&above)[4], float (&products)[4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float& value = products[n];
    if (!whole) value = kept >> n & 1 ? value * head.keep_factor : 0.0f;
    value = fmaf(above[n], share, value);
  }
}
template <bool whole, typename T>
__device__ __forceinline__ void add_above(const AttentionHead<T>& head, unsigned kept, float share,
                                          const float (&above)[2][4], float (&products)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    add_above<whole>(head, kept >> 4 * n, share, above[n], products[n]);
  }
}

// Grid: tiles of queries, the last ones first, x batch x heads. Writes `rows`.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_delta_kernel(RefractoryLifAttentionParams p,
                                               RefractoryOptions options,
                                               RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    using Rows = GradientRows<T, kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const HalfThresholds gate(p, head.head);
    const AttentionRows<T> grad_out(p.grad_out, block.batch, block.head, p.queries, p.size);

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = (end + kKeys - 1) / kKeys;
    const auto bring = [&](int tile) {
      if (tile >= tiles) return;
      const uint32_t place = shared + uint32_t(tile & 1) * Layout::kBytes;
      bring_rows<kSize>(head.key, tile * kKeys, place);
      bring_rows<kSize>(head.value, tile * kKeys, place + Rows::kValues);
      commit_copies();
    };
    const Rows kept_rows(shared);
    kept_rows.begin(head.query, grad_out, first, p.scale < 0, bring);
    const KeptRows<T, kSize, Rows::kInRegisters> query(kept_rows.query_place),
        grads(kept_rows.grad_place);

    const LoadSums loads;
    const QueryExponents exponents(head, loads, first + fragment_row());
    const QueryLoads<T> thresholds(head, p, options, gate, first + fragment_row());
    const float steep = head.steepness * gate.open;
    const float* above[2] = {};
    if (scratch.above) {
      pair_rows(head, p.look_ahead, scratch.above, first + fragment_row(), above);
    }
    const float* const ending =
        p.grad_probabilities ? static_cast<const float*>(p.grad_probabilities) +
                                   (head.batch * p.heads + head.head) * p.keys + fragment_column()
                             : nullptr;
    // Of p g, p g t, p h, p h t and p d probabilities.
    float weight[2] = {}, weight_t[2] = {}, derivative[2] = {}, derivative_t[2] = {}, known[2] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<0>();
      __syncthreads();
      bring(tile + 1);
      const int keys = tile * kKeys;
      const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
      if (keys >= head.end_of_keys(warp_first + kFragmentRows - 1)) continue;
      const auto columns = TileRows<kSize>::by_column(shared + uint32_t(tile & 1) * Layout::kBytes);
      const auto take = [&](auto whole, int c) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
        const int column = keys + 16 * c;
        const unsigned kept = !kWhole && p.seed ? kept_scores(head, row, column) : 0xffu;
        const unsigned visible =
            kWhole ? 0xffu : visible_scores(head, row, column + fragment_column());
        float sums[2][4], bases[2][4], more[2][4] = {}, endings[2][4] = {};
        thresholds.template begin<kWhole>(column, visible, sums, bases);
        if (scratch.above) read_pairs<kWhole>(above, column, visible, more);
        if (ending) read_pairs<kWhole>(ending, column, visible, endings);
        float scores[2][4] = {}, t[2][4] = {};
        query.multiply(columns, offset, scores);
        grads.multiply(columns, offset + Rows::kValues, t);
        add_above<kWhole>(head, kept, options.share, more, t);
        if (!kWhole) hide_scores(scores, visible);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float& score = scores[n / 4][n % 4];
          score = exponents.probability(score, options.exponents, n / 2 % 2);
        }
        thresholds.finish(loads, scores, sums, bases);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int half = n / 2 % 2;
          const float prob = scores[n / 4][n % 4], s = t[n / 4][n % 4];
          const GateTerms terms(prob, gate.fire(prob, bases[n / 4][n % 4]), gate.leak, steep);
          weight[half] += terms.weight;
          weight_t[half] = fmaf(terms.weight, s, weight_t[half]);
          derivative[half] += terms.derivative;
          derivative_t[half] = fmaf(terms.derivative, s, derivative_t[half]);
          known[half] = fmaf(prob, endings[n / 4][n % 4], known[half]);
        }
      };
      if (options.in_pairs && !p.seed && keys + kKeys <= head.end_of_keys(warp_first)) {
        each_chunk<kChunks>([&](int c) { take(std::true_type(), c); });
      } else {
        each_chunk<kChunks>([&](int c) { take(std::false_type(), c); });
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (float* sum :
           {&weight[half], &weight_t[half], &derivative[half], &derivative_t[half], &known[half]}) {
        *sum = across_lanes<Sum>(*sum);
      }
      const int i = first + fragment_row() + 8 * half;
      if (fragment_column() > 0 || i >= int(p.queries)) continue;
      const bool broken = exponents.broken[half];
      const float inverse =
          exponents.inverse_sum[half] == 0 ? 0.0f : 1 / (weight[half] + options.eps);
      const float delta = inverse * weight_t[half];
      scratch.rows[head.row(i)] = {
          unless_broken(broken, exponents.exponent[half]), delta, inverse,
          fmaf(inverse, derivative_t[half] - delta * derivative[half], known[half])};
    }
  }
}

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
      for (int queries = last; queries >= begin; queries -= kQueries, ++step) {
        wait_for_copies<0>();
        __syncthreads();
        if (queries > begin) {
          bring(step + 1, h, queries - kQueries);
        } else if (h < last_head()) {
          bring(step + 1, h + 1, last);
        }
        const uint32_t place = shared + uint32_t(step & 1) * Layout::kBytes;
        const auto columns = TileRows<kSize>::by_column(place);
        const auto rows = TileRows<kSize>::by_row(place);
        const HalfQuery* const of_queries = reinterpret_cast<const HalfQuery*>(shared_rows) +
                                            (step & 1) * kQueries + fragment_column();
        const QuerySum* const of_sums = query_sums + (step & 1) * kQueries + fragment_column();
        const int row = first + in_place(fragment_row());
        const int warp_first = row / 16 * 16, warp_last = min(warp_first + 16, int(p.keys)) - 1;
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
        if (!p.seed && warp_last < head.end_of_keys(queries) && warp_first + 16 <= int(p.keys) &&
            queries + kQueries <= int(p.queries)) {
          each_chunk<kChunks>([&](int c) { take(std::true_type(), kChunks - 1 - c); });
        } else {
          // Those past the last query have no loads.
          const int chunks = min(kChunks, (int(p.queries) - queries + 15) / 16);
          each_chunk<kChunks>([&](int c) {
            if (kChunks - 1 - c < chunks) take(std::false_type(), kChunks - 1 - c);
          });
        }
      }
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

// A lane's sums for the gates' gradients: with y = p f (1 - f) dw of y, y p, y load, y
// previous_load and p (1 - f) dw.
struct RefractoryGateSums {
  float y = 0, y_p = 0, y_load = 0, y_previous = 0, smoulder = 0;
};

// What `queries` needs of a lane's two queries, of which `row` is the first.
template <typename T>
struct QueryState {
  QueryLoads<T> thresholds;
  const float* above[2] = {};
  HalfQuery here[2];
  float inverse_sum[2], inverse_count[2];

  __device__ __forceinline__ QueryState(const AttentionHead<T>& head,
                                        const RefractoryLifAttentionParams& p,
                                        const RefractoryOptions& options,
                                        const HalfThresholds& gate,
                                        const RefractoryHalfScratch& scratch, const float* rest,
                                        int row)
      : thresholds(head, p, options, gate, row) {
    if (scratch.above) pair_rows(head, p.look_ahead, scratch.above, row, above);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half;
      const int64_t at = head.row(head.existing(i));
      here[half] = scratch.rows[at];
      if (rest) here[half].mean += rest[at];
      inverse_sum[half] = QueryExponent(head, i).inverse_sum;
      inverse_count[half] = cuda::inverse_count(p, i);
    }
  }
};

// Grid: as `delta`. Writes what `rows` lacks of E and the gates' gradients, or with E grad_query,
// or, where there are the registers for two results, all of it.
template <typename T, int kSize, bool for_rest, bool for_query>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_backward_queries_kernel(RefractoryLifAttentionParams p,
                                                          RefractoryOptions options,
                                                          RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    using Rows = GradientRows<T, kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    // Of 128 columns too much is in registers for what queries need to be kept there.
    constexpr bool kLate = kSize > 64;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const HalfThresholds gate(p, head.head);
    const AttentionRows<T> grad_out(p.grad_out, block.batch, block.head, p.queries, p.size);

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = (end + kKeys - 1) / kKeys;
    const auto bring = [&](int tile) {
      if (tile >= tiles) return;
      const uint32_t place = shared + uint32_t(tile & 1) * Layout::kBytes;
      bring_rows<kSize>(head.key, tile * kKeys, place);
      bring_rows<kSize>(head.value, tile * kKeys, place + Rows::kValues);
      commit_copies();
    };
    const Rows kept_rows(shared);
    kept_rows.begin(head.query, grad_out, first, p.scale < 0, bring);
    const KeptRows<T, kSize, Rows::kInRegisters> query(kept_rows.query_place),
        grads(kept_rows.grad_place);

    const int first_row = first + fragment_row();
    const float within = static_cast<const float*>(p.within)[block.head];
    const float steep = head.steepness * gate.open, tau_factor = -steep * within;
    using State = QueryState<T>;
    const auto state_of = [&](int row) {
      return State(head, p, options, gate, scratch, for_rest ? nullptr : scratch.rest, row);
    };
    const State state_kept = state_of(first_row);
    RefractoryGateSums sum;
    float mean[2] = {};  // of what `rows` lacks of E
    HalfScale<T> stored;
    float gradient[kSize / 8][4] = {}, mean_key[kSize / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<0>();
      __syncthreads();
      bring(tile + 1);
      const int keys = tile * kKeys;
      // Worked out anew for each tile: the registers are for scores.
      const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
      if (keys >= head.end_of_keys(warp_first + kFragmentRows - 1)) continue;
      const uint32_t place = shared + uint32_t(tile & 1) * Layout::kBytes;
      const auto columns = TileRows<kSize>::by_column(place);
      const auto rows = TileRows<kSize>::by_row(place);
      const auto take = [&](auto whole, int c) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
        const int column = keys + 16 * c;
        const unsigned kept = !kWhole && p.seed ? kept_scores(head, row, column) : 0xffu;
        const auto visible_in = [&](int row) {
          return kWhole ? 0xffu : visible_scores(head, row, column + fragment_column());
        };
        float sums[2][4], bases[2][4], more[2][4] = {}, endings[2][4];
        const auto read = [&](const State& state, unsigned visible, int n) {
          const unsigned of_piece = visible >> 4 * n;
          const int at = column + 8 * n;
          state.thresholds.template begin<kWhole>(at, of_piece, sums[n], bases[n]);
          if (scratch.above) read_piece<kWhole>(state.above, at, of_piece, more[n]);
          read_piece<kWhole>(state.thresholds.block(scratch.ends), at, of_piece, endings[n]);
        };
        float scores[2][4] = {}, t[2][4] = {};
        if (!kLate) {
          const unsigned visible = visible_in(row);
          read(state_kept, visible, 0);
          read(state_kept, visible, 1);
        }
        query.multiply(columns, offset, scores);
        grads.multiply(columns, offset + Rows::kValues, t);
        const unsigned visible = visible_in(in_place(row));
        if (!kWhole) hide_scores(scores, visible);
        uint32_t probabilities[4];
        const int thread = kLate ? in_place(int(threadIdx.x)) : int(threadIdx.x);
        const LoadSums loads(thread);
        const TauSums later_taus(thread);
        const State state = kLate ? state_of(in_place(row)) : state_kept;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (kLate) {
            __syncwarp();
            read(state, visible, n);
          }
          float tau[4], derivatives[4], previous[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float& score = scores[n][m];
            score = probability(score, options.exponents, state.here[m / 2].exponent,
                                state.inverse_sum[m / 2]);
            previous[m] = bases[n][m];
          }
          add_above<kWhole>(head, kept >> 4 * n, options.share, more[n], t[n]);
          state.thresholds.finish(loads, scores[n], sums[n], bases[n]);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const HalfQuery& here = state.here[m / 2];
            const float prob = scores[n][m];
            const GateTerms terms(prob, gate.fire(prob, bases[n][m]), gate.leak, steep);
            const float dw = (t[n][m] - here.delta) * here.inverse_weight_sum;
            const float y = terms.slope * dw;
            const float of_load = y * state.inverse_count[m / 2];
            tau[m] = of_load * tau_factor;
            derivatives[m] = terms.derivative * dw;
            sum.y += y;
            sum.y_p = fmaf(y, prob, sum.y_p);
            sum.y_load = fmaf(of_load, sums[n][m], sum.y_load);
            sum.y_previous = fmaf(y, previous[m], sum.y_previous);
            sum.smoulder = fmaf(terms.smoulder, dw, sum.smoulder);
          }
          if (!p.look_ahead) later_taus.template add_rows<kTauParts<T>>(tau, endings[n]);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            t[n][m] = fmaf(scores[n][m], endings[n][m] - state.here[m / 2].mean, derivatives[m]);
            mean[m / 2] += t[n][m];
          }
          probabilities[2 * n] = rounded_pair<T>(scores[n][0], scores[n][1]);
          probabilities[2 * n + 1] = rounded_pair<T>(scores[n][2], scores[n][3]);
        }
        if constexpr (for_query) {
          stored.apply(t, gradient);
          uint32_t gradients[4];
          left_operand<T>(t, gradients);
          if constexpr (for_rest) {
            add_rows<T, kSize>(gradients, probabilities, rows, offset, gradient, mean_key);
          } else {
            add_rows<T, kSize>(gradients, rows, offset, gradient);
          }
        }
      };
      if (options.in_pairs && !p.seed && keys + kKeys <= head.end_of_keys(warp_first)) {
        each_chunk<kChunks>([&](int c) { take(std::true_type(), c); });
      } else {
        each_chunk<kChunks>([&](int c) { take(std::false_type(), c); });
      }
    }

    // Worked out again, as in the loop the registers are for scores.
    const HalfBlock here = HalfBlock::again(p, p.heads);
    const int query_tile = int(attention_tiles(p.queries)) - 1 - here.tile;
    const int64_t pair = here.batch * p.heads + here.head;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mean[half] = across_lanes<Sum>(mean[half]);
      const int i = query_tile * kTile + fragment_row() + 8 * half;
      if (fragment_column() > 0 || i >= int(p.queries)) continue;
      const int64_t at = pair * p.queries + i;
      if constexpr (for_query) {
        HalfQuery& of_row = scratch.rows[at];
        of_row.mean = for_rest ? mean[half] : scratch.rest[at];
        of_row.delta = static_cast<const float*>(p.row_stats)[p.batch * p.heads * p.queries + at];
      } else {
        scratch.rest[at] = mean[half];
      }
    }
    if constexpr (for_query) {
      const float factor = options.scale / stored.factor;
      scale_rows(gradient, factor, factor);
      if constexpr (for_rest) {
        scale_rows(mean_key, -options.scale * mean[0], -options.scale * mean[1]);
#pragma unroll
        for (int n = 0; n < kSize / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) gradient[n][i] += mean_key[n][i];
        }
      }
      store_rows<T, kSize>(p.grad_query, here.batch, here.head, query_tile * kTile, int(p.queries),
                           int(p.size), gradient);
    }
    if constexpr (!for_rest) return;
    const float threshold = static_cast<const float*>(p.threshold)[here.head];
    const float coupling = static_cast<const float*>(p.within)[here.head];
    const float across = static_cast<const float*>(p.across)[here.head];
    double gates[3] = {double(-steep * sum.y), double(sum.smoulder),
                       double(gate.open * (sum.y_p - threshold * sum.y - coupling * sum.y_load -
                                           across * sum.y_previous))};
    double couplings[2] = {double(-steep * sum.y_load), double(-steep * sum.y_previous)};
    __syncthreads();
    const Team<double> team{kFragmentThreads, shared_memory<double>()};
    team.template reduce<Sum>(gates);
    team.template reduce<Sum>(couplings);
    if (threadIdx.x > 0) return;
    double* const partial = scratch.gates + (pair * attention_tiles(p.queries) + query_tile) * 5;
    for (int n = 0; n < 3; ++n) partial[n] = gates[n];
    for (int n = 0; n < 2; ++n) partial[3 + n] = couplings[n];
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
    const int last_head = (group + 1) * options.shared_by - 1;
    for (int h = group * options.shared_by; h <= last_head; ++h) {
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
      for (int queries = begin; queries < int(p.queries); queries += kQueries, ++step) {
        wait_for_copies<0>();
        __syncthreads();
        if (queries + kQueries < int(p.queries)) {
          bring(step + 1, h, queries + kQueries);
        } else if (h < last_head) {
          bring(step + 1, h + 1, begin);
        }
        const uint32_t place = shared + uint32_t(step & 1) * Layout::kBytes;
        const auto columns = TileRows<kSize>::by_column(place);
        const auto rows = TileRows<kSize>::by_row(place);
        const HalfQuery* const of_queries = reinterpret_cast<const HalfQuery*>(shared_rows) +
                                            (step & 1) * kQueries + fragment_column();
        const int row = first + in_place(fragment_row());
        const int warp_first = row / 16 * 16, warp_last = min(warp_first + 16, int(p.keys)) - 1;
        if (warp_first >= head.end_of_keys(queries + kQueries - 1)) continue;
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
        if (warp_last < head.end_of_keys(queries) && queries + kQueries <= int(p.queries)) {
          each_chunk<kChunks>([&](int c) { take(std::true_type(), c); });
        } else {
          each_chunk<kChunks>([&](int c) { take(std::false_type(), c); });
        }
      }
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

// Grid: 32 keys each x tiles of queries x batch. Writes grad_previous_load, or, if that has one
// row for all queries, its sums over the tile's to scratch.mean_sums.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_previous_kernel(RefractoryLifAttentionParams p,
                                                  RefractoryOptions options,
                                                  RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr uint32_t kTileBytes = kTile * Layout::kRowBytes;
    constexpr uint32_t kKeyBytes = kPreviousKeys * Layout::kRowBytes;
    AttentionBlock block;
    const int keys = block.next(ceil_div(p.keys, kPreviousKeys)) * kPreviousKeys;
    const int query_tile = block.next(attention_tiles(p.queries)), batch = int(block.rest);
    const int first = query_tile * kTile;
    const uint32_t key_place = shared_address(shared_memory<unsigned char>());
    const uint32_t value_place = key_place + kKeyBytes, query_place = value_place + kKeyBytes;
    const uint32_t grad_place = query_place + kTileBytes;
    const LoadSums loads;
    PairTile<kPreviousKeys> sum;
    for (int h = 0; h < int(p.heads); ++h) {
      const AttentionHead<T> head(p, options.keep, batch, h);
      if (keys >= head.end_of_keys(first + kTile - 1)) break;
      bring_rows<kSize, kPreviousKeys>(head.key, keys, key_place);
      bring_rows<kSize, kPreviousKeys>(head.value, keys, value_place);
      bring_rows<kSize, kTile>(head.query, first, query_place);
      bring_rows<kSize, kTile>(AttentionRows<T>(p.grad_out, batch, h, p.queries, p.size), first,
                               grad_place);
      commit_copies();
      const int row = first + in_place(fragment_row()), warp_first = row / 16 * 16;
      const HalfThresholds gate(p, head.head);
      const QueryLoads<T> thresholds(head, p, options, gate, row);
      const float steep = head.steepness * gate.open;
      const float* above[2] = {};
      if (scratch.above) pair_rows(head, p.look_ahead, scratch.above, row, above);
      float exponent[2], inverse_sum[2], delta[2], factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const HalfQuery of_row = scratch.rows[head.row(head.existing(row + 8 * half))];
        exponent[half] = of_row.exponent;
        inverse_sum[half] = QueryExponent(head, row + 8 * half).inverse_sum;
        delta[half] = of_row.delta;
        factor[half] = -steep * static_cast<const float*>(p.across)[h] * of_row.inverse_weight_sum;
      }
      wait_for_copies<0>();
      if (p.scale < 0) negate_rows<kSize>(query_place);
      __syncthreads();
      if (keys < head.end_of_keys(warp_first + kFragmentRows - 1)) {
        const KeptRows<T, kSize, kHalfInRegisters<kSize>> query(query_place), grads(grad_place);
        const auto columns = TileRows<kSize>::by_column(key_place);
        const auto take = [&](auto whole, int c, float (&to)[2][4]) {
          constexpr bool kWhole = decltype(whole)::value;
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          const int column = keys + 16 * c;
          // Worked out for each chunk: the registers are for the sums.
          const int here = in_place(row);
          const unsigned kept = !kWhole && p.seed ? kept_scores(head, here, column) : 0xffu;
          const unsigned visible =
              kWhole ? 0xffu : visible_scores(head, here, column + fragment_column());
          float scores[2][4] = {}, t[2][4] = {};
          query.multiply(columns, offset, scores);
          grads.multiply(columns, offset + kKeyBytes, t);
          if (!kWhole) hide_scores(scores, visible);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const unsigned of_piece = visible >> 4 * n;
            const int at = column + 8 * n;
            float sums[4], bases[4], more[4] = {};
            thresholds.template begin<kWhole>(at, of_piece, sums, bases);
            if (scratch.above) read_piece<kWhole>(above, at, of_piece, more);
            add_above<kWhole>(head, kept >> 4 * n, options.share, more, t[n]);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              float& score = scores[n][m];
              score = probability(score, options.exponents, exponent[m / 2], inverse_sum[m / 2]);
            }
            thresholds.finish(loads, scores[n], sums, bases);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
              const float prob = scores[n][m];
              const GateTerms terms(prob, gate.fire(prob, bases[m]), gate.leak, steep);
              to[n][m] = fmaf(terms.slope * (t[n][m] - delta[m / 2]), factor[m / 2], to[n][m]);
            }
          }
        };
        if (options.in_pairs && !p.seed && keys + kPreviousKeys <= head.end_of_keys(warp_first)) {
#pragma unroll
          for (int c = 0; c < kPreviousKeys / 16; ++c) take(std::true_type(), c, sum.values[c]);
        } else {
#pragma unroll
          for (int c = 0; c < kPreviousKeys / 16; ++c) take(std::false_type(), c, sum.values[c]);
        }
      }
      // The next head's rows take the place of these.
      __syncthreads();
    }
    if (p.one_previous_row) {
      sum.sum_queries(
          p, keys, shared_memory<float>(),
          scratch.mean_sums + (batch * attention_tiles(p.queries) + query_tile) * p.keys);
    } else {
      sum.store(p, options.in_pairs, batch, first, keys, static_cast<float*>(p.grad_previous_load));
    }
  }
}

}  // namespace cuda
}  // namespace ember
