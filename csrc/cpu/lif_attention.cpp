// LIF attention on the CPU, one strip of queries at a time.
//
// The scores of a strip against all its keys fit in the caches, and the row sums that the gate and
// the softmax need are taken there: no product of matrices is computed twice within forward or
// backward. Forward takes two products (query key^T, weights value), backward five.
//
//   p = exp(s - m) / l;  f = sigmoid(k (p - theta));  g = f + lambda (1 - f);  w = p g
//   out = sum_j w_j M_j v_j / R,  R = sum_j w_j + eps,  M the dropout mask over 1 - dropout
//
// Backward, with t_j = M_j (grad_out . v_j), delta = sum_j t_j w_j / R and h = d(p g)/dp:
//   dw_j = (t_j - delta) / R,  dp_j = h_j dw_j,  ds_j = p_j (dp_j - sum_i p_i dp_i)
#include "../common/lif_attention.h"

#include <cstring>
#include <type_traits>

#include "../common/lif_gate_math.h"
#include "../common/philox.h"
#include "parallel.h"
#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

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

// The queries [first, first + rows) of one task, and what they see.
struct Strip {
  int64_t first, rows, keys;
  int64_t before;  // row r sees keys [0, before + r + 1) if causal; all of them otherwise
  bool causal;

  Strip(const LifAttentionParams& p, int64_t first, int64_t end)
      : first(first),
        rows(smaller(lif_attention_strip_rows(p), end - first)),
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

// One thread's buffers.
template <typename C>
struct Workspace {
  int64_t stride, size_stride;        // of rows in strips, and of rows of `size` elements
  double* load;                       // [keys]
  C *scores, *grads;                  // strips [rows, stride]
  C *keep, *p, *fire, *smoulder, *w;  // rows [stride]
  C *query, *result;                  // [rows, size_stride]
  C* grad_out;                        // the same
  C *query_panels, *grad_out_panels;
  C *key_t, *value;  // forward's operands: panels of tokens; panels of columns
  C *value_t, *key;
  C *grad_key, *grad_value;  // [keys, size_stride]

  Workspace(const LifAttentionParams& p, const ThreadPool& pool, bool backward) {
    const int64_t bytes = lif_attention_scratch_bytes(p, backward);
    char* base = static_cast<char*>(p.scratch) + pool.thread_index() * bytes;
    load = reinterpret_cast<double*>(base);
    C* at = reinterpret_cast<C*>(load + p.keys);
    const auto take = [&](int64_t elements) {
      C* block = at;
      at += elements;
      return block;
    };
    stride = lif_attention_strip_stride(p);
    size_stride = lif_attention_padded(p.size);
    const int64_t strip = lif_attention_strip_rows(p) * stride;
    const int64_t operand = lif_attention_strip_rows(p) * size_stride;
    const int64_t matrix = lif_attention_padded(p.keys) * size_stride;
    scores = take(strip);
    keep = take(stride);
    this->p = take(stride);
    fire = take(stride);
    smoulder = take(stride);
    w = take(stride);
    query = take(operand);
    result = take(operand);
    key_t = take(matrix);
    value = take(matrix);
    if (!backward) return;
    grads = take(strip);
    grad_out = take(operand);
    query_panels = take(operand);
    grad_out_panels = take(operand);
    value_t = take(matrix);
    key = take(matrix);
    grad_key = take(matrix);
    grad_value = take(matrix);
  }
};

// A segment of the queries of batch entry b and head h.
struct Task {
  int64_t index, b, h, group, first, end;

  Task(const LifAttentionParams& p, int64_t index) : index(index) {
    const int64_t segments = lif_attention_segments(p), segment = index % segments;
    h = index / segments % p.heads;
    b = index / segments / p.heads;
    group = h / (p.heads / p.groups);
    first = border(p, segment, segments);
    end = border(p, segment + 1, segments);
  }

