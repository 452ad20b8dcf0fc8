// The CfC scan's way through the steps of a stretch of time, layer by layer. The forward pass takes
// it, and the backward pass where it computes steps again.
#pragma once

#include "cfc_scan.h"

namespace ember {
inline namespace EMBER_ISA {

// Steps of the rows [begin, end), from slot 0 on. `keep` says whether to keep the values that the
// derivatives need.
struct CfcStretch {
  int64_t first, steps;
  int32_t begin, end;
  bool keep;
};

template <typename T>
class CfcSteps {
 public:
  using C = compute_t<T>;

  explicit CfcSteps(const CfcTapes<C>& tapes) : p_(tapes.p), tapes_(tapes) {}

  // From the states in slot 0, by run(job).
  template <typename Run>
  void walk(const CfcStretch& all, bool want_y, const Run& run) const {
    // With few rows the weights' way into the core takes longer than the arithmetic. Those of the
    // inputs are then applied to several steps at a time; the order of the sums stays the same.
    const bool ahead = all.end - all.begin <= 4 && p_.inputs > 0;
    // x and y are read and written several steps at a time, since a row's steps lie side by side.
    const int64_t stretch = ahead ? 32 : 8;
    for (int64_t from = 0; from < all.steps; from += stretch) {
      const int64_t to = from + stretch < all.steps ? from + stretch : all.steps;
      place_inputs(all, from, to);
      const CfcStep start{all.first + from, all.begin, all.end, from, 0};
      if (ahead) run(CfcJob{CfcJob::inputs_part, 0, start, all.keep, false, int32_t(to - from)});
      for (int64_t slot = from; slot < to; ++slot) {
        const CfcStep step{all.first + slot, all.begin, all.end, slot, 0};
        for (int32_t l = 0; l < p_.num_layers; ++l) {
          run(CfcJob{CfcJob::layer_step, l, step, all.keep, ahead && l == 0});
        }
      }
      if (want_y) store_outputs(all, from, to);
    }
  }

 private:
  void place_inputs(const CfcStretch& all, int64_t from, int64_t to) const {
    const T* x = static_cast<const T*>(p_.x);
    for (int64_t b = all.begin; b < all.end; ++b) {
      for (int64_t slot = from; slot < to; ++slot) {
        C* row = tapes_.input(0, slot, b);
        row[0] = C(1);
        if (tapes_.runs(b, all.first + slot)) {
          convert(x + (b * p_.steps + all.first + slot) * p_.inputs, p_.inputs, row + 1);
        } else {  // not even NaN there reaches a gradient
          for (int64_t j = 1; j <= p_.inputs; ++j) row[j] = 0;
        }
      }
    }
  }

  void store_outputs(const CfcStretch& all, int64_t from, int64_t to) const {
    T* y = static_cast<T*>(p_.y);
    for (int64_t b = all.begin; b < all.end; ++b) {
      for (int64_t slot = from; slot < to; ++slot) {
        T* out = y + (b * p_.steps + all.first + slot) * p_.hidden;
        if (tapes_.runs(b, all.first + slot)) {
          convert(tapes_.state(slot + 1, b), p_.hidden, out);
        } else {
          for (int64_t j = 0; j < p_.hidden; ++j) narrow(C(0), out[j]);
        }
      }
    }
  }

  const CfcScanParams& p_;
  const CfcTapes<C>& tapes_;
};

}  // namespace EMBER_ISA
}  // namespace ember
