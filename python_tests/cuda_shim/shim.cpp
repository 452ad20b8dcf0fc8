// Runs kernels on the CPU, block after block or cluster after cluster, and looks for what a GPU
// would not report.
//
// A fault ends the launch, which then returns cudaErrorLaunchFailure; cuda_shim_error() says what
// and where. Found are: threads that wait at different places or for threads that have left; memory
// faults next to arrays from cuda_shim_allocate(), misaligned accesses and integer overflow (the
// sources are built with trapping undefined-behaviour checks); writes past the block's shared
// memory. Shared memory and fresh arrays hold NaN, so what is read before it is written shows in
// the results; so does a missing barrier, because results then change with the order of threads. In
// two orders a warp runs as far as it gets without the others, then the next; in the third, threads
// of all warps take turns.
// Of the blocks of a cluster one runs as far as it gets without the others, then the next in the
// order: so much may happen in one while nothing does in another, and a missing barrier shows. Each
// has shared memory of its own, which is kept elsewhere while another block runs.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "ptx.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {
constexpr size_t kSharedMost = 227 * 1024, kSharedGuard = 4096;  // the H100's limit
}

namespace ember {
namespace cuda {
alignas(256) unsigned char shared_bytes[kSharedMost + kSharedGuard];
}  // namespace cuda
}  // namespace ember

namespace {

using cuda_shim::Place;
using ember::cuda::shared_bytes;

constexpr int kMostThreads = 1024, kMostBlocks = 8;  // of a block, and of a cluster
constexpr size_t kStack = 128 * 1024, kPage = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, -1 in the integers

enum class State { ready, at_barrier, at_warp, at_cluster, done };
enum Order { forward, reverse, shuffled };

// A copy to shared memory that has been started.
struct Copy {
  unsigned char* to;
  const void* from;
  bool exists;  // else zeros are written
  int group;    // how many groups had been ended before
};

struct Thread {
  State state;
  Place place;
  unsigned mask;
  uint64_t value;                            // handed in at a warp's meeting
  void (*together)(void* const* arguments);  // called there with all values, unless null
  uint64_t received[32];                     // taken from it
  bool condition;                            // handed in at block_or
  std::vector<Copy> copies;                  // under way
  int groups;                                // of copies that have been ended
  int arrivals, waits;                       // at the cluster's barriers
  Place arrival;                             // the last
  bool started;                              // whether `resume` holds a point to go on from
  jmp_buf resume;
  ucontext_t start;
};

Thread threads[kMostBlocks * kMostThreads];  // of the blocks of a cluster one after the other
int current;
int block_threads, cluster_blocks, rank_now;  // of a block, of a cluster; the block that runs
size_t block_shared;                          // bytes that the block has
bool block_condition;
// The shared memory of the blocks that do not run.
std::vector<unsigned char> stored_shared[kMostBlocks];
jmp_buf scheduler;
sigjmp_buf escape;
unsigned char* stacks[kMostBlocks];
const std::function<void()>* body;
Order order = forward;
std::mt19937 generator;
std::string error;
cudaError_t last_error = cudaSuccess;  // until somebody asks for it
bool refuse_attributes = false;
std::map<const void*, int> allowed_shared;
std::string launches;
// Of the supported GPUs those of sm_75 have the least shared memory: what works there works on all.
int shared_limit = 64 * 1024;
int most_blocks = 1;  // of a cluster; without clusters 1
int cluster_questions = 0;

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(const_cast<void*>(kernel), &info) || !info.dli_sname) return "?";
  int status = 0;
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : info.dli_sname;
  free(name);
  return result;
}

