// Tiles of 64 x 64 for the attention kernels: the patch of each of a block's 256 threads, and how
// rows of a matrix in memory come to shared memory.
#pragma once

#include "../common/lif_attention.h"
#include "../common/types.h"
#include "launch.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kAttentionThreads = 256;
constexpr int kTile = 64;  // queries, keys, and columns of a result
constexpr int kPatch = 4;  // of each a thread takes, in 16 x 16 threads
constexpr int kAcross = kTile / kPatch;

__host__ __device__ __forceinline__ int64_t attention_tiles(int64_t n) {
  return ceil_div(n, kTile);
}

// Kernels count tokens and columns in int, which saves registers.
inline bool attention_fits(const LifAttentionParams& p) {
  const int64_t most = 0x7fffffff - 2 * kTile;
  return p.queries <= most && p.keys <= most && p.size <= most && p.queries + p.keys <= most;
}

// The row and the column of the thread's patch. The 16 threads with the same rows are of one warp.
__device__ __forceinline__ int patch_row() {
  return int(threadIdx.x) / kAcross * kPatch;
}
__device__ __forceinline__ int patch_column() {
  return int(threadIdx.x) % kAcross * kPatch;
}

// Combines a value over the 16 threads that share the patch's rows.
template <typename Operation, typename C>
__device__ __forceinline__ C across_columns(C value) {
#pragma unroll
  for (int offset = kAcross / 2; offset > 0; offset /= 2) {
    value = Operation::of(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Rows of a matrix [count, size] in memory; rows and columns past the end read as 0.
template <typename T>
struct AttentionRows {
  const T* data;
  int64_t stride;
  int count, size;

  __device__ __forceinline__ AttentionRows(const AttentionTensor& t, int64_t batch, int64_t head,
                                           int64_t count, int64_t size)
      : data(static_cast<const T*>(t.data) + batch * t.batch + head * t.head),
        stride(t.token),
        count(int(count)),
        size(int(size)) {}

  __device__ __forceinline__ compute_t<T> at(int row, int column) const {
    return row < count && column < size ? widen(data[row * stride + column]) : compute_t<T>(0);
  }

  // Whether every row begins where a pack may be loaded.
  __device__ __forceinline__ bool packed() const {
    return ((reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * int64_t(sizeof(T)))) & 15) == 0;
  }

  // `packed` is packed().
  __device__ __forceinline__ WidestPack<T> pack(int row, int column, bool packed) const {
    WidestPack<T> result;
    if (packed && row < count && column + result.kElements <= size) {
      return *reinterpret_cast<const WidestPack<T>*>(data + row * stride + column);
    }
#pragma unroll
    for (int n = 0; n < result.kElements; ++n) narrow(at(row, column + n), result.values[n]);
    return result;
  }
};

// Brings columns [column, + columns) of rows [first, + count) to shared memory, whose rows are
// `stride` apart; `convert` makes of a pack what lies there. Where there are `spare` registers,
// tiles that lie wholly inside the matrix take a loop without tests.
template <int columns, int count, int stride, bool spare, typename T, typename Element,
          typename Convert>
__device__ __forceinline__ void stage_rows(const AttentionRows<T>& rows, int first, int column,
                                           Element* to, const Convert& convert) {
  constexpr int kElements = WidestPack<T>::kElements, kPacks = columns / kElements;
  constexpr int kRows = kAttentionThreads / kPacks;  // that the block takes at once
  constexpr int kTurns = count / kRows;
  using Stored = Pack<Element, kElements>;
  const int thread = in_place(int(threadIdx.x));  // the registers are for the scores
  const int row = thread / kPacks, offset = thread % kPacks * kElements;
  first += row;
  column += offset;
  to += row * stride + offset;
  const bool packed = rows.packed();
  // Most tiles lie wholly inside the matrix.
  const bool inside =
      packed && first + count - kRows < rows.count && column + kElements <= rows.size;
  const T* from = rows.data + first * rows.stride + column;
  if (spare && inside) {
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const WidestPack<T> pack = *reinterpret_cast<const WidestPack<T>*>(from);
      *reinterpret_cast<Stored*>(to + n * kRows * stride) = convert(pack);
      from += kRows * rows.stride;
    }
    return;
  }
  // Unrolled, the loop would take registers that the scores need.
#pragma unroll 1
  for (int n = 0; n < kTurns; ++n) {
    WidestPack<T> pack;
    if (inside && !spare) {
      pack = *reinterpret_cast<const WidestPack<T>*>(from);
    } else {
      pack = rows.pack(first + n * kRows, column, packed);
    }
    *reinterpret_cast<Stored*>(to) = convert(pack);
    from += kRows * rows.stride;
    to += kRows * stride;
  }
}

// Blocks that share a multiprocessor: 128 registers a thread, and on sm_75 all of its shared
// memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 1;
#else
constexpr int kMostBlocks = 2;
#endif

// What values are multiplied by before a tile holds them, and its inverse.
template <typename C>
struct AttentionScale {
  C factor = 1, unit = 1;
};

}  // namespace cuda
}  // namespace ember
