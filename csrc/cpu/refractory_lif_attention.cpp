// Refractory LIF attention on the CPU. The formulas are in common/refractory_lif_attention.h.
//
// Causal: one pass over strips of queries, forward in order, backward in reverse, with the running
// sums over queries in hand. Products of matrices are those of plain LIF attention: two forward,
// five backward.
//
// With look_ahead the gates need every query's probabilities, and in backward the probabilities'
// gradients every query's gates. One head's matrix (backward: two) is kept in between, by each
// thread, so that nothing is computed twice.
#include "refractory_lif_attention.h"

#include <type_traits>

#include "attention_strips.h"
#include "parallel.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

using Params = RefractoryLifAttentionParams;

template <typename C>
struct RefractoryGate : Gate<C> {
  C within, across;

  RefractoryGate(const Params& p, int64_t h)
      : Gate<C>(gate_of<C>(p, h)),
        within(static_cast<const C*>(p.within)[h]),
        across(static_cast<const C*>(p.across)[h]) {}
};

struct Unit {
  int64_t index, b, group, first_head, heads;

  Unit(const Params& p, int64_t index)
      : index(index),
        b(index / p.groups),
        group(index % p.groups),
        first_head(group * (p.heads / p.groups)),
        heads(p.heads / p.groups) {}
};

// Where a unit's heads add rows over the keys: to one row for all queries, or row r of a strip to
// rows + r * stride, where the first head to come writes instead, with zeros for invisible keys.
// Both null if the sum is not wanted.
template <typename C>
struct Share {
  double* one_row;
  C* rows;
  int64_t stride;
  bool first;
};

// sums += row * factor.
template <typename C, typename Sum>
void add_row(int64_t n, Sum factor, const C* row, Sum* sums) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += row[j] * factor;
}

template <typename C>
void add_to_share(int64_t n, int64_t keys, const C* values, C factor, const Share<C>& share,
                  int64_t row) {
  if (share.one_row) return add_row(n, double(factor), values, share.one_row);
  if (!share.rows) return;
  C* const to = share.rows + row * share.stride;
  if (share.first) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = values[j] * factor;
    memset(to + n, 0, size_t(keys - n) * sizeof(C));
  } else {
    add_row(n, factor, values, to);
  }
}

template <typename C>
const C* previous_row(const Params& p, int64_t b, int64_t query, const C* zeros) {
  if (!p.previous_load) return zeros;
  return static_cast<const C*>(p.previous_load) + b * p.previous_strides[0] +
         query * p.previous_strides[1];
}

// 1 over the number of queries that a load is the mean of.
template <typename C>
C inverse_count(const Params& p, int64_t query) {
  return C(1) / C(p.look_ahead ? p.queries : p.keys - p.queries + query + 1);
}

template <typename C>
C* block_loads(const Params& p, int64_t b, int64_t h, int64_t first) {
  const int64_t blocks = p.look_ahead ? 1 : (p.queries + p.block - 1) / p.block;
  const int64_t block = p.look_ahead ? 0 : first / p.block;
  return static_cast<C*>(p.block_loads) + ((b * p.heads + h) * blocks + block) * p.keys;
}

template <typename From, typename To>
void copy_row(const From* from, int64_t n, To* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = To(from[j]);
}

void clear_row(int64_t n, double* row) {
  memset(row, 0, size_t(n) * sizeof(double));
}

// Sums that start from elements `offset` ... of a tensor of C, or from zero if that is null.
template <typename C>
void start_sums(const void* from, int64_t offset, int64_t n, double* sums) {
  if (from) {
    copy_row(static_cast<const C*>(from) + offset, n, sums);
  } else {
    clear_row(n, sums);
  }
}

template <typename C>
RefractoryWorkspace<C> workspace(const Params& p, const RefractoryScratch<C>& scratch,
                                 int64_t index, bool backward) {
  return {p, backward, scratch.workspaces + index * scratch.workspace_bytes};
}

// Replaces n values, which times `factor` are probabilities, by weights before their division, and
// returns the weights' sum. Adds the probabilities to `sums` first, unless these look ahead.
template <bool look_ahead, typename C>
C gate_loaded_row(int64_t n, C factor, C per_query, const RefractoryGate<C>& gate,
                  const C* previous, double* sums, C* row) {
  const C threshold = gate.threshold, leak = gate.leak, steepness = gate.steepness;
  const C within = gate.within * per_query, across = gate.across;
  LongSum<C> whole;
  for (int64_t from = 0; from < n; from += sum_segment<C>) {
    const int64_t end = smaller(n, from + sum_segment<C>);
    C total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = from; j < end; ++j) {
      const C prob = row[j] * factor;
      double sum = sums[j];
      if (!look_ahead) {
        sum += double(prob);
        sums[j] = sum;
      }
      const C odds = gate_odds(prob, threshold + within * C(sum) + across * previous[j], steepness);
      const C fire = C(1) / (C(1) + odds), w = prob * gate_value(fire, odds * fire, leak);
      row[j] = w;
      total += w;
    }
    whole.add(total);
  }
  return C(whole.value());
}

