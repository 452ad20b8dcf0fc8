// LIF attention on a GPU, without a matrix of scores in memory.
//
//   p = exp(s - m) / l;  f = sigmoid(k (p - theta));  g = f + lambda (1 - f);  w = p g
//   out = sum_j w_j M_j v_j / R,  R = sum_j w_j + eps,  M the dropout mask over 1 - dropout
//
// A block takes 64 queries past all keys, 64 at a time, twice: first for m and l, then, p being
// exact, for w, R and out together. Backward takes the queries past the keys twice as well, with
// t_j = M_j (grad_out . v_j) and h = d(p g)/dp:
//   first   delta = sum_j w_j t_j / R,  E = sum_j p_j h_j (t_j - delta) / R
//   then    ds_j = p_j (h_j (t_j - delta) / R - E), grad_query and the gates' gradients
// and then 64 keys past all queries for grad_key and grad_value. No sum is shared between blocks
// but those of the gates and the summary, which a second kernel adds in a fixed order.
//
// Scores are computed 64 x 64 at a time (attention_products.cuh), sizes above 64 piece by piece,
// and each 64 columns of a result are a block of their own. With `matrix_units` products of 16-bit
// types and, on request, of fp32 run on the GPU's matrix units, which take weights and gradients of
// scores rounded to T, or to tf32; everything else stays in C. Of 16-bit types these kernels take
// what those of lif_attention_half.cuh leave: more than 128 columns, rows that are not aligned, and
// sm_75.
#pragma once

#include "../common/lif_attention.h"
#include "../common/lif_gate_math.h"
#include "../common/philox.h"
#include "attention_products.cuh"

namespace ember {
namespace cuda {

// What a block works on, counted down from its index.
struct AttentionBlock {
  unsigned rest;
  __device__ __forceinline__ AttentionBlock() : rest(blockIdx.x) {}
  __device__ __forceinline__ int next(int64_t count) {
    const unsigned index = rest % unsigned(count);
    rest /= unsigned(count);
    return int(index);
  }
};

// What dropout keeps: words from `limit` on, multiplied by `factor`.
struct AttentionDropout {
  uint32_t limit;
  double factor;
};

inline AttentionDropout dropout_of(const LifAttentionParams& p) {
  return {dropout_limit(p.dropout), 1 / (1 - p.dropout)};
}

// Shared memory of a kernel that only adds up doubles over a block.
constexpr size_t kReductionBytes = 3 * kAttentionThreads / kWarp * sizeof(double);

// A product that no compiler may fuse with what is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}

// One query head and all that its scores and weights depend on.
template <typename T>
struct AttentionHead {
  using C = compute_t<T>;

  const LifAttentionParams& p;
  int batch, head, group;
  AttentionRows<T> query, key, value;
  C threshold, leak, steepness, scale, keep_factor;
  uint32_t keep_limit;

  __device__ __forceinline__ AttentionHead(const LifAttentionParams& p, AttentionDropout keep,
                                           int batch, int head)
      : p(p),
        batch(batch),
        head(head),
        group(int(unsigned(head) / (unsigned(p.heads) / unsigned(p.groups)))),
        query(p.query, batch, head, p.queries, p.size),
        key(p.key, batch, group, p.keys, p.size),
        value(p.value, batch, group, p.keys, p.size),
        threshold(static_cast<const C*>(p.threshold)[head]),
        leak(static_cast<const C*>(p.leak)[head]),
        steepness(static_cast<const C*>(p.steepness)[head]),
        scale(C(p.scale)),
        keep_factor(C(keep.factor)),
        keep_limit(keep.limit) {}

  // Element of a [B, H, Q] array.
  __device__ __forceinline__ int64_t row(int i) const {
    return (batch * p.heads + head) * p.queries + i;
  }

  // Query i, or for one past the end the last, whose row no other tile's block writes.
  __device__ __forceinline__ int existing(int i) const {
    return i < int(p.queries) ? i : int(p.queries) - 1;
  }

  __device__ __forceinline__ bool masked_in(int i, int j) const {
    return p.mask[batch * p.mask_strides[0] + head * p.mask_strides[1] + i * p.mask_strides[2] +
                  j * p.mask_strides[3]];
  }

  // Past the last key that a query up to `last` sees.
  __device__ __forceinline__ int end_of_keys(int last) const {
    const int keys = int(p.keys), end = last + 1 + keys - int(p.queries);
    return p.causal && end < keys ? end : keys;
  }

