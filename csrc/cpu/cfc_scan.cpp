// The CfC scan's forward pass on the CPU, and the layout of weights for many calls.
#include "cfc_scan.h"

#include <type_traits>

#include "cfc_scan_steps.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

template <typename T>
class Forward {
 public:
  using C = compute_t<T>;

  explicit Forward(const CfcScanParams& p)
      : p_(p),
        tapes_(p, false),
        steps_(tapes_),
        packed_(p.packed ? static_cast<C*>(p.packed)
                         : static_cast<C*>(p.workspace) + cfc_workspace(p, false).packed) {}

  void run(const ThreadPool& pool) {
    if (!p_.packed) cfc_pack(p_, packed_);
    const auto work = [this](const CfcJob& job, const Share& share) {
      cfc_layer_job(tapes_, packed_, job, share);
    };
    cfc_for_row_blocks(p_, pool, work, [&](int32_t begin, int32_t end, const auto& run) {
      run_rows(begin, end, run);
    });
  }

 private:
  template <typename Run>
  void run_rows(int32_t begin, int32_t end, const Run& run) {
    const int64_t slots = tapes_.slots;
    tapes_.place_state(static_cast<const C*>(p_.h0), p_.h_stride, begin, end);
    for (int64_t b = begin; b < end; ++b) {
      // The state of a row without steps is handed on and takes no part in anything else.
      for (int64_t j = 0; j < p_.hidden && !tapes_.runs(b, 0); ++j) tapes_.state(0, b)[j] = 0;
    }
    for (int64_t first = 0; first < p_.steps; first += slots) {
      const int64_t steps = p_.steps - first < slots ? p_.steps - first : slots;
      if (p_.saved && p_.chunk) store_border(first, begin, end);
      steps_.walk({first, steps, begin, end, tapes_.is_whole}, true, run);
      if (first + steps < p_.steps) move_state(steps, begin, end);
    }
    store_state(begin, end);
  }

  void store_border(int64_t first, int64_t begin, int64_t end) const {
    C* border = static_cast<C*>(p_.saved) + first / tapes_.chunk * p_.batch * p_.hidden;
    for (int64_t b = begin; b < end; ++b) {
      copy(tapes_.state(0, b), p_.hidden, border + b * p_.hidden);
    }
  }

  void move_state(int64_t slot, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      copy(tapes_.state(slot, b), p_.hidden, tapes_.state(0, b));
    }
  }

  void store_state(int64_t begin, int64_t end) const {
    const int64_t last = p_.steps ? (p_.steps - 1) % tapes_.slots + 1 : 0;
    C* h_last = static_cast<C*>(p_.h_last);
    for (int64_t b = begin; b < end; ++b) {
      const C* h = tapes_.runs(b, 0) ? tapes_.state(last, b)
                                     : static_cast<const C*>(p_.h0) + b * p_.h_stride;
      copy(h, p_.hidden, h_last + b * p_.h_stride);
    }
  }

  const CfcScanParams& p_;
  const CfcTapes<C> tapes_;
  const CfcSteps<T> steps_;
  C* const packed_;
};

}  // namespace

void cfc_scan_pack(const CfcScanParams& p, const ThreadPool&) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using C = compute_t<std::remove_pointer_t<decltype(element)>>;
    cfc_pack(p, static_cast<C*>(p.packed));
  });
}

void cfc_scan_forward(const CfcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Forward<std::remove_pointer_t<decltype(element)>>(p).run(pool);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
