// How kernels run on several threads without knowing whose threads they are.
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace ember {

// torch's intra-op pool, filled in by the binding (or a test's own loop).
struct ThreadPool {
  using Task = void (*)(int64_t begin, int64_t end, void* context);
  // Calls `task` on disjoint ranges that cover [0, n), each at least `grain` long if n allows.
  void (*run)(int64_t n, int64_t grain, Task task, void* context);
  // Inside a task: which of the `threads` threads this is.
  int64_t (*thread_index)();
  int64_t threads;
};

inline namespace EMBER_ISA {

// body(begin, end) over [0, n). It must not throw: an exception cannot leave a worker thread.
template <typename Body>
inline void parallel_for(const ThreadPool& pool, int64_t n, int64_t grain, const Body& body) {
  pool.run(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// The number of items of `cost` (about one nanosecond each unit) that are worth handing to a
// thread.
inline int64_t grain_for(int64_t cost) {
  const int64_t worthwhile = 20000;
  return cost >= worthwhile ? 1 : (worthwhile + cost) / (cost + 1);
}

}  // namespace EMBER_ISA
}  // namespace ember
