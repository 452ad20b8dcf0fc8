// What lif_gate_rows.cuh shares a row out by: the team of threads that holds it, the sums over the
// team, and the ring in shared memory that brings the rows to come.
#pragma once

#include "lif_gate_norms.cuh"
#include "lif_gate_sums.cuh"

namespace ember {
namespace cuda {

// Columns of a thread. Backward has three sums and four parameters of each in registers.
constexpr int kLifGateForwardColumns = 16, kLifGateBackwardColumns = 8;
constexpr int kLifGateRowStages = 3;
// Of a block. More would not leave a GPU of 64 KiB of shared memory room for the rows to come.
template <typename T>
constexpr int kLifGateRowThreads = sizeof(T) == 2 ? 512 : 256;

// A vector in fp32.
template <typename T, int n>
__device__ __forceinline__ void widen_all(const Pack<T, n>& from, float (&to)[n]) {
  if constexpr (std::is_same<T, bfloat16>::value) {
    // One instruction for each: the compiler's way takes two for the upper of a pair.
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      uint32_t pair;
      memcpy(&pair, &from.values[i], sizeof(pair));
      to[i] = bit_cast<float>(pair << 16);
      to[i + 1] = bit_cast<float>(pair & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = widen(from.values[i]);
  }
}

// A block has threads / team rows at once, and works on that many `rounds` times.
struct LifGateRowsPlan {
  int team;  // a power of two up to a warp, or the block's warps
  int threads, rounds;
  int64_t row_blocks;
};

template <typename T>
using LifGateVector = Pack<T, 16 / int(sizeof(T))>;

// Of each warp: four values of a row and of that before it.
constexpr int kLifGateExchange = 2 * 4;

// Bytes of shared memory: what teams exchange, and rows of `arrays` matrices.
template <typename T>
__host__ __device__ constexpr size_t lif_gate_rows_shared(int threads, int columns, int arrays) {
  return size_t(threads / kWarp) * (kLifGateExchange + 4) * sizeof(float) +
         size_t(threads) * kLifGateRowStages * columns * arrays * sizeof(T);
}

struct LifGateRowTeam : Team<float> {
  __device__ __forceinline__ int lane() const {
    return size > kWarp ? int(threadIdx.x) : int(threadIdx.x) & (size - 1);
  }

  // As Team's, of which the loops over warps, unrolled, take more registers than there are.
  template <typename Operation, int n>
  __device__ __forceinline__ void reduce(float (&values)[n]) const {
    Team<float>{size < kWarp ? size : kWarp, nullptr}.template reduce<Operation>(values);
    if (size <= kWarp) return;
    const int warps = size / kWarp;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (threadIdx.x % kWarp == 0) exchange[int(threadIdx.x) / kWarp] = values[i];
      __syncthreads();
      values[i] = exchange[0];
#pragma unroll 1
      for (int w = 1; w < warps; ++w) values[i] = Operation::of(values[i], exchange[w]);
      __syncthreads();
    }
  }

  // Replaces every value by its sum over the team, the same bits in all threads. Calls take turns
  // with the halves of `turns`, so that one barrier is enough.
  template <int n>
  __device__ __forceinline__ void sum(float (&values)[n], float* turns, bool odd) const {
    static_assert(n == 2 || n == 3, "one for each fourth of a warp");
    if (size <= kWarp) {
      Team<float>::reduce<Sum>(values);
      return;
    }
    const int lane = int(threadIdx.x) % kWarp, warps = size / kWarp;
    // Halves of the warp keep different values, and halves of these.
    const bool upper = lane & 16, second = lane & 8;
    float mine[2] = {upper ? (n == 3 ? values[n - 1] : values[1]) : values[0],
                     upper ? 0.0f : values[1]};
    mine[0] += __shfl_xor_sync(kAllLanes, upper ? values[0] : values[n - 1], 16);
    float sum = mine[0];
    if (n == 3) {
      mine[1] += __shfl_xor_sync(kAllLanes, upper ? values[1] : 0.0f, 16);
      sum = second ? mine[1] : mine[0];
      sum += __shfl_xor_sync(kAllLanes, second ? mine[0] : mine[1], 8);
    } else {
      sum += __shfl_xor_sync(kAllLanes, sum, 8);
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    float* const half = turns + (odd ? 4 * warps : 0);
    // Lanes 0, 8 and 16 have the first, second and third of three, 0 and 16 those of two.
    if (lane % 8 == 0) {
      half[int(threadIdx.x) / kWarp * 4 +
           (n == 3 ? (lane >> 4) * 2 + (lane >> 3 & 1) : lane >> 4)] = sum;
    }
    __syncthreads();
    const auto* all = reinterpret_cast<const Pack<float, 4>*>(half);
    Pack<float, 4> total = all[0];
#pragma unroll 2
    for (int w = 1; w < warps; ++w) {
      const Pack<float, 4> of = all[w];
#pragma unroll
      for (int i = 0; i < n; ++i) total.values[i] += of.values[i];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = total.values[i];
  }
};

// Where a thread works, and the rows of `arrays` matrices that it has asked for.
template <typename T, int columns, int arrays>
struct LifGateRows {
  static constexpr int kWidth = LifGateVector<T>::kElements;
  static constexpr int kVectors = columns / kWidth;

  LifGateRowTeam team;
  float* turns;
  LifGateVector<T>* ring;  // [stage, array, vector, threads], from this thread on
  int cols, lane;
  int64_t row, step;  // the thread's row, and elements between its rows
  int rows, rounds;   // those of the team, and those that the block goes through

  __device__ __forceinline__ LifGateRows(const LifGateParams& p, const LifGateRowsPlan& plan) {
    const int warps = plan.threads / kWarp, teams = plan.threads / plan.team;
    turns = shared_memory<float>();
    team.size = plan.team;
    team.exchange = turns + warps * kLifGateExchange;
    ring =
        reinterpret_cast<LifGateVector<T>*>(turns + warps * (kLifGateExchange + 4)) + threadIdx.x;
    cols = int(p.cols);
    lane = team.lane();
    step = teams * p.cols;
    const int64_t first = int64_t(blockIdx.x) * plan.rounds * teams;
    row = first + (plan.team > kWarp ? 0 : team.index());
    const auto rounds_from = [&](int64_t at) {
      return int(max(int64_t(0), min(int64_t(plan.rounds), (p.rows - at + teams - 1) / teams)));
    };
    rows = rounds_from(row);
    rounds = rounds_from(first);
  }

  __device__ __forceinline__ int column(int v) const { return (v * team.size + lane) * kWidth; }
  __device__ __forceinline__ bool has(int v) const { return column(v) < cols; }

  // A stage of the ring holds one row. It is named by its first slot.
  static constexpr int kSlots = arrays * kVectors;
  __device__ __forceinline__ int next(int stage) const {
    const int last = (kLifGateRowStages - 1) * kSlots * int(blockDim.x);
    return stage == last ? 0 : stage + kSlots * int(blockDim.x);
  }
  __device__ __forceinline__ int previous(int stage) const {
    const int last = (kLifGateRowStages - 1) * kSlots * int(blockDim.x);
    return stage == 0 ? last : stage - kSlots * int(blockDim.x);
  }
  __device__ __forceinline__ void read(int stage, int array, int v, float (&to)[kWidth]) const {
    widen_all(ring[stage + (array * kVectors + v) * int(blockDim.x)], to);
  }

  // Asks for the thread's part of the row at `offset` of each matrix: zeros where there is none.
  __device__ __forceinline__ void fetch(const T* const (&matrices)[arrays], int64_t offset,
                                        int stage, bool exists) const {
#pragma unroll
    for (int array = 0; array < arrays; ++array) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const bool here = exists && has(v);
        const T* const from = matrices[array] + (offset + column(v));
        LifGateVector<T>& to = ring[stage + (array * kVectors + v) * int(blockDim.x)];
        if constexpr (has_fragments()) {
          copy_async(shared_address(&to), from, here);
        } else {
          to = here ? *reinterpret_cast<const LifGateVector<T>*>(from) : LifGateVector<T>{};
        }
      }
    }
    if constexpr (has_fragments()) commit_copies();
  }
  // Waits for the oldest row that was asked for, or for all.
  __device__ __forceinline__ void wait() const {
    if constexpr (has_fragments()) wait_for_copies<kLifGateRowStages - 1>();
  }
  __device__ __forceinline__ void wait_for_all() const {
    if constexpr (has_fragments()) wait_for_copies<0>();
  }

  // Calls take(done, stage, offset) for each of the block's rounds, where the ring's stage has the
  // row at `offset` of each matrix, and rows to come are on their way.
  template <typename Take>
  __device__ __forceinline__ void walk(const T* const (&matrices)[arrays], const Take& take) const {
    int64_t offset = row * cols;
    int stage = 0;
    for (int n = 0; n < kLifGateRowStages - 1; ++n) {
      fetch(matrices, offset + n * step, stage, n < rows);
      stage = next(stage);
    }
    stage = 0;
    for (int done = 0; done < rounds; ++done) {
      fetch(matrices, offset + (kLifGateRowStages - 1) * step, previous(stage),
            done + kLifGateRowStages - 1 < rows);
      wait();
      take(done, stage, offset);
      offset += step;
      stage = next(stage);
    }
    wait_for_all();
  }

  // Of the thread's columns, 0 where there are none.
  __device__ __forceinline__ void load(const void* from, float (&to)[kVectors][kWidth]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        Pack<float, 4> four{};
        if (has(v)) {
          four = *reinterpret_cast<const Pack<float, 4>*>(static_cast<const float*>(from) +
                                                          column(v) + i);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) to[v][i + n] = four.values[n];
      }
    }
  }

