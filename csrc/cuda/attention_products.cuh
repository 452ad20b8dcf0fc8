// Products of 64 x 64 tiles for the attention kernels, whose elements each thread then works on.
//
// A block of 256 threads multiplies rows of two matrices in memory, a tile of scores, and hands
// every thread a patch of 4 x 4 scores. From the patches the block makes a tile of weights or of
// gradients and adds its product with rows of a third matrix to a result that stays in registers:
//
//   Products products;  Products::Result out;
//   products.rows(query, i, key, j, scores);     scores = query rows times key rows
//   products.store(scores);                      the tile = scores, changed in between
//   products.add_tile(value, j, column, out);    out += tile times columns of value rows
//
// Kernels are written once for both kinds of AttentionProducts: sums in registers, for any type,
// and nvcuda::wmma's matrix units, for 16-bit types and for fp32 rounded to tf32.
#pragma once

#include <mma.h>

#include <type_traits>

#include "../common/lif_attention.h"
#include "matrix_units.cuh"
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

// `spare`: whether the kernel has registers left for loads of whole tiles.
template <typename T, bool matrix_units, bool spare = true>
struct AttentionProducts;

// What values are multiplied by before a tile holds them, and its inverse.
template <typename C>
struct AttentionScale {
  C factor = 1, unit = 1;
};

// Sums in registers, 4 x 4 to a thread, over operands staged in shared memory.
template <typename T, bool spare>
struct AttentionProducts<T, false, spare> {
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

  __device__ __forceinline__ AttentionProducts()
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
    if constexpr (!spare) {
      constexpr int kPacks = kDepth / kElements;
      const bool packed = rows.packed();
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
    const bool packed = rows.packed();
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
    if (!spare) thread = in_place(thread);
    a += thread / kAcross * kPatch;
    b += thread % kAcross * kPatch;
    // As many turns share one step of the addresses.
#pragma unroll 8
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

// What a warp has of a product on matrix units: 16 x 32 of a tile's 64 x 64 sums.
//
// wmma for 16-bit types. Its own loads of bf16 come out as accesses of any memory, several times as
// many as ldmatrix needs, unless nvcc is told that they are of shared memory.
template <typename T>
struct WarpSums {
  static constexpr int kStep = 16;   // terms of a product that one step takes
  static constexpr int kPiece = 16;  // two pieces of 16 x 16, side by side
  static constexpr int kPieces = 2;
  static constexpr int kWidePad = 8;  // keeps rows of operands aligned and spreads them over banks

  template <typename Use, typename Layout>
  using Operand = nvcuda::wmma::fragment<Use, kPiece, kPiece, kStep, T, Layout>;
  using Accumulator =
      nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kPiece, kPiece, kStep, float>;

  Accumulator pieces[kPieces];

  __device__ __forceinline__ WarpSums() {
#pragma unroll
    for (Accumulator& piece : pieces) nvcuda::wmma::fill_fragment(piece, 0.0f);
  }

  static __device__ __forceinline__ T round(T x) { return x; }

  // Adds the products of kStep columns of `left`, 16 rows, with as many of `right`, 32 rows, or, if
  // `right` is `transposed`, with as many rows of 32 columns.
  template <int left_stride, int right_stride, bool transposed>
  __device__ __forceinline__ void add(const T* left, const T* right) {
    using namespace nvcuda::wmma;
    using Layout = std::conditional_t<transposed, row_major, col_major>;
    Operand<matrix_a, row_major> a;
    load(a, left, left_stride);
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      Operand<matrix_b, Layout> b;
      load(b, right + n * kPiece * (transposed ? 1 : right_stride), right_stride);
      mma_sync(pieces[n], a, b, pieces[n]);
    }
  }

  template <int stride>
  __device__ __forceinline__ void store(float* to) const {
    using namespace nvcuda::wmma;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      store_matrix_sync(to + n * kPiece, pieces[n], stride, mem_row_major);
    }
  }