std::string text_of(Place place) {
  const std::string file = place.file ? place.file : "?";
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

cudaError_t failed(cudaError_t status) {
  return last_error = status;
}

bool same(Place a, Place b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0;
}

[[noreturn]] void fail(const std::string& what) {
  error = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
          std::to_string(current % block_threads) + ")";
  siglongjmp(escape, 1);
}

void on_signal(int signal, siginfo_t* info, void*) {
  fail(signal == SIGSEGV || signal == SIGBUS
           ? "access to memory outside the arrays, address " +
                 std::to_string(reinterpret_cast<uintptr_t>(info->si_addr))
       : signal == SIGFPE ? "division by zero"
                          : "undefined behaviour: misaligned access, overflow or bounds");
}

void yield(State state, Place place) {
  Thread& t = threads[current];
  t.state = state;
  t.place = place;
  if (_setjmp(t.resume) == 0) _longjmp(scheduler, 1);
}

// A fibre runs its thread of one block after the other.
void fibre() {
  for (;;) {
    (*body)();
    if (!threads[current].copies.empty()) fail("a thread leaves with copies under way");
    yield(State::done, {});
  }
}

void resume(int index) {
  Thread& t = threads[index];
  const unsigned in_block = unsigned(index % block_threads);
  current = index;
  threadIdx = {in_block % blockDim.x, in_block / blockDim.x, 0};
  if (_setjmp(scheduler) != 0) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp =
      stacks[index / kMostThreads] + size_t(index % kMostThreads) * kStack + kPage;
  t.start.uc_stack.ss_size = kStack - kPage;
  t.start.uc_link = nullptr;
  makecontext(&t.start, fibre, 0);
  setcontext(&t.start);
}

Thread* block_of(int rank) {
  return threads + rank * block_threads;
}

// Lets warps of the running block go on whose lanes have all met, of threads [begin, end). Returns
// whether there were any.
bool release_warps(int begin, int end) {
  Thread* const block = block_of(rank_now);
  bool released = false;
  for (int i = begin; i < end; ++i) {
    if (block[i].state != State::at_warp) continue;
    const int first = i / 32 * 32;
    const unsigned mask = block[i].mask;
    bool complete = mask >> (i - first) & 1;
    for (int lane = 0; lane < 32 && complete; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= block_threads) {
        current = int(block + i - threads);
        fail("a warp's mask names lanes that the block does not have, at " +
             text_of(block[i].place));
      }
      const Thread& other = block[first + lane];
      complete =
          other.state == State::at_warp && other.mask == mask && same(other.place, block[i].place);
    }
    if (!complete) continue;
    if (block[i].together) {
      void* arguments[32];
      for (int lane = 0; lane < 32; ++lane) {
        arguments[lane] = reinterpret_cast<void*>(block[first + lane].value);
      }
      current = int(block + i - threads);
      block[i].together(arguments);
    }
    uint64_t values[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) values[lane] = block[first + lane].value;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      memcpy(block[first + lane].received, values, sizeof(values));
      block[first + lane].state = State::ready;
    }
    released = true;
  }
  return released;
}

bool release_barrier() {
  Thread* const block = block_of(rank_now);
  block_condition = false;
  for (int i = 0; i < block_threads; ++i) {
    if (block[i].state != State::at_barrier || !same(block[i].place, block[0].place)) return false;
    block_condition |= block[i].condition;
  }
  for (int i = 0; i < block_threads; ++i) block[i].state = State::ready;
  return true;
}

// Lets those threads of the running block go on that wait at the cluster's barrier, once all
// threads of the cluster have arrived at it. Returns whether there were any.
bool release_cluster() {
  Thread *const block = block_of(rank_now), *const block_end = block + block_threads;
  const auto waits = [](const Thread& t) { return t.state == State::at_cluster; };
  const Thread* const first = std::find_if(block, block_end, waits);
  if (first == block_end) return false;
  const auto arrived = [first](const Thread& t) {
    return t.arrivals > first->waits ||
           (t.arrivals == first->waits && same(t.arrival, first->arrival));
  };
  if (!std::all_of(threads, block_of(cluster_blocks), arrived)) return false;
  for (Thread* t = block; t < block_end; ++t) {
    if (waits(*t)) t->state = State::ready;
  }
  return true;
}

