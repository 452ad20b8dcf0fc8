// Attention on the CPU, one strip of queries at a time: the products of matrices, and what every
// kind of attention does to a row.
//
// The scores of a strip against all its keys fit in the caches, and sums over a row are taken
// there.
#pragma once

#include <cstring>

#include "../common/lif_gate_math.h"
#include "../common/philox.h"
#include "attention_workspace.h"
#include "sums.h"
#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {

// A micro-kernel keeps tile_rows x tile_cols sums in registers.
constexpr int tile_rows = vector_sums / 2;
template <typename C>
constexpr int64_t tile_cols = 2 * lanes<C>;
constexpr int64_t depth_block = 256;  // terms of a sum between two visits of the result

template <typename C>
EMBER_HD int64_t panels(int64_t cols) {
  return (cols + tile_cols<C> - 1) / tile_cols<C>;
}

// c [rows, tile_cols] = or += a b over `depth` terms. b is a panel [depth, tile_cols]; element
// (i, k) of a is a[i * stride + k], or a[i + k * stride] if transposed.
template <typename C, int rows, bool transposed>
inline __attribute__((always_inline)) void multiply_tile(int64_t depth, const C* a, int64_t stride,
                                                         const C* b, C* c, int64_t c_stride,
                                                         bool add) {
  using V = Vector<C>;
  V sums[rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const V b0 = load_vector(b + k * tile_cols<C>),
            b1 = load_vector(b + k * tile_cols<C> + lanes<C>);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const C x = transposed ? a[i + k * stride] : a[i * stride + k];
      sums[i][0] += b0 * x;
      sums[i][1] += b1 * x;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    C* row = c + i * c_stride;
    if (add) {
      sums[i][0] += load_vector(row);
      sums[i][1] += load_vector(row + lanes<C>);
    }
    store_vector(sums[i][0], row);
    store_vector(sums[i][1], row + lanes<C>);
  }
}

template <typename C, bool transposed, int rows = tile_rows>
void multiply(int64_t count, int64_t depth, const C* a, int64_t stride, const C* b, C* c,
              int64_t c_stride, bool add) {
  if constexpr (rows > 1) {
    if (count < rows) {
      return multiply<C, transposed, rows - 1>(count, depth, a, stride, b, c, c_stride, add);
    }
  }
  multiply_tile<C, rows, transposed>(depth, a, stride, b, c, c_stride, add);
}

EMBER_HD int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The queries [first, first + rows), and what they see.
struct Strip {
  int64_t first, rows, keys;
  int64_t before;  // row r sees keys [0, before + r + 1) if causal; all of them otherwise
  bool causal;

  Strip(const LifAttentionParams& p, int64_t first, int64_t rows)
      : first(first),
        rows(rows),
        keys(p.keys),
        before(first + p.keys - p.queries),
        causal(p.causal) {}

  int64_t visible(int64_t row) const {
    if (!causal) return keys;
    const int64_t n = before + row + 1;
    return n < 0 ? 0 : smaller(n, keys);
  }
  int64_t visible_to_any() const { return visible(rows - 1); }
  // The first row that sees `key`, or a later key.
  int64_t first_row(int64_t key) const { return !causal || key <= before ? 0 : key - before; }
};

// scores [rows, keys] = a [rows, size] times the transposed keys, in panels [size, tile_cols]. Keys
// that no row of a tile sees are left out.
template <typename C>
void multiply_keys(const Strip& strip, int64_t size, const C* a, int64_t a_stride, const C* keys,
                   C* scores, int64_t stride) {
  const int64_t count = panels<C>(strip.visible_to_any());
  for (int64_t panel = 0; panel < count; ++panel) {
    const int64_t first_key = panel * tile_cols<C>;
    const int64_t first = strip.first_row(first_key) / tile_rows * tile_rows;
    for (int64_t row = first; row < strip.rows; row += tile_rows) {
      multiply<C, false>(strip.rows - row, size, a + row * a_stride, a_stride,
                         keys + panel * size * tile_cols<C>, scores + row * stride + first_key,
                         stride, false);
    }
  }
}