// The weights of a strip of head h from its scores (look_ahead: its probabilities), in place.
template <bool look_ahead, typename C>
void forward_rows(const Params& p, const Unit& unit, int64_t h, const Strip& strip,
                  const RefractoryWorkspace<C>& s, C* scores, double* sums, const Share<C>& share) {
  const RefractoryGate<C> gate(p, h);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const int64_t query = strip.first + r, n = strip.visible(r);
    const RowStats<C> stats(p, unit.b, h, query);
    C* const row = scores + r * s.stride;
    if (!look_ahead) softmax_row(n, row, *stats.largest, *stats.inverse_sum);
    const C total = gate_loaded_row<look_ahead>(n, look_ahead ? C(1) : *stats.inverse_sum,
                                                inverse_count<C>(p, query), gate,
                                                previous_row(p, unit.b, query, s.zeros), sums, row);
    *stats.inverse_weight = C(1) / (total + C(p.eps));
    add_to_share(n, p.keys, row, *stats.inverse_weight / C(p.heads), share, r);
    drop_weights(p, unit.b, h, query, n, s.keep, row);
    clear_invisible(strip, r, row);
  }
}

// What a unit does before its first strip.
template <typename T, typename C>
void begin_unit(const Params& p, const Unit& unit, bool backward, const RefractoryWorkspace<C>& s) {
  pack_keys<T>(p, unit.b, unit.group, backward, s.operands);
  memset(s.zeros, 0, size_t(s.stride) * sizeof(C));
  if (backward) clear_key_gradients(p, s.operands);
}

// Causal, forward.

template <typename T, typename C>
void begin_causal_forward(const Params& p, const Unit& unit, const RefractoryWorkspace<C>& s) {
  begin_unit<T>(p, unit, false, s);
  const int64_t earlier = p.keys - p.queries;
  for (int64_t head = 0; head < unit.heads; ++head) {
    double* const sums = s.load_sums + head * s.stride;
    start_sums<C>(p.past_probabilities, (unit.b * p.heads + unit.first_head + head) * earlier,
                  earlier, sums);
    clear_row(p.queries, sums + earlier);
  }
}

template <typename T, typename C>
void causal_forward_strip(const Params& p, const Unit& unit, const Strip& strip,
                          const RefractoryWorkspace<C>& s, Share<C> share) {
  for (int64_t head = 0; head < unit.heads; ++head) {
    const int64_t h = unit.first_head + head;
    double* const sums = s.load_sums + head * s.stride;
    copy_row(sums, p.keys, block_loads<C>(p, unit.b, h, strip.first));
    multiply_scores<T>(p, unit.b, h, strip, false, s.operands, s.scores, s.stride);
    forward_rows<false>(p, unit, h, strip, s, s.scores, sums, share);
    write_out<T>(p, unit.b, h, strip, s.scores, s.stride, s.operands);
    if (strip.first + strip.rows == p.queries) {
      copy_row(sums, p.keys, static_cast<C*>(p.probabilities) + (unit.b * p.heads + h) * p.keys);
    }
    share.first = false;
  }
}

template <typename C>
void begin_weights(const Params& p, int64_t b, const RefractoryScratch<C>& scratch) {
  const int64_t earlier = p.keys - p.queries;
  double* const sums = scratch.weight_sums + b * p.keys;
  start_sums<C>(p.past_weights, b * earlier, earlier, sums);
  clear_row(p.queries, sums + earlier);
}

// Turns rows of next_load from each query's weights into means over the queries so far, with the
// running sums in `weight_sums`; keys [begin, end) only.
template <typename C>
void average_weights(const Params& p, const RefractoryScratch<C>& scratch, int64_t b,
                     const Strip& strip, int64_t begin, int64_t end) {
  double* const sums = scratch.weight_sums + b * p.keys;
  for (int64_t r = 0; r < strip.rows; ++r) {
    const int64_t query = strip.first + r, n = smaller(strip.visible(r), end);
    C* const row = static_cast<C*>(p.next_load) + (b * p.queries + query) * p.keys;
    const C factor = inverse_count<C>(p, query);
#pragma omp simd
    for (int64_t j = begin; j < n; ++j) {
      const double sum = sums[j] + double(row[j]);
      sums[j] = sum;
      row[j] = C(sum) * factor;
    }
  }
  if (strip.first + strip.rows == p.queries) {
    copy_row(sums + begin, end - begin, static_cast<C*>(p.weights) + b * p.keys + begin);
  }
}