  // Segments see about equally many keys in all.
  static int64_t border(const LifAttentionParams& p, int64_t segment, int64_t segments) {
    if (!p.causal || segment == segments) return p.queries * segment / segments;
    const int64_t hidden = p.queries > p.keys ? p.queries - p.keys : 0;
    const int64_t before = p.keys > p.queries ? p.keys - p.queries : 0;
    const double rows = double(p.queries - hidden), total = rows * (before + rows / 2);
    const double part = total * double(segment) / double(segments);
    const double row = __builtin_sqrt(double(before) * before + 2 * part) - before;
    return segment == 0 ? 0 : hidden + int64_t(row);
  }
};

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

// exp(x) for x <= 0 that ends in 0, where `exponential` ends at the smallest normal number.
template <typename C>
EMBER_HD C decay(C x) {
  return x < C(sizeof(C) == 4 ? -87.33 : -708.39) ? C(0) : exponential(x);
}

template <typename C>
constexpr C infinity = C(__builtin_inf());

// Hides the scores that the mask hides; returns how many are left.
template <typename C>
int64_t apply_mask(const LifAttentionParams& p, int64_t b, int64_t h, int64_t query, int64_t n,
                   C* scores) {
  if (!p.mask) return n;
  const int64_t* stride = p.mask_strides;
  const bool* mask = p.mask + b * stride[0] + h * stride[1] + query * stride[2];
  int64_t left = 0;
  for (int64_t j = 0; j < n; ++j) {
    const bool visible = mask[j * stride[3]];
    left += visible;
    scores[j] = visible ? scores[j] : -infinity<C>;
  }
  return left;
}

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

// One row of probabilities from its n scores, in place; 1 / sum of exp(score - largest) if any.
template <typename C>
void softmax_row(int64_t n, C* scores, C& largest, C& inverse_sum) {
  C top = -infinity<C>;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    scores[j] = decay(scores[j] - top);
    sum += scores[j];
  }
  largest = top;
  inverse_sum = C(1) / sum;
}

// Replaces probabilities over `sum` by weights before their division; returns their sum.
template <typename C>
C gate_row(int64_t n, C inverse_sum, const Gate<C>& gate, C* row) {
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const C p = row[j] * inverse_sum, odds = gate_odds(p, threshold, steepness);
    const C fire = C(1) / (C(1) + odds), w = p * gate_value(fire, odds * fire, leak);
    row[j] = w;
    sum += w;
  }
  return sum;
}

// Sums over queries of what AttentionSummary describes: entropy, support, first token, firing and
// visible pairs; `load` of each key.
template <typename C>
void summarize_row(int64_t n, int64_t visible, const C* exponentials, C inverse_sum, C threshold,
                   const C* w, C inverse_weight, double* sums, double* load) {
  sums[4] += double(visible);
  for (int64_t j = 0; j < n; ++j) {
    const C p = exponentials[j] * inverse_sum, weight = w[j] * inverse_weight;
    sums[0] -= weight > 0 ? double(weight) * __builtin_log(double(weight)) : 0;
    sums[1] += weight > C(0.01);
    sums[3] += p > threshold;
    load[j] += p;
  }
  if (n > 0) sums[2] += w[0] * inverse_weight;
}

template <typename C>
void forward_row(const LifAttentionParams& p, const Task& task, const Gate<C>& gate, int64_t query,
                 int64_t n, const Workspace<C>& s, C* row, double* summary) {
  const RowStats<C> stats(p, task.b, task.h, query);
  const int64_t visible = apply_mask(p, task.b, task.h, query, n, row);
  if (visible == 0) {
    *stats.largest = *stats.inverse_sum = *stats.inverse_weight = 0;
    for (int64_t j = 0; j < n; ++j) row[j] = 0;
    return;
  }
  softmax_row(n, row, *stats.largest, *stats.inverse_sum);
  if (summary) memcpy(s.p, row, size_t(n) * sizeof(C));
  const C sum = gate_row(n, *stats.inverse_sum, gate, row);
  *stats.inverse_weight = C(1) / (sum + C(p.eps));
  if (summary) {
    summarize_row(n, visible, s.p, *stats.inverse_sum, gate.threshold, row, *stats.inverse_weight,
                  summary, s.load);
  }
  if (p.seed) {
    draw_dropout(p, task.b, task.h, query, n, s.keep);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] *= s.keep[j];
  }
}

