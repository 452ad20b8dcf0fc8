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
// Products are sums in registers, 4 x 4 to a thread, over operands staged in shared memory: sizes
// above 64 are staged piece by piece, and each 64 columns of a result are a block of their own.
#pragma once

#include "../common/lif_attention.h"
#include "../common/lif_gate_math.h"
#include "../common/philox.h"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kAttentionThreads = 256;
constexpr int kTile = 64;  // queries, keys, and columns of a result
constexpr int kPatch = 4;  // of each a thread takes, in 16 x 16 threads
constexpr int kAcross = kTile / kPatch;

// The block's shared memory: a tile, and the stage through which operands pass.
template <typename C>
struct AttentionShared {
  // Terms of a product that are staged at once, for both operands or, twice as many, for one.
  static constexpr int kDepth = sizeof(C) == 8 ? 16 : 32;
  static constexpr int kStride = kTile + 16 / int(sizeof(C));  // keeps rows 16-byte aligned
  static constexpr size_t kBytes = (kTile + 2 * kDepth) * kStride * sizeof(C);

  C* tile;   // [kTile, kStride]
  C* stage;  // [2 * kDepth, kStride]

  __device__ __forceinline__ AttentionShared()
      : tile(shared_memory<C>()), stage(tile + kTile * kStride) {}
};

template <typename C>
struct alignas(16) Patch {
  C values[kPatch];
};

// The row and the column of the thread's patch.
__device__ __forceinline__ int patch_row() {
  return int(threadIdx.x) / kAcross * kPatch;
}
__device__ __forceinline__ int patch_column() {
  return int(threadIdx.x) % kAcross * kPatch;
}

// Rows of a matrix [count, size] in memory; rows and columns past the end read as 0.
template <typename T>
struct AttentionRows {
  const T* data;
  int64_t stride, count, size;

  __device__ __forceinline__ AttentionRows(const AttentionTensor& t, int64_t batch, int64_t head,
                                           int64_t count, int64_t size)
      : data(static_cast<const T*>(t.data) + batch * t.batch + head * t.head),
        stride(t.token),
        count(count),
        size(size) {}

  __device__ __forceinline__ compute_t<T> at(int64_t row, int64_t column) const {
    return row < count && column < size ? widen(data[row * stride + column]) : compute_t<T>(0);
  }
};

// sums += a^T b for the thread's patch; a and b are [depth, kStride] in shared memory.
template <typename C>
__device__ __forceinline__ void multiply(const C* a, const C* b, int depth,
                                         C (&sums)[kPatch][kPatch]) {
  constexpr int kStride = AttentionShared<C>::kStride;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const Patch<C> left = *reinterpret_cast<const Patch<C>*>(a + k * kStride + patch_row());
    const Patch<C> right = *reinterpret_cast<const Patch<C>*>(b + k * kStride + patch_column());
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) sums[r][c] += left.values[r] * right.values[c];
    }
  }
}

// sums = the products of rows [a_first, + kTile) of a with rows [b_first, + kTile) of b.
template <typename T, typename C>
__device__ __forceinline__ void multiply_rows(const AttentionShared<C>& shared,
                                              const AttentionRows<T>& a, int64_t a_first,
                                              const AttentionRows<T>& b, int64_t b_first,
                                              C (&sums)[kPatch][kPatch]) {
  constexpr int kDepth = AttentionShared<C>::kDepth, kStride = AttentionShared<C>::kStride;
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
#pragma unroll
    for (int c = 0; c < kPatch; ++c) sums[r][c] = 0;
  }
  for (int64_t first = 0; first < a.size; first += kDepth) {
    __syncthreads();
    // Neighbouring threads take neighbouring rows: their stores go to different banks.
    const int row = int(threadIdx.x) % kTile;
    for (int k = int(threadIdx.x) / kTile; k < kDepth; k += kAttentionThreads / kTile) {
      shared.stage[k * kStride + row] = a.at(a_first + row, first + k);
      shared.stage[(kDepth + k) * kStride + row] = b.at(b_first + row, first + k);
    }
    __syncthreads();
    multiply(shared.stage, shared.stage + kDepth * kStride, kDepth, sums);
  }
}

