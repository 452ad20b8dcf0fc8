// Refractory LIF attention on the CPU: how both passes go, and the forward pass. The formulas are
// in common/refractory_lif_attention.h.
//
// Causal: one pass over strips of queries, forward in order, backward in reverse, with the running
// sums over queries in hand. Products of matrices are those of plain LIF attention: two forward,
// five backward.
//
// With look_ahead the gates need every query's probabilities, and in backward the probabilities'
// gradients every query's gates. One head's matrix (backward: two) is kept in between, by each
// thread, so that nothing is computed twice.
#include <type_traits>

#include "refractory_rows.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

using Params = RefractoryLifAttentionParams;

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
                  const RefractoryWorkspace<C>& s, C* scores, double* sums,
                  const HeadShare<C>& share) {
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
                          const RefractoryWorkspace<C>& s, HeadShare<C> share) {
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

template <typename T>
void look_ahead_forward_unit(const Params& p, const Unit& unit,
                             const RefractoryScratch<compute_t<T>>& scratch,
                             const RefractoryWorkspace<compute_t<T>>& s) {
  using C = compute_t<T>;
  const int64_t rows = refractory_strip_rows(p);
  begin_unit<T>(p, unit, false, s);
  const HeadShare<C> share = unit_row(p, unit, scratch);
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

}  // namespace

void refractory_lif_attention_forward(const RefractoryLifAttentionParams& p,
                                      const ThreadPool& pool) {
  dispatch_dtype(
      p.dtype, [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(p, pool); });
}

}  // namespace EMBER_ISA
}  // namespace ember