// out [rows, size] = weights [rows, keys] times `values` in panels [keys, tile_cols]. Weights of
// invisible keys are zero.
template <typename C>
void multiply_values(const Strip& strip, int64_t size, const C* weights, int64_t stride,
                     const C* values, C* out, int64_t out_stride) {
  const int64_t count = panels<C>(size), keys = strip.visible_to_any();
  if (keys == 0) memset(out, 0, size_t(strip.rows * out_stride) * sizeof(C));
  for (int64_t first = 0; first < keys; first += depth_block) {
    for (int64_t panel = 0; panel < count; ++panel) {
      const C* b = values + (panel * strip.keys + first) * tile_cols<C>;
      for (int64_t row = 0; row < strip.rows; row += tile_rows) {
        const int64_t seen = strip.visible(smaller(row + tile_rows, strip.rows) - 1) - first;
        const int64_t depth = seen < 0 ? 0 : smaller(seen, depth_block);
        if (depth == 0 && first > 0) continue;
        multiply<C, false>(strip.rows - row, depth, weights + row * stride + first, stride, b,
                           out + row * out_stride + panel * tile_cols<C>, out_stride, first > 0);
      }
    }
  }
}

// sums [keys, size] += weights^T [keys, rows] times `b` in panels [rows, tile_cols].
template <typename C>
void add_transposed(const Strip& strip, int64_t size, const C* weights, int64_t stride, const C* b,
                    C* sums, int64_t sums_stride) {
  const int64_t count = panels<C>(size), keys = strip.visible_to_any();
  for (int64_t key = 0; key < keys; key += tile_rows) {
    const int64_t first = strip.first_row(key);
    for (int64_t panel = 0; panel < count; ++panel) {
      multiply<C, true>(keys - key, strip.rows - first, weights + first * stride + key, stride,
                        b + (panel * strip.rows + first) * tile_cols<C>,
                        sums + key * sums_stride + panel * tile_cols<C>, sums_stride, true);
    }
  }
}

// Rows of one head, tokens first ... first + count of them, as a matrix product wants them.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;

  Rows(const AttentionTensor& t, int64_t b, int64_t h, int64_t first = 0)
      : data(static_cast<const T*>(t.data) + b * t.batch + h * t.head + first * t.token),
        stride(t.token) {}
};

// [count, size], times `factor`.
template <typename T, typename C>
void pack_rows(const Rows<T>& from, int64_t count, int64_t size, C factor, C* to,
               int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = from.data + i * from.stride;
    C* out = to + i * to_stride;
    for (int64_t d = 0; d < size; ++d) out[d] = widen(row[d]) * factor;
  }
}

// Panels [count, tile_cols] of columns, zero beyond `size`.
template <typename T, typename C>
void pack_columns(const Rows<T>& from, int64_t count, int64_t size, C factor, C* to) {
  for (int64_t first = 0; first < size; first += tile_cols<C>) {
    const int64_t width = smaller(tile_cols<C>, size - first);
    for (int64_t i = 0; i < count; ++i, to += tile_cols<C>) {
      const T* row = from.data + i * from.stride + first;
      for (int64_t d = 0; d < width; ++d) to[d] = widen(row[d]) * factor;
      for (int64_t d = width; d < tile_cols<C>; ++d) to[d] = 0;
    }
  }
}

// Panels [size, tile_cols] of tokens, zero beyond `count`.
template <typename T, typename C>
void pack_transposed(const Rows<T>& from, int64_t count, int64_t size, C* to) {
  for (int64_t first = 0; first < count; first += tile_cols<C>, to += size * tile_cols<C>) {
    const int64_t width = smaller(tile_cols<C>, count - first);
    if (width < tile_cols<C>) memset(to, 0, size_t(size * tile_cols<C>) * sizeof(C));
    for (int64_t i = 0; i < width; ++i) {
      const T* row = from.data + (first + i) * from.stride;
      for (int64_t d = 0; d < size; ++d) to[d * tile_cols<C> + i] = widen(row[d]);
    }
  }
}