// sums += the transposed tile times columns [column, + kTile) of rows [first, + kTile) of b.
template <typename T, typename C>
__device__ __forceinline__ void multiply_tile(const AttentionShared<C>& shared,
                                              const AttentionRows<T>& b, int64_t first,
                                              int64_t column, C (&sums)[kPatch][kPatch]) {
  constexpr int kSlice = 2 * AttentionShared<C>::kDepth, kStride = AttentionShared<C>::kStride;
  for (int slice = 0; slice < kTile; slice += kSlice) {
    __syncthreads();
    const int c = int(threadIdx.x) % kTile;
    for (int k = int(threadIdx.x) / kTile; k < kSlice; k += kAttentionThreads / kTile) {
      shared.stage[k * kStride + c] = b.at(first + slice + k, column + c);
    }
    __syncthreads();
    multiply(shared.tile + slice * kStride, shared.stage, kSlice, sums);
  }
}

// tile[c][r] = values[r][c] for the thread's patch. The tile must no longer be in use, and
// multiply_tile() waits before it reads.
template <typename C>
__device__ __forceinline__ void store_tile(const AttentionShared<C>& shared,
                                           const C (&values)[kPatch][kPatch]) {
#pragma unroll
  for (int c = 0; c < kPatch; ++c) {
    Patch<C> column;
#pragma unroll
    for (int r = 0; r < kPatch; ++r) column.values[r] = values[r][c];
    *reinterpret_cast<Patch<C>*>(shared.tile + (patch_column() + c) * shared.kStride +
                                 patch_row()) = column;
  }
}

