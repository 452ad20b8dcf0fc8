// The LTC scan's backward pass on the CPU.
//
// A group of rows walks its solver steps in reverse. Each takes a unit's synapses twice: first for
// the denominator, by which the unit's gradient is divided, then for what they pass on. Gradients
// of the weights are summed in vectors over a few time steps, then in double over all steps of some
// groups, and last over these in a fixed order, which makes them independent of the number of
// threads.
#include <initializer_list>
#include <tuple>
#include <type_traits>

#include "ltc_scan.h"
#include "ltc_scan_solver.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

// What is summed for each synapse: the gradients of w, of erev over w, of sigma, and of mu over
// -sigma.
enum SynapseSum { sum_w, sum_erev, sum_sigma, sum_mu, synapse_sums };
// And for each unit: the gradients of cm, and of numerator and denominator.
enum UnitSum { sum_cm, sum_numerator, sum_denominator, unit_sums };

// Sums in vectors, [count, sums, lanes], and where they go: double [sums, count].
template <typename C>
struct Sums {
  C* vectors;
  double* totals;
  int64_t count, kinds;

  void clear() const {
    for (int64_t i = 0; i < count * kinds * lanes<C>; ++i) vectors[i] = 0;
  }
  void flush() const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t kind = 0; kind < kinds; ++kind) {
        const C* v = vectors + (i * kinds + kind) * lanes<C>;
        C sum = 0;
        for (int lane = 0; lane < lanes<C>; ++lane) sum += v[lane];
        totals[kind * count + i] += sum;
      }
    }
    clear();
  }
  EMBER_HD void add(int64_t i, int64_t kind, Vector<C> term) const {
    C* to = vectors + (i * kinds + kind) * lanes<C>;
    store_vector(load_vector(to) + term, to);
  }
};

// All time steps of one group of rows, in reverse.
template <typename T, int R>
class Reverse {
 public:
  using C = compute_t<T>;
  using V = Vector<C>;
  using Group = LtcGroup<T, R>;
  static constexpr int width = Group::width;

  Reverse(const LtcScanParams& p, const LtcNetwork<C>& forward, const LtcNetwork<C>& network,
          const LtcRows& rows, C* memory, double* totals)
      : p_(p),
        network_(network),
        group_(p, rows),
        rows_(rows),
        scratch_(memory),
        solver_(p, forward, group_, scratch_),
        wants_weights_(totals != nullptr) {
    const int64_t states = p.units * width;
    running_ = scratch_.take(width);
    timespans_ = scratch_.take(width);
    x_ = scratch_.take(p.inputs * width);
    grad_x_ = scratch_.take(p.inputs * width);
    for (C** state : {&state_, &before_, &after_, &grad_, &grad_before_, &sensory_denominator_,
                      &grad_numerator_, &grad_denominator_, &grad_c_, &c_}) {
      *state = scratch_.take(states);
    }
    opens_ = scratch_.take(2 * states);
    sensory_opens_ = scratch_.take(2 * p.sensory.count * width);
    tape_ = p.chunk ? scratch_.take((p.chunk * p.unfolds + 1) * states) : nullptr;
    if (!wants_weights_) return;
    for (auto [sums, count, kinds] :
         {std::tuple<Sums<C>*, int64_t, int64_t>{&sensory_sums_, p.sensory.count, synapse_sums},
          {&recurrent_sums_, p.recurrent.count, synapse_sums},
          {&unit_sums_, p.units, unit_sums}}) {
      *sums = {scratch_.take(count * kinds * lanes<C>), totals, count, kinds};
      sums->clear();
      totals += count * kinds;
    }
  }

  void run() {
    group_.load_state(p_.grad_h_last, grad_);
    const int64_t chunk = p_.chunk ? p_.chunk : p_.steps > 0 ? p_.steps : 1;
    for (int64_t c = count_chunks(p_.steps, chunk) - 1; c >= 0; --c) {
      const int64_t first = c * chunk, end = first + chunk < p_.steps ? first + chunk : p_.steps;
      if (p_.chunk) run_forward(c, first, end);
      for (int64_t t = end - 1; t >= first; --t) {
        step(t, (t - first) * p_.unfolds);
        if (wants_weights_ && t % flush_steps == 0) {
          for (const Sums<C>* sums : {&sensory_sums_, &recurrent_sums_, &unit_sums_}) sums->flush();
        }
      }
    }
    group_.store_state(grad_, p_.grad_h0);
  }

