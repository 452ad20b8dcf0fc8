// LIF attention on the CPU, one strip of queries at a time.
//
// The row sums that the gate and the softmax need are taken while a strip is in the caches: no
// product of matrices is computed twice within forward or backward. Forward takes two products
// (query key^T, weights value), backward five.
//
//   p = exp(s - m) / l;  f = sigmoid(k (p - theta));  g = f + lambda (1 - f);  w = p g
//   out = sum_j w_j M_j v_j / R,  R = sum_j w_j + eps,  M the dropout mask over 1 - dropout
//
// Backward, with t_j = M_j (grad_out . v_j), delta = sum_j t_j w_j / R and h = d(p g)/dp:
//   dw_j = (t_j - delta) / R,  dp_j = h_j dw_j,  ds_j = p_j (dp_j - sum_i p_i dp_i)
#include "lif_attention.h"

#include <type_traits>

#include "attention_strips.h"
#include "parallel.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

char* thread_block(const LifAttentionParams& p, const ThreadPool& pool, bool backward) {
  return static_cast<char*>(p.scratch) +
         pool.thread_index() * lif_attention_scratch_bytes(p, backward);
}

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

// What the mask says of the keys of one query.
struct MaskRow {
  const bool* first = nullptr;
  int64_t stride = 0;

  MaskRow(const LifAttentionParams& p, int64_t b, int64_t h, int64_t query) {
    if (!p.mask) return;
    first = p.mask + b * p.mask_strides[0] + h * p.mask_strides[1] + query * p.mask_strides[2];
    stride = p.mask_strides[3];
  }
  bool visible(int64_t key) const { return !first || first[key * stride]; }
};

// Hides the scores that the mask hides; returns how many are left.
template <typename C>
int64_t apply_mask(const MaskRow& mask, int64_t n, C* scores) {
  if (!mask.first) return n;
  int64_t left = 0;
  for (int64_t j = 0; j < n; ++j) {
    const bool visible = mask.visible(j);
    left += visible;
    scores[j] = visible ? scores[j] : -infinity<C>;
  }
  return left;
}

// Replaces probabilities over `sum` by weights before their division; returns their sum.
template <typename C>
C gate_row(int64_t n, C inverse_sum, const Gate<C>& gate, C* row) {
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  LongSum<C> total;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < end; ++j) {
      const C p = row[j] * inverse_sum, odds = gate_odds(p, threshold, steepness);
      const C fire = C(1) / (C(1) + odds), w = p * gate_value(fire, odds * fire, leak);
      row[j] = w;
      sum += w;
    }
    total.add(sum);
  }
  return C(total.value());
}

// Sums over queries of what AttentionSummary describes. Counts are exact as they are.
struct SummarySums {
  LongSum<double> entropy, first_token;
  double support = 0, firing = 0, visible = 0;
};

// Adds a row to the sums, and to `load`, [2, keys]: of each key the sum and its rest.
template <typename C>
void summarize_row(int64_t n, int64_t visible, const MaskRow& mask, const C* exponentials,
                   C inverse_sum, C threshold, const C* w, C inverse_weight, int64_t keys,
                   SummarySums& sums, double* load) {
  sums.visible += double(visible);
  for (int64_t j = 0; j < n; ++j) {
    const C p = exponentials[j] * inverse_sum, weight = w[j] * inverse_weight;
    sums.entropy.add(weight > 0 ? -double(weight) * __builtin_log(double(weight)) : 0);
    sums.support += weight > C(0.01);
    sums.firing += p > threshold && mask.visible(j);
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    add_exactly(double(exponentials[j] * inverse_sum), load[j], load[keys + j]);
  }
  if (n > 0) sums.first_token.add(double(w[0] * inverse_weight));
}

template <typename C>
void forward_row(const LifAttentionParams& p, const Task& task, const Gate<C>& gate, int64_t query,
                 int64_t n, const LifAttentionWorkspace<C>& s, C* row, SummarySums* summary) {
  const RowStats<C> stats(p, task.b, task.h, query);
  const MaskRow mask(p, task.b, task.h, query);
  const int64_t visible = apply_mask(mask, n, row);
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
    summarize_row(n, visible, mask, s.p, *stats.inverse_sum, gate.threshold, row,
                  *stats.inverse_weight, p.keys, *summary, s.load);
  }
  drop_weights(p, task.b, task.h, query, n, s.keep, row);
}

template <typename T>
void forward_task(const LifAttentionParams& p, const Task& task,
                  const LifAttentionWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const Gate<C> gate = gate_of<C>(p, task.h);
  const AttentionOperands<C>& operands = s.operands;
  pack_keys<T>(p, task.b, task.group, false, operands);
  double* partial = p.summary ? p.summary_partials + task.index * (5 + p.keys) : nullptr;
  for (int64_t j = 0; partial && j < 2 * p.keys; ++j) s.load[j] = 0;
  SummarySums sums;
  for (int64_t first = task.first; first < task.end; first += lif_attention_strip_rows(p)) {
    const Strip strip(p, first, smaller(lif_attention_strip_rows(p), task.end - first));
    multiply_scores<T>(p, task.b, task.h, strip, false, operands, s.scores, s.stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      C* scores = s.scores + row * s.stride;
      forward_row(p, task, gate, first + row, strip.visible(row), s, scores,
                  partial ? &sums : nullptr);
      clear_invisible(strip, row, scores);
    }
    write_out<T>(p, task.b, task.h, strip, s.scores, s.stride, operands);
  }
  if (!partial) return;
  const double results[] = {sums.entropy.value(), sums.support, sums.first_token.value(),
                            sums.firing, sums.visible};
  for (int64_t j = 0; j < 5; ++j) partial[j] = results[j];
  for (int64_t j = 0; j < p.keys; ++j) partial[5 + j] = s.load[j] + s.load[p.keys + j];
}