// Combines a value over the 16 threads that share the patch's rows.
template <typename Operation, typename C>
__device__ __forceinline__ C across_columns(C value) {
#pragma unroll
  for (int offset = kAcross / 2; offset > 0; offset /= 2) {
    value = Operation::of(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// What a block works on, counted down from its index.
struct AttentionBlock {
  unsigned rest;
  __device__ __forceinline__ AttentionBlock() : rest(blockIdx.x) {}
  __device__ __forceinline__ int64_t next(int64_t count) {
    const unsigned index = rest % unsigned(count);
    rest /= unsigned(count);
    return index;
  }
};

__host__ __device__ __forceinline__ int64_t attention_tiles(int64_t n) {
  return (n + kTile - 1) / kTile;
}

// What dropout keeps: words from `limit` on, multiplied by `factor`.
struct AttentionDropout {
  uint32_t limit;
  double factor;
};

// One query head and all that its scores and weights depend on.
template <typename T>
struct AttentionHead {
  using C = compute_t<T>;

  const LifAttentionParams& p;
  int64_t batch, head, group;
  AttentionRows<T> query, key, value;
  C threshold, leak, steepness, scale;
  AttentionDropout keep;

  __device__ __forceinline__ AttentionHead(const LifAttentionParams& p, AttentionDropout keep,
                                           int64_t batch, int64_t head)
      : p(p),
        batch(batch),
        head(head),
        group(unsigned(head) / (unsigned(p.heads) / unsigned(p.groups))),
        query(p.query, batch, head, p.queries, p.size),
        key(p.key, batch, group, p.keys, p.size),
        value(p.value, batch, group, p.keys, p.size),
        threshold(static_cast<const C*>(p.threshold)[head]),
        leak(static_cast<const C*>(p.leak)[head]),
        steepness(static_cast<const C*>(p.steepness)[head]),
        scale(C(p.scale)),
        keep(keep) {}

  // Element of a [B, H, Q] array.
  __device__ __forceinline__ int64_t row(int64_t i) const {
    return (batch * p.heads + head) * p.queries + i;
  }

  __device__ __forceinline__ bool visible(int64_t i, int64_t j) const {
    return i < p.queries && j < p.keys && (!p.causal || j <= i + p.keys - p.queries) &&
           (!p.mask || p.mask[batch * p.mask_strides[0] + head * p.mask_strides[1] +
                              i * p.mask_strides[2] + j * p.mask_strides[3]]);
  }

  // Past the last key that a query up to `last` sees.
  __device__ __forceinline__ int64_t end_of_keys(int64_t last) const {
    const int64_t end = p.causal ? last + 1 + p.keys - p.queries : p.keys;
    return end < p.keys ? end : p.keys;
  }

  // The dropout mask M of query i and the keys j ... j + 3; j is a multiple of 4.
  __device__ __forceinline__ void dropout(int64_t i, int64_t j, C (&factors)[kPatch]) const {
    if (!p.seed) {
#pragma unroll
      for (int n = 0; n < kPatch; ++n) factors[n] = 1;
      return;
    }
    uint32_t words[kPatch] = {uint32_t(j / 4), uint32_t(i), uint32_t(head), uint32_t(batch)};
    philox(uint64_t(*p.seed), words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int n = 0; n < kPatch; ++n) factors[n] = words[n] >= keep.limit ? C(keep.factor) : C(0);
  }
};

// The gate on one probability.
template <typename C>
struct GatedProbability {
  C p, smoulder, weight, slope, derivative;  // 1 - f, w, dg/dz, h = dw/dp

  template <typename T>
  __device__ __forceinline__ GatedProbability(const AttentionHead<T>& head, C p) : p(p) {
    const C odds = gate_odds(p, head.threshold, head.steepness);
    const C fire = C(1) / (C(1) + odds);
    smoulder = odds * fire;
    const C g = gate_value(fire, smoulder, head.leak);
    slope = gate_slope(fire, smoulder, head.leak);
    weight = p * g;
    derivative = gate_dy_dx(p, head.steepness, g, slope);
  }
};

// Writes a patch of a result whose rows are tokens.
template <typename T>
__device__ __forceinline__ void store_patch(const AttentionTensor& t, int64_t batch, int64_t head,
                                            int64_t token, int64_t tokens, int64_t column,
                                            int64_t columns,
                                            const compute_t<T> (&values)[kPatch][kPatch]) {
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      if (token + r < tokens && column + c < columns) {
        T* to = static_cast<T*>(t.data) + batch * t.batch + head * t.head + (token + r) * t.token +
                column + c;
        narrow(values[r][c], *to);
      }
    }
  }
}

// Grid: batch x heads x tiles of queries x 64 columns of the result.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(T) == 8 ? 1 : 2)
    lif_attention_forward_kernel(LifAttentionParams p, AttentionDropout keep) {
  using C = compute_t<T>;
  const AttentionShared<C> shared;
  AttentionBlock block;
  const int64_t column = block.next(attention_tiles(p.size)) * kTile;
  const int64_t first = block.next(attention_tiles(p.queries)) * kTile;
  const int64_t head_index = block.next(p.heads);
  const AttentionHead<T> head(p, keep, block.rest, head_index);
  const int64_t end = head.end_of_keys(first + kTile - 1), row = first + patch_row();
  const C lowest = C(sizeof(C) == 8 ? -1.7e308 : -3.4e38);

  C largest[kPatch], sum[kPatch];  // over this thread's keys, then over all
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    largest[r] = lowest;
    sum[r] = 0;
  }
  C scores[kPatch][kPatch];
  for (int64_t keys = 0; keys < end; keys += kTile) {
    multiply_rows(shared, head.query, first, head.key, keys, scores);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      C most = largest[r];
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const bool visible = head.visible(row + r, keys + patch_column() + c);
        scores[r][c] = visible ? scores[r][c] * head.scale : lowest;
        most = Maximum::of(scores[r][c], most);
      }
      sum[r] *= exponential(largest[r] - most);
      largest[r] = most;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        if (scores[r][c] != lowest) sum[r] += exponential(scores[r][c] - most);
      }
    }
  }
  C inverse_sum[kPatch];
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C most = across_columns<Maximum>(largest[r]);
    const C total = across_columns<Sum>(sum[r] * exponential(largest[r] - most));
    largest[r] = most;
    inverse_sum[r] = total == 0 ? C(0) : C(1) / total;
  }

  C weight_sum[kPatch] = {};
  C out[kPatch][kPatch] = {};
  for (int64_t keys = 0; keys < end; keys += kTile) {
    multiply_rows(shared, head.query, first, head.key, keys, scores);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      C factors[kPatch];
      head.dropout(row + r, keys + patch_column(), factors);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        C weight = 0;
        if (head.visible(row + r, keys + patch_column() + c)) {
          const C e = exponential(scores[r][c] * head.scale - largest[r]);
          weight = GatedProbability<C>(head, e * inverse_sum[r]).weight;
        }
        weight_sum[r] += weight;
        scores[r][c] = weight * factors[c];
      }
    }
    store_tile(shared, scores);
    multiply_tile(shared, head.value, keys, column, out);
  }
