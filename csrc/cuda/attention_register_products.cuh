// AttentionProducts without matrix units (attention_products.cuh): for any type and any GPU.
#pragma once

#include "attention_tiles.cuh"

namespace ember {
namespace cuda {

// Sums in registers, 4 x 4 to a thread, over operands staged in shared memory.
template <typename T, bool spare>
struct RegisterProducts {
  using C = compute_t<T>;
  static constexpr int kElements = WidestPack<T>::kElements;
  // Terms of a product that are staged at once, for both operands or, twice as many, for one.
  static constexpr int kDepth = sizeof(C) == 8 ? 16 : 32;
  static constexpr int kStride = kTile + 16 / int(sizeof(C));  // keeps rows 16-byte aligned
  static constexpr size_t kBytes = (kTile + 2 * kDepth) * kStride * sizeof(C);
  // Blocks that share a multiprocessor.
  static constexpr int kBlocks = sizeof(C) == 8 ? 1 : kMostBlocks;

  struct Result {
    C values[kPatch][kPatch] = {};
  };

  C* tile;   // transposed, [kTile, kStride]
  C* stage;  // [2 * kDepth, kStride]

  __device__ __forceinline__ RegisterProducts()
      : tile(shared_memory<C>()), stage(tile + kTile * kStride) {}

  // sums = the products of rows [a_first, + kTile) of a with rows [b_first, + kTile) of b.
  __device__ __forceinline__ void rows(const AttentionRows<T>& a, int a_first,
                                       const AttentionRows<T>& b, int b_first,
                                       C (&sums)[kPatch][kPatch]) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) sums[r][c] = 0;
    }
    const int thread = in_place(int(threadIdx.x));  // the registers are for the sums
    // Other methods count on the loop's barriers.
    if (a.size == 0) __syncthreads();
    for (int first = 0; first < a.size; first += kDepth) {
      __syncthreads();
      stage_transposed(a, a_first, first, stage, thread);
      stage_transposed(b, b_first, first, stage + kDepth * kStride, thread);
      __syncthreads();
      multiply<kDepth>(stage, stage + kDepth * kStride, sums);
    }
  }

  // Nothing has to be scaled here; matrix units may want it.
  static __device__ __forceinline__ AttentionScale<C> scale_for(C) { return {}; }
  static __device__ __forceinline__ void scale_rows(C (&)[kPatch][kPatch], C*, C (&units)[kPatch]) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) units[r] = 1;
  }
  __device__ __forceinline__ void add_scaled_rows(const AttentionRows<T>& b, int first, int column,
                                                  const C*, Result& sums) {
    add_tile(b, first, column, sums);
  }

  // A value as the tile holds it.
  static __device__ __forceinline__ C rounded(C value) { return value; }

  // tile = the threads' patches. It must no longer be in use; add_tile() waits before it reads.
  __device__ __forceinline__ void store(const C (&values)[kPatch][kPatch]) {
#pragma unroll
    for (int c = 0; c < kPatch; ++c) {
      Pack<C, kPatch> column;
#pragma unroll
      for (int r = 0; r < kPatch; ++r) column.values[r] = values[r][c];
      *reinterpret_cast<Pack<C, kPatch>*>(tile + (patch_column() + c) * kStride + patch_row()) =
          column;
    }
  }

  // The same for values of any size, whose product add_tile<true>() adds.
  __device__ __forceinline__ void store_scaled(C (&values)[kPatch][kPatch]) { store(values); }

  // sums += the tile times columns [column, + kTile) of rows [first, + kTile) of b.
  template <bool scaled = false>
  __device__ __forceinline__ void add_tile(const AttentionRows<T>& b, int first, int column,
                                           Result& sums) {
    constexpr int kSlice = 2 * kDepth;
    for (int slice = 0; slice < kTile; slice += kSlice) {
      __syncthreads();
      const bool packed = b.packed();
#pragma unroll 1
      for (int i = int(threadIdx.x); i < kSlice * kTile / kElements; i += kAttentionThreads) {
        const int k = i / (kTile / kElements), c = i % (kTile / kElements) * kElements;
        const WidestPack<T> pack = b.pack(first + slice + k, column + c, packed);
        Pack<C, kElements> values;
#pragma unroll
        for (int n = 0; n < kElements; ++n) values.values[n] = widen(pack.values[n]);
        *reinterpret_cast<Pack<C, kElements>*>(stage + k * kStride + c) = values;
      }
      __syncthreads();
      multiply<kSlice>(tile + slice * kStride, stage, sums.values);
    }
  }

  // store_scaled() and add_tile<true>(), in parts if the tile would round the values.
  __device__ __forceinline__ void add_in_parts(C (&values)[kPatch][kPatch],
                                               const AttentionRows<T>& b, int first, int column,
                                               Result& sums) {
    store_scaled(values);
    add_tile<true>(b, first, column, sums);
  }

  // The thread's patch of a result.
  __device__ __forceinline__ void read(const Result& sums, C (&values)[kPatch][kPatch]) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