template <typename T, typename C>
void write_row(const C* row, int64_t size, C factor, const AttentionTensor& to, int64_t b,
               int64_t h, int64_t token) {
  T* out = static_cast<T*>(to.data) + b * to.batch + h * to.head + token * to.token;
  for (int64_t d = 0; d < size; ++d) narrow(row[d] * factor, out[d]);
}

template <typename C>
struct Gate {
  C threshold, leak, steepness;
};

template <typename C>
Gate<C> gate_of(const LifAttentionParams& p, int64_t h) {
  return {static_cast<const C*>(p.threshold)[h], static_cast<const C*>(p.leak)[h],
          static_cast<const C*>(p.steepness)[h]};
}

template <typename C>
struct RowStats {
  C *largest, *inverse_sum, *inverse_weight;

  RowStats(const LifAttentionParams& p, int64_t b, int64_t h, int64_t query) {
    const int64_t plane = p.batch * p.heads * p.queries;
    largest = static_cast<C*>(p.row_stats) + (b * p.heads + h) * p.queries + query;
    inverse_sum = largest + plane;
    inverse_weight = inverse_sum + plane;
  }
};

// exp(x) for x <= 0 that is 0 below the normal numbers, where `exponential` may be subnormal.
template <typename C>
EMBER_HD C decay(C x) {
  const C limit = C(sizeof(C) == 4 ? -87.33 : -708.39);
#ifdef __aarch64__
  return zero_below(limit, x, exponential(x));
#else
  return x < limit ? C(0) : exponential(x);
#endif
}

template <typename C>
constexpr C infinity = C(__builtin_inf());

// The dropout mask of a row, over 1 - dropout; `keep` has room for four more.
template <typename C>
void draw_dropout(const LifAttentionParams& p, int64_t b, int64_t h, int64_t query, int64_t n,
                  C* keep) {
  const uint64_t seed = uint64_t(*p.seed);
  const uint32_t limit = dropout_limit(p.dropout);
  const C kept = C(1 / (1 - p.dropout));
  for (int64_t group = 0; group < (n + 3) / 4; ++group) {
    uint32_t w0 = uint32_t(group), w1 = uint32_t(query), w2 = uint32_t(h), w3 = uint32_t(b);
    philox(seed, w0, w1, w2, w3);
    keep[4 * group] = w0 >= limit ? kept : C(0);
    keep[4 * group + 1] = w1 >= limit ? kept : C(0);
    keep[4 * group + 2] = w2 >= limit ? kept : C(0);
    keep[4 * group + 3] = w3 >= limit ? kept : C(0);
  }
}

template <typename C>
void multiply_row(int64_t n, const C* factors, C* row) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) row[j] *= factors[j];
}

// row *= the dropout mask over 1 - dropout, which is left in `keep`; nothing without dropout.
template <typename C>
void drop_weights(const LifAttentionParams& p, int64_t b, int64_t h, int64_t query, int64_t n,
                  C* keep, C* row) {
  if (!p.seed) return;
  draw_dropout(p, b, h, query, n, keep);
  multiply_row(n, keep, row);
}

// One row of probabilities from its n scores, in place; 1 / sum of exp(score - largest) if any.
template <typename C>
void softmax_row(int64_t n, C* scores, C& largest, C& inverse_sum) {
  C top = -infinity<C>;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  LongSum<C> total;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < end; ++j) {
      scores[j] = decay(scores[j] - top);
      sum += scores[j];
    }
    total.add(sum);
  }
  largest = top;
  inverse_sum = C(1) / C(total.value());
}

template <typename C>
void clear_invisible(const Strip& strip, int64_t row, C* weights) {
  const int64_t n = strip.visible(row);
  memset(weights + n, 0, size_t(strip.visible_to_any() - n) * sizeof(C));
}

