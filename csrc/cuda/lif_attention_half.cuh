// LIF attention of 16-bit types up to 128 columns, whose scores stay in registers
// (attention_fragments.cuh).
//
// With the same formulas as lif_attention.cuh, and exponentials as powers of two. A block takes 64
// queries past all keys twice forward, and once backward: with delta known from forward's result,
//
//   grad_weight_j = (t_j - delta) / R,  E = sum_j p_j h_j grad_weight_j
//   grad_query = sum_j (p_j h_j grad_weight_j) key_j - E sum_j p_j key_j
//
// in which E may come last: as the ratio of the sums of both factors, as they were rounded for the
// products with keys (RoundedSums). That delta is rounded as the result is, too coarsely for the
// gates' gradients, which are of fp32. What it errs by follows from the same sweep and is taken out
// of them. Then 64 keys are taken past all queries.
//
// Tiles wholly inside the mask, without dropout, take a loop without tests.
#pragma once

#include "half_scores.cuh"

namespace ember {
namespace cuda {

// Grid: tiles of queries, the last ones first as they see most keys, x batch x heads.
template <typename T, int kSize>
__global__ void __launch_bounds__(kFragmentThreads, kSize > 64 ? 2 : 3)
    lif_attention_half_forward_kernel(LifAttentionParams p, HalfOptions options) {
  if constexpr (has_fragments()) {
    using Layout = TileLayout<kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    const HalfBlock block(p, p.heads);
    const int first = (int(attention_tiles(p.queries)) - 1 - block.tile) * kTile;
    const AttentionHead<T> head(p, options.keep, block.batch, block.head);
    const HalfGate<T> gate(head);

    const uint32_t shared = shared_address(shared_memory<unsigned char>());
    const uint32_t key_tiles = shared, value_tiles = shared + 2 * Layout::kBytes;
    const int end = head.end_of_keys(first + kTile - 1);
    const int tiles = end > 0 ? (end + kKeys - 1) / kKeys : 0;
    // Steps past the keys, and past keys and values.
    const auto bring = [&](int step) {
      if (step >= 2 * tiles) return;
      const uint32_t place = uint32_t(step & 1) * Layout::kBytes;
      const int keys = (step < tiles ? step : step - tiles) * kKeys;
      bring_rows<kSize>(head.key, keys, key_tiles + place);
      if (step >= tiles) bring_rows<kSize>(head.value, keys, value_tiles + place);
      commit_copies();
    };
    const uint32_t query_place =
        kHalfInRegisters<kSize> ? value_tiles + Layout::kBytes : shared + 4 * Layout::kBytes;
    bring_rows<kSize, kTile>(head.query, first, query_place);
    commit_copies();
    bring(0);
    wait_for_copies<0>();
    if (p.scale < 0) negate_rows<kSize>(query_place);
    __syncthreads();
    const KeptRows<T, kSize, true> query(query_place);

    HalfMaxima maxima;
    maxima.sweep<kSize>(p, head, query, key_tiles, first, tiles, options.exponents, bring);

    // Stored weights are p / unit. A row's largest weight, which belongs to its largest score, says
    // how its weights are scaled.
    float largest[2], inverse_sum[2], exponent[2], unit[2], rate[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maxima.finish(half, options, largest[half], inverse_sum[half]);
      exponent[half] = largest_exponent(largest[half]);
      const AttentionScale<float> stored =
          AttentionProducts<T, true>::scale_for(gate.gate(inverse_sum[half]));
      unit[half] = inverse_sum[half] * stored.unit;
      rate[half] = gate.rate * unit[half];
      exponent[half] -= log2f(stored.factor);
    }

    float weight_sum[2] = {}, rounded_sum[4] = {}, out[kSize / 8][4] = {};
    const uint32_t ones = rounded_pair<T>(1, 1);
    // Weights of 16 keys.
    const auto weigh = [&](auto whole, float (&scores)[2][4]) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float& score = scores[n / 4][n % 4];
        const int half = n / 2 % 2;
        const float e = fast_exp2(fmaf(score, options.exponents, -exponent[half]));
        const float fire = gate.template fire<decltype(whole)::value>(e, rate[half]);
        score = e * fmaf(fire, gate.open, gate.leak);
        weight_sum[half] += score;
      }
    };
    walk_keys<kSize>(head, first, tiles, tiles, bring, [&](const KeyTile& tile) {
      const bool easy = !p.mask && !p.seed && !gate.bounded;
      const auto columns = TileRows<kSize>::by_column(key_tiles + tile.place);
      const auto rows = TileRows<kSize>::by_row(value_tiles + tile.place);
      if (easy && tile.all_visible(head, kKeys)) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          float scores[2][4] = {};
          query.multiply(columns, offset, scores);
          weigh(std::true_type(), scores);
          uint32_t weights[4];
          left_operand<T>(scores, weights);
          multiply_add<T>(rounded_sum, weights, ones, ones, rounded_sum);
          add_rows<T, kSize>(weights, rows, offset, out);
        }
      } else {
#pragma unroll 1
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t offset = uint32_t(c * 16 * Layout::kRowBytes);
          float scores[2][4] = {};
          query.multiply(columns, offset, scores);
          hide_scores(scores,
                      visible_scores(head, tile.row, tile.keys + 16 * c + fragment_column()));
          weigh(std::false_type(), scores);
          uint32_t weights[4];
          left_operand<T>(scores, weights);
          multiply_add<T>(rounded_sum, weights, ones, ones, rounded_sum);
          if (p.seed) {
            const unsigned kept = kept_scores(head, tile.row, tile.keys + 16 * c);
#pragma unroll
            for (int n = 0; n < 4; ++n) weights[n] = kept_pair(weights[n], kept >> 2 * n);
          }
          add_rows<T, kSize>(weights, rows, offset, out);
        }
      }
    });

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool any = inverse_sum[half] != 0;
      const float total = across_lanes<Sum>(weight_sum[half]) * unit[half];
      // All columns of the product with ones are alike.
      const float rounded_total = rounded_sum[2 * half] * unit[half];
      factor[half] = any ? unit[half] / (rounded_total + options.eps) * options.keep_factor : 0.0f;
      const int query_row = first + fragment_row() + 8 * half;
      if (fragment_column() == 0 && query_row < int(p.queries)) {
        const int64_t count = p.batch * p.heads * p.queries;
        float* stats = static_cast<float*>(p.row_stats) + head.row(query_row);
        stats[0] = largest[half];
        stats[count] = inverse_sum[half];
        stats[2 * count] = any ? 1 / (total + options.eps) : 0.0f;
      }
    }
    scale_rows(out, factor[0], factor[1]);
    store_rows<T, kSize>(p.out, block.batch, block.head, first, int(p.queries), int(p.size), out);
  }
}

}  // namespace cuda
}  // namespace ember
