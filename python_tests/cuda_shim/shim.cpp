// Runs kernels on the CPU, block after block, and looks for what a GPU would not report.
//
// A fault ends the launch, which then returns cudaErrorLaunchFailure; cuda_shim_error() says what
// and where. Found are: threads that wait at different places or for threads that have left; memory
// faults next to arrays from cuda_shim_allocate(), misaligned accesses and integer overflow (the
// sources are built with trapping undefined-behaviour checks); writes past the block's shared
// memory. Shared memory and fresh arrays hold NaN, so what is read before it is written shows in
// the results; so does a missing barrier, because results then change with the order of threads.
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

constexpr int kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024, kPage = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type, -1 in the integers

enum class State { ready, at_barrier, at_warp, done };
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
  bool started;                              // whether `resume` holds a point to go on from
  jmp_buf resume;
  ucontext_t start;
};

Thread threads[kMostThreads];
int current;
size_t block_shared;  // bytes that the block has
bool block_condition;
jmp_buf scheduler;
sigjmp_buf escape;
unsigned char* stacks;
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
  error =
      what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
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

void resume(int index, unsigned block_threads_x) {
  Thread& t = threads[index];
  current = index;
  threadIdx = {unsigned(index) % block_threads_x, unsigned(index) / block_threads_x, 0};
  if (_setjmp(scheduler) != 0) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = stacks + size_t(index) * kStack + kPage;
  t.start.uc_stack.ss_size = kStack - kPage;
  t.start.uc_link = nullptr;
  makecontext(&t.start, fibre, 0);
  setcontext(&t.start);
}

// Lets warps go on whose lanes have all met. Returns whether there were any.
bool release_warps(int count) {
  bool released = false;
  for (int i = 0; i < count; ++i) {
    if (threads[i].state != State::at_warp) continue;
    const int first = i / 32 * 32;
    const unsigned mask = threads[i].mask;
    bool complete = mask >> (i - first) & 1;
    for (int lane = 0; lane < 32 && complete; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= count) {
        current = i;
        fail("a warp's mask names lanes that the block does not have, at " +
             text_of(threads[i].place));
      }
      const Thread& other = threads[first + lane];
      complete = other.state == State::at_warp && other.mask == mask &&
                 same(other.place, threads[i].place);
    }
    if (!complete) continue;
    if (threads[i].together) {
      void* arguments[32];
      for (int lane = 0; lane < 32; ++lane) {
        arguments[lane] = reinterpret_cast<void*>(threads[first + lane].value);
      }
      current = i;
      threads[i].together(arguments);
    }
    uint64_t values[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) values[lane] = threads[first + lane].value;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      memcpy(threads[first + lane].received, values, sizeof(values));
      threads[first + lane].state = State::ready;
    }
    released = true;
  }
  return released;
}

bool release_barrier(int count) {
  block_condition = false;
  for (int i = 0; i < count; ++i) {
    if (threads[i].state != State::at_barrier || !same(threads[i].place, threads[0].place)) {
      return false;
    }
    block_condition |= threads[i].condition;
  }
  for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  return true;
}

[[noreturn]] void fail_stuck(int count) {
  std::set<std::string> places;
  for (int i = 0; i < count; ++i) {
    current = i;
    places.insert(threads[i].state == State::done
                      ? "some have left the kernel"
                      : (threads[i].state == State::at_barrier ? "some wait at the barrier in "
                                                               : "some wait for their warp in ") +
                            text_of(threads[i].place));
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

void run_block(int count, unsigned block_threads_x, size_t shared) {
  memset(shared_bytes, kPoison, std::min(shared + kSharedGuard, sizeof(shared_bytes)));
  block_shared = shared;
  for (int i = 0; i < count; ++i) {
    threads[i].state = State::ready;
    threads[i].copies.clear();
    threads[i].groups = 0;
  }
  for (;;) {
    for (int i : in_order(count)) {
      if (threads[i].state == State::ready) resume(i, block_threads_x);
    }
    const auto done = [](const Thread& t) { return t.state == State::done; };
    if (std::all_of(threads, threads + count, done)) break;
    if (!release_warps(count) && !release_barrier(count)) fail_stuck(count);
  }
  for (size_t i = shared; i < shared + kSharedGuard; ++i) {
    if (shared_bytes[i] != kPoison) fail("write past the block's shared memory");
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

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (refuse_attributes || bytes > shared_limit) return failed(cudaErrorInvalidValue);
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared,
                const std::function<void()>& kernel_body) {
  const int count = int(block.x * block.y * block.z);
  const size_t allowed = allowed_shared.count(kernel) ? size_t(allowed_shared[kernel]) : 48 * 1024;
  launches += name_of(kernel) + "\t" + std::to_string(uint64_t(grid.x) * grid.y * grid.z) + "\t" +
              std::to_string(count) + "\t" + std::to_string(shared) + "\t" +
              std::to_string(allowed) + "\n";
  if (!error.empty() || count == 0 || count > kMostThreads || shared > allowed ||
      shared > size_t(shared_limit)) {
    if (error.empty()) error = "launch configuration";
    return failed(cudaErrorInvalidConfiguration);
  }
  if (!stacks) {
    stacks =
        static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < kMostThreads; ++i) mprotect(stacks + size_t(i) * kStack, kPage, PROT_NONE);
  }
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
  if (sigsetjmp(escape, 1) == 0) {
    for (int b : in_order(int(grid.x * grid.y * grid.z))) {
      blockIdx = {unsigned(b) % grid.x, unsigned(b) / grid.x % grid.y,
                  unsigned(b) / grid.x / grid.y};
      run_block(count, block.x, shared);
    }
  } else {
    for (Thread& t : threads) t.started = false;  // their stacks are in the middle of something
  }
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return error.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure);
}

}  // namespace cuda_shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shared_limit;
  return cudaSuccess;
}

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

// Lines of kernel, blocks, threads, bytes of shared memory, and how many of these the kernel may
// have, for every launch so far.
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