#pragma unroll
      for (int c = 0; c < kPatch; ++c) values[r][c] = sums.values[r][c];
    }
  }

 private:
  // Stages kDepth terms of rows [first, + kTile), transposed. Pairs of threads share a row: what
  // they read at once is a sector of memory, and what a warp stores goes to different banks.
  static __device__ __forceinline__ void stage_transposed(const AttentionRows<T>& rows, int first,
                                                          int term, C* to, int thread) {
    const bool packed = rows.packed();
    if constexpr (!spare) {
      constexpr int kPacks = kDepth / kElements;
#pragma unroll 1
      for (int i = int(threadIdx.x); i < kTile * kPacks; i += kAttentionThreads) {
        const int row = i / 2 % kTile, k = (i / (2 * kTile) * 2 + i % 2) * kElements;
        store_column(rows.pack(first + row, term + k, packed), to + k * kStride + row);
      }
      return;
    }
    constexpr int kAtOnce = kAttentionThreads / kTile * kElements;  // terms of a row
    constexpr int kTurns = kDepth / kAtOnce;
    static_assert(kDepth % kAtOnce == 0 && kAttentionThreads % (2 * kTile) == 0,
                  "a thread stays in its row");
    const int row = thread / 2 % kTile, k = (thread / (2 * kTile) * 2 + thread % 2) * kElements;
    first += row;
    term += k;
    to += k * kStride + row;
    // Most tiles lie wholly inside the matrix.
    if (packed && first < rows.count && term + kDepth - kAtOnce + kElements <= rows.size) {
      const T* from = rows.data + first * rows.stride + term;
#pragma unroll
      for (int n = 0; n < kTurns; ++n) {
        const WidestPack<T> pack = *reinterpret_cast<const WidestPack<T>*>(from + n * kAtOnce);
        store_column(pack, to + n * kAtOnce * kStride);
      }
      return;
    }
#pragma unroll 1
    for (int n = 0; n < kTurns; ++n) {
      store_column(rows.pack(first, term, packed), to);
      term += kAtOnce;
      to += kAtOnce * kStride;
    }
  }

  static __device__ __forceinline__ void store_column(const WidestPack<T>& pack, C* to) {
#pragma unroll
    for (int n = 0; n < kElements; ++n) to[n * kStride] = widen(pack.values[n]);
  }

  // sums += a^T b for the thread's patch; a and b are [depth, kStride] in shared memory.
  template <int depth>
  static __device__ __forceinline__ void multiply(const C* a, const C* b,
                                                  C (&sums)[kPatch][kPatch]) {
    int thread = int(threadIdx.x);
    if (!spare) thread = in_place(thread);  // the registers are for the sums
    a += thread / kAcross * kPatch;
    b += thread % kAcross * kPatch;
    // Terms that share one step of the addresses, as many as there are registers for.
    constexpr int kUnroll = spare ? 8 : 4;
#pragma unroll kUnroll
    for (int k = 0; k < depth; ++k) {
      const Pack<C, kPatch> left = *reinterpret_cast<const Pack<C, kPatch>*>(a + k * kStride);
      const Pack<C, kPatch> right = *reinterpret_cast<const Pack<C, kPatch>*>(b + k * kStride);
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) sums[r][c] += left.values[r] * right.values[c];
      }
    }
  }
};

}  // namespace cuda
}  // namespace ember
