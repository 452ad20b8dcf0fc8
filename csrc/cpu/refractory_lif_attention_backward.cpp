// The backward pass of refractory LIF attention on the CPU.
#include <type_traits>

#include "refractory_rows.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

using Params = RefractoryLifAttentionParams;

// a_ij / H for the rows of a strip. Null if there is no such gradient.
template <typename C>
const C* weight_gradient_rows(const Params& p, int64_t b, const Strip& strip,
                              const RefractoryWorkspace<C>& s) {
  if (!p.grad_next_load && !p.grad_weights) return nullptr;
  const C per_head = C(1) / C(p.heads);
  for (int64_t r = strip.rows - 1; r >= 0; --r) {
    const int64_t query = strip.first + r, n = strip.visible(r);
    if (p.grad_next_load) {
      add_row(n, double(inverse_count<C>(p, query)),
              static_cast<const C*>(p.grad_next_load) + (b * p.queries + query) * p.keys,
              s.weight_grads);
    }
    C* const row = s.extra + r * s.stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) row[j] = C(s.weight_grads[j]) * per_head;
  }
  return s.extra;
}

// The gradient of a row's thresholds, tau, into `smoulder`, and of its probabilities before the
// softmax's own. Turns `grads`, d out . v, into
//   causal      the dropped weights, and `scores`, the probabilities, into the scores' gradients
//   look_ahead  h_ij dw_ij, for the sum over queries is not known yet, and writes the dropped
//               weights to `weights`
// Adds to `load_grads` and to the gates' gradients.
template <bool look_ahead, typename C>
void backward_row(const Params& p, const Unit& unit, int64_t h, int64_t query, int64_t n,
                  const RefractoryGate<C>& gate, const C* loads, const C* extra,
                  const RefractoryWorkspace<C>& s, double* load_grads, C* scores, C* grads,
                  C* weights, LongSum<C>* gates) {
  const C inverse_weight = *RowStats<C>(p, unit.b, h, query).inverse_weight;
  const C* const previous = previous_row(p, unit.b, query, s.zeros);
  drop_weights(p, unit.b, h, query, n, s.keep, grads);
  if (extra) add_row(n, C(1), extra, grads);
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  const C within = gate.within, across = gate.across;
  C *const fire_row = s.fire, *const smoulder_row = s.smoulder, *const w_row = s.w;
  LongSum<C> dots, expectations;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = from; j < end; ++j) {
      const C prob = scores[j];
      const C odds =
          gate_odds(prob, threshold + within * loads[j] + across * previous[j], steepness);
      const C fire = C(1) / (C(1) + odds), w = prob * gate_value(fire, odds * fire, leak);
      fire_row[j] = fire;
      smoulder_row[j] = odds * fire;
      w_row[j] = w;
      dot += w * grads[j];
    }
    dots.add(dot);
  }
  const C delta = C(dots.value()) * inverse_weight;
  const C load_factor = within * inverse_count<C>(p, query);
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C expected = 0, by_threshold = 0, by_leak = 0, by_steepness = 0, by_within = 0, by_across = 0;
#pragma omp simd reduction(+ : expected, by_threshold, by_leak, by_steepness, by_within, by_across)
    for (int64_t j = from; j < end; ++j) {
      const C prob = scores[j], fire = fire_row[j], smoulder = smoulder_row[j];
      const C dw = (grads[j] - delta) * inverse_weight, slope = gate_slope(fire, smoulder, leak);
      const C value = gate_value(fire, smoulder, leak);
      const C tau = gate_dy_dthreshold(prob, steepness, slope) * dw;
      const double load_grad = load_grads[j] + double(load_factor * tau);
      load_grads[j] = load_grad;
      C dp = gate_dy_dx(prob, steepness, value, slope) * dw;
      if (!look_ahead) {
        dp = prob * (dp + C(load_grad));
        expected += dp;
      }
      fire_row[j] = dp;
      smoulder_row[j] = tau;
      by_threshold += tau;
      by_leak += prob * smoulder * dw;
      const C above = prob - (threshold + within * loads[j] + across * previous[j]);
      by_steepness += above * (prob * slope) * dw;
      by_within += tau * loads[j];
      by_across += tau * previous[j];
    }
    expectations.add(expected);
    const C terms[] = {by_threshold, by_leak, by_steepness, by_within, by_across};
    for (int64_t which = 0; which < 5; ++which) gates[which].add(terms[which]);
  }
  const C expected = C(expectations.value());
  C* const dropped = look_ahead ? weights : grads;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    if (look_ahead) {
      grads[j] = fire_row[j];
    } else {
      scores[j] = fire_row[j] - scores[j] * expected;
    }
    dropped[j] = w_row[j] * inverse_weight;
  }
  if (p.seed) multiply_row(n, s.keep, dropped);
}