[[noreturn]] void fail_stuck() {
  std::set<std::string> places;
  for (int i = 0; i < cluster_blocks * block_threads; ++i) {
    current = i;
    const std::string place = text_of(threads[i].place);
    switch (threads[i].state) {
      case State::at_barrier:
        places.insert("some wait at the barrier in " + place);
        break;
      case State::at_cluster:
        places.insert("some wait at the cluster's barrier in " + place);
        break;
      case State::done:
        places.insert("some have left the kernel");
        break;
      default:
        places.insert("some wait for their warp in " + place);
    }
  }
  std::string what = "threads diverge:";
  for (const std::string& place : places) what += " " + place + ";";
  fail(what);
}

std::vector<int> in_order(int n) {
  std::vector<int> indices(n);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == reverse) std::reverse(indices.begin(), indices.end());
  if (order == shuffled) std::shuffle(indices.begin(), indices.end(), generator);
  return indices;
}

uint3 block_index(int block) {
  const unsigned b = unsigned(block);
  return {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
}

// Makes a block the one that runs: its shared memory is where the kernel looks for it.
void enter(int rank, int first_block) {
  blockIdx = block_index(first_block + rank);
  if (rank == rank_now) return;
  memcpy(stored_shared[rank_now].data(), shared_bytes, block_shared + kSharedGuard);
  memcpy(shared_bytes, stored_shared[rank].data(), block_shared + kSharedGuard);
  rank_now = rank;
}

// Runs threads [begin, end) of the block, whole warps, until none gets further without others.
// Returns whether any did.
bool run_threads(int begin, int end) {
  bool ran = false;
  do {
    for (int i : in_order(end - begin)) {
      const int index = rank_now * block_threads + begin + i;
      if (threads[index].state != State::ready) continue;
      resume(index);
      ran = true;
    }
  } while (release_warps(begin, end));
  return ran;
}

// Runs the block's threads until none gets further without another block. Returns whether any did.
bool run_block() {
  const int at_once = order == shuffled ? block_threads : 32;
  bool ran = false;
  do {
    for (int part : in_order((block_threads + at_once - 1) / at_once)) {
      const int begin = part * at_once;
      ran |= run_threads(begin, std::min(begin + at_once, block_threads));
    }
  } while (release_barrier() || release_cluster());
  return ran;
}

void run_cluster(int first_block) {
  const int count = cluster_blocks * block_threads;
  const size_t bytes = block_shared + kSharedGuard;
  memset(shared_bytes, kPoison, bytes);
  rank_now = 0;
  for (auto& stored : stored_shared) stored.assign(cluster_blocks > 1 ? bytes : 0, kPoison);
  for (Thread* t = threads; t < threads + count; ++t) {
    t->state = State::ready;
    t->copies.clear();
    t->groups = t->arrivals = t->waits = 0;
  }
  const auto done = [](const Thread& t) { return t.state == State::done; };
  while (!std::all_of(threads, threads + count, done)) {
    bool ran = false;
    for (int rank : in_order(cluster_blocks)) {
      enter(rank, first_block);
      ran |= run_block();
    }
    if (!ran) fail_stuck();
  }
  for (int rank = 0; rank < cluster_blocks; ++rank) {
    enter(rank, first_block);
    for (size_t i = block_shared; i < bytes; ++i) {
      if (shared_bytes[i] != kPoison) fail("write past the block's shared memory");
    }
  }
}

void make_stacks(int blocks) {
  for (int block = 0; block < blocks; ++block) {
    if (stacks[block]) continue;
    stacks[block] =
        static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < kMostThreads; ++i) {
      mprotect(stacks[block] + size_t(i) * kStack, kPage, PROT_NONE);
    }
  }
}

}  // namespace