  // Which of queries i ... i + 3 see which of keys j ... j + 3: bit 4 * query + key. One test does
  // for most patches, which lie wholly inside.
  __device__ __forceinline__ unsigned visible_patch(int i, int j) const {
    const bool inside = i + kPatch <= int(p.queries) && j + kPatch <= end_of_keys(i);
    if (inside && !p.mask) return (1u << kPatch * kPatch) - 1;
    unsigned bits = 0;
    // Unrolled, these rarer cases would take registers from the others.
#pragma unroll 1
    for (int q = 0; q < kPatch; ++q) {
      const int keys = i + q < int(p.queries) ? min(end_of_keys(i + q) - j, kPatch) : 0;
#pragma unroll 1
      for (int k = 0; k < keys; ++k) {
        bits |= unsigned(!p.mask || masked_in(i + q, j + k)) << (q * kPatch + k);
      }
    }
    return bits;
  }

  // e^x. What the faster function errs by is lost in a result of 16 bits.
  static __device__ __forceinline__ C exponential(C x) {
    if constexpr (sizeof(T) == 2) {
      return __expf(x > C(87) ? C(87) : x);  // of NaN, NaN
    } else {
      return ember::exponential(x);
    }
  }

  // The score of a product of query and key. Everywhere it is rounded alike: the exponential of a
  // row's largest is then exactly 1.
  __device__ __forceinline__ C score(C product) const { return rounded_product(product, scale); }

  // Whether dropout keeps the weights of query i and the keys j ... j + 3; j is a multiple of 4. M
  // is keep_factor where it does.
  __device__ __forceinline__ void dropout(int i, int j, bool (&kept)[kPatch]) const {
    if (!p.seed) {
#pragma unroll
      for (int n = 0; n < kPatch; ++n) kept[n] = true;
      return;
    }
    uint32_t words[kPatch] = {uint32_t(j / 4), uint32_t(i), uint32_t(head), uint32_t(batch)};
    philox(uint64_t(*p.seed), words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int n = 0; n < kPatch; ++n) kept[n] = words[n] >= keep_limit;
  }
};

// Of what visible_patch() returns, whether the patch's query sees the key.
__device__ __forceinline__ bool seen(unsigned visible, int query, int key) {
  return visible >> (query * kPatch + key) & 1;
}

// The gate on one probability.
template <typename C>
struct GatedProbability {
  C p, smoulder, gate, slope, derivative;  // 1 - f, g, dg/dz, h = d(p g)/dp

  template <typename T>
  __device__ __forceinline__ GatedProbability(const AttentionHead<T>& head, C p)
      : GatedProbability(head, p, head.threshold) {}

  template <typename T>
  __device__ __forceinline__ GatedProbability(const AttentionHead<T>& head, C p, C threshold)
      : p(p) {
    const C odds = head.exponential(gate_exponent(p, threshold, head.steepness));
    const C fire = quotient(C(1), C(1) + odds);
    smoulder = odds * fire;
    gate = gate_value(fire, smoulder, head.leak);
    slope = gate_slope(fire, smoulder, head.leak);
    derivative = gate_dy_dx(p, head.steepness, gate, slope);
  }
};

template <typename C>
__device__ __forceinline__ void scale_patch(C (&values)[kPatch][kPatch], C factor) {
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
#pragma unroll
    for (int c = 0; c < kPatch; ++c) values[r][c] *= factor;
  }
}

// Writes a patch of a result whose rows are tokens.
template <typename T>
__device__ __forceinline__ void store_patch(const AttentionTensor& t, int64_t batch, int64_t head,
                                            int token, int64_t tokens, int column, int64_t columns,
                                            const compute_t<T> (&values)[kPatch][kPatch]) {
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      if (token + r < int(tokens) && column + c < int(columns)) {
        T* to = static_cast<T*>(t.data) + batch * t.batch + head * t.head + (token + r) * t.token +
                column + c;
        narrow(values[r][c], *to);
      }
    }
  }
}

