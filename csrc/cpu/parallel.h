// How kernels run on several threads without knowing whose threads they are.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

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

// What one of several threads does of a job that has `n` equal parts: [begin(n), end(n)).
struct Share {
  int64_t index, members;
  int64_t begin(int64_t n) const { return n * index / members; }
  int64_t end(int64_t n) const { return n * (index + 1) / members; }
};

// Threads that go through a sequence of jobs together, each with its share of every job: for work
// whose jobs are too short, at a microsecond, to be handed to a pool one by one.
//
// The thread that enters first leads, and the others help from the first job on that starts after
// they entered. The leader does every share that nobody has begun by the time its own is done. So
// it waits for shares that are under way and for nothing else: where a pool runs its tasks one
// after the other, or the machine is busy, the leader does the work alone.
template <typename Job>
class Team {
 public:
  static constexpr int64_t max_members = 64;

  // Called by each thread. The leader runs lead(), which calls run(); the others do work(job,
  // share) until the leader is through.
  template <typename Lead, typename Work>
  void enter(const Lead& lead, const Work& work) {
    const int64_t index = entered_.fetch_add(1);
    if (index == 0) {
      lead();
      turn_.store(over, std::memory_order_release);
    } else if (index < max_members) {
      help(index, work);
    }
  }

  // For the leader: does `job` with at most `most` members, and returns when all of it is done.
  template <typename Work>
  void run(const Job& job, int64_t most, const Work& work) {
    int64_t members = entered_.load(std::memory_order_acquire);
    members = members < most ? members : most;
    members = members < max_members ? members : max_members;
    if (members <= 1) return work(job, Share{0, 1});
    job_ = job;
    ++number_;
    turn_.store(number_ * 256 + uint64_t(members), std::memory_order_release);
    work(job, Share{0, members});
    for (int64_t i = 1; i < members; ++i) {
      Place& place = places_[i];
      for (int spins = 0; place.done.load(std::memory_order_acquire) != number_; ++spins) {
        // Looking whether a share was begun slows its member down, so one that did the last is
        // given half a microsecond.
        const bool looks = spins == (place.absent ? 0 : 50);
        if (looks && (place.absent = claims(i, number_))) {
          work(job, Share{i, members});
          break;
        }
        wait(spins < 400);
      }
    }
  }

 private:
  static constexpr uint64_t over = ~uint64_t(0);

  // A member's last job: begun by the member or, in its place, the leader; done by the member.
  // Lines of the cache of their own, since each has another reader or writer.
  struct Place {
    alignas(64) std::atomic<uint64_t> begun{0};
    alignas(64) std::atomic<uint64_t> done{0};
    alignas(64) bool absent = false;  // the leader did its last share
  };

  // Whether the caller is the first to begin member i's share of a job.
  bool claims(int64_t i, uint64_t number) {
    uint64_t last = places_[i].begun.load(std::memory_order_relaxed);
    return last < number &&
           places_[i].begun.compare_exchange_strong(last, number, std::memory_order_acq_rel);
  }

  static void wait(bool spin) {
    if (!spin) return std::this_thread::yield();  // the awaited thread may need this core
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    // Takes some ten nanoseconds, as x86's pause does; Arm's `yield` takes none on most cores.
    __asm__ volatile("isb" ::: "memory");
#endif
  }

  template <typename Work>
  void help(int64_t index, const Work& work) {
    uint64_t last = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t turn = turn_.load(std::memory_order_acquire), number = turn / 256;
      if (turn == over) return;
      if (number == last || index >= int64_t(turn % 256)) {
        wait(spins < 4000);
        continue;
      }
      last = number;
      spins = 0;
      if (!claims(index, number)) continue;
      work(job_, Share{index, int64_t(turn % 256)});
      places_[index].done.store(number, std::memory_order_release);
    }
  }

  alignas(64) std::atomic<int64_t> entered_{0};
  // The number of the leader's last shared job and its members; job_ is written before it, and
  // should fit the same line of the cache.
  alignas(64) std::atomic<uint64_t> turn_{0};
  Job job_{};
  alignas(64) uint64_t number_ = 0;
  Place places_[max_members];
};

}  // namespace EMBER_ISA
}  // namespace ember