namespace cuda_shim {

void wait_for_block(Place place) {
  threads[current].condition = false;
  yield(State::at_barrier, place);
}

bool block_or(bool condition, Place place) {
  threads[current].condition = condition;
  yield(State::at_barrier, place);
  return block_condition;
}

const uint64_t* wait_for_warp(unsigned mask, uint64_t value, Place place) {
  const int self = current;
  threads[self].mask = mask;
  threads[self].value = value;
  threads[self].together = nullptr;
  yield(State::at_warp, place);
  return threads[self].received;
}

void meet(void* argument, void (*together)(void* const* arguments), Place place) {
  threads[current].mask = 0xffffffffu;
  threads[current].value = reinterpret_cast<uint64_t>(argument);
  threads[current].together = together;
  yield(State::at_warp, place);
}

uint32_t shared_address(const void* shared) {
  return uint32_t(static_cast<const unsigned char*>(shared) - shared_bytes);
}

unsigned char* shared_place(uint32_t address, size_t bytes, Place place) {
  if (address % 16 != 0) fault("shared memory that is not aligned to 16 bytes", place);
  if (address + bytes > block_shared) fault("access past the block's shared memory", place);
  return shared_bytes + address;
}

void copy_async(uint32_t to, const void* from, bool exists) {
  const Place place{__FILE__, __LINE__};
  unsigned char* const target = shared_place(to, 16, place);
  if (exists && reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fault("a copy from memory that is not aligned to 16 bytes", place);
  }
  memset(target, kPoison, 16);
  threads[current].copies.push_back({target, from, exists, threads[current].groups});
}

void commit_copies() {
  ++threads[current].groups;
}

void wait_for_copies(int under_way) {
  std::vector<Copy>& copies = threads[current].copies;
  const int end = threads[current].groups - under_way;
  for (const Copy& copy : copies) {
    if (copy.group >= end) continue;
    if (copy.exists) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [end](const Copy& copy) { return copy.group < end; }),
               copies.end());
}

void fault(const char* what, Place place) {
  fail(what + (" at " + text_of(place)));
}

int cluster_rank() {
  return rank_now;
}

void arrive_at_cluster(Place place) {
  Thread& t = threads[current];
  if (t.arrivals++ != t.waits) fault("a second arrival at the cluster's barrier", place);
  t.arrival = place;
  // Other blocks may get further now, while this one has not begun what it does before it waits.
  yield(State::ready, place);
}

void wait_for_cluster(Place place) {
  Thread& t = threads[current];
  if (++t.waits != t.arrivals) fault("a wait without arrival at the cluster's barrier", place);
  yield(State::at_cluster, place);
}

void* shared_of_rank(void* shared, int rank, Place place) {
  const size_t offset = size_t(static_cast<unsigned char*>(shared) - shared_bytes);
  if (offset >= block_shared) fault("an address that is not in the block's shared memory", place);
  if (rank < 0 || rank >= cluster_blocks) fault("a block that the cluster does not have", place);
  if (rank == rank_now) return shared;
  if (threads[current].waits == 0) fault("shared memory of a block that may not run yet", place);
  const Thread* const block = block_of(rank);
  if (std::any_of(block, block + block_threads,
                  [](const Thread& t) { return t.state == State::done; })) {
    fault("shared memory of a block that may have left", place);
  }
  return stored_shared[rank].data() + offset;
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (refuse_attributes || bytes > shared_limit) return failed(cudaErrorInvalidValue);
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, int cluster, size_t shared,
                const std::function<void()>& kernel_body) {
  const int count = int(block.x * block.y * block.z), blocks = int(grid.x * grid.y * grid.z);
  const size_t allowed = allowed_shared.count(kernel) ? size_t(allowed_shared[kernel]) : 48 * 1024;
  launches += name_of(kernel) + "\t" + std::to_string(blocks) + "\t" + std::to_string(count) +
              "\t" + std::to_string(shared) + "\t" + std::to_string(allowed) + "\t" +
              std::to_string(cluster) + "\n";
  if (!error.empty() || count == 0 || count > kMostThreads || shared > allowed ||
      shared > size_t(shared_limit) || cluster < 1 || cluster > most_blocks ||
      blocks % cluster != 0) {
    if (error.empty()) error = "launch configuration";
    return failed(cudaErrorInvalidConfiguration);
  }
  make_stacks(cluster);
  static unsigned char signal_stack[64 * 1024];
  stack_t alternative{}, stack_before;
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof(signal_stack);
  sigaltstack(&alternative, &stack_before);
  struct sigaction action{}, before[4];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  const int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &before[i]);

  body = &kernel_body;
  blockDim = block;
  gridDim = grid;
  block_threads = count;
  cluster_blocks = cluster;
  block_shared = shared;
  if (sigsetjmp(escape, 1) == 0) {
    for (int c : in_order(blocks / cluster)) run_cluster(c * cluster);
  } else {
    for (Thread& t : threads) t.started = false;  // their stacks are in the middle of something
  }
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return error.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure);
}

}  // namespace cuda_shim

