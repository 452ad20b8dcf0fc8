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

namespace ember {
inline namespace EMBER_ISA {

// The four weights of a synapse side by side. Forward has w * erev in place of erev.
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
  int64_t count;
};

// The network as kernels take it.
template <typename C>
struct LtcNetwork {
  LtcList<C> sensory, recurrent;
  const C *cm, *gleak, *vleak;  // [units]

  // Lays the network out in `memory`, or finds it there if `memory` is laid out.
  LtcNetwork(const LtcScanParams& p, bool backward, C* memory, bool is_laid_out) {
    cm = static_cast<const C*>(p.unit_weights);
    gleak = cm + p.units;
    vleak = gleak + p.units;
    sensory = place(p, p.sensory, backward, memory, is_laid_out);
    recurrent = place(p, p.recurrent, backward, memory + list_size(p, p.sensory), is_laid_out);
  }

 private:
  static int64_t list_size(const LtcScanParams& p, const LtcSynapses& list) {
    return list.count * 5 + p.units + 1;
  }

  static LtcList<C> place(const LtcScanParams& p, const LtcSynapses& list, bool backward, C* memory,
                          bool is_laid_out) {
    auto* synapses = reinterpret_cast<LtcSynapse<C>*>(memory);
    auto* source = reinterpret_cast<int32_t*>(memory + 4 * list.count);
    int32_t* begin = source + list.count;
    if (!is_laid_out) {
      const C *w = static_cast<const C*>(list.weights), *mu = w + list.count,
              *sigma = mu + list.count, *erev = sigma + list.count;
      int64_t target = -1;
      for (int64_t e = 0; e < list.count; ++e) {
        synapses[e] = {mu[e], sigma[e], w[e], backward ? erev[e] : w[e] * erev[e]};
        source[e] = int32_t(list.sources[e]);
        while (target < list.targets[e]) begin[++target] = int32_t(e);
      }
      while (target < p.units) begin[++target] = int32_t(list.count);
    }
    return {begin, source, synapses, list.count};
  }
};

// How far two synapses of one target are open, at one division for both: dividing takes as long as
// half an exponential. Beyond `most`, sigmoid rounds to 1, and the product of the two sums stays
// finite. A NaN in one makes both NaN, as it makes their target's next state NaN anyway.
template <typename C>
EMBER_HD void sigmoids(Vector<C> x, Vector<C> y, Vector<C>& first, Vector<C>& second) {
  constexpr C most = sizeof(C) == 4 ? C(43) : C(340);
  const Vector<C> a = exponential(x, most), b = exponential(y, most);
  const Vector<C> a1 = C(1) + a, b1 = C(1) + b, r = C(1) / (a1 * b1);
  first = a * (b1 * r);
  second = b * (a1 * r);
}

// The same of one, to the bit as if the other were of a synapse with sigma = 0.
template <typename C>
EMBER_HD Vector<C> sigmoid_alone(Vector<C> x) {
  constexpr C most = sizeof(C) == 4 ? C(43) : C(340);
  const Vector<C> a = exponential(x, most);
  return a * (C(1) / (C(1) + a));
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

  // Time step t of T [batch, steps, columns] to [columns, width]; 0 in rows that do not run.
  void load(const void* from, int64_t t, int64_t columns, const C* running, C* to) const {
    const T* values = static_cast<const T*>(from);
    for (int64_t lane = 0; lane < width; ++lane) {
      if (running[lane] == 0) {
        for (int64_t i = 0; i < columns; ++i) to[i * width + lane] = 0;
        continue;
      }
      const T* row = values + ((rows_.first + lane) * p_.steps + t) * columns;
      for (int64_t i = 0; i < columns; ++i) to[i * width + lane] = widen(row[i]);
    }
  }
  // The way back; 0 for rows that do not run.
  void store(const C* from, int64_t t, int64_t columns, const C* running, void* to) const {
    T* values = static_cast<T*>(to);
    for (int64_t lane = 0; lane < rows_.count; ++lane) {
      T* row = values + ((rows_.first + lane) * p_.steps + t) * columns;
      if (running[lane] == 0) {
        for (int64_t i = 0; i < columns; ++i) narrow(C(0), row[i]);
        continue;
      }
      for (int64_t i = 0; i < columns; ++i) narrow(from[i * width + lane], row[i]);
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

// Adds what the synapses of `list` to unit j conduct from potentials v, [sources, width]:
// numerator and denominator of the unit's next state. With `opens` it also keeps how far each is
// open, [synapses, width], and leaves the numerator alone.
template <int R, bool keeps, typename C>
EMBER_HD void conduct(const LtcList<C>& list, int64_t j, const C* v, Vector<C>* numerator,
                      Vector<C>* denominator, C* opens = nullptr) {
  using V = Vector<C>;
  constexpr int width = R * lanes<C>;
  const auto add = [&](const LtcSynapse<C>& s, V open, int r) {
    denominator[r] += s.w * open;
    if (!keeps) numerator[r] += s.erev * open;
  };
  int64_t e = list.begin[j];
  const int64_t end = list.begin[j + 1];
  for (; e + 2 <= end; e += 2) {
    const LtcSynapse<C>&s = list.synapses[e], &next = list.synapses[e + 1];
    const C *from = v + list.source[e] * width, *next_from = v + list.source[e + 1] * width;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V open, next_open;
      sigmoids<C>(s.sigma * (load_vector(from + r * lanes<C>) - s.mu),
                  next.sigma * (load_vector(next_from + r * lanes<C>) - next.mu), open, next_open);
      add(s, open, r);
      add(next, next_open, r);
      if (keeps) {
        store_vector(open, opens + r * lanes<C>);
        store_vector(next_open, opens + width + r * lanes<C>);
      }
    }
    if (keeps) opens += 2 * width;
  }
  if (e == end) return;
  const LtcSynapse<C>& s = list.synapses[e];
  const C* from = v + list.source[e] * width;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const V open = sigmoid_alone<C>(s.sigma * (load_vector(from + r * lanes<C>) - s.mu));
    add(s, open, r);
    if (keeps) store_vector(open, opens + r * lanes<C>);
  }
}

// Vectors of rows that a group has at most.
template <typename C>
constexpr int ltc_max_vectors = vector_bytes == 16 ? 2 : 2;

// Splits the batch into groups of whole vectors of rows, and calls body(R as a constant, rows) for
// those in [begin, end).
template <typename C>
struct LtcGroups {
  int64_t batch, vectors, count;

  // At least `least` groups, if there are as many vectors.
  LtcGroups(int64_t batch_, int64_t least) : batch(batch_) {
    vectors = (batch + lanes<C> - 1) / lanes<C>;
    count = (vectors + ltc_max_vectors<C> - 1) / ltc_max_vectors<C>;
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
        body(std::integral_constant<int, 2>(), rows, i);
      } else {
        body(std::integral_constant<int, 1>(), rows, i);
      }
    }
  }
};

// Scratch memory of a thread, taken piece by piece; without memory it only counts.
template <typename C>
class LtcScratch {
 public:
  explicit LtcScratch(C* memory = nullptr) : memory_(memory) {}
  C* take(int64_t elements) {
    C* piece = memory_ ? memory_ + size_ : nullptr;
    size_ += (elements + 15) / 16 * 16;
    return piece;
  }
  int64_t size() const { return size_; }

 private:
  C* memory_;
  int64_t size_ = 0;
};

}  // namespace EMBER_ISA
}  // namespace ember
