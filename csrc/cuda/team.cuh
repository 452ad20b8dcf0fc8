// Sums over a team: the threads of a block, a power of two in number, that share a row.
#pragma once

#include "launch.cuh"

namespace ember {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <typename C>
  static __device__ __forceinline__ C of(C a, C b) {
    return a + b;
  }
};
struct Maximum {
  template <typename C>
  static __device__ __forceinline__ C of(C a, C b) {
    return a > b ? a : b;
  }
};

// A block is teams of `size` consecutive threads; all of the block's threads must make each call
// together. `exchange` is shared memory for 3 values of every warp; teams of up to a warp leave it
// alone.
template <typename C>
struct Team {
  int size;
  C* exchange;

  __device__ __forceinline__ int lane() const { return int(threadIdx.x) & (size - 1); }
  __device__ __forceinline__ int index() const { return int(threadIdx.x) / size; }
  __device__ __forceinline__ int count() const { return int(blockDim.x) / size; }

  // Replaces every value by its combination over the team, the same bits in all threads.
  template <typename Operation, int n>
  __device__ __forceinline__ void reduce(C (&values)[n]) const {
    static_assert(n <= 3, "`exchange` holds three values of a warp");
    for (int offset = (size < kWarp ? size : kWarp) / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        values[i] = Operation::of(values[i], __shfl_xor_sync(kAllLanes, values[i], offset));
      }
    }
    if (size <= kWarp) return;
    const int warp = int(threadIdx.x) / kWarp, warps = size / kWarp, first = index() * warps;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) exchange[warp * n + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      C total = exchange[first * n + i];
      for (int w = 1; w < warps; ++w) total = Operation::of(total, exchange[(first + w) * n + i]);
      values[i] = total;
    }
    __syncthreads();
  }
};

}  // namespace cuda
}  // namespace ember