 private:
  template <typename Use, typename Layout>
  static __device__ __forceinline__ void load(Operand<Use, Layout>& operand, const T* from,
                                              int stride) {
#ifdef __NVCC__
    if constexpr (std::is_same<T, bfloat16>::value) {
      static_assert(sizeof(operand.x) == 16, "an operand takes four registers");
      unsigned* r = reinterpret_cast<unsigned*>(operand.x);
      const unsigned address = unsigned(__cvta_generic_to_shared(from));
#define EMBER_LOAD_OPERAND(what)                                \
  asm volatile("wmma.load." what " {%0, %1, %2, %3}, [%4], %5;" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) \
               : "r"(address), "r"(stride)                      \
               : "memory")
      if constexpr (std::is_same<Use, nvcuda::wmma::matrix_a>::value) {
        EMBER_LOAD_OPERAND("a.sync.aligned.row.m16n16k16.shared.bf16");
      } else if constexpr (std::is_same<Layout, nvcuda::wmma::row_major>::value) {
        EMBER_LOAD_OPERAND("b.sync.aligned.row.m16n16k16.shared.bf16");
      } else {
        EMBER_LOAD_OPERAND("b.sync.aligned.col.m16n16k16.shared.bf16");
      }
#undef EMBER_LOAD_OPERAND
      return;
    }
#endif
    nvcuda::wmma::load_matrix_sync(operand, from, stride);
  }
};

// fp32 rounded to tf32, whose products wmma makes of instructions of half the size, after loads of
// single numbers with an address each.
template <>
struct WarpSums<float> {
  static constexpr int kStep = 8, kPiece = 8, kPieces = 4;  // of 16 x 8
  static constexpr int kWidePad = 8;  // so that 4 rows times 8 columns lie in different banks

  float pieces[kPieces][4] = {};

  static __device__ __forceinline__ float round(float x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    return nvcuda::wmma::__float_to_tf32(x);
#else
    return x;
#endif
  }

  template <int left_stride, int right_stride, bool transposed>
  __device__ __forceinline__ void add(const float* left, const float* right) {
    const int lane = int(threadIdx.x) % kWarp;
    uint32_t a[4];
    load_matrices(a, shared_address(left + lane % 16 * left_stride + lane / 16 * 4));
#pragma unroll
    for (int n = 0; n < kPieces; n += 2) {
      uint32_t b[4];  // of two pieces
      if constexpr (transposed) {
        const float* from = right + lane % 4 * right_stride + n * kPiece + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          b[i] = bit_cast<uint32_t>(from[i % 2 * 4 * right_stride + i / 2 * kPiece]);
        }
      } else {
        const int row = n * kPiece + lane / 16 * 8 + lane % 8;
        load_matrices(b, shared_address(right + row * right_stride + lane / 8 % 2 * 4));
      }
      multiply_add_tf32(pieces[n], a, b[0], b[1]);
      multiply_add_tf32(pieces[n + 1], a, b[2], b[3]);
    }
  }

  template <int stride>
  __device__ __forceinline__ void store(float* to) const {
    const int lane = int(threadIdx.x) % kWarp;
    to += lane / 4 * stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pack<float, 2> pair = {{pieces[n][2 * half], pieces[n][2 * half + 1]}};
        *reinterpret_cast<Pack<float, 2>*>(to + 8 * half * stride + n * kPiece) = pair;
      }
    }
  }
};

// Matrix units: each of the 8 warps has 16 x 32 of every tile. Where wmma's elements lie within a
// warp's registers is not known, so scores go through shared memory on their way to the patches.
// The tile of weights takes the scores' place.
template <typename T, bool spare>
struct AttentionProducts<T, true, spare> {
  using C = float;
  using Result = WarpSums<T>;
  static constexpr int kStep = Result::kStep;
  static constexpr bool kSpare = spare && sizeof(T) > 2;
  static constexpr int kUnroll = kSpare ? 4 : 1;       // steps of a product in a row
  static constexpr int kDepth = 128 / int(sizeof(T));  // of a product, staged at once
  // Strides keep rows aligned as wmma needs them and spread them over the banks.
  static constexpr int kScoreStride = kTile + 4;                                 // of C
  static constexpr int kTileStride = kScoreStride * int(sizeof(C) / sizeof(T));  // of T, in place
  static constexpr int kPad = 16 / int(sizeof(T));
  static constexpr int kStride = kDepth + kPad;  // of staged operands
  static constexpr int kWideStride = kTile + Result::kWidePad;
  static constexpr int kStage =
      2 * kStride > kWideStride ? 2 * kTile * kStride : kTile * kWideStride;
  static constexpr size_t kBytes =
      kTile * kScoreStride * sizeof(C) + kStage * sizeof(T) + kAttentionThreads / kWarp * sizeof(C);
  static constexpr int kBlocks = kMostBlocks;
  // fp16 ends at 65504 and is coarse below 1e-4, where gradients may lie, and the weights of gates
  // that are all but closed.
  static constexpr bool kScales = std::is_same<T, float16>::value;

