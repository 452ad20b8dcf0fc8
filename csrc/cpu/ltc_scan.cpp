// The LTC scan's forward pass on the CPU.
#include "ltc_scan.h"

#include <type_traits>

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
        network_(p, false, static_cast<C*>(p.packed ? p.packed : p.workspace), p.packed),
        scratch_(static_cast<C*>(p.workspace) + (p.packed ? 0 : ltc_network_size(p))) {}

  void run(const ThreadPool& pool) {
    // How rows are grouped has no influence on their values, so the number of threads may decide.
    const LtcGroups<C> groups(p_.batch, pool.threads);
    parallel_for(pool, groups.count, 1, [&](int64_t begin, int64_t end) {
      C* scratch = scratch_ + pool.thread_index() * ltc_scratch_size(p_, false);
      groups.visit(begin, end, [&](auto vectors, const LtcRows& rows, int64_t) {
        run_rows<decltype(vectors)::value>(rows, scratch);
      });
    });
  }

 private:
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
      if (group.find_running(t, running) > 0) {
        solver.step(t, running, state, [&](int64_t k, const C* after) {
          if (keeps_all) group.store_slot(after, 1 + t * p_.unfolds + k);
        });
      }
      group.store(state, t, p_.outputs, running, p_.y);
    }
    group.store_state(state, p_.h_last);
  }

  const LtcScanParams& p_;
  const LtcNetwork<C> network_;
  C* const scratch_;
};

}  // namespace

void ltc_scan_forward(const LtcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Forward<std::remove_pointer_t<decltype(element)>>(p).run(pool);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