// Rows [B, Q, K] of a step: the sums over units in step of what they share; keys [begin, end).
template <typename C>
void add_shares(const Params& p, const RefractoryScratch<C>& scratch, bool backward, int64_t b,
                const Strip& strip, int64_t begin, int64_t end, void* to) {
  for (int64_t group = 0; group < p.groups; ++group) {
    const RefractoryWorkspace<C> s = workspace(p, scratch, b * p.groups + group, backward);
    for (int64_t r = 0; r < strip.rows; ++r) {
      const C* const from = s.share + r * s.stride;
      C* const row = static_cast<C*>(to) + (b * p.queries + strip.first + r) * p.keys;
      if (group == 0) {
        copy_row(from + begin, end - begin, row + begin);
      } else {
        add_row(smaller(strip.visible(r), end) - begin, C(1), from + begin, row + begin);
      }
    }
  }
}

// Calls `body` with the batch entries and ranges of keys that a sum over units in step falls into.
template <typename Body>
void for_columns(const Params& p, const ThreadPool& pool, int64_t rows, const Body& body) {
  const int64_t width = 256, ranges = (p.keys + width - 1) / width;
  parallel_for(pool, p.batch * ranges, grain_for(rows * p.groups * width / 8),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % ranges * width;
                   body(i / ranges, first, smaller(first + width, p.keys));
                 }
               });
}

// About how many nanoseconds a unit spends on so many queries.
int64_t unit_cost(const Params& p, int64_t queries) {
  return queries * p.keys * (p.size + 32) / 16 * (p.heads / p.groups);
}

template <typename T>
void causal_forward_in_step(const Params& p, const ThreadPool& pool,
                            const RefractoryScratch<compute_t<T>>& scratch) {
  using C = compute_t<T>;
  const int64_t rows = refractory_strip_rows(p), step_rows = refractory_step_rows(p);
  for (int64_t b = 0; b < p.batch; ++b) begin_weights(p, b, scratch);
  for (int64_t start = 0; start < p.queries; start += step_rows) {
    const Strip step(p, start, smaller(step_rows, p.queries - start));
    const auto run_unit = [&](int64_t i) {
      const Unit unit(p, i);
      const RefractoryWorkspace<C> s = workspace(p, scratch, i, false);
      if (start == 0) begin_causal_forward<T>(p, unit, s);
      for (int64_t r = 0; r < step.rows; r += rows) {
        const Strip strip(p, start + r, smaller(rows, step.rows - r));
        causal_forward_strip<T>(p, unit, strip, s,
                                {nullptr, s.share + r * s.stride, s.stride, true});
      }
    };
    parallel_for(pool, refractory_units(p), grain_for(unit_cost(p, step.rows)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) run_unit(i);
                 });
    for_columns(p, pool, step.rows, [&](int64_t b, int64_t begin, int64_t end) {
      add_shares(p, scratch, false, b, step, begin, end, p.next_load);
      average_weights(p, scratch, b, step, begin, end);
    });
  }
}

// All rows [B, Q, K] of a strip, shared by the units of one batch entry.
template <typename C>
Share<C> shared_rows(const Params& p, const Unit& unit, const Strip& strip, void* rows) {
  return {nullptr, static_cast<C*>(rows) + (unit.b * p.queries + strip.first) * p.keys, p.keys,
          unit.group == 0};
}

template <typename T>
void causal_forward_entry(const Params& p, int64_t b,
                          const RefractoryScratch<compute_t<T>>& scratch,
                          const RefractoryWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const int64_t rows = refractory_strip_rows(p);
  for (int64_t group = 0; group < p.groups; ++group) {
    const Unit unit(p, b * p.groups + group);
    begin_causal_forward<T>(p, unit, s);
    for (int64_t first = 0; first < p.queries; first += rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      causal_forward_strip<T>(p, unit, strip, s, shared_rows<C>(p, unit, strip, p.next_load));
    }
  }
  begin_weights(p, b, scratch);
  average_weights(p, scratch, b, Strip(p, 0, p.queries), 0, p.keys);
}

// Causal, backward.

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

// Where the gradient of the previous layer's load goes if it is one row for all queries.
template <typename C>
Share<C> unit_row(const Params& p, const Unit& unit, const RefractoryScratch<C>& scratch) {
  return {scratch.unit_rows + unit.index * p.keys, nullptr, 0, false};
}

