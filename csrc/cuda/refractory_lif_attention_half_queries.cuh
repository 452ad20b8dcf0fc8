// Kernels of the backward pass of refractory LIF attention of 16-bit types with queries as rows:
// `delta`, `queries` and `previous` (refractory_lif_attention_half_backward.cuh).
#pragma once

#include "refractory_half_gradients.cuh"

namespace ember {
namespace cuda {

// Keys that a block of `previous` has, with all heads: of more, its sums would take too many
// registers.
constexpr int kPreviousKeys = 32;

// 64 queries and their gradients, which a block keeps and takes past all keys and values.
template <typename T, int kSize>
struct GradientQueries {
  using Layout = TileLayout<kSize>;
  static constexpr uint32_t kValues = 2 * Layout::kBytes;  // from a tile of keys to their values
  static constexpr bool kInRegisters = kHalfInRegisters<kSize>;
  using Kept = KeptRows<T, kSize, kInRegisters>;

  int first;
  AttentionHead<T> head;
  GradientGate gate;
  uint32_t shared, query_place, grad_place;
  int tiles;

  __device__ __forceinline__ GradientQueries(const RefractoryLifAttentionParams& p,
                                             const RefractoryOptions& options)
      : GradientQueries(p, options, HalfBlock(p, p.heads)) {}

  // Starts to bring a tile of keys and values.
  __device__ __forceinline__ void bring(int tile) const {
    if (tile >= tiles) return;
    const uint32_t place = shared + uint32_t(tile & 1) * Layout::kBytes;
    bring_rows<kSize>(head.key, tile * Layout::kRows, place);
    bring_rows<kSize>(head.value, tile * Layout::kRows, place + kValues);
    commit_copies();
  }
  // Calls take(tile) for each of them.
  template <typename Take>
  __device__ __forceinline__ void walk(const Take& take) const {
    walk_keys<kSize>(head, first, tiles, 0, [&](int tile) { bring(tile); }, take);
  }

 private:
  __device__ __forceinline__ GradientQueries(const RefractoryLifAttentionParams& p,
                                             const RefractoryOptions& options,
                                             const HalfBlock& block)
      : first((int(attention_tiles(p.queries)) - 1 - block.tile) * kTile),
        head(p, options.keep, block.batch, block.head),
        gate(p, block.head),
        shared(shared_address(shared_memory<unsigned char>())),
        query_place(shared + (kInRegisters ? 1 : 4) * Layout::kBytes),
        grad_place(kInRegisters ? shared + kValues + Layout::kBytes
                                : query_place + kTile * Layout::kRowBytes),
        tiles((head.end_of_keys(first + kTile - 1) + Layout::kRows - 1) / Layout::kRows) {
    bring_rows<kSize, kTile>(head.query, first, query_place);
    bring_rows<kSize, kTile>(
        AttentionRows<T>(p.grad_out, block.batch, block.head, p.queries, p.size), first,
        grad_place);
    commit_copies();
    bring(0);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(query_place);
    __syncthreads();
  }
};

// Grid: tiles of queries, the last ones first, x batch x heads. Writes `rows`.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_delta_kernel(RefractoryLifAttentionParams p,
                                               RefractoryOptions options,
                                               RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    using Block = GradientQueries<T, kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    const Block block(p, options);
    const int first = block.first;
    const AttentionHead<T>& head = block.head;
    const GradientGate& gate = block.gate;
    const typename Block::Kept query(block.query_place), grads(block.grad_place);

