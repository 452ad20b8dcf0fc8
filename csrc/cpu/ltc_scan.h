// What the LTC scan's CPU kernels share: a network laid out for them, groups of rows, and how
// synapses open.
//
// Rows of the batch are vector lanes: a group of rows has [sources, width] arrays of potentials,
// and a synapse is a few scalars that apply to all of them. A group goes through all steps by
// itself; no thread waits for another.
#pragma once

#include "../common/ltc_scan.h"
#include "parallel.h"
#include "vector.h"
#include "vector_math.h"

namespace ember {
inline namespace EMBER_ISA {

// Memory that is taken piece by piece, each from a line of the cache on.
template <typename C>
class LtcScratch {
 public:
  explicit LtcScratch(C* memory) : memory_(memory) {}
  C* take(int64_t elements) {
    C* piece = memory_;
    memory_ += ltc_pad(elements);
    return piece;
  }

 private:
  C* memory_;
};

// The four weights of a synapse side by side. Forward has -sigma, and w * erev in place of erev.
template <typename C>
struct LtcSynapse {
  C mu, sigma, w, erev;
};

// The synapses of one kind as a list by target: those of unit j are [begin[j], begin[j + 1]).
template <typename C>
struct LtcList {
  const int32_t* begin;
  const int32_t* source;
  const LtcSynapse<C>* synapses;
  int64_t count, targets;

  int32_t degree(int64_t j) const { return begin[j + 1] - begin[j]; }
};

// The network as kernels take it.
template <typename C>
struct LtcNetwork {
  LtcList<C> sensory, recurrent;
  const C *cm, *gleak, *vleak;  // [units]
  const C* current;             // [units]: gleak vleak

  // Lays the network out in `memory`, ltc_network_size() elements, or finds it there.
  LtcNetwork(const LtcScanParams& p, bool backward, C* memory, bool is_laid_out) {
    LtcScratch<C> scratch(memory);
    C* own = scratch.take(4 * p.units);
    cm = own;
    gleak = cm + p.units;
    vleak = gleak + p.units;
    current = vleak + p.units;
    if (!is_laid_out) {
      const C* given = static_cast<const C*>(p.unit_weights);
      for (int64_t i = 0; i < 3 * p.units; ++i) own[i] = given[i];
      for (int64_t j = 0; j < p.units; ++j) own[3 * p.units + j] = gleak[j] * vleak[j];
    }
    sensory = place(p, p.sensory, backward, scratch, is_laid_out);
    recurrent = place(p, p.recurrent, backward, scratch, is_laid_out);
  }

 private:
  static LtcList<C> place(const LtcScanParams& p, const LtcSynapses& list, bool backward,
                          LtcScratch<C>& scratch, bool is_laid_out) {
    auto* synapses = reinterpret_cast<LtcSynapse<C>*>(scratch.take(4 * list.count));
    auto* source = reinterpret_cast<int32_t*>(scratch.take(list.count));
    auto* begin = reinterpret_cast<int32_t*>(scratch.take(p.units + 1));
    if (!is_laid_out) {
      const C *w = static_cast<const C*>(list.weights), *mu = w + list.count,
              *sigma = mu + list.count, *erev = sigma + list.count;
      int64_t target = -1;
      for (int64_t e = 0; e < list.count; ++e) {
        synapses[e] = {mu[e], backward ? sigma[e] : -sigma[e], w[e],
                       backward ? erev[e] : w[e] * erev[e]};
        source[e] = int32_t(list.sources[e]);
        while (target < list.targets[e]) begin[++target] = int32_t(e);
      }
      while (target < p.units) begin[++target] = int32_t(list.count);
    }
    return {begin, source, synapses, list.count, p.units};
  }
};

// e^43 + 1 is e^43, and two of them multiply to a finite number.
template <typename C>
constexpr C ltc_most_exponent = sizeof(C) == 4 ? C(43) : C(340);

// How far two synapses of one target are open, sigmoid(-x) and sigmoid(-y), at one division for
// both: dividing takes as long as half an exponential. A NaN in one makes both NaN, as it makes
// their target's next state NaN anyway. Never less than e^-43, too little to be seen in a sum.
template <typename C>
EMBER_HD void sigmoids_of_negative(Vector<C> x, Vector<C> y, Vector<C>& first, Vector<C>& second) {
  const Vector<C> a = C(1) + exponential(x, ltc_most_exponent<C>),
                  b = C(1) + exponential(y, ltc_most_exponent<C>), r = C(1) / (a * b);
  first = b * r;
  second = a * r;
}
// The same of one, to the bit as if the other were 0.
template <typename C>
EMBER_HD Vector<C> sigmoid_of_negative(Vector<C> x) {
  return C(1) / (C(1) + exponential(x, ltc_most_exponent<C>));
}

// How far a synapse is open, and the derivative of that.
template <typename C>
struct SlopedSigmoid {
  Vector<C> open, slope;
};
template <typename C>
EMBER_HD SlopedSigmoid<C> sloped_sigmoid(Vector<C> exponential, Vector<C> closed) {
  const Vector<C> open = exponential * closed;
  return {open, open * closed};
}

// sigmoid(x) and sigmoid(y), which do fall to 0: as a factor of a large potential, what is left of
// a closed synapse would be seen.
template <typename C>
EMBER_HD void sigmoids(Vector<C> x, Vector<C> y, SlopedSigmoid<C>& first,
                       SlopedSigmoid<C>& second) {
  const Vector<C> a = exponential(x, ltc_most_exponent<C>),
                  b = exponential(y, ltc_most_exponent<C>);
  const Vector<C> a1 = C(1) + a, b1 = C(1) + b, r = C(1) / (a1 * b1);
  first = sloped_sigmoid<C>(a, b1 * r);
  second = sloped_sigmoid<C>(b, a1 * r);
}
template <typename C>
EMBER_HD SlopedSigmoid<C> sigmoid_alone(Vector<C> x) {
  const Vector<C> a = exponential(x, ltc_most_exponent<C>);
  return sloped_sigmoid<C>(a, C(1) / (C(1) + a));
}

// `mask`'s lanes of `a`, and 0 in the others.
template <typename C>
EMBER_HD Vector<C> select(Vector<C> mask, Vector<C> a) {
  return mask != Vector<C>{} ? a : Vector<C>{};
}
template <typename C>
EMBER_HD Vector<C> select(Vector<C> mask, Vector<C> a, Vector<C> b) {
  return mask != Vector<C>{} ? a : b;
}

// Rows [first, first + count) of the batch as lanes of R vectors.
struct LtcRows {
  int64_t first, count;
};

// Arrays of one group of rows, [.., width], and what moves rows into lanes and back.
template <typename T, int R>
class LtcGroup {
 public:
  using C = compute_t<T>;
  using V = Vector<C>;
  static constexpr int width = R * lanes<C>;

  LtcGroup(const LtcScanParams& p, const LtcRows& rows) : p_(p), rows_(rows) {}

  // Which rows run in time step t: running[lane] is 1 or 0. Returns how many.
  int64_t find_running(int64_t t, C* running) const {
    int64_t count = 0;
    for (int64_t lane = 0; lane < width; ++lane) {
      const bool runs = lane < rows_.count && (!p_.lengths || t < p_.lengths[rows_.first + lane]);
      running[lane] = C(runs);
      count += runs;
    }
    return count;
  }

  // Time step t of T [batch, steps, columns] to [columns, width], through a map C [2, columns] if
  // there is one; 0 in rows that do not run.
  void load(const void* from, int64_t t, int64_t columns, const C* running, C* to,
            const void* map = nullptr) const {
    const T* values = static_cast<const T*>(from);
    const C *scale = static_cast<const C*>(map), *shift = map ? scale + columns : nullptr;
    for (int64_t lane = 0; lane < width; ++lane) {
      if (running[lane] == 0) {
        for (int64_t i = 0; i < columns; ++i) to[i * width + lane] = 0;
        continue;
      }
      const T* row = values + ((rows_.first + lane) * p_.steps + t) * columns;
      for (int64_t i = 0; i < columns; ++i) {
        const C value = widen(row[i]);
        to[i * width + lane] = map ? ltc_mapped(value, scale[i], shift[i]) : value;
      }
    }
  }
  // The way back, through a map C [2, columns] if there is one; 0 for rows that do not run.
  void store(const C* from, int64_t t, int64_t columns, const C* running, void* to,
             const void* map = nullptr) const {
    T* values = static_cast<T*>(to);
    const C *scale = static_cast<const C*>(map), *shift = map ? scale + columns : nullptr;
    for (int64_t lane = 0; lane < rows_.count; ++lane) {
      T* row = values + ((rows_.first + lane) * p_.steps + t) * columns;
      if (running[lane] == 0) {
        for (int64_t i = 0; i < columns; ++i) narrow(C(0), row[i]);
        continue;
      }
      for (int64_t i = 0; i < columns; ++i) {
        const C value = from[i * width + lane];
        narrow(map ? ltc_mapped(value, scale[i], shift[i]) : value, row[i]);
      }
    }
  }

  // C [batch, units] to [units, width] and back; 0 beyond the rows.
  void load_state(const void* from, C* to) const {
    for (int64_t lane = 0; lane < width; ++lane) {
      const C* row = static_cast<const C*>(from) + (rows_.first + lane) * p_.units;
      for (int64_t j = 0; j < p_.units; ++j) {
        to[j * width + lane] = lane < rows_.count ? row[j] : C(0);
      }
    }
  }
  void store_state(const C* from, void* to) const {
    for (int64_t lane = 0; lane < rows_.count; ++lane) {
      C* row = static_cast<C*>(to) + (rows_.first + lane) * p_.units;
      for (int64_t j = 0; j < p_.units; ++j) row[j] = from[j * width + lane];
    }
  }

  // A slot of `saved` for unit j, a row of the batch for every unit.
  void store_slot(const C* from, int64_t slot) const {
    C* to = static_cast<C*>(p_.saved) + slot * p_.units * p_.batch + rows_.first;
    for (int64_t j = 0; j < p_.units; ++j, from += width, to += p_.batch) {
      if (rows_.count == width) {
        for (int r = 0; r < R; ++r) copy_vector(from + r * lanes<C>, to + r * lanes<C>);
      } else {
        for (int64_t lane = 0; lane < rows_.count; ++lane) to[lane] = from[lane];
      }
    }
  }
  void load_slot(int64_t slot, const C* running, C* to) const {
    const C* from = static_cast<const C*>(p_.saved) + slot * p_.units * p_.batch + rows_.first;
    for (int64_t j = 0; j < p_.units; ++j, from += p_.batch, to += width) {
      if (rows_.count == width) {
        for (int r = 0; r < R; ++r) {
          const int at = r * lanes<C>;
          store_vector(select<C>(load_vector(running + at), load_vector(from + at)), to + at);
        }
      } else {
        for (int64_t lane = 0; lane < width; ++lane) {
          to[lane] = lane < rows_.count && running[lane] != 0 ? from[lane] : C(0);
        }
      }
    }
  }

  // The time step's length over the number of solver steps, in each lane; 1 where none is.
  void load_timespans(int64_t t, const C* running, C* to) const {
    const C* spans = static_cast<const C*>(p_.timespans);
    for (int64_t lane = 0; lane < width; ++lane) {
      const bool runs = running[lane] != 0;
      to[lane] = runs ? spans[(rows_.first + lane) * p_.steps + t] / C(p_.unfolds) : C(1);
    }
  }

 private:
  const LtcScanParams& p_;
  const LtcRows rows_;
};

// Adds what the synapses of `list`, laid out for forward, to unit j conduct from potentials v,
// [sources, width], to numerator and denominator of the unit's next state.
template <int R, typename C>
EMBER_HD void conduct(const LtcList<C>& list, int64_t j, const C* v, Vector<C>* numerator,
                      Vector<C>* denominator) {
  constexpr int width = R * lanes<C>;
  const auto steep = [](const LtcSynapse<C>& s, const C* from) {
    return s.sigma * (load_vector(from) - s.mu);
  };
  const auto add = [&](const LtcSynapse<C>& s, Vector<C> open, int r) {
    denominator[r] += s.w * open;
    numerator[r] += s.erev * open;
  };
  int32_t e = list.begin[j];
  const int32_t end = list.begin[j + 1];
  for (; e + 2 <= end; e += 2) {
    const LtcSynapse<C>*s = list.synapses + e, *next = s + 1;
    const C *from = v + list.source[e] * width, *next_from = v + list.source[e + 1] * width;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int at = r * lanes<C>;
      Vector<C> open, next_open;
      sigmoids_of_negative<C>(steep(*s, from + at), steep(*next, next_from + at), open, next_open);
      add(*s, open, r);
      add(*next, next_open, r);
    }
  }
  if (e == end) return;
  const LtcSynapse<C>& s = list.synapses[e];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const C* from = v + list.source[e] * width + r * lanes<C>;
    add(s, sigmoid_of_negative<C>(steep(s, from)), r);
  }
}