#pragma unroll
  for (int r = 0; r < kPatch; ++r) {
    const C total = across_columns<Sum>(weight_sum[r]);
    const C inverse = inverse_sum[r] == 0 ? C(0) : C(1) / (total + C(p.eps));
#pragma unroll
    for (int c = 0; c < kPatch; ++c) out[r][c] *= inverse;
    if (column == 0 && patch_column() == 0 && row + r < p.queries) {
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
  __device__ __forceinline__ AttentionRowStats(const AttentionHead<T>& head, int64_t i) {
    const LifAttentionParams& p = head.p;
    const int64_t rows = p.batch * p.heads * p.queries;
    const C* stats = static_cast<const C*>(p.row_stats) + head.row(i < p.queries ? i : 0);
    largest = stats[0];
    inverse_sum = stats[rows];
    inverse_weight_sum = stats[2 * rows];
  }

  template <typename T>
  __device__ __forceinline__ C probability(const AttentionHead<T>& head, C product) const {
    return exponential(product * head.scale - largest) * inverse_sum;
  }
};

// Grid: batch x heads x tiles of queries x 64 columns. Writes grad_query, `row_gradients` [2, B, H,
// Q] (delta and E) and `gate_partials` [B, H, tiles of queries, 3].
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    lif_attention_backward_queries_kernel(LifAttentionParams p, AttentionDropout keep,
                                          compute_t<T>* row_gradients, double* gate_partials) {
  using C = compute_t<T>;
  const AttentionShared<C> shared;
  AttentionBlock block;
  const int64_t column = block.next(attention_tiles(p.size)) * kTile;
  const int64_t tiles = attention_tiles(p.queries), tile = block.next(tiles);
  const int64_t head_index = block.next(p.heads);
  const AttentionHead<T> head(p, keep, block.rest, head_index);
  const AttentionRows<T> grad_out(p.grad_out, head.batch, head.head, p.queries, p.size);
  const int64_t first = tile * kTile, row = first + patch_row();
  const int64_t end = head.end_of_keys(first + kTile - 1);

  C scores[kPatch][kPatch], through_value[kPatch][kPatch];
  C delta[kPatch] = {}, with_value[kPatch] = {}, without[kPatch] = {};
  for (int64_t keys = 0; keys < end; keys += kTile) {
    multiply_rows(shared, head.query, first, head.key, keys, scores);
    multiply_rows(shared, grad_out, first, head.value, keys, through_value);
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const AttentionRowStats<C> stats(head, row + r);
      C factors[kPatch];
      head.dropout(row + r, keys + patch_column(), factors);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        if (!head.visible(row + r, keys + patch_column() + c)) continue;
        const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
        const C t = through_value[r][c] * factors[c];
        delta[r] += gated.weight * t;
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
    if (column == 0 && patch_column() == 0 && row + r < p.queries) {
      row_gradients[head.row(row + r)] = delta[r];
      row_gradients[p.batch * p.heads * p.queries + head.row(row + r)] = mean[r];
    }
  }

  double gates[3] = {};
  C grad_query[kPatch][kPatch] = {};
  for (int64_t keys = 0; keys < end; keys += kTile) {
    multiply_rows(shared, head.query, first, head.key, keys, scores);
    multiply_rows(shared, grad_out, first, head.value, keys, through_value);
    C tile_gates[3] = {};
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const AttentionRowStats<C> stats(head, row + r);
      C factors[kPatch];
      head.dropout(row + r, keys + patch_column(), factors);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        C grad_score = 0;
        if (head.visible(row + r, keys + patch_column() + c)) {
          const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
          const C grad_weight =
              (through_value[r][c] * factors[c] - delta[r]) * stats.inverse_weight_sum;
          grad_score = gated.p * (gated.derivative * grad_weight - mean[r]) * head.scale;
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
    store_tile(shared, scores);
    multiply_tile(shared, head.key, keys, column, grad_query);
  }
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
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    lif_attention_backward_keys_kernel(LifAttentionParams p, AttentionDropout keep,
                                       const compute_t<T>* row_gradients) {
  using C = compute_t<T>;
  const AttentionShared<C> shared;
  AttentionBlock block;
  const int64_t column = block.next(attention_tiles(p.size)) * kTile;
  const int64_t first = block.next(attention_tiles(p.keys)) * kTile;
  const int64_t group = block.next(p.groups), batch = block.rest;
  const int64_t key = first + patch_row();
  const int64_t heads = unsigned(p.heads) / unsigned(p.groups);
  // Queries before this one do not see the tile.
  const int64_t begin = p.causal && first > p.keys - p.queries ? first - (p.keys - p.queries) : 0;

  C scores[kPatch][kPatch], through_value[kPatch][kPatch];
  C grad_key[kPatch][kPatch] = {}, grad_value[kPatch][kPatch] = {};
  for (int64_t h = group * heads; h < (group + 1) * heads; ++h) {
    const AttentionHead<T> head(p, keep, batch, h);
    const AttentionRows<T> grad_out(p.grad_out, batch, h, p.queries, p.size);
    for (int64_t queries = begin / kTile * kTile; queries < p.queries; queries += kTile) {
      multiply_rows(shared, head.key, first, head.query, queries, scores);
      multiply_rows(shared, head.value, first, grad_out, queries, through_value);
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        const int64_t i = queries + patch_column() + c;
        const AttentionRowStats<C> stats(head, i);
        const int64_t row = head.row(i < p.queries ? i : 0);
        const C delta = row_gradients[row];
        const C mean = row_gradients[p.batch * p.heads * p.queries + row];
        C factors[kPatch];
        head.dropout(i, key, factors);
#pragma unroll
        for (int r = 0; r < kPatch; ++r) {
          C grad_score = 0, weight = 0;
          if (head.visible(i, key + r)) {
            const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
            const C grad_weight =
                (through_value[r][c] * factors[r] - delta) * stats.inverse_weight_sum;
            grad_score = gated.p * (gated.derivative * grad_weight - mean) * head.scale;
            weight = gated.weight * stats.inverse_weight_sum * factors[r];
          }
          scores[r][c] = grad_score;
          through_value[r][c] = weight;
        }
      }
      store_tile(shared, scores);
      multiply_tile(shared, head.query, queries, column, grad_key);
      __syncthreads();
      store_tile(shared, through_value);
      multiply_tile(shared, grad_out, queries, column, grad_value);
    }
  }
  store_patch<T>(p.grad_key, batch, group, key, p.keys, column + patch_column(), p.size, grad_key);
  store_patch<T>(p.grad_value, batch, group, key, p.keys, column + patch_column(), p.size,
                 grad_value);
}

// Grid: batch x heads x tiles of keys; after forward. Writes the keys' loads, and `partials` [B, H,
// tiles of keys, 6]: entropy, support, first token, probabilities above the threshold, visible
// pairs, nothing. Patches as in backward_keys.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    lif_attention_summary_kernel(LifAttentionParams p, double* partials) {
  using C = compute_t<T>;
  const AttentionShared<C> shared;
  AttentionBlock block;
  const int64_t tile = block.next(attention_tiles(p.keys)), first = tile * kTile;
  const int64_t head_index = block.next(p.heads);
  const AttentionHead<T> head(p, {}, block.rest, head_index);
  const int64_t key = first + patch_row();

  C scores[kPatch][kPatch], load[kPatch] = {};
  double sums[3] = {}, counts[3] = {};
  for (int64_t queries = 0; queries < p.queries; queries += kTile) {
    multiply_rows(shared, head.key, first, head.query, queries, scores);
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      const int64_t i = queries + patch_column() + c;
      const AttentionRowStats<C> stats(head, i);
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
        if (!head.visible(i, key + r)) continue;
        const GatedProbability<C> gated(head, stats.probability(head, scores[r][c]));
        const C weight = gated.weight * stats.inverse_weight_sum;
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
    if (patch_column() == 0 && key + r < p.keys) {
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