// Of the patch's queries in the tile from `first` on: the largest score of the keys before `end`,
// and 1 over the sum of exp(score - largest); 0 if there is none.
template <typename T, typename Products, typename C>
__device__ __forceinline__ void row_maxima(Products& products, const AttentionHead<T>& head,
                                           int first, int end, C (&largest)[kPatch],
                                           C (&inverse_sum)[kPatch]) {
  const C lowest = C(sizeof(C) == 8 ? -1.7e308 : -3.4e38);
  const int row = first + patch_row();
  C scores[kPatch][kPatch], sum[kPatch];  // over this thread's keys, then over all
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    largest[r] = lowest;
    sum[r] = 0;
  }
  for (int keys = 0; keys < end; keys += kTile) {
    products.rows(head.query, first, head.key, keys, scores);
    const unsigned visible = head.visible_patch(row, keys + patch_column());
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      C most = largest[r];
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        scores[r][c] = seen(visible, r, c) ? head.score(scores[r][c]) : lowest;
        most = Maximum::of(scores[r][c], most);
      }
      sum[r] *= head.exponential(largest[r] - most);
      largest[r] = most;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const C e = head.exponential(scores[r][c] - most);
        sum[r] += seen(visible, r, c) ? e : C(0);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C most = across_columns<Maximum>(largest[r]);
    const C total = across_columns<Sum>(sum[r] * head.exponential(largest[r] - most));
    largest[r] = most;
    inverse_sum[r] = total == 0 ? C(0) : C(1) / total;
  }
}

// Blocks that share the columns of a result; one also where there are none, for the rows' sums.
__host__ __device__ __forceinline__ int64_t attention_columns(const LifAttentionParams& p) {
  return attention_tiles(p.size > 0 ? p.size : 1);
}

// Grid: batch x heads x tiles of queries x 64 columns of the result.
template <typename T, bool matrix_units>
__global__ void __launch_bounds__(kAttentionThreads, AttentionProductsFor<T, matrix_units>::kBlocks)
    lif_attention_forward_kernel(LifAttentionParams p, AttentionDropout keep) {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units>;
  Products products;
  AttentionBlock block;
  const int column = block.next(attention_columns(p)) * kTile;
  const int first = block.next(attention_tiles(p.queries)) * kTile;
  const int head_index = block.next(p.heads);
  const AttentionHead<T> head(p, keep, int(block.rest), head_index);
  const int end = head.end_of_keys(first + kTile - 1), row = first + patch_row();
  C scores[kPatch][kPatch], largest[kPatch], inverse_sum[kPatch];
  row_maxima(products, head, first, end, largest, inverse_sum);

  // A row's largest weight, which belongs to its largest score, says how its weights are scaled.
  C factors[kPatch];
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    factors[r] = Products::scale_for(GatedProbability<C>(head, inverse_sum[r]).gate).factor;
  }

  // Rows are divided by the sum of what multiplies the values: their weights, rounded or not, then
  // still add up to 1.
  C weight_sum[kPatch] = {}, rounded_sum[kPatch] = {};
  typename Products::Result weighted;
  for (int keys = 0; keys < end; keys += kTile) {
    products.rows(head.query, first, head.key, keys, scores);
    const unsigned visible = head.visible_patch(row, keys + patch_column());
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      bool kept[kPatch];
      head.dropout(row + r, keys + patch_column(), kept);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const C e = head.exponential(head.score(scores[r][c]) - largest[r]);
        // Times the row's sum of exponentials.
        C weight = e * GatedProbability<C>(head, e * inverse_sum[r]).gate;
        if (!seen(visible, r, c)) weight = 0;
        weight_sum[r] += weight;
        weight = Products::rounded(weight * factors[r]);
        rounded_sum[r] += weight;
        scores[r][c] = kept[c] ? weight : C(0);
      }
    }
    products.store(scores);
    products.add_tile(head.value, keys, column, weighted);
  }
  C out[kPatch][kPatch];
  products.read(weighted, out);
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C total = across_columns<Sum>(weight_sum[r]) * inverse_sum[r];
    const C inverse = inverse_sum[r] == 0 ? C(0) : C(1) / (total + C(p.eps));
    const C unit = inverse_sum[r] / factors[r];
    const C rounded_total = across_columns<Sum>(rounded_sum[r]) * unit;
    const C factor =
        inverse_sum[r] == 0 ? C(0) : unit / (rounded_total + C(p.eps)) * head.keep_factor;
#pragma unroll
    for (int c = 0; c < kPatch; ++c) out[r][c] *= factor;
    if (column == 0 && patch_column() == 0 && row + r < int(p.queries)) {
      const int64_t rows = p.batch * p.heads * p.queries;
      C* stats = static_cast<C*>(p.row_stats) + head.row(row + r);
      stats[0] = largest[r];
      stats[rows] = inverse_sum[r];
      stats[2 * rows] = inverse;
    }
  }
  store_patch<T>(p.out, head.batch, head.head, row, p.queries, column + patch_column(), p.size,
                 out);
}