// Turns a row of scores into their gradients and a row of grad_out . v into weights, in place. Adds
// the gradients of the gate's parameters to `gates`.
template <typename C>
void backward_row(const LifAttentionParams& p, const Task& task, const Gate<C>& gate, int64_t query,
                  int64_t n, const LifAttentionWorkspace<C>& s, C* scores, C* grads,
                  LongSum<C>* gates) {
  const RowStats<C> stats(p, task.b, task.h, query);
  const C largest = *stats.largest, inverse_sum = *stats.inverse_sum;
  const C inverse_weight = *stats.inverse_weight;
  if (inverse_weight == 0) {
    memset(scores, 0, size_t(n) * sizeof(C));
    memset(grads, 0, size_t(n) * sizeof(C));
    return;
  }
  apply_mask(MaskRow(p, task.b, task.h, query), n, scores);
  drop_weights(p, task.b, task.h, query, n, s.keep, grads);
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  C *const p_row = s.p, *const fire_row = s.fire, *const smoulder_row = s.smoulder;
  C* const w_row = s.w;
  LongSum<C> dots, expectations;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = from; j < end; ++j) {
      const C prob = decay(scores[j] - largest) * inverse_sum;
      const C odds = gate_odds(prob, threshold, steepness), fire = C(1) / (C(1) + odds);
      const C w = prob * gate_value(fire, odds * fire, leak);
      p_row[j] = prob;
      fire_row[j] = fire;
      smoulder_row[j] = odds * fire;
      w_row[j] = w;
      dot += w * grads[j];
    }
    dots.add(dot);
  }
  const C delta = C(dots.value()) * inverse_weight;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C expected = 0, by_threshold = 0, by_leak = 0, by_steepness = 0;
#pragma omp simd reduction(+ : expected, by_threshold, by_leak, by_steepness)
    for (int64_t j = from; j < end; ++j) {
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
    expectations.add(expected);
    gates[0].add(by_threshold);
    gates[1].add(by_leak);
    gates[2].add(by_steepness);
  }
  const C expected = C(expectations.value());
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    scores[j] = fire_row[j] - p_row[j] * expected;
    grads[j] = w_row[j] * inverse_weight;
  }
  if (p.seed) multiply_row(n, s.keep, grads);
}

template <typename T>
void backward_task(const LifAttentionParams& p, const Task& task,
                   const LifAttentionWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const Gate<C> gate = gate_of<C>(p, task.h);
  const AttentionOperands<C>& operands = s.operands;
  pack_keys<T>(p, task.b, task.group, true, operands);
  clear_key_gradients(p, operands);
  LongSum<C> gates[3];
  for (int64_t first = task.first; first < task.end; first += lif_attention_strip_rows(p)) {
    const Strip strip(p, first, smaller(lif_attention_strip_rows(p), task.end - first));
    multiply_scores<T>(p, task.b, task.h, strip, true, operands, s.scores, s.stride);
    multiply_grad_out(p, strip, operands, s.grads, s.stride);
    for (int64_t row = 0; row < strip.rows; ++row) {
      C *scores = s.scores + row * s.stride, *grads = s.grads + row * s.stride;
      backward_row(p, task, gate, first + row, strip.visible(row), s, scores, grads, gates);
      clear_invisible(strip, row, scores);
      clear_invisible(strip, row, grads);
    }
    add_value_gradients(p, strip, s.grads, s.stride, operands);
    add_score_gradients<T>(p, task.b, task.h, strip, s.scores, s.stride, operands);
  }
  for (int64_t which = 0; which < 3; ++which) {
    p.gate_partials[task.index * 3 + which] = gates[which].value();
  }
  for (int64_t token = 0; token < p.keys; ++token) {
    const C* grad_key = operands.grad_key + token * operands.stride;
    const C* grad_value = operands.grad_value + token * operands.stride;
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

// row [size] = the sum of `count` rows from there on.
template <typename C>
void sum_rows(int64_t count, int64_t size, C* row, int64_t stride) {
  constexpr int64_t width = 32;
  for (int64_t first = 0; first < size; first += width) {
    const int64_t end = smaller(size, first + width);
    double sums[width] = {};
    for (int64_t i = 0; i < count; ++i) {
      const C* from = row + i * stride;
      for (int64_t d = first; d < end; ++d) sums[d - first] += double(from[d]);
    }
    for (int64_t d = first; d < end; ++d) row[d] = C(sums[d - first]);
  }
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
                     sum_rows(shares, p.size, row, 2 * plane);
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
    LongSum<double> sum;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        sum.add(p.gate_partials[((b * p.heads + h) * segments + segment) * 3 + which]);
      }
    }
    static_cast<C*>(p.grad_gates)[i] = C(sum.value());
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
    parallel_for(
        pool, lif_attention_tasks(p), grain_for(task_cost(p)), [&](int64_t begin, int64_t end) {
          const LifAttentionWorkspace<compute_t<T>> s(p, false, thread_block(p, pool, false));
          for (int64_t i = begin; i < end; ++i) forward_task<T>(p, Task(p, i), s);
        });
    if (p.summary) sum_summaries<compute_t<T>>(p);
  });
}

void lif_attention_backward(const LifAttentionParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    parallel_for(
        pool, lif_attention_tasks(p), grain_for(2 * task_cost(p)), [&](int64_t begin, int64_t end) {
          const LifAttentionWorkspace<compute_t<T>> s(p, true, thread_block(p, pool, true));
          for (int64_t i = begin; i < end; ++i) backward_task<T>(p, Task(p, i), s);
        });
    if (p.key_partials) sum_keys<T>(p, pool);
    sum_gates<compute_t<T>>(p);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