template <typename C>
void clear_invisible(const Strip& strip, int64_t row, C* weights) {
  const int64_t n = strip.visible(row);
  memset(weights + n, 0, size_t(strip.visible_to_any() - n) * sizeof(C));
}

template <typename T>
void forward_task(const LifAttentionParams& p, const Task& task, const Workspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const Gate<C> gate = gate_of<C>(p, task.h);
  pack_transposed(Rows<T>(p.key, task.b, task.group), p.keys, p.size, s.key_t);
  pack_columns(Rows<T>(p.value, task.b, task.group), p.keys, p.size, C(1), s.value);
  double* partial = p.summary ? p.summary_partials + task.index * (5 + p.keys) : nullptr;
  for (int64_t j = 0; partial && j < p.keys; ++j) s.load[j] = 0;
  for (int64_t j = 0; partial && j < 5; ++j) partial[j] = 0;
  for (int64_t first = task.first; first < task.end; first += lif_attention_strip_rows(p)) {
    const Strip strip(p, first, task.end);
    pack_rows(Rows<T>(p.query, task.b, task.h, first), strip.rows, p.size, C(p.scale), s.query,
              s.size_stride);
    multiply_keys(strip, p.size, s.query, s.size_stride, s.key_t, s.scores, s.stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      C* scores = s.scores + row * s.stride;
      forward_row(p, task, gate, first + row, strip.visible(row), s, scores, partial);
      clear_invisible(strip, row, scores);
    }
    multiply_values(strip, p.size, s.scores, s.stride, s.value, s.result, s.size_stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      write_row<T>(s.result + row * s.size_stride, p.size,
                   *RowStats<C>(p, task.b, task.h, first + row).inverse_weight, p.out, task.b,
                   task.h, first + row);
    }
  }
  for (int64_t j = 0; partial && j < p.keys; ++j) partial[5 + j] = s.load[j];
}

// Turns a row of scores into their gradients and a row of grad_out . v into weights, in place. Adds
// the gradients of the gate's parameters to `gates`.
template <typename C>
void backward_row(const LifAttentionParams& p, const Task& task, const Gate<C>& gate, int64_t query,
                  int64_t n, const Workspace<C>& s, C* scores, C* grads, double* gates) {
  const RowStats<C> stats(p, task.b, task.h, query);
  const C largest = *stats.largest, inverse_sum = *stats.inverse_sum;
  const C inverse_weight = *stats.inverse_weight;
  if (inverse_weight == 0) {
    memset(scores, 0, size_t(n) * sizeof(C));
    memset(grads, 0, size_t(n) * sizeof(C));
    return;
  }
  apply_mask(p, task.b, task.h, query, n, scores);
  if (p.seed) {
    draw_dropout(p, task.b, task.h, query, n, s.keep);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) grads[j] *= s.keep[j];
  }
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  C *const p_row = s.p, *const fire_row = s.fire, *const smoulder_row = s.smoulder;
  C* const w_row = s.w;
  C dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < n; ++j) {
    const C prob = decay(scores[j] - largest) * inverse_sum;
    const C odds = gate_odds(prob, threshold, steepness), fire = C(1) / (C(1) + odds);
    const C w = prob * gate_value(fire, odds * fire, leak);
    p_row[j] = prob;
    fire_row[j] = fire;
    smoulder_row[j] = odds * fire;
    w_row[j] = w;
    dot += w * grads[j];
  }
  const C delta = dot * inverse_weight;
  C expected = 0, by_threshold = 0, by_leak = 0, by_steepness = 0;