// What forward has left of a query.
template <typename C>
struct AttentionRowStats {
  C largest, inverse_sum, inverse_weight_sum;

  template <typename T>
  __device__ __forceinline__ AttentionRowStats(const AttentionHead<T>& head, int i) {
    const LifAttentionParams& p = head.p;
    const int64_t rows = p.batch * p.heads * p.queries;
    const C* stats = static_cast<const C*>(p.row_stats) + head.row(head.existing(i));
    largest = stats[0];
    inverse_sum = stats[rows];
    inverse_weight_sum = stats[2 * rows];
  }

  template <typename T>
  __device__ __forceinline__ C probability(const AttentionHead<T>& head, C product) const {
    return head.exponential(head.score(product) - largest) * inverse_sum;
  }
};

// Grid: batch x heads x tiles of queries x 64 columns. Writes grad_query, `row_gradients` [2, B, H,
// Q] (delta and E) and `gate_partials` [B, H, tiles of queries, 3].
template <typename T, bool matrix_units>
__global__ void __launch_bounds__(kAttentionThreads, AttentionProductsFor<T, matrix_units>::kBlocks)
    lif_attention_backward_queries_kernel(LifAttentionParams p, AttentionDropout keep,
                                          compute_t<T>* row_gradients, double* gate_partials) {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units>;
  Products products;
  AttentionBlock block;
  const int column = block.next(attention_columns(p)) * kTile;
  const int tiles = int(attention_tiles(p.queries)), tile = block.next(tiles);
  const int head_index = block.next(p.heads);
  const AttentionHead<T> head(p, keep, int(block.rest), head_index);
  const AttentionRows<T> grad_out(p.grad_out, head.batch, head.head, p.queries, p.size);
  const int first = tile * kTile, row = first + patch_row();
  const int end = head.end_of_keys(first + kTile - 1);

  C scores[kPatch][kPatch], through_value[kPatch][kPatch];
  C delta[kPatch] = {}, with_value[kPatch] = {}, without[kPatch] = {};
  for (int keys = 0; keys < end; keys += kTile) {
    products.rows(head.query, first, head.key, keys, scores);
    products.rows(grad_out, first, head.value, keys, through_value);
    const unsigned visible = head.visible_patch(row, keys + patch_column());
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const AttentionRowStats<C> stats(head, row + r);
      bool kept[kPatch];
      head.dropout(row + r, keys + patch_column(), kept);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const C chance = stats.probability(head, scores[r][c]);
        const GatedProbability<C> gated(head, seen(visible, r, c) ? chance : C(0));
        const C t = kept[c] ? through_value[r][c] * head.keep_factor : C(0);
        delta[r] += gated.p * gated.gate * t;
        with_value[r] += gated.p * gated.derivative * t;
        without[r] += gated.p * gated.derivative;
      }
    }
  }
  C mean[kPatch];
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C inverse = AttentionRowStats<C>(head, row + r).inverse_weight_sum;
    delta[r] = across_columns<Sum>(delta[r]) * inverse;
    mean[r] =
        (across_columns<Sum>(with_value[r]) - delta[r] * across_columns<Sum>(without[r])) * inverse;
    if (column == 0 && patch_column() == 0 && row + r < int(p.queries)) {
      row_gradients[head.row(row + r)] = delta[r];
      row_gradients[p.batch * p.heads * p.queries + head.row(row + r)] = mean[r];
    }
  }

  double gates[3] = {};
  typename Products::Result weighted;
  for (int keys = 0; keys < end; keys += kTile) {
    products.rows(head.query, first, head.key, keys, scores);
    products.rows(grad_out, first, head.value, keys, through_value);
    const unsigned visible = head.visible_patch(row, keys + patch_column());
    C tile_gates[3] = {};
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const AttentionRowStats<C> stats(head, row + r);
      bool kept[kPatch];
      head.dropout(row + r, keys + patch_column(), kept);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        C grad_score = 0;
        if (seen(visible, r, c)) {
          const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
          const C t = kept[c] ? through_value[r][c] * head.keep_factor : C(0);
          const C grad_weight = (t - delta[r]) * stats.inverse_weight_sum;
          grad_score = gated.p * (gated.derivative * grad_weight - mean[r]);
          tile_gates[0] += grad_weight * gate_dy_dthreshold(gated.p, head.steepness, gated.slope);
          tile_gates[1] += grad_weight * gated.p * gated.smoulder;
          tile_gates[2] +=
              grad_weight * gate_dy_dsteepness(gated.p, gated.p, head.threshold, gated.slope);
        }
        scores[r][c] = grad_score;
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) gates[k] += double(tile_gates[k]);
    products.add_in_parts(scores, head.key, keys, column, weighted);
  }
  C grad_query[kPatch][kPatch];
  products.read(weighted, grad_query);
  scale_patch(grad_query, head.scale);
  store_patch<T>(p.grad_query, head.batch, head.head, row, p.queries, column + patch_column(),
                 p.size, grad_query);
  if (column > 0) return;
  __syncthreads();
  Team<double>{kAttentionThreads, shared_memory<double>()}.template reduce<Sum>(gates);
  if (threadIdx.x > 0) return;
  for (int k = 0; k < 3; ++k) {
    gate_partials[((head.batch * p.heads + head.head) * tiles + tile) * 3 + k] = gates[k];
  }
}

