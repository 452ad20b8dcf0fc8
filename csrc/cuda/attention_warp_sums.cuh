// What a warp has of a product on matrix units: 16 x 32 of a tile's 64 x 64 sums.
#pragma once

#include <mma.h>

#include <type_traits>

#include "matrix_units.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

// 16-bit types take wmma, which the GPUs before sm_80 have, too. Its own loads of bf16 come out as
// accesses of any memory, several times as many as ldmatrix needs, unless nvcc is told that they
// are of shared memory.
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
  // `right` is `transposed`, with as many rows of 32 columns. Both lie in shared memory, in rows
  // that are aligned to 16 bytes.
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

// fp32 rounded to tf32 takes mma and ldmatrix: wmma has products of half the size, and loads single
// numbers by an address each.
template <>
struct WarpSums<float> {
  static constexpr int kStep = 8, kPiece = 8, kPieces = 4;  // of 16 x 8
  static constexpr int kWidePad = 8;  // so that 4 rows times 8 columns lie in different banks

  float pieces[kPieces][4] = {};

  static __device__ __forceinline__ float round(float x) { return rounded_to_tf32(x); }

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

}  // namespace cuda
}  // namespace ember