 private:
  // Rounding errors grow with the number of terms in one sum.
  static constexpr int64_t flush_steps = 32;

  // The states of a chunk again, to the tape.
  void run_forward(int64_t chunk, int64_t first, int64_t end) {
    for (int64_t lane = 0; lane < width; ++lane) running_[lane] = C(lane < rows_.count);
    group_.load_slot(chunk, running_, state_);
    C* to = tape_;
    const auto keep = [&](const C* state) {
      for (int64_t i = 0; i < p_.units * width; i += lanes<C>) copy_vector(state + i, to + i);
      to += p_.units * width;
    };
    keep(state_);
    for (int64_t t = first; t < end; ++t) {
      if (group_.find_running(t, running_) == 0) return;
      solver_.step(t, running_, state_, [&](int64_t, const C* after) { keep(after); });
    }
  }

  // The state after `slot` solver steps of the chunk, 0 in rows that do not run.
  void load(int64_t slot, C* to) const {
    if (!p_.chunk) return group_.load_slot(slot, running_, to);
    const C* from = tape_ + slot * p_.units * width;
    for (int64_t i = 0; i < p_.units * width; i += lanes<C>) {
      store_vector(select<C>(load_vector(running_ + i % width), load_vector(from + i)), to + i);
    }
  }

  void step(int64_t t, int64_t slot) {
    C* grad_timespans = static_cast<C*>(p_.grad_timespans);
    if (group_.find_running(t, running_) == 0) {
      if (p_.grad_x) group_.store(grad_x_, t, p_.inputs, running_, p_.grad_x);
      for (int64_t lane = 0; lane < rows_.count; ++lane) {
        grad_timespans[(rows_.first + lane) * p_.steps + t] = 0;
      }
      return;
    }
    group_.load(p_.x, t, p_.inputs, running_, x_);
    group_.load_timespans(t, running_, timespans_);
    add_output_gradients(t);
    for (int64_t j = 0; j < p_.units; ++j) {
      V denominator[R] = {};
      open_synapses<R>(network_.sensory, j, x_, denominator,
                       sensory_opens_ + network_.sensory.begin[j] * 2 * width);
      for (int r = 0; r < R; ++r) {
        const int64_t at = j * width + r * lanes<C>;
        store_vector(denominator[r], sensory_denominator_ + at);
        store_vector(network_.cm[j] / load_vector(timespans_ + r * lanes<C>), c_ + at);
        for (C* sum : {grad_numerator_, grad_denominator_, grad_c_}) store_vector(V{}, sum + at);
      }
    }
    load(slot + p_.unfolds, after_);
    for (int64_t k = p_.unfolds - 1; k >= 0; --k) {
      load(slot + k, before_);
      for (int64_t i = 0; i < p_.units * width; ++i) grad_before_[i] = 0;
      for (int64_t j = 0; j < p_.units; ++j) solver_step(j);
      for (int64_t i = 0; i < p_.units * width; i += lanes<C>) {
        const V runs = load_vector(running_ + i % width);
        store_vector(select<C>(runs, load_vector(grad_before_ + i), load_vector(grad_ + i)),
                     grad_ + i);
      }
      C* const swap = after_;
      after_ = before_;
      before_ = swap;
    }
    time_gradients(t);
    if (p_.grad_x || wants_weights_) sensory_gradients(t);
  }

  void add_output_gradients(int64_t t) {
    const T* grad_y = static_cast<const T*>(p_.grad_y);
    for (int64_t lane = 0; lane < rows_.count; ++lane) {
      if (running_[lane] == 0) continue;
      const T* row = grad_y + ((rows_.first + lane) * p_.steps + t) * p_.outputs;
      for (int64_t j = 0; j < p_.outputs; ++j) grad_[j * width + lane] += widen(row[j]);
    }
  }

  // One solver step of unit j: from its gradient to those of the states before.
  void solver_step(int64_t j) {
    V denominator[R] = {}, numerators[R], denominators[R];
    open_synapses<R>(network_.recurrent, j, before_, denominator, opens_);
    for (int r = 0; r < R; ++r) {
      const int64_t at = j * width + r * lanes<C>;
      const V c = load_vector(c_ + at);
      const V below = c + network_.gleak[j] +
                      (denominator[r] + load_vector(sensory_denominator_ + at)) + C(p_.eps);
      const V numerator =
          select<C>(load_vector(running_ + r * lanes<C>), load_vector(grad_ + at) / below);
      const V grad_below = -numerator * load_vector(after_ + at);
      const auto add = [at](C* to, V term) { store_vector(load_vector(to + at) + term, to + at); };
      add(grad_numerator_, numerator);
      add(grad_denominator_, grad_below);
      add(grad_c_, numerator * load_vector(before_ + at) + grad_below);
      add(grad_before_, c * numerator);
      numerators[r] = numerator;
      denominators[r] = grad_below;
    }
    pass_on(network_.recurrent, j, numerators, denominators, before_, opens_, grad_before_,
            recurrent_sums_);
  }

