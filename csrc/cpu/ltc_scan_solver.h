// One time step of an LTC network for a group of rows.
#pragma once

#include "ltc_scan.h"

namespace ember {
inline namespace EMBER_ISA {

template <typename T, int R>
class LtcSolver {
 public:
  using C = compute_t<T>;
  using V = Vector<C>;
  using Group = LtcGroup<T, R>;
  static constexpr int width = Group::width;

  LtcSolver(const LtcScanParams& p, const LtcNetwork<C>& network, const Group& group,
            LtcScratch<C>& scratch)
      : p_(p), network_(network), group_(group) {
    x_ = scratch.take(p.inputs * width);
    current_ = scratch.take(p.units * width);
    next_ = scratch.take(p.units * width);
    numerator_ = scratch.take(p.units * width);
    denominator_ = scratch.take(p.units * width);
    c_ = scratch.take(p.units * width);
    timespans_ = scratch.take(width);
  }

  // From the state v, [units, width], to the next; rows that do not run keep theirs.
  // kept(k, state) is called after each solver step k; rows that do not run are 0 in its state.
  template <typename Kept>
  void step(int64_t t, const C* running, C* v, const Kept& kept) {
    group_.load(p_.x, t, p_.inputs, running, x_, p_.input_map);
    group_.load_timespans(t, running, timespans_);
    for (int64_t j = 0; j < p_.units; ++j) {
      V numerator[R] = {}, denominator[R] = {};
      conduct<R>(network_.sensory, j, x_, numerator, denominator);
      for (int r = 0; r < R; ++r) {
        const int64_t at = j * width + r * lanes<C>;
        store_vector(numerator[r], numerator_ + at);
        store_vector(denominator[r], denominator_ + at);
        store_vector(network_.cm[j] / load_vector(timespans_ + r * lanes<C>), c_ + at);
        store_vector(select<C>(load_vector(running + r * lanes<C>), load_vector(v + at)),
                     current_ + at);
      }
    }
    for (int64_t k = 0; k < p_.unfolds; ++k) {
      for (int64_t j = 0; j < p_.units; ++j) solve(j, running);
      C* const swap = current_;
      current_ = next_;
      next_ = swap;
      kept(k, current_);
    }
    for (int64_t i = 0; i < p_.units * width; i += lanes<C>) {
      const V runs = load_vector(running + i % width);
      store_vector(select<C>(runs, load_vector(current_ + i), load_vector(v + i)), v + i);
    }
  }

 private:
  // One solver step of unit j.
  void solve(int64_t j, const C* running) {
    V numerator[R] = {}, denominator[R] = {};
    conduct<R>(network_.recurrent, j, current_, numerator, denominator);
    for (int r = 0; r < R; ++r) {
      const int64_t at = j * width + r * lanes<C>;
      const V next =
          ltc_next_state(load_vector(c_ + at), load_vector(current_ + at), network_.gleak[j],
                         network_.current[j], numerator[r] + load_vector(numerator_ + at),
                         denominator[r] + load_vector(denominator_ + at), C(p_.eps));
      store_vector(select<C>(load_vector(running + r * lanes<C>), next), next_ + at);
    }
  }

  const LtcScanParams& p_;
  const LtcNetwork<C>& network_;
  const Group& group_;
  C *x_, *current_, *next_;
  C *numerator_, *denominator_;  // of the sensory synapses
  C *c_, *timespans_;
};

}  // namespace EMBER_ISA
}  // namespace ember
