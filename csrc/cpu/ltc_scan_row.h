// One row of the batch through an LTC network, with units as vector lanes.
//
// For fewer rows than would fill the lanes. Units that have about as many synapses share a vector;
// the k-th synapses of all its units are computed at once, and units with fewer are filled up with
// synapses of no effect, from a source that is always 0. The sums are those of a group of rows, in
// the same order, and come out the same to the bit.
#pragma once

#include "ltc_scan.h"

namespace ember {
inline namespace EMBER_ISA {

// The synapses of one kind by vectors of targets: those of vector g are [begin[g], begin[g + 1]),
// an even number.
template <typename C>
struct LtcColumns {
  int32_t* begin;   // [vectors + 1]
  int32_t* target;  // [vectors, lanes]: see LtcRowNetwork
  int32_t* source;  // [synapses, lanes]
  C* weights;       // [synapses, (mu, -sigma, w, w * erev), lanes]
};

// A network laid out for single rows. Units have places, in the order of recurrent.target, which
// names them, or `units` where a vector is not full. sensory.target names places, or the one after
// the last, whose potential is always 0.
template <typename C>
class LtcRowNetwork {
 public:
  LtcColumns<C> sensory, recurrent;
  int32_t vectors, places;
  C *cm, *leak, *current;  // [places]

  // Lays the network out in `memory`, or finds it there if there is no list to lay out.
  LtcRowNetwork(const LtcScanParams& p, const LtcNetwork<C>* network, C* memory)
      : vectors(int32_t((p.units + lanes<C> - 1) / lanes<C>)), places(vectors * lanes<C>) {
    LtcScratch<C> scratch(memory);
    cm = scratch.take(places);
    leak = scratch.take(places);
    current = scratch.take(places);
    int32_t* place = take_integers(scratch, p.units);
    recurrent = order(p, p.recurrent, network ? &network->recurrent : nullptr, scratch);
    sensory = order(p, p.sensory, network ? &network->sensory : nullptr, scratch);
    if (network) {
      for (int32_t i = 0; i < places; ++i) {
        const int32_t unit = recurrent.target[i];
        const bool exists = unit < p.units;
        if (exists) place[unit] = i;
        cm[i] = exists ? network->cm[unit] : C(1);
        leak[i] = exists ? network->gleak[unit] : C(0);
        current[i] = exists ? network->current[unit] : C(0);
      }
    }
    fill(recurrent, network ? &network->recurrent : nullptr, places, place, scratch);
    fill(sensory, network ? &network->sensory : nullptr, int32_t(p.inputs), nullptr, scratch);
    for (int32_t i = 0; network && i < places; ++i) {
      int32_t& target = sensory.target[i];
      target = target < p.units ? place[target] : places;
    }
  }

 private:
  static int32_t* take_integers(LtcScratch<C>& scratch, int64_t count) {
    return reinterpret_cast<int32_t*>(scratch.take(count));
  }

  // Units by falling number of synapses.
  LtcColumns<C> order(const LtcScanParams& p, const LtcSynapses& synapses, const LtcList<C>* list,
                      LtcScratch<C>& scratch) const {
    LtcColumns<C> c{};
    c.begin = take_integers(scratch, vectors + 1);
    c.target = take_integers(scratch, places);
    int32_t* first = take_integers(scratch, synapses.num_sources + 2);
    if (!list) return c;
    const int64_t most = synapses.num_sources;
    for (int64_t degree = 0; degree <= most + 1; ++degree) first[degree] = 0;
    for (int64_t j = 0; j < p.units; ++j) ++first[most - list->degree(j) + 1];
    for (int64_t i = 0; i < most; ++i) first[i + 1] += first[i];
    for (int64_t j = 0; j < p.units; ++j) c.target[first[most - list->degree(j)]++] = int32_t(j);
    for (int64_t i = p.units; i < places; ++i) c.target[i] = int32_t(p.units);
    c.begin[0] = 0;
    for (int32_t g = 0; g < vectors; ++g) {
      c.begin[g + 1] = c.begin[g] + (list->degree(c.target[g * lanes<C>]) + 1) / 2 * 2;
    }
    return c;
  }

  // The synapses themselves; `none` is a source that is 0, and `place` what sources are called.
  void fill(LtcColumns<C>& c, const LtcList<C>* list, int32_t none, const int32_t* place,
            LtcScratch<C>& scratch) const {
    c.source = take_integers(scratch, c.begin[vectors] * lanes<C>);
    c.weights = scratch.take(c.begin[vectors] * 4 * lanes<C>);
    for (int32_t i = 0; list && i < places; ++i) {
      const int32_t g = i / lanes<C>, unit = c.target[i];
      const bool exists = unit < list->targets;
      const int32_t degree = exists ? list->degree(unit) : 0;
      for (int32_t k = c.begin[g]; k < c.begin[g + 1]; ++k) {
        const int32_t nth = k - c.begin[g], e = nth < degree ? list->begin[unit] + nth : -1;
        const LtcSynapse<C> s = e < 0 ? LtcSynapse<C>{} : list->synapses[e];
        const int32_t source = e < 0 ? none : place ? place[list->source[e]] : list->source[e];
        C* to = c.weights + k * 4 * lanes<C> + i % lanes<C>;
        c.source[k * lanes<C> + i % lanes<C>] = source;
        to[0] = s.mu;
        to[lanes<C>] = s.sigma;
        to[2 * lanes<C>] = s.w;
        to[3 * lanes<C>] = s.erev;
      }
    }
  }
};

template <typename T>
class LtcRowSolver {
 public:
  using C = compute_t<T>;
  using V = Vector<C>;

  LtcRowSolver(const LtcScanParams& p, const LtcRowNetwork<C>& network, C* memory)
      : p_(p), network_(network) {
    LtcScratch<C> scratch(memory);
    x_ = scratch.take(p.inputs + 1);
    state_ = scratch.take(network.places + 1);
    next_ = scratch.take(network.places + 1);
    numerator_ = scratch.take(network.places + 1);
    denominator_ = scratch.take(network.places + 1);
    x_[p.inputs] = 0;
    // The sensory sums of units without sensory synapses are never written.
    for (int32_t i = 0; i <= network.places; ++i) {
      state_[i] = next_[i] = numerator_[i] = denominator_[i] = 0;
    }
  }

  // Row b from its initial to its last state.
  void run(int64_t b) {
    const int32_t* unit = network_.recurrent.target;
    const C* h0 = static_cast<const C*>(p_.h0) + b * p_.units;
    C* h_last = static_cast<C*>(p_.h_last) + b * p_.units;
    for (int32_t i = 0; i < network_.places; ++i) state_[i] = unit[i] < p_.units ? h0[unit[i]] : 0;
    const int64_t length = p_.lengths ? p_.lengths[b] : p_.steps;
    const bool keeps_all = p_.saved && !p_.chunk, keeps_borders = p_.saved && p_.chunk;
    if (keeps_all) store_slot(b, 0);
    for (int64_t t = 0; t < p_.steps; ++t) {
      if (keeps_borders && t % p_.chunk == 0) store_slot(b, t / p_.chunk);
      T* y = static_cast<T*>(p_.y) + (b * p_.steps + t) * p_.outputs;
      if (t >= length) {
        for (int64_t j = 0; j < p_.outputs; ++j) narrow(C(0), y[j]);
        for (int64_t k = 0; keeps_all && k < p_.unfolds; ++k) {
          store_slot(b, 1 + t * p_.unfolds + k);
        }
        continue;
      }
      begin_step(b, t);
      const C timespan = static_cast<const C*>(p_.timespans)[b * p_.steps + t] / C(p_.unfolds);
      for (int64_t k = 0; k < p_.unfolds; ++k) {
        solve(timespan);
        if (keeps_all) store_slot(b, 1 + t * p_.unfolds + k);
      }
      store_outputs(y);
    }
    for (int32_t i = 0; i < network_.places; ++i) {
      if (unit[i] < p_.units) h_last[unit[i]] = state_[i];
    }
  }

 private:
  // Numerators and denominators of the vector g of targets, from potentials v.
  static EMBER_HD void conduct(const LtcColumns<C>& columns, int32_t g, const C* v, V& numerator,
                               V& denominator) {
    for (int32_t k = columns.begin[g]; k < columns.begin[g + 1]; k += 2) {
      const int32_t* source = columns.source + k * lanes<C>;
      const C *w = columns.weights + k * 4 * lanes<C>, *next = w + 4 * lanes<C>;
      const auto weight = [](const C* from, int i) { return load_vector(from + i * lanes<C>); };
      V open, next_open;
      sigmoids_of_negative<C>(
          weight(w, 1) * (gather_vector(v, source) - weight(w, 0)),
          weight(next, 1) * (gather_vector(v, source + lanes<C>) - weight(next, 0)), open,
          next_open);
      denominator += weight(w, 2) * open;
      numerator += weight(w, 3) * open;
      denominator += weight(next, 2) * next_open;
      numerator += weight(next, 3) * next_open;
    }
  }

  void begin_step(int64_t b, int64_t t) {
    const T* x = static_cast<const T*>(p_.x) + (b * p_.steps + t) * p_.inputs;
    for (int64_t i = 0; i < p_.inputs; ++i) x_[i] = widen(x[i]);
    if (p_.input_map) {
      const C *scale = static_cast<const C*>(p_.input_map), *shift = scale + p_.inputs;
      for (int64_t i = 0; i < p_.inputs; ++i) x_[i] = ltc_mapped(x_[i], scale[i], shift[i]);
    }
    const LtcColumns<C>& sensory = network_.sensory;
    for (int32_t g = 0; g < network_.vectors && sensory.begin[g] < sensory.begin[g + 1]; ++g) {
      V numerator = {}, denominator = {};
      conduct(sensory, g, x_, numerator, denominator);
      for (int lane = 0; lane < lanes<C>; ++lane) {
        const int32_t place = sensory.target[g * lanes<C> + lane];
        numerator_[place] = numerator[lane];
        denominator_[place] = denominator[lane];
      }
    }
  }

  void solve(C timespan) {
    for (int32_t g = 0; g < network_.vectors; ++g) {
      V numerator = {}, denominator = {};
      conduct(network_.recurrent, g, state_, numerator, denominator);
      const int32_t at = g * lanes<C>;
      store_vector(
          ltc_next_state(load_vector(network_.cm + at) / timespan, load_vector(state_ + at),
                         load_vector(network_.leak + at), load_vector(network_.current + at),
                         numerator + load_vector(numerator_ + at),
                         denominator + load_vector(denominator_ + at), C(p_.eps)),
          next_ + at);
    }
    C* const swap = state_;
    state_ = next_;
    next_ = swap;
  }

  void store_outputs(T* y) const {
    const C *scale = static_cast<const C*>(p_.output_map),
            *shift = scale ? scale + p_.outputs : nullptr;
    for (int32_t i = 0; i < network_.places; ++i) {
      const int32_t j = network_.recurrent.target[i];
      if (j >= p_.outputs) continue;
      narrow(scale ? ltc_mapped(state_[i], scale[j], shift[j]) : state_[i], y[j]);
    }
  }

  void store_slot(int64_t b, int64_t slot) const {
    C* to = static_cast<C*>(p_.saved) + slot * p_.units * p_.batch + b;
    for (int32_t i = 0; i < network_.places; ++i) {
      const int32_t unit = network_.recurrent.target[i];
      if (unit < p_.units) to[unit * p_.batch] = state_[i];
    }
  }

  const LtcScanParams& p_;
  const LtcRowNetwork<C>& network_;
  C *x_, *state_, *next_;
  C *numerator_, *denominator_;  // of the sensory synapses
};

}  // namespace EMBER_ISA
}  // namespace ember