  C* scores;   // [kTile, kScoreStride]
  T* tile;     // in the same place, [kTile, kTileStride]
  T* stage;    // two of [kTile, kStride], or one of [kTile, kWideStride]
  C* maximum;  // one for each warp
  C unit = 1;  // of the tile's values

  __device__ __forceinline__ AttentionProducts()
      : scores(shared_memory<C>()),
        tile(shared_memory<T>()),
        stage(reinterpret_cast<T*>(scores + kTile * kScoreStride)),
        maximum(reinterpret_cast<C*>(stage + kStage)) {}

  __device__ __forceinline__ void rows(const AttentionRows<T>& a, int a_first,
                                       const AttentionRows<T>& b, int b_first,
                                       C (&sums)[kPatch][kPatch]) {
    T* const other = stage + kTile * kStride;
    Result products;
    // Other methods count on the loop's barriers.
    if (a.size == 0) __syncthreads();
    for (int first = 0; first < a.size; first += kDepth) {
      __syncthreads();
      stage_rows<kDepth, kTile, kStride, kSpare>(a, a_first, first, stage, rounded_pack);
      stage_rows<kDepth, kTile, kStride, kSpare>(b, b_first, first, other, rounded_pack);
      __syncthreads();
#pragma unroll kUnroll
      for (int k = 0; k < kDepth; k += kStep) {
        if (first + k >= a.size) break;
        products.template add<kStride, kStride, false>(stage + warp_row() * kStride + k,
                                                       other + warp_column() * kStride + k);
      }
    }
    read_scores(products, sums);
  }

  // For values up to `most`, a power of two that makes the largest one within [2^13, 2^14).
  static __device__ __forceinline__ AttentionScale<C> scale_for(C most) {
    if constexpr (kScales) {
      uint32_t exponent = bit_cast<uint32_t>(most) >> 23;
      exponent = exponent < 20 ? 20 : exponent > 253 ? 253 : exponent;
      return {bit_cast<float>((267 - exponent) << 23), bit_cast<float>((exponent - 13) << 23)};
    } else {
      return {};
    }
  }