#pragma omp simd reduction(+ : expected, by_threshold, by_leak, by_steepness)
  for (int64_t j = 0; j < n; ++j) {
    const C prob = p_row[j], fire = fire_row[j], smoulder = smoulder_row[j];
    const C dw = (grads[j] - delta) * inverse_weight, slope = gate_slope(fire, smoulder, leak);
    const C value = gate_value(fire, smoulder, leak);
    const C p_dp = prob * gate_dy_dx(prob, steepness, value, slope) * dw;
    fire_row[j] = p_dp;
    expected += p_dp;
    by_threshold += gate_dy_dthreshold(prob, steepness, slope) * dw;
    by_leak += prob * smoulder * dw;
    by_steepness += gate_dy_dsteepness(prob, prob, threshold, slope) * dw;
  }
  gates[0] += by_threshold;
  gates[1] += by_leak;
  gates[2] += by_steepness;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    scores[j] = fire_row[j] - p_row[j] * expected;
    grads[j] = w_row[j] * inverse_weight;
  }
  if (p.seed) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) grads[j] *= s.keep[j];
  }
}

template <typename T>
void backward_task(const LifAttentionParams& p, const Task& task,
                   const Workspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const Gate<C> gate = gate_of<C>(p, task.h);
  const Rows<T> key(p.key, task.b, task.group), value(p.value, task.b, task.group);
  pack_transposed(key, p.keys, p.size, s.key_t);
  pack_transposed(value, p.keys, p.size, s.value_t);
  pack_columns(key, p.keys, p.size, C(1), s.key);
  memset(s.grad_key, 0, size_t(p.keys * s.size_stride) * sizeof(C));
  memset(s.grad_value, 0, size_t(p.keys * s.size_stride) * sizeof(C));
  double* gates = p.gate_partials + task.index * 3;
  gates[0] = gates[1] = gates[2] = 0;
  for (int64_t first = task.first; first < task.end; first += lif_attention_strip_rows(p)) {
    const Strip strip(p, first, task.end);
    const Rows<T> query(p.query, task.b, task.h, first);
    const Rows<T> grad_out(p.grad_out, task.b, task.h, first);
    pack_rows(query, strip.rows, p.size, C(p.scale), s.query, s.size_stride);
    pack_columns(query, strip.rows, p.size, C(p.scale), s.query_panels);
    pack_rows(grad_out, strip.rows, p.size, C(1), s.grad_out, s.size_stride);
    pack_columns(grad_out, strip.rows, p.size, C(1), s.grad_out_panels);
    multiply_keys(strip, p.size, s.query, s.size_stride, s.key_t, s.scores, s.stride);
    multiply_keys(strip, p.size, s.grad_out, s.size_stride, s.value_t, s.grads, s.stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      C *scores = s.scores + row * s.stride, *grads = s.grads + row * s.stride;
      backward_row(p, task, gate, first + row, strip.visible(row), s, scores, grads, gates);
      clear_invisible(strip, row, scores);
      clear_invisible(strip, row, grads);
    }
    add_transposed(strip, p.size, s.grads, s.stride, s.grad_out_panels, s.grad_value,
                   s.size_stride);
    add_transposed(strip, p.size, s.scores, s.stride, s.query_panels, s.grad_key, s.size_stride);
    multiply_values(strip, p.size, s.scores, s.stride, s.key, s.result, s.size_stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      write_row<T>(s.result + row * s.size_stride, p.size, C(p.scale), p.grad_query, task.b, task.h,
                   first + row);
    }
  }
  for (int64_t token = 0; token < p.keys; ++token) {
    const C* grad_key = s.grad_key + token * s.size_stride;
    const C* grad_value = s.grad_value + token * s.size_stride;
    if (p.key_partials) {
      const size_t bytes = size_t(p.size) * sizeof(C);
      C* to = static_cast<C*>(p.key_partials) + (task.index * 2 * p.keys + token) * p.size;
      memcpy(to, grad_key, bytes);
      memcpy(to + p.keys * p.size, grad_value, bytes);
    } else {
      write_row<T>(grad_key, p.size, C(1), p.grad_key, task.b, task.group, token);
      write_row<T>(grad_value, p.size, C(1), p.grad_value, task.b, task.group, token);
    }
  }
}