  __device__ __forceinline__ void load_parameters(const LifGateParams& p,
                                                  float (&theta)[kVectors][kWidth],
                                                  float (&leak)[kVectors][kWidth],
                                                  float (&rate)[kVectors][kWidth]) const {
    load(p.threshold, theta);
    load(p.leak, leak);
    load(p.steepness, rate);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (float& value : rate[v]) value = gate_rate(value);
    }
  }

  __device__ __forceinline__ void store(const float (&values)[kWidth], T* row_of, int v) const {
    if (!has(v)) return;
    LifGateVector<T> rounded;
    if constexpr (sizeof(T) == 2 && has_fragments()) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const uint32_t pair = rounded_pair<T>(values[i], values[i + 1]);
        memcpy(&rounded.values[i], &pair, sizeof(pair));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) narrow(values[i], rounded.values[i]);
    }
    *reinterpret_cast<LifGateVector<T>*>(row_of + column(v)) = rounded;
  }

  // Adds up the teams' sums of columns and leaves the block's, [3, units], at `partial`.
  __device__ __forceinline__ void store_sums(float (&sums)[3][kVectors][kWidth], int64_t units,
                                             float* partial) const {
    if (team.size > kWarp) {
#pragma unroll
      for (int k = 0; k < 3; ++k) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < kWidth && has(v); i += 4) {
            Pack<float, 4> four;
#pragma unroll
            for (int n = 0; n < 4; ++n) four.values[n] = sums[k][v][i + n];
            *reinterpret_cast<Pack<float, 4>*>(partial + k * units + column(v) + i) = four;
          }
        }
      }
      return;
    }
    // The sums of warps take the place of the rows, once all have been read.
    __syncthreads();
    Team<float> teams{team.size, reinterpret_cast<float*>(ring - threadIdx.x)};
    const LifGateStrip<float, true, kWidth> strip(team.size, lane);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float of[3][kWidth];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) of[k][i] = sums[k][v][i];
      }
      const int first = v * strip.cols;
      if (first < cols) store_column_sums(teams, strip, of, cols - first, units, partial + first);
    }
  }
};

}  // namespace cuda
}  // namespace ember