// As conduct() for a list laid out for backward: keeps how far each synapse is open and the slope
// of that, [synapses, 2, width], and adds to the denominator only.
template <int R, typename C>
EMBER_HD void open_synapses(const LtcList<C>& list, int64_t j, const C* v, Vector<C>* denominator,
                            C* opens) {
  constexpr int width = R * lanes<C>;
  const auto steep = [](const LtcSynapse<C>& s, const C* from) {
    return s.sigma * (load_vector(from) - s.mu);
  };
  int32_t e = list.begin[j];
  const int32_t end = list.begin[j + 1];
  for (; e + 2 <= end; e += 2, opens += 4 * width) {
    const LtcSynapse<C>*s = list.synapses + e, *next = s + 1;
    const C *from = v + list.source[e] * width, *next_from = v + list.source[e + 1] * width;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int at = r * lanes<C>;
      SlopedSigmoid<C> own, next_own;
      sigmoids<C>(steep(*s, from + at), steep(*next, next_from + at), own, next_own);
      denominator[r] += s->w * own.open;
      denominator[r] += next->w * next_own.open;
      store_vector(own.open, opens + at);
      store_vector(own.slope, opens + width + at);
      store_vector(next_own.open, opens + 2 * width + at);
      store_vector(next_own.slope, opens + 3 * width + at);
    }
  }
  if (e == end) return;
  const LtcSynapse<C>& s = list.synapses[e];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const C* from = v + list.source[e] * width + r * lanes<C>;
    const SlopedSigmoid<C> own = sigmoid_alone<C>(steep(s, from));
    denominator[r] += s.w * own.open;
    store_vector(own.open, opens + r * lanes<C>);
    store_vector(own.slope, opens + width + r * lanes<C>);
  }
}

// Vectors of rows that a group has at most.
constexpr int ltc_max_vectors = 2;

// Splits the batch into groups of whole vectors of rows, and calls body(R as a constant, rows) for
// those in [begin, end).
template <typename C>
struct LtcGroups {
  int64_t batch, vectors, count;

  // At least `least` groups, if there are as many vectors.
  LtcGroups(int64_t batch_, int64_t least) : batch(batch_) {
    vectors = (batch + lanes<C> - 1) / lanes<C>;
    count = (vectors + ltc_max_vectors - 1) / ltc_max_vectors;
    count = count < least ? least : count;
    count = count < vectors ? count : vectors;
  }

  template <typename Body>
  void visit(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = vectors * i / count, to = vectors * (i + 1) / count;
      const int64_t first = from * lanes<C>, last = to * lanes<C> < batch ? to * lanes<C> : batch;
      const LtcRows rows{first, last - first};
      if (to - from == 2) {
        body(std::integral_constant<int, 2>(), rows);
      } else {
        body(std::integral_constant<int, 1>(), rows);
      }
    }
  }
};

}  // namespace EMBER_ISA
}  // namespace ember