// Probabilities from a row of scores, in place.
template <typename C>
void recompute_row(const RowStats<C>& stats, int64_t n, C* row) {
  const C largest = *stats.largest, inverse_sum = *stats.inverse_sum;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) row[j] = decay(row[j] - largest) * inverse_sum;
}

template <typename T, typename C>
void write_key_gradients(const Params& p, const Unit& unit, const AttentionOperands<C>& operands) {
  for (int64_t token = 0; token < p.keys; ++token) {
    const int64_t row = token * operands.stride;
    write_row<T>(operands.grad_key + row, p.size, C(1), p.grad_key, unit.b, unit.group, token);
    write_row<T>(operands.grad_value + row, p.size, C(1), p.grad_value, unit.b, unit.group, token);
  }
}

template <typename C>
void begin_unit_sums(const Params& p, const Unit& unit, const RefractoryScratch<C>& scratch,
                     const RefractoryWorkspace<C>& s) {
  for (int64_t head = 0; head < unit.heads; ++head) {
    const int64_t index = unit.b * p.heads + unit.first_head + head;
    for (int64_t which = 0; which < 5; ++which) scratch.gates[index * 5 + which] = LongSum<C>();
    start_sums<C>(p.grad_probabilities, index * p.keys, p.keys, s.load_grads + head * s.stride);
  }
  start_sums<C>(p.grad_weights, unit.b * p.keys, p.keys, s.weight_grads);
  clear_row(p.keys, scratch.unit_rows + unit.index * p.keys);
}

template <typename T, typename C>
void causal_backward_strip(const Params& p, const Unit& unit, const Strip& strip,
                           const RefractoryScratch<C>& scratch, const RefractoryWorkspace<C>& s,
                           HeadShare<C> share) {
  const AttentionOperands<C>& operands = s.operands;
  const C* const extra = weight_gradient_rows(p, unit.b, strip, s);
  for (int64_t head = 0; head < unit.heads; ++head) {
    const int64_t h = unit.first_head + head;
    const RefractoryGate<C> gate(p, h);
    double* const sums = s.load_sums + head * s.stride;
    double* const load_grads = s.load_grads + head * s.stride;
    copy_row(block_loads<C>(p, unit.b, h, strip.first), p.keys, sums);
    multiply_scores<T>(p, unit.b, h, strip, true, s.operands, s.scores, s.stride);
    multiply_grad_out(p, strip, operands, s.grads, s.stride);
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t query = strip.first + r, n = strip.visible(r);
      C *const row = s.scores + r * s.stride, *const loads = s.loads + r * s.stride;
      recompute_row(RowStats<C>(p, unit.b, h, query), n, row);
      const C factor = inverse_count<C>(p, query);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const double sum = sums[j] + double(row[j]);
        sums[j] = sum;
        loads[j] = C(sum) * factor;
      }
    }
    for (int64_t r = strip.rows - 1; r >= 0; --r) {
      const int64_t at = r * s.stride, n = strip.visible(r);
      backward_row<false>(p, unit, h, strip.first + r, n, gate, s.loads + at,
                          extra ? extra + at : nullptr, s, load_grads, s.scores + at, s.grads + at,
                          static_cast<C*>(nullptr), scratch.gates + (unit.b * p.heads + h) * 5);
      add_to_share(n, p.keys, s.smoulder, gate.across, share, r);
      clear_invisible(strip, r, s.scores + at);
      clear_invisible(strip, r, s.grads + at);
    }
    add_value_gradients(p, strip, s.grads, s.stride, operands);
    add_score_gradients<T>(p, unit.b, h, strip, s.scores, s.stride, operands);
    share.first = false;
  }
}

template <typename T, typename C>
void end_causal_backward(const Params& p, const Unit& unit, const RefractoryWorkspace<C>& s) {
  write_key_gradients<T>(p, unit, s.operands);
  if (!p.grad_past_probabilities) return;
  const int64_t earlier = p.keys - p.queries;
  for (int64_t head = 0; head < unit.heads; ++head) {
    copy_row(s.load_grads + head * s.stride, earlier,
             static_cast<C*>(p.grad_past_probabilities) +
                 (unit.b * p.heads + unit.first_head + head) * earlier);
  }
  if (unit.group == 0) {
    copy_row(s.weight_grads, earlier, static_cast<C*>(p.grad_past_weights) + unit.b * earlier);
  }
}