// Grid: batch x groups x tiles of keys x 64 columns. Writes grad_key and grad_value. Patches have
// keys for rows and queries for columns.
template <typename T, bool matrix_units>
__global__ void __launch_bounds__(kAttentionThreads, AttentionProductsFor<T, matrix_units>::kBlocks)
    lif_attention_backward_keys_kernel(LifAttentionParams p, AttentionDropout keep,
                                       const compute_t<T>* row_gradients) {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units>;
  Products products;
  AttentionBlock block;
  const int column = block.next(attention_columns(p)) * kTile;
  const int first = block.next(attention_tiles(p.keys)) * kTile;
  const int group = block.next(p.groups), batch = int(block.rest);
  const int key = first + patch_row();
  const int heads = int(unsigned(p.heads) / unsigned(p.groups));
  // Queries before this one do not see the tile.
  const int later = int(p.keys) - int(p.queries);
  const int begin = p.causal && first > later ? first - later : 0;

  C scores[kPatch][kPatch], through_value[kPatch][kPatch];
  typename Products::Result weighted_query, weighted_grad;
  for (int h = group * heads; h < (group + 1) * heads; ++h) {
    const AttentionHead<T> head(p, keep, batch, h);
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    for (int queries = begin / kTile * kTile; queries < int(p.queries); queries += kTile) {
      products.rows(head.key, first, head.query, queries, scores);
      products.rows(head.value, first, grad_out, queries, through_value);
      const unsigned visible = head.visible_patch(queries + patch_column(), key);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const int i = queries + patch_column() + c;
        const AttentionRowStats<C> stats(head, i);
        const int64_t row = head.row(head.existing(i));
        const C delta = row_gradients[row];
        const C mean = row_gradients[p.batch * p.heads * p.queries + row];
        bool kept[kPatch];
        head.dropout(i, key, kept);
#pragma unroll
        for (int r = 0; r < kPatch; ++r) {
          C grad_score = 0, weight = 0;
          if (seen(visible, c, r)) {
            const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
            const C t = kept[r] ? through_value[r][c] * head.keep_factor : C(0);
            const C grad_weight = (t - delta) * stats.inverse_weight_sum;
            grad_score = gated.p * (gated.derivative * grad_weight - mean);
            weight = kept[r] ? gated.p * gated.gate * stats.inverse_weight_sum : C(0);
          }
          scores[r][c] = grad_score;
          through_value[r][c] = weight;
        }
      }
      products.store(through_value);
      products.add_tile(grad_out, queries, column, weighted_grad);
      __syncthreads();
      products.store_scaled(scores);
      products.template add_tile<true>(head.query, queries, column, weighted_query);
    }
  }
  products.read(weighted_query, scores);
  scale_patch(scores, C(p.scale));
  store_patch<T>(p.grad_key, batch, group, key, p.keys, column + patch_column(), p.size, scores);
  products.read(weighted_grad, scores);
  scale_patch(scores, C(keep.factor));
  store_patch<T>(p.grad_value, batch, group, key, p.keys, column + patch_column(), p.size, scores);
}

