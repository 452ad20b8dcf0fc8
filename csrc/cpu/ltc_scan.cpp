// The LTC scan's forward pass on the CPU, and the layout of a network for many calls.
#include "ltc_scan.h"

#include <type_traits>

#include "ltc_scan_row.h"
#include "ltc_scan_solver.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

template <typename T>
class Forward {
 public:
  using C = compute_t<T>;

  explicit Forward(const LtcScanParams& p)
      : p_(p),
        memory_(static_cast<C*>(p.packed ? p.packed : p.workspace)),
        network_(p, false, memory_, p.packed),
        scratch_(static_cast<C*>(p.workspace) + (p.packed ? 0 : ltc_packed_size(p))) {}

  void run(const ThreadPool& pool) {
    // Which rows go together, and whether by lanes, has no influence on their values.
    if (p_.batch <= lanes<C> / 2) {
      const LtcRowNetwork<C> network(p_, p_.packed ? nullptr : &network_, row_memory(p_, memory_));
      if (p_.batch == 1) return LtcRowSolver<T>(p_, network, scratch_).run(0);
      parallel_for(pool, p_.batch, 1, [&](int64_t begin, int64_t end) {
        LtcRowSolver<T> solver(p_, network, thread_scratch(pool));
        for (int64_t b = begin; b < end; ++b) solver.run(b);
      });
      return;
    }
    const LtcGroups<C> groups(p_.batch, pool.threads);
    parallel_for(pool, groups.count, 1, [&](int64_t begin, int64_t end) {
      C* scratch = thread_scratch(pool);
      groups.visit(begin, end, [&](auto vectors, const LtcRows& rows) {
        run_rows<decltype(vectors)::value>(rows, scratch);
      });
    });
  }

  static C* row_memory(const LtcScanParams& p, C* memory) {
    return memory + ltc_pad(ltc_network_size(p));
  }

 private:
  C* thread_scratch(const ThreadPool& pool) const {
    return scratch_ + pool.thread_index() * ltc_scratch_size(p_, false);
  }

  template <int R>
  void run_rows(const LtcRows& rows, C* memory) {
    using Group = LtcGroup<T, R>;
    const Group group(p_, rows);
    LtcScratch<C> scratch(memory);
    C* state = scratch.take(p_.units * Group::width);
    C* running = scratch.take(Group::width);
    LtcSolver<T, R> solver(p_, network_, group, scratch);
    group.load_state(p_.h0, state);
    const bool keeps_all = p_.saved && !p_.chunk;
    if (keeps_all) group.store_slot(state, 0);
    for (int64_t t = 0; t < p_.steps; ++t) {
      if (p_.saved && p_.chunk && t % p_.chunk == 0) group.store_slot(state, t / p_.chunk);
      const auto keep = [&](int64_t k, const C* after) {
        if (keeps_all) group.store_slot(after, 1 + t * p_.unfolds + k);
      };
      if (group.find_running(t, running) > 0) {
        solver.step(t, running, state, keep);
      } else {
        for (int64_t k = 0; k < p_.unfolds; ++k) keep(k, state);
      }
      group.store(state, t, p_.outputs, running, p_.y, p_.output_map);
    }
    group.store_state(state, p_.h_last);
  }

  const LtcScanParams& p_;
  C* const memory_;
  const LtcNetwork<C> network_;
  C* const scratch_;
};

}  // namespace

void ltc_scan_forward(const LtcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Forward<std::remove_pointer_t<decltype(element)>>(p).run(pool);
  });
}

void ltc_scan_pack(const LtcScanParams& p, const ThreadPool&) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = compute_t<T>;
    C* memory = static_cast<C*>(p.packed);
    const LtcNetwork<C> network(p, false, memory, false);
    LtcRowNetwork<C>(p, &network, Forward<T>::row_memory(p, memory));
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