// The keys and values of group `group`, packed for forward or backward.
template <typename T, typename C>
void pack_keys(const LifAttentionParams& p, int64_t b, int64_t group, bool backward,
               const AttentionOperands<C>& to) {
  const Rows<T> key(p.key, b, group), value(p.value, b, group);
  pack_transposed(key, p.keys, p.size, to.key_t);
  if (!backward) return pack_columns(value, p.keys, p.size, C(1), to.value);
  pack_transposed(value, p.keys, p.size, to.value_t);
  pack_columns(key, p.keys, p.size, C(1), to.key);
}

// The queries of a strip, times the scale, and in backward the gradients of their results.
template <typename T, typename C>
void pack_queries(const LifAttentionParams& p, int64_t b, int64_t h, const Strip& strip,
                  bool backward, const AttentionOperands<C>& to) {
  const Rows<T> query(p.query, b, h, strip.first);
  pack_rows(query, strip.rows, p.size, C(p.scale), to.query, to.stride);
  if (!backward) return;
  const Rows<T> grad_out(p.grad_out, b, h, strip.first);
  pack_columns(query, strip.rows, p.size, C(p.scale), to.query_panels);
  pack_rows(grad_out, strip.rows, p.size, C(1), to.grad_out, to.stride);
  pack_columns(grad_out, strip.rows, p.size, C(1), to.grad_out_panels);
}

// Scores of a strip of queries, which are packed for that.
template <typename T, typename C>
void multiply_scores(const LifAttentionParams& p, int64_t b, int64_t h, const Strip& strip,
                     bool backward, const AttentionOperands<C>& operands, C* scores,
                     int64_t stride) {
  pack_queries<T>(p, b, h, strip, backward, operands);
  multiply_keys(strip, p.size, operands.query, operands.stride, operands.key_t, scores, stride);
}

// out = weights value, the rows divided by the sums in the rows' statistics.
template <typename T, typename C>
void write_out(const LifAttentionParams& p, int64_t b, int64_t h, const Strip& strip,
               const C* weights, int64_t stride, const AttentionOperands<C>& operands) {
  multiply_values(strip, p.size, weights, stride, operands.value, operands.result, operands.stride);
  for (int64_t r = 0; r < strip.rows; ++r) {
    write_row<T>(operands.result + r * operands.stride, p.size,
                 *RowStats<C>(p, b, h, strip.first + r).inverse_weight, p.out, b, h,
                 strip.first + r);
  }
}

// grad_out . v for each pair of a strip's query and a key.
template <typename C>
void multiply_grad_out(const LifAttentionParams& p, const Strip& strip,
                       const AttentionOperands<C>& operands, C* grads, int64_t stride) {
  multiply_keys(strip, p.size, operands.grad_out, operands.stride, operands.value_t, grads, stride);
}

template <typename C>
void add_value_gradients(const LifAttentionParams& p, const Strip& strip, const C* weights,
                         int64_t stride, const AttentionOperands<C>& operands) {
  add_transposed(strip, p.size, weights, stride, operands.grad_out_panels, operands.grad_value,
                 operands.stride);
}

// From the gradients of a strip's scores those of its queries, and its part of the keys'.
template <typename T, typename C>
void add_score_gradients(const LifAttentionParams& p, int64_t b, int64_t h, const Strip& strip,
                         const C* score_grads, int64_t stride,
                         const AttentionOperands<C>& operands) {
  add_transposed(strip, p.size, score_grads, stride, operands.query_panels, operands.grad_key,
                 operands.stride);
  multiply_values(strip, p.size, score_grads, stride, operands.key, operands.result,
                  operands.stride);
  for (int64_t r = 0; r < strip.rows; ++r) {
    write_row<T>(operands.result + r * operands.stride, p.size, C(p.scale), p.grad_query, b, h,
                 strip.first + r);
  }
}

template <typename C>
void clear_key_gradients(const LifAttentionParams& p, const AttentionOperands<C>& operands) {
  memset(operands.grad_key, 0, size_t(p.keys * operands.stride) * sizeof(C));
  memset(operands.grad_value, 0, size_t(p.keys * operands.stride) * sizeof(C));
}

}  // namespace EMBER_ISA
}  // namespace ember