// Grid: batch x heads x tiles of keys; after forward. Writes the keys' loads, and `partials` [B, H,
// tiles of keys, 6]: entropy, support, first token, probabilities above the threshold, visible
// pairs, nothing. Patches as in backward_keys.
template <typename T, bool matrix_units>
__global__ void __launch_bounds__(kAttentionThreads, AttentionProductsFor<T, matrix_units>::kBlocks)
    lif_attention_summary_kernel(LifAttentionParams p, double* partials) {
  using C = compute_t<T>;
  using Products = AttentionProductsFor<T, matrix_units>;
  Products products;
  AttentionBlock block;
  const int tile = block.next(attention_tiles(p.keys)), first = tile * kTile;
  const int head_index = block.next(p.heads);
  const AttentionHead<T> head(p, {}, int(block.rest), head_index);
  const int key = first + patch_row();

  C scores[kPatch][kPatch], load[kPatch] = {};
  double sums[3] = {}, counts[3] = {};
  for (int queries = 0; queries < int(p.queries); queries += kTile) {
    products.rows(head.key, first, head.query, queries, scores);
    const unsigned visible = head.visible_patch(queries + patch_column(), key);
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      const AttentionRowStats<C> stats(head, queries + patch_column() + c);
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
        if (!seen(visible, c, r)) continue;
        const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
        const C weight = gated.p * gated.gate * stats.inverse_weight_sum;
        load[r] += gated.p;
        if (weight > 0) sums[0] -= double(weight * log(weight));
        sums[1] += weight > C(0.01);
        sums[2] += key + r == 0 ? double(weight) : 0;
        counts[0] += gated.p > head.threshold;
        counts[1] += 1;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C total = across_columns<Sum>(load[r]);
    if (patch_column() == 0 && key + r < int(p.keys)) {
      static_cast<C*>(p.load)[(head.batch * p.heads + head.head) * p.keys + key + r] =
          total / C(p.queries);
    }
  }
  __syncthreads();
  const Team<double> team{kAttentionThreads, shared_memory<double>()};
  team.template reduce<Sum>(sums);
  team.template reduce<Sum>(counts);
  if (threadIdx.x > 0) return;
  double* to = partials + ((head.batch * p.heads + head.head) * attention_tiles(p.keys) + tile) * 6;
  for (int k = 0; k < 3; ++k) {
    to[k] = sums[k];
    to[3 + k] = counts[k];
  }
}

// Grid: heads. grad_gates [3, H] from partials [B, H, tiles, 3].
template <typename C>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    lif_attention_sum_gates_kernel(LifAttentionParams p, const double* partials) {
  const int64_t tiles = attention_tiles(p.queries), head = blockIdx.x;
  double sums[3] = {};
  for (int64_t n = threadIdx.x; n < p.batch * tiles; n += kAttentionThreads) {
    const double* from = partials + ((n / tiles * p.heads + head) * tiles + n % tiles) * 3;
    for (int k = 0; k < 3; ++k) sums[k] += from[k];
  }
  Team<double>{kAttentionThreads, shared_memory<double>()}.template reduce<Sum>(sums);
  if (threadIdx.x > 0) return;
  for (int k = 0; k < 3; ++k) static_cast<C*>(p.grad_gates)[k * p.heads + head] = C(sums[k]);
}

// Grid: batch x heads. summary [4, B, H] from partials [B, H, tiles, 6].
template <typename C>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    lif_attention_sum_summary_kernel(LifAttentionParams p, const double* partials) {
  const int64_t tiles = attention_tiles(p.keys), pair = blockIdx.x;
  double sums[3] = {}, counts[3] = {};
  for (int64_t n = threadIdx.x; n < tiles; n += kAttentionThreads) {
    const double* from = partials + (pair * tiles + n) * 6;
    for (int k = 0; k < 3; ++k) {
      sums[k] += from[k];
      counts[k] += from[3 + k];
    }
  }
  const Team<double> team{kAttentionThreads, shared_memory<double>()};
  team.template reduce<Sum>(sums);
  team.template reduce<Sum>(counts);
  if (threadIdx.x > 0) return;
  C* to = static_cast<C*>(p.summary) + pair;
  const int64_t pairs = p.batch * p.heads;
  for (int k = 0; k < 3; ++k) to[k * pairs] = C(sums[k] / double(p.queries));
  to[3 * pairs] = C(counts[0] / (counts[1] > 0 ? counts[1] : 1));
}

}  // namespace cuda
}  // namespace ember