// The last multiple of `step` below n.
int64_t last_multiple(int64_t n, int64_t step) {
  return (n - 1) / step * step;
}

template <typename T>
void causal_backward_in_step(const Params& p, const ThreadPool& pool,
                             const RefractoryScratch<compute_t<T>>& scratch) {
  using C = compute_t<T>;
  const int64_t rows = refractory_strip_rows(p), step_rows = refractory_step_rows(p);
  const int64_t last = last_multiple(p.queries, step_rows);
  for (int64_t start = last; start >= 0; start -= step_rows) {
    const Strip step(p, start, smaller(step_rows, p.queries - start));
    const auto run_unit = [&](int64_t i) {
      const Unit unit(p, i);
      const RefractoryWorkspace<C> s = workspace(p, scratch, i, true);
      if (start == last) {
        begin_unit<T>(p, unit, true, s);
        begin_unit_sums(p, unit, scratch, s);
      }
      for (int64_t r = last_multiple(step.rows, rows); r >= 0; r -= rows) {
        HeadShare<C> share{};
        if (p.grad_previous_load) {
          share = p.one_previous_row
                      ? unit_row(p, unit, scratch)
                      : HeadShare<C>{nullptr, s.share + r * s.stride, s.stride, true};
        }
        const Strip strip(p, start + r, smaller(rows, step.rows - r));
        causal_backward_strip<T>(p, unit, strip, scratch, s, share);
      }
      if (start == 0) end_causal_backward<T>(p, unit, s);
    };
    parallel_for(pool, refractory_units(p), grain_for(2 * unit_cost(p, step.rows)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) run_unit(i);
                 });
    if (p.grad_previous_load && !p.one_previous_row) {
      for_columns(p, pool, step.rows, [&](int64_t b, int64_t begin, int64_t end) {
        add_shares(p, scratch, true, b, step, begin, end, p.grad_previous_load);
      });
    }
  }
}

// The gradient of the previous layer's load, in the rows of a strip or in the unit's one row.
template <typename C>
HeadShare<C> previous_share(const Params& p, const Unit& unit, const Strip& strip,
                            const RefractoryScratch<C>& scratch) {
  if (!p.grad_previous_load) return {};
  if (p.one_previous_row) return unit_row(p, unit, scratch);
  return shared_rows<C>(p, unit, strip, p.grad_previous_load);
}

template <typename T>
void causal_backward_entry(const Params& p, int64_t b,
                           const RefractoryScratch<compute_t<T>>& scratch,
                           const RefractoryWorkspace<compute_t<T>>& s) {
  const int64_t rows = refractory_strip_rows(p);
  for (int64_t group = 0; group < p.groups; ++group) {
    const Unit unit(p, b * p.groups + group);
    begin_unit<T>(p, unit, true, s);
    begin_unit_sums(p, unit, scratch, s);
    for (int64_t first = last_multiple(p.queries, rows); first >= 0; first -= rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      causal_backward_strip<T>(p, unit, strip, scratch, s, previous_share(p, unit, strip, scratch));
    }
    end_causal_backward<T>(p, unit, s);
  }
}