  // Gradients of the time spans, and of the units' own weights.
  void time_gradients(int64_t t) {
    C sums[width] = {};
    for (int64_t j = 0; j < p_.units; ++j) {
      V cm = {}, numerator = {}, denominator = {};
      for (int r = 0; r < R; ++r) {
        const int64_t at = j * width + r * lanes<C>;
        const V scaled = load_vector(grad_c_ + at) / load_vector(timespans_ + r * lanes<C>);
        C* sum = sums + r * lanes<C>;
        store_vector(load_vector(sum) + scaled * network_.cm[j], sum);
        cm += scaled;
        numerator += load_vector(grad_numerator_ + at);
        denominator += load_vector(grad_denominator_ + at);
      }
      if (!wants_weights_) continue;
      unit_sums_.add(j, sum_cm, cm);
      unit_sums_.add(j, sum_numerator, numerator);
      unit_sums_.add(j, sum_denominator, denominator);
    }
    C* grad_timespans = static_cast<C*>(p_.grad_timespans);
    for (int64_t lane = 0; lane < rows_.count; ++lane) {
      // c = cm / (dt / unfolds), so dc/ddt = -c / dt.
      grad_timespans[(rows_.first + lane) * p_.steps + t] =
          running_[lane] != 0 ? -sums[lane] / (timespans_[lane] * C(p_.unfolds)) : C(0);
    }
  }

  void sensory_gradients(int64_t t) {
    for (int64_t i = 0; i < p_.inputs * width; ++i) grad_x_[i] = 0;
    for (int64_t j = 0; j < p_.units; ++j) {
      V numerators[R], denominators[R];
      for (int r = 0; r < R; ++r) {
        numerators[r] = load_vector(grad_numerator_ + j * width + r * lanes<C>);
        denominators[r] = load_vector(grad_denominator_ + j * width + r * lanes<C>);
      }
      pass_on(network_.sensory, j, numerators, denominators, x_,
              sensory_opens_ + network_.sensory.begin[j] * 2 * width, grad_x_, sensory_sums_);
    }
    if (p_.grad_x) group_.store(grad_x_, t, p_.inputs, running_, p_.grad_x);
  }

  EMBER_HD void pass_on(const LtcList<C>& list, int64_t j, const V* numerators,
                        const V* denominators, const C* v, const C* opens, C* grad_v,
                        const Sums<C>& sums) {
    if (wants_weights_) {
      pass_on<true>(list, j, numerators, denominators, v, opens, grad_v, sums);
    } else {
      pass_on<false>(list, j, numerators, denominators, v, opens, grad_v, sums);
    }
  }

  // From the gradients of unit j's numerator and denominator to those of its synapses' sources, v,
  // and weights.
  template <bool weights>
  static void pass_on(const LtcList<C>& list, int64_t j, const V* numerators, const V* denominators,
                      const C* v, const C* opens, C* grad_v, const Sums<C>& sums) {
    for (int64_t e = list.begin[j]; e < list.begin[j + 1]; ++e, opens += 2 * width) {
      const LtcSynapse<C>& s = list.synapses[e];
      const int64_t source = list.source[e] * width;
      V w = {}, erev = {}, sigma = {}, mu = {};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = source + r * lanes<C>;
        const auto g = synapse_gradients<V>(load_vector(opens + r * lanes<C>),
                                            load_vector(opens + width + r * lanes<C>), s.w, s.erev,
                                            numerators[r], denominators[r]);
        store_vector(load_vector(grad_v + at) + g.slope * s.sigma, grad_v + at);
        if (!weights) continue;
        w += g.w;
        erev += g.erev_over_w;
        sigma += g.slope * (load_vector(v + at) - s.mu);
        mu += g.slope;
      }
      if (!weights) continue;
      sums.add(e, sum_w, w);
      sums.add(e, sum_erev, erev);
      sums.add(e, sum_sigma, sigma);
      sums.add(e, sum_mu, mu);
    }
  }

  const LtcScanParams& p_;
  const LtcNetwork<C>& network_;
  const Group group_;
  const LtcRows rows_;
  LtcScratch<C> scratch_;
  LtcSolver<T, R> solver_;
  const bool wants_weights_;
  C *running_, *timespans_;
  C *x_, *grad_x_;
  C *state_, *before_, *after_;  // around a solver step
  C *grad_, *grad_before_;       // of the state
  C *sensory_denominator_, *c_;  // sums over the sensory synapses; cm / (dt / unfolds)
  C *grad_numerator_, *grad_denominator_, *grad_c_;  // sums over the solver steps of a time step
  C *opens_, *sensory_opens_;  // see open_synapses(): a unit's own, all sensory ones
  C* tape_;
  Sums<C> sensory_sums_{}, recurrent_sums_{}, unit_sums_{};
};