// About how many nanoseconds a task takes.
int64_t task_cost(const LifAttentionParams& p) {
  return p.queries * p.keys * (p.size + 16) / (16 * lif_attention_segments(p));
}

// Gradients of keys and values: sums over the tasks that saw them, always in the same order.
template <typename T>
void sum_keys(const LifAttentionParams& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  const int64_t shares = lif_attention_tasks(p) / (p.batch * p.groups);
  const int64_t plane = p.keys * p.size;
  parallel_for(pool, p.batch * p.groups * p.keys, grain_for(shares * p.size),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t token = i % p.keys, head = i / p.keys;
                   C* first = static_cast<C*>(p.key_partials) + head * shares * 2 * plane;
                   const AttentionTensor* grads[] = {&p.grad_key, &p.grad_value};
                   for (int which = 0; which < 2; ++which) {
                     C* row = first + which * plane + token * p.size;
                     for (int64_t share = 1; share < shares; ++share) {
                       const C* other = row + share * 2 * plane;
                       for (int64_t d = 0; d < p.size; ++d) row[d] += other[d];
                     }
                     write_row<T>(row, p.size, C(1), *grads[which], head / p.groups,
                                  head % p.groups, token);
                   }
                 }
               });
}

template <typename C>
void sum_gates(const LifAttentionParams& p) {
  const int64_t segments = lif_attention_segments(p);
  for (int64_t i = 0; i < 3 * p.heads; ++i) {
    const int64_t h = i % p.heads, which = i / p.heads;
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        sum += p.gate_partials[((b * p.heads + h) * segments + segment) * 3 + which];
      }
    }
    static_cast<C*>(p.grad_gates)[i] = C(sum);
  }
}

template <typename C>
void sum_summaries(const LifAttentionParams& p) {
  const int64_t segments = lif_attention_segments(p), heads = p.batch * p.heads;
  C *summary = static_cast<C*>(p.summary), *load = static_cast<C*>(p.load);
  for (int64_t i = 0; i < heads; ++i) {
    double* sums = p.summary_partials + i * segments * (5 + p.keys);
    for (int64_t segment = 1; segment < segments; ++segment) {
      for (int64_t j = 0; j < 5 + p.keys; ++j) sums[j] += sums[segment * (5 + p.keys) + j];
    }
    for (int64_t which = 0; which < 3; ++which) {
      summary[which * heads + i] = C(sums[which] / double(p.queries));
    }
    summary[3 * heads + i] = C(sums[3] / (sums[4] > 0 ? sums[4] : 1));
    for (int64_t j = 0; j < p.keys; ++j) load[i * p.keys + j] = C(sums[5 + j] / double(p.queries));
  }
}

}  // namespace

void lif_attention_forward(const LifAttentionParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel_for(pool, lif_attention_tasks(p), grain_for(task_cost(p)),
                 [&](int64_t begin, int64_t end) {
                   const Workspace<compute_t<T>> s(p, pool, false);
                   for (int64_t i = begin; i < end; ++i) forward_task<T>(p, Task(p, i), s);
                 });
    if (p.summary) sum_summaries<compute_t<T>>(p);
  });
}

void lif_attention_backward(const LifAttentionParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel_for(pool, lif_attention_tasks(p), grain_for(2 * task_cost(p)),
                 [&](int64_t begin, int64_t end) {
                   const Workspace<compute_t<T>> s(p, pool, true);
                   for (int64_t i = begin; i < end; ++i) backward_task<T>(p, Task(p, i), s);
                 });
    if (p.key_partials) sum_keys<T>(p, pool);
    sum_gates<compute_t<T>>(p);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
