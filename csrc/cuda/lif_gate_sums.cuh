// Sums of parameter gradients: those of a block, and over blocks.
#pragma once

#include "launch.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

// Adds up the teams' sums of a strip's columns and leaves the block's, [3, units], at `partial`.
template <typename Strip, typename C, int n>
__device__ __forceinline__ void store_column_sums(const Team<C>& team, const Strip& strip,
                                                  C (&sums)[3][n], int limit, int64_t units,
                                                  C* partial) {
  const bool alone = team.count() == 1;
  const int warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      for (int offset = kWarp / 2; offset >= team.size; offset /= 2) {
        sums[k][i] += __shfl_xor_sync(kAllLanes, sums[k][i], offset);
      }
      const int column = strip.column(i);
      if (!alone) {
        if (int(threadIdx.x) % kWarp < team.size) {
          team.exchange[(warp * 3 + k) * strip.cols + column] = sums[k][i];
        }
      } else if (column < limit) {
        partial[k * units + column] = sums[k][i];
      }
    }
  }
  if (alone) return;
  __syncthreads();
  const int values = 3 * strip.cols, warps = int(blockDim.x) / kWarp;
  for (int value = int(threadIdx.x); value < values; value += int(blockDim.x)) {
    const int k = value / strip.cols, column = value % strip.cols;
    if (column >= limit) continue;
    C sum = team.exchange[value];
    for (int w = 1; w < warps; ++w) sum += team.exchange[w * values + value];
    partial[k * units + column] = sum;
  }
  __syncthreads();
}

// Adds the partial sums [outer, count, inner] over outer and inner, `slices` threads to an output.
// Where inner is 1, neighbouring threads should read neighbouring outputs, so thread t of a block
// works on output t % outputs.
template <typename C>
__global__ void __launch_bounds__(kLifGateSumThreads)
    lif_gate_sum_kernel(const C* partial, int64_t outer, int64_t count, int64_t inner, int slices,
                        C* out) {
  double* sums = shared_memory<double>();
  const int outputs = int(blockDim.x) / slices, slice = int(threadIdx.x) / outputs;
  const int64_t output = int64_t(blockIdx.x) * outputs + int(threadIdx.x) % outputs;
  double sum = 0;
  if (output < count) {
    // Term o * inner + i; the next is `slices` further, which takes no division.
    const int64_t steps = slices / inner, rest = slices % inner;
    int64_t o = slice / inner, i = slice % inner;
    while (o < outer) {
      // Loads in flight together; what is past the end adds 0.
      C terms[4] = {};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (o < outer) terms[n] = partial[(o * count + output) * inner + i];
        o += steps;
        i += rest;
        if (i >= inner) {
          i -= inner;
          ++o;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) sum += terms[n];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) sums[threadIdx.x] += sums[int(threadIdx.x) + half * outputs];
  }
  if (slice == 0 && output < count) out[output] = C(sums[threadIdx.x]);
}

}  // namespace cuda
}  // namespace ember