template <typename T>
class Backward {
 public:
  using C = compute_t<T>;

  explicit Backward(const LtcScanParams& p)
      : p_(p),
        groups_(p.batch, 2),
        partials_(groups_.count < ltc_max_partials ? groups_.count : ltc_max_partials),
        totals_(static_cast<double*>(p.workspace)),
        memory_(static_cast<C*>(p.workspace) + partials_ * ltc_partial_size(p)),
        forward_(p, false, memory_, false),
        network_(p, true, memory_ + ltc_pad(ltc_network_size(p)), false),
        scratch_(memory_ + 2 * ltc_pad(ltc_network_size(p))) {}

  void run(const ThreadPool& pool) {
    const bool wants_weights = p_.grad_unit_weights != nullptr;
    const int64_t size = total_size();
    parallel_for(pool, partials_, 1, [&](int64_t begin, int64_t end) {
      C* scratch = scratch_ + pool.thread_index() * ltc_scratch_size(p_, true);
      for (int64_t i = begin; i < end; ++i) {
        double* totals = wants_weights ? totals_ + i * size : nullptr;
        for (int64_t k = 0; totals && k < size; ++k) totals[k] = 0;
        groups_.visit(groups_.count * i / partials_, groups_.count * (i + 1) / partials_,
                      [&](auto vectors, const LtcRows& rows) {
                        Reverse<T, decltype(vectors)::value>(p_, forward_, network_, rows, scratch,
                                                             totals)
                            .run();
                      });
      }
    });
    if (wants_weights) store_weight_gradients();
  }

 private:
  int64_t total_size() const {
    return synapse_sums * (p_.sensory.count + p_.recurrent.count) + unit_sums * p_.units;
  }

  void store_weight_gradients() {
    const int64_t size = total_size();
    for (int64_t i = 1; i < partials_; ++i) {
      for (int64_t k = 0; k < size; ++k) totals_[k] += totals_[i * size + k];
    }
    const double* totals = totals_;
    for (const LtcSynapses* list : {&p_.sensory, &p_.recurrent}) {
      const int64_t n = list->count;
      const C *w = static_cast<const C*>(list->weights), *sigma = w + 2 * n;
      C* grad = static_cast<C*>(list->grad_weights);
      for (int64_t e = 0; e < n; ++e) {
        grad[e] = C(totals[sum_w * n + e]);
        grad[n + e] = C(-sigma[e] * totals[sum_mu * n + e]);
        grad[2 * n + e] = C(totals[sum_sigma * n + e]);
        grad[3 * n + e] = C(w[e] * totals[sum_erev * n + e]);
      }
      totals += synapse_sums * n;
    }
    const int64_t n = p_.units;
    C* grad = static_cast<C*>(p_.grad_unit_weights);
    for (int64_t j = 0; j < n; ++j) {
      const double numerator = totals[sum_numerator * n + j];
      grad[j] = C(totals[sum_cm * n + j]);
      grad[n + j] = C(network_.vleak[j] * numerator + totals[sum_denominator * n + j]);
      grad[2 * n + j] = C(network_.gleak[j] * numerator);
    }
  }

  const LtcScanParams& p_;
  const LtcGroups<C> groups_;
  const int64_t partials_;
  double* const totals_;  // [partials, total_size()]
  C* const memory_;
  const LtcNetwork<C> forward_, network_;
  C* const scratch_;
};

}  // namespace

void ltc_scan_backward(const LtcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Backward<std::remove_pointer_t<decltype(element)>>(p).run(pool);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