template <typename T>
void look_ahead_backward_unit(const Params& p, const Unit& unit,
                              const RefractoryScratch<compute_t<T>>& scratch,
                              const RefractoryWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const AttentionOperands<C>& operands = s.operands;
  const int64_t rows = refractory_strip_rows(p);
  begin_unit<T>(p, unit, true, s);
  begin_unit_sums(p, unit, scratch, s);
  const C per_query = inverse_count<C>(p, 0), per_head = C(1) / C(p.heads);
  const C* extra = nullptr;
  if (p.grad_next_load || p.grad_weights) {
    if (p.grad_next_load) {
      add_row(p.keys, double(per_query), static_cast<const C*>(p.grad_next_load) + unit.b * p.keys,
              s.weight_grads);
    }
    for (int64_t j = 0; j < p.keys; ++j) s.extra[j] = C(s.weight_grads[j]) * per_head;
    extra = s.extra;
  }
  for (int64_t head = 0; head < unit.heads; ++head) {
    const int64_t h = unit.first_head + head;
    const RefractoryGate<C> gate(p, h);
    double* const load_grads = s.load_grads + head * s.stride;
    const C* const sums = block_loads<C>(p, unit.b, h, 0);
    for (int64_t j = 0; j < p.keys; ++j) s.loads[j] = sums[j] * per_query;
    for (int64_t first = 0; first < p.queries; first += rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      C *const scores = s.scores + first * s.stride, *const grads = s.grads + first * s.stride;
      HeadShare<C> share = previous_share(p, unit, strip, scratch);
      share.first &= head == 0;
      multiply_scores<T>(p, unit.b, h, strip, true, operands, scores, s.stride);
      multiply_grad_out(p, strip, operands, grads, s.stride);
      for (int64_t r = 0; r < strip.rows; ++r) {
        const int64_t at = r * s.stride, n = strip.visible(r);
        recompute_row(RowStats<C>(p, unit.b, h, first + r), n, scores + at);
        backward_row<true>(p, unit, h, first + r, n, gate, s.loads, extra, s, load_grads,
                           scores + at, grads + at, s.weights + at,
                           scratch.gates + (unit.b * p.heads + h) * 5);
        add_to_share(n, p.keys, s.smoulder, gate.across, share, r);
        clear_invisible(strip, r, s.weights + at);
      }
      add_value_gradients(p, strip, s.weights, s.stride, operands);
    }
    for (int64_t first = 0; first < p.queries; first += rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      C *const scores = s.scores + first * s.stride, *const grads = s.grads + first * s.stride;
      for (int64_t r = 0; r < strip.rows; ++r) {
        const int64_t n = strip.visible(r);
        C *const probs = scores + r * s.stride, *const dp = grads + r * s.stride;
        LongSum<C> expectations;
        for (int64_t from = 0; from < n; from += sum_segment<C>) {
          const int64_t end = smaller(n, from + sum_segment<C>);
          C sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t j = from; j < end; ++j) {
            dp[j] = probs[j] * (dp[j] + C(load_grads[j]));
            sum += dp[j];
          }
          expectations.add(sum);
        }
        const C expected = C(expectations.value());
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) dp[j] -= probs[j] * expected;
        clear_invisible(strip, r, dp);
      }
      const Rows<T> query(p.query, unit.b, h, first);
      pack_columns(query, strip.rows, p.size, C(p.scale), operands.query_panels);
      add_score_gradients<T>(p, unit.b, h, strip, grads, s.stride, operands);
    }
  }
  write_key_gradients<T>(p, unit, operands);
}

template <typename C>
void sum_gates(const Params& p, const RefractoryScratch<C>& scratch) {
  for (int64_t which = 0; which < 5; ++which) {
    for (int64_t h = 0; h < p.heads; ++h) {
      LongSum<double> sum;
      for (int64_t b = 0; b < p.batch; ++b) {
        sum.add(scratch.gates[(b * p.heads + h) * 5 + which].value());
      }
      static_cast<C*>(p.grad_gates)[which * p.heads + h] = C(sum.value());
    }
  }
}

template <typename T>
void backward(const Params& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  using Workspace = RefractoryWorkspace<C>;
  const RefractoryScratch<C> scratch(p, true, pool.threads, p.scratch);
  if (refractory_in_step(p)) {
    causal_backward_in_step<T>(p, pool, scratch);
  } else if (!p.look_ahead) {
    for_each(p, pool, scratch, true, p.batch,
             [&](int64_t b, const Workspace& s) { causal_backward_entry<T>(p, b, scratch, s); });
  } else {
    // Units that add to the same rows of a gradient take turns.
    const int64_t turns = p.grad_previous_load && !p.one_previous_row ? p.groups : 1;
    for_each(p, pool, scratch, true, refractory_units(p) / turns,
             [&](int64_t i, const Workspace& s) {
               for (int64_t turn = 0; turn < turns; ++turn) {
                 look_ahead_backward_unit<T>(p, Unit(p, i * turns + turn), scratch, s);
               }
             });
  }
  if (p.grad_previous_load && p.one_previous_row) {
    sum_unit_rows(p, scratch, p.grad_previous_load, nullptr);
  }
  sum_gates(p, scratch);
}

}  // namespace

void refractory_lif_attention_backward(const RefractoryLifAttentionParams& p,
                                       const ThreadPool& pool) {
  dispatch_dtype(
      p.dtype, [&](auto* element) { backward<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace EMBER_ISA
}  // namespace ember