    const LoadSums loads;
    const QueryExponents exponents(head, loads, first + fragment_row());
    const QueryLoads<T> thresholds(head, p, options, gate, first + fragment_row());
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
    block.walk([&](const KeyTile& tile) {
      const int row = tile.row;
      const auto columns = TileRows<kSize>::by_column(block.shared + tile.place);
      const auto take = [&](auto whole, int c) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
        const int column = tile.keys + 16 * c;
        const unsigned kept = !kWhole && p.seed ? kept_scores(head, row, column) : 0xffu;
        const unsigned visible =
            kWhole ? 0xffu : visible_scores(head, row, column + fragment_column());
        float sums[2][4], bases[2][4], more[2][4] = {}, endings[2][4] = {};
        thresholds.template begin<kWhole>(column, visible, sums, bases);
        if (scratch.above) read_pairs<kWhole>(above, column, visible, more);
        if (ending) read_pairs<kWhole>(ending, column, visible, endings);
        float scores[2][4] = {}, t[2][4] = {};
        query.multiply(columns, offset, scores);
        grads.multiply(columns, offset + Block::kValues, t);
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
          const GateTerms terms(prob, gate.fire(prob, bases[n / 4][n % 4]), gate.leak, gate.steep);
          weight[half] += terms.weight;
          weight_t[half] = fmaf(terms.weight, s, weight_t[half]);
          derivative[half] += terms.derivative;
          derivative_t[half] = fmaf(terms.derivative, s, derivative_t[half]);
          known[half] = fmaf(prob, endings[n / 4][n % 4], known[half]);
        }
      };
      each_chunk<kChunks>(options.in_pairs && !p.seed && tile.all_visible(head, kKeys), take);
    });
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

// What `delta` has written of query i. All probabilities of one that is not there are 0.
template <typename T>
__device__ __forceinline__ HalfQuery query_row(const AttentionHead<T>& head, const HalfQuery* rows,
                                               int i) {
  if (i < int(head.p.queries)) return rows[head.row(i)];
  return {kInfinity, 0, 0, 0};
}

// A lane's sums for the gates' gradients: with y = p f (1 - f) dw of y, y p, y load, y
// previous_load and p (1 - f) dw. The steepness's gradient, of y (p - threshold), is a difference
// of these sums, which are up to k threshold times as large: by that factor rounding of fp32 counts
// more. As it does for p, of which f takes k (p - threshold), sums of differences gain nothing.
struct RefractoryGateSums {
  float y = 0, y_p = 0, y_load = 0, y_previous = 0, smoulder = 0;

  // Writes the block's part of the gradients of threshold, leak, steepness, within and across.
  __device__ __forceinline__ void store(const RefractoryLifAttentionParams& p,
                                        const GradientGate& gate, int head, double* to) const {
    const float threshold = static_cast<const float*>(p.threshold)[head];
    const float coupling = static_cast<const float*>(p.within)[head];
    const float across = static_cast<const float*>(p.across)[head];
    double gates[3] = {
        double(-gate.steep * y), double(smoulder),
        double(gate.open * (y_p - threshold * y - coupling * y_load - across * y_previous))};
    double couplings[2] = {double(-gate.steep * y_load), double(-gate.steep * y_previous)};
    __syncthreads();
    const Team<double> team{kFragmentThreads, shared_memory<double>()};
    team.template reduce<Sum>(gates);
    team.template reduce<Sum>(couplings);
    if (threadIdx.x > 0) return;
    for (int n = 0; n < 3; ++n) to[n] = gates[n];
    for (int n = 0; n < 2; ++n) to[3 + n] = couplings[n];
  }
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
      here[half] = query_row(head, scratch.rows, i);
      if (rest) here[half].mean += rest[head.row(head.existing(i))];
      inverse_sum[half] = QueryExponent(head, i).inverse_sum;
      inverse_count[half] = cuda::inverse_count(p, i);
    }
  }
};

// Adds up what `rows` lacks of E over lanes, and leaves it to the next launches: in `rows` itself
// once it is of no more use to `queries`, or else in `rest`.
template <bool for_rest, bool for_query>
__device__ __forceinline__ void store_means(const RefractoryLifAttentionParams& p,
                                            const RefractoryHalfScratch& scratch, int64_t pair,
                                            int first, float (&mean)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mean[half] = across_lanes<Sum>(mean[half]);
    const int i = first + fragment_row() + 8 * half;
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
}