template <typename T, typename C>
void causal_backward_strip(const Params& p, const Unit& unit, const Strip& strip,
                           const RefractoryScratch<C>& scratch, const RefractoryWorkspace<C>& s,
                           Share<C> share) {
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
        Share<C> share{};
        if (p.grad_previous_load) {
          share = p.one_previous_row ? unit_row(p, unit, scratch)
                                     : Share<C>{nullptr, s.share + r * s.stride, s.stride, true};
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
Share<C> previous_share(const Params& p, const Unit& unit, const Strip& strip,
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

// Looking ahead.

template <typename T>
void look_ahead_forward_unit(const Params& p, const Unit& unit,
                             const RefractoryScratch<compute_t<T>>& scratch,
                             const RefractoryWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const int64_t rows = refractory_strip_rows(p);
  begin_unit<T>(p, unit, false, s);
  const Share<C> share = unit_row(p, unit, scratch);
  clear_row(p.keys, share.one_row);
  double* const sums = s.load_sums;
  for (int64_t h = unit.first_head; h < unit.first_head + unit.heads; ++h) {
    clear_row(p.keys, sums);
    for (int64_t first = 0; first < p.queries; first += rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      C* const scores = s.scores + first * s.stride;
      multiply_scores<T>(p, unit.b, h, strip, false, s.operands, scores, s.stride);
      for (int64_t r = 0; r < strip.rows; ++r) {
        const RowStats<C> stats(p, unit.b, h, first + r);
        const int64_t n = strip.visible(r);
        C* const row = scores + r * s.stride;
        softmax_row(n, row, *stats.largest, *stats.inverse_sum);
        const C factor = *stats.inverse_sum;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          row[j] *= factor;
          sums[j] += double(row[j]);
        }
      }
    }
    copy_row(sums, p.keys, block_loads<C>(p, unit.b, h, 0));
    copy_row(sums, p.keys, static_cast<C*>(p.probabilities) + (unit.b * p.heads + h) * p.keys);
    for (int64_t first = 0; first < p.queries; first += rows) {
      const Strip strip(p, first, smaller(rows, p.queries - first));
      C* const scores = s.scores + first * s.stride;
      forward_rows<true>(p, unit, h, strip, s, scores, sums, share);
      write_out<T>(p, unit.b, h, strip, scores, s.stride, s.operands);
    }
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
      Share<C> share = previous_share(p, unit, strip, scratch);
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

// Sums over units, always in the same order.

// sums [B, K] = those of the units' rows, and `means`, if any, 1 / Q of them.
template <typename C>
void sum_unit_rows(const Params& p, const RefractoryScratch<C>& scratch, void* sums, void* means) {
  const double per_query = 1 / double(p.queries);
  for (int64_t b = 0; b < p.batch; ++b) {
    double* const first = scratch.unit_rows + b * p.groups * p.keys;
    for (int64_t group = 1; group < p.groups; ++group) {
      add_row(p.keys, 1.0, first + group * p.keys, first);
    }
    copy_row(first, p.keys, static_cast<C*>(sums) + b * p.keys);
    for (int64_t j = 0; means && j < p.keys; ++j) {
      static_cast<C*>(means)[b * p.keys + j] = C(first[j] * per_query);
    }
  }
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

// Calls body(i, workspace of the thread) for i in [0, n).
template <typename C, typename Body>
void for_each(const Params& p, const ThreadPool& pool, const RefractoryScratch<C>& scratch,
              bool backward, int64_t n, const Body& body) {
  const int64_t cost = unit_cost(p, p.queries) * refractory_units(p) / n * (backward ? 2 : 1);
  parallel_for(pool, n, grain_for(cost), [&](int64_t begin, int64_t end) {
    const RefractoryWorkspace<C> s = workspace(p, scratch, pool.thread_index(), backward);
    for (int64_t i = begin; i < end; ++i) body(i, s);
  });
}

template <typename T>
void forward(const Params& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  using Workspace = RefractoryWorkspace<C>;
  const RefractoryScratch<C> scratch(p, false, pool.threads, p.scratch);
  if (refractory_in_step(p)) return causal_forward_in_step<T>(p, pool, scratch);
  if (!p.look_ahead) {
    return for_each(p, pool, scratch, false, p.batch, [&](int64_t b, const Workspace& s) {
      causal_forward_entry<T>(p, b, scratch, s);
    });
  }
  for_each(p, pool, scratch, false, refractory_units(p), [&](int64_t i, const Workspace& s) {
    look_ahead_forward_unit<T>(p, Unit(p, i), scratch, s);
  });
  sum_unit_rows(p, scratch, p.weights, p.next_load);
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

void refractory_lif_attention_forward(const RefractoryLifAttentionParams& p,
                                      const ThreadPool& pool) {
  dispatch_dtype(
      p.dtype, [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

void refractory_lif_attention_backward(const RefractoryLifAttentionParams& p,
                                       const ThreadPool& pool) {
  dispatch_dtype(
      p.dtype, [&](auto* element) { backward<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace EMBER_ISA
}  // namespace ember