  // Multiplies each row of a tile of values >= 0 by the factor that suits it. Its unit goes to
  // `units`, and to `memory`, shared and [kTile, kAcross], for add_scaled_rows(), which waits
  // before it reads.
  static __device__ __forceinline__ void scale_rows(C (&values)[kPatch][kPatch], C* memory,
                                                    C (&units)[kPatch]) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      units[r] = 1;
      if constexpr (kScales) {
        C most = 0;
#pragma unroll
        for (int c = 0; c < kPatch; ++c) most = Maximum::of(values[r][c], most);
        const AttentionScale<C> scale = scale_for(across_columns<Maximum>(most));
#pragma unroll
        for (int c = 0; c < kPatch; ++c) values[r][c] *= scale.factor;
        units[r] = scale.unit;
        static_assert(Result::kPiece == kAcross, "each thread of a row writes one of its units");
        memory[(patch_row() + r) * kAcross + int(threadIdx.x) % kAcross] = scale.unit;
      }
    }
  }

  static __device__ __forceinline__ C rounded(C value) {
    T result;
    narrow(value, result);
    return widen(Result::round(result));
  }

  __device__ __forceinline__ void store(const C (&values)[kPatch][kPatch]) {
    // The warp's own rows alone are overwritten, once all of its lanes have read theirs.
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      Pack<T, kPatch> row;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        narrow(values[r][c], row.values[c]);
        row.values[c] = Result::round(row.values[c]);
      }
      *reinterpret_cast<Pack<T, kPatch>*>(tile + (patch_row() + r) * kTileStride + patch_column()) =
          row;
    }
  }

  // fp16 holds the values as multiples of a power of two that suits the largest of them; `values`
  // are lost.
  __device__ __forceinline__ void store_scaled(C (&values)[kPatch][kPatch]) {
    if constexpr (!kScales) {
      store(values);
    } else {
      C most = 0;
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) most = Maximum::of(absolute(values[r][c]), most);
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        most = Maximum::of(most, __shfl_xor_sync(kAllLanes, most, offset));
      }
      if (threadIdx.x % kWarp == 0) maximum[threadIdx.x / kWarp] = most;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kAttentionThreads / kWarp; ++w) most = Maximum::of(maximum[w], most);
      const AttentionScale<C> scale = scale_for(most);
      unit = scale.unit;
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) values[r][c] *= scale.factor;
      }
      store(values);
    }
  }

  template <bool scaled = false>
  __device__ __forceinline__ void add_tile(const AttentionRows<T>& b, int first, int column,
                                           Result& sums) {
    stage_rows<kTile, kTile, kWideStride, kSpare>(b, first, column, stage, rounded_pack);
    __syncthreads();
    if constexpr (scaled && kScales) {
      Result products;
      multiply_tile(products);
#pragma unroll
      for (int n = 0; n < Result::kPieces; ++n) {
#pragma unroll
        for (int i = 0; i < Result::Accumulator::num_elements; ++i) {
          sums.pieces[n].x[i] += products.pieces[n].x[i] * unit;
        }
      }
    } else {
      multiply_tile(sums);
    }
  }

  // The same for a tile whose rows scale_rows() has scaled.
  __device__ __forceinline__ void add_scaled_rows(const AttentionRows<T>& b, int first, int column,
                                                  const C* memory, Result& sums) {
    if constexpr (kScales) {
      Result products;
      add_tile(b, first, column, products);
      typename Result::Accumulator units;
      nvcuda::wmma::load_matrix_sync(units, memory + warp_row() * kAcross, kAcross,
                                     nvcuda::wmma::mem_row_major);
#pragma unroll
      for (int n = 0; n < Result::kPieces; ++n) {
#pragma unroll
        for (int i = 0; i < Result::Accumulator::num_elements; ++i) {
          sums.pieces[n].x[i] += products.pieces[n].x[i] * units.x[i];
        }
      }
    } else {
      add_tile(b, first, column, sums);
    }
  }

  __device__ __forceinline__ void read(const Result& sums, C (&values)[kPatch][kPatch]) {
    __syncthreads();
    read_scores(sums, values);
  }

 private:
  // Where the warp's sums begin.
  static __device__ __forceinline__ int warp_row() { return int(threadIdx.x) / (2 * kWarp) * 16; }
  static __device__ __forceinline__ int warp_column() { return int(threadIdx.x) / kWarp % 2 * 32; }

  static __device__ __forceinline__ WidestPack<T> rounded_pack(WidestPack<T> pack) {
#pragma unroll
    for (T& value : pack.values) value = Result::round(value);
    return pack;
  }

  // sums += the tile times the stage.
  __device__ __forceinline__ void multiply_tile(Result& sums) const {
#pragma unroll kUnroll
    for (int k = 0; k < kTile; k += kStep) {
      sums.template add<kTileStride, kWideStride, true>(tile + warp_row() * kTileStride + k,
                                                        stage + k * kWideStride + warp_column());
    }
  }

  // Nobody may be reading scores or the tile any more.
  __device__ __forceinline__ void read_scores(const Result& sums, C (&values)[kPatch][kPatch]) {
    sums.template store<kScoreStride>(scores + warp_row() * kScoreStride + warp_column());
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const Pack<C, kPatch> row = *reinterpret_cast<const Pack<C, kPatch>*>(
          scores + (patch_row() + r) * kScoreStride + patch_column());
#pragma unroll
      for (int c = 0; c < kPatch; ++c) values[r][c] = row.values[c];
    }
  }
};

// What a kernel of T uses if it asks for matrix units or not. Both kinds run with any launch of
// attention_shared_bytes(), so that the host need not know what the device's code was compiled for.
template <typename T, bool matrix_units, bool spare = true>
using AttentionProductsFor = AttentionProducts<T, matrix_units && has_matrix_units<T>(), spare>;

template <typename T, bool matrix_units>
constexpr size_t attention_shared_bytes() {
  const size_t plain = AttentionProducts<T, false>::kBytes;
  const size_t other = AttentionProducts<T, matrix_units>::kBytes;
  return plain > other ? plain : other;
}

}  // namespace cuda
}  // namespace ember