// Grid: as `delta`. Writes what `rows` lacks of E and the gates' gradients, or with E grad_query,
// or, where there are the registers for two results, all of it. Of two launches the first one
// leaves in grad_query the mean of keys at which the second one centres the gradient.
template <typename T, int kSize, bool for_rest, bool for_query>
__global__ void __launch_bounds__(kFragmentThreads, 2)
    refractory_lif_attention_half_backward_queries_kernel(RefractoryLifAttentionParams p,
                                                          RefractoryOptions options,
                                                          RefractoryHalfScratch scratch) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    using Block = GradientQueries<T, kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    // Of 128 columns too much is in registers for what queries need to be kept there.
    constexpr bool kLate = kSize > 64;
    const Block block(p, options);
    const int first = block.first;
    const AttentionHead<T>& head = block.head;
    const GradientGate& gate = block.gate;
    const typename Block::Kept query(block.query_place), grads(block.grad_place);

    const int first_row = first + fragment_row();
    using State = QueryState<T>;
    const auto state_of = [&](int row) {
      return State(head, p, options, gate, scratch, for_rest ? nullptr : scratch.rest, row);
    };
    const State state_kept = state_of(first_row);
    RefractoryGateSums sum;
    float mean[2] = {};  // of what `rows` lacks of E
    HalfScale<T> stored;
    RoundedSums<T> rounded;
    float gradient[kSize / 8][4] = {}, mean_key[kSize / 8][4] = {};
    block.walk([&](const KeyTile& tile) {
      const int row = tile.row;
      const uint32_t place = block.shared + tile.place;
      const auto columns = TileRows<kSize>::by_column(place);
      const auto rows = TileRows<kSize>::by_row(place);
      const auto take = [&](auto whole, int c) {
        constexpr bool kWhole = decltype(whole)::value;
        const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
        const int column = tile.keys + 16 * c;
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
        grads.multiply(columns, offset + Block::kValues, t);
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
            const GateTerms terms(prob, gate.fire(prob, bases[n][m]), gate.leak, gate.steep);
            const float dw = (t[n][m] - here.delta) * here.inverse_weight_sum;
            const float y = terms.slope * dw;
            const float of_load = y * state.inverse_count[m / 2];
            tau[m] = of_load * gate.tau;
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
        uint32_t gradients[4] = {};
        if constexpr (for_query) {
          stored.apply(t, gradient, rounded);
          left_operand<T>(t, gradients);
        }
        rounded.add(gradients, probabilities);
        if constexpr (for_query && for_rest) {
          add_rows<T, kSize>(gradients, probabilities, rows, offset, gradient, mean_key);
        } else if constexpr (for_query) {
          add_rows<T, kSize>(gradients, rows, offset, gradient);
        } else {
          add_rows<T, kSize>(probabilities, rows, offset, mean_key);
        }
      };
      each_chunk<kChunks>(options.in_pairs && !p.seed && tile.all_visible(head, kKeys), take);
    });

    // Worked out again, as in the loop the registers are for scores.
    const HalfBlock here = HalfBlock::again(p, p.heads);
    const int query_tile = int(attention_tiles(p.queries)) - 1 - here.tile;
    const int64_t pair = here.batch * p.heads + here.head;
    const int query_first = query_tile * kTile;
    store_means<for_rest, for_query>(p, scratch, pair, query_first, mean);
    if constexpr (for_rest) {
      rounded.divide(mean_key);
    } else {
      load_rows<T, kSize>(p.grad_query, here.batch, here.head, query_first, int(p.queries),
                          int(p.size), mean_key);
    }
    if constexpr (for_query) {
      rounded.centre(mean_key, gradient);
      const float factor = options.scale / stored.factor;
      scale_rows(gradient, factor, factor);
      store_rows<T, kSize>(p.grad_query, here.batch, here.head, query_first, int(p.queries),
                           int(p.size), gradient);
    } else {
      // Until the gradient takes their place.
      store_rows<T, kSize>(p.grad_query, here.batch, here.head, query_first, int(p.queries),
                           int(p.size), mean_key);
    }
    if constexpr (for_rest) {
      sum.store(p, gate, here.head,
                scratch.gates + (pair * attention_tiles(p.queries) + query_tile) * 5);
    }
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
      const GradientGate gate(p, head.head);
      const QueryLoads<T> thresholds(head, p, options, gate, row);
      const float* above[2] = {};
      if (scratch.above) pair_rows(head, p.look_ahead, scratch.above, row, above);
      float exponent[2], inverse_sum[2], delta[2], factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const HalfQuery of_row = query_row(head, scratch.rows, row + 8 * half);
        exponent[half] = of_row.exponent;
        inverse_sum[half] = QueryExponent(head, row + 8 * half).inverse_sum;
        delta[half] = of_row.delta;
        factor[half] =
            -gate.steep * static_cast<const float*>(p.across)[h] * of_row.inverse_weight_sum;
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
              const GateTerms terms(prob, gate.fire(prob, bases[m]), gate.leak, gate.steep);
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