// Limits that are set anew make another device, since launchers may keep what a device has said.
cudaError_t cudaGetDevice(int* device) {
  static std::vector<std::pair<int, int>> devices;
  const std::pair<int, int> now{shared_limit, most_blocks};
  const auto found = std::find(devices.begin(), devices.end(), now);
  *device = int(found - devices.begin());
  if (found == devices.end()) devices.push_back(now);
  return cudaSuccess;
}

// Of the device as it is now.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrClusterLaunch ? most_blocks > 1 : shared_limit;
  return cudaSuccess;
}

namespace cuda_shim {
int active_clusters(const cudaLaunchConfig_t& config) {
  ++cluster_questions;
  return int(config.attrs[0].val.clusterDim.x) <= most_blocks;
}
}  // namespace cuda_shim

cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

extern "C" {

// Forgets the last fault and chooses the order of threads and blocks: 0 forward, 1 reverse, 2
// shuffled anew at every wait.
void cuda_shim_reset(int thread_order, unsigned seed) {
  error.clear();
  order = Order(thread_order);
  generator.seed(seed);
}

// Sets the bytes of shared memory that a block may have, at most those of the largest GPU.
void cuda_shim_limit_shared(int bytes) {
  shared_limit = std::min(bytes, int(kSharedMost));
}

// Sets how many blocks a cluster may have; 1 is a GPU without clusters.
void cuda_shim_limit_clusters(int blocks) {
  most_blocks = std::min(blocks, kMostBlocks);
}

// How often a launcher has asked how many clusters run at a time.
int cuda_shim_cluster_questions() {
  return cluster_questions;
}

// Whether to let no kernel have more shared memory than it gets without asking.
void cuda_shim_refuse_attributes(int refuse) {
  refuse_attributes = refuse;
}

int cuda_shim_last_error() {
  return last_error;
}

const char* cuda_shim_error() {
  return error.c_str();
}

// Lines of kernel, blocks, threads, bytes of shared memory, how many of these the kernel may have,
// and the blocks of a cluster, for every launch so far.
const char* cuda_shim_launches() {
  return launches.c_str();
}

// `bytes` that hold NaN and end where a page without access begins.
void* cuda_shim_allocate(size_t bytes) {
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  auto* base = static_cast<unsigned char*>(
      mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(base + kPage, pages, PROT_READ | PROT_WRITE);
  memset(base + kPage, kPoison, pages);
  return base + kPage + pages - bytes;
}

// Returns whether something was written in front of the array.
int cuda_shim_free(void* array, size_t bytes) {
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  auto* end = static_cast<unsigned char*>(array) + bytes;
  const bool damaged = std::any_of(end - pages, static_cast<unsigned char*>(array),
                                   [](unsigned char c) { return c != kPoison; });
  munmap(end - pages - kPage, pages + 2 * kPage);
  return damaged;
}

}  // extern "C"
