// Products of two matrices for the CfC scan, and sums of their parts. They do the work that is not
// recurrent, for a whole chunk of steps. The order of the sums depends on the shape alone.
#pragma once

#include "../common/types.h"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

// Terms that are added up one after the other: rounding errors grow with their number.
constexpr int kCfcStretch = 128;

constexpr int kCfcRowThreads = 256;  // of a kernel without tiles

constexpr int kCfcProductTile = 64, kCfcProductDepth = 16, kCfcProductThreads = 256;

// out[m, n] = sum over the depth k of a[m, k] b[n, k]. The depth may be split in parts, each with a
// result of its own.
struct CfcProduct {
  const void *a, *b;                       // C
  int64_t a_row, a_depth, b_row, b_depth;  // strides, one of each pair being 1
  int64_t m, n, depth, depth_of_split;
  unsigned tiles_m, tiles_n;
  void* out;  // [splits], split_stride apart
  int64_t split_stride;
  // Row m is at m / rows * outer_row + m % rows * row, column n likewise.
  int64_t rows, outer_row, row;
  int64_t columns, outer_column;
};

// A tile of 64 rows and 16 depths of a or b on its way to shared memory. `along_depth` says which
// of the strides is 1, and so which elements neighbouring threads should read.
template <typename C, bool along_depth>
struct CfcProductTile {
  static constexpr int kEach = kCfcProductTile * kCfcProductDepth / kCfcProductThreads;
  static constexpr int kStride = kCfcProductTile + 16 / sizeof(C);  // of a depth in shared memory

  C values[kEach];

  static __device__ __forceinline__ int row(int i) {
    const int index = i * kCfcProductThreads + int(threadIdx.x);
    return along_depth ? index / kCfcProductDepth : index % kCfcProductTile;
  }
  static __device__ __forceinline__ int depth(int i) {
    const int index = i * kCfcProductThreads + int(threadIdx.x);
    return along_depth ? index % kCfcProductDepth : index / kCfcProductTile;
  }

  __device__ __forceinline__ void load(const void* from, int64_t row_stride, int64_t depth_stride,
                                       int64_t first_row, int64_t rows, int64_t first_depth,
                                       int64_t end_depth) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t r = first_row + row(i), k = first_depth + depth(i);
      values[i] = r < rows && k < end_depth
                      ? static_cast<const C*>(from)[r * row_stride + k * depth_stride]
                      : C(0);
    }
  }

  __device__ __forceinline__ void store(C* shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) shared[depth(i) * kStride + row(i)] = values[i];
  }
};

template <typename C, typename Out, bool a_along_depth, bool b_along_depth>
__global__ void __launch_bounds__(kCfcProductThreads) cfc_scan_product_kernel(CfcProduct p) {
  using A = CfcProductTile<C, a_along_depth>;
  using B = CfcProductTile<C, b_along_depth>;
  C *shared_a = shared_memory<C>(), *shared_b = shared_a + kCfcProductDepth * A::kStride;
  const int64_t split = blockIdx.x / p.tiles_n / p.tiles_m;
  const int64_t first_m = int64_t(blockIdx.x / p.tiles_n % p.tiles_m) * kCfcProductTile;
  const int64_t first_n = int64_t(blockIdx.x % p.tiles_n) * kCfcProductTile;
  const int64_t begin = split * p.depth_of_split, end = min(begin + p.depth_of_split, p.depth);
  const int own_m = int(threadIdx.x) / 16 * 4, own_n = int(threadIdx.x) % 16 * 4;
  C totals[4][4] = {}, sums[4][4] = {};
  A a;
  B b;
  a.load(p.a, p.a_row, p.a_depth, first_m, p.m, begin, end);
  b.load(p.b, p.b_row, p.b_depth, first_n, p.n, begin, end);
  for (int64_t k = begin; k < end; k += kCfcProductDepth) {
    a.store(shared_a);
    b.store(shared_b);
    __syncthreads();
    // On their way while the present tiles are multiplied.
    a.load(p.a, p.a_row, p.a_depth, first_m, p.m, k + kCfcProductDepth, end);
    b.load(p.b, p.b_row, p.b_depth, first_n, p.n, k + kCfcProductDepth, end);
#pragma unroll 4
    for (int d = 0; d < kCfcProductDepth; ++d) {
      const auto left = *reinterpret_cast<const Pack<C, 4>*>(shared_a + d * A::kStride + own_m);
      const auto right = *reinterpret_cast<const Pack<C, 4>*>(shared_b + d * B::kStride + own_n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left.values[i] * right.values[j];
      }
    }
    __syncthreads();
    if ((k - begin) % kCfcStretch == kCfcStretch - kCfcProductDepth ||
        k + kCfcProductDepth >= end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }
  Out* out = static_cast<Out*>(p.out) + split * p.split_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = first_m + own_m + i;
    if (m >= p.m) break;
    Out* row = out + m / p.rows * p.outer_row + m % p.rows * p.row;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = first_n + own_n + j;
      if (n < p.n) narrow(totals[i][j], row[n / p.columns * p.outer_column + n % p.columns]);
    }
  }
}

// out[i] = the sum of terms [count of them, size], plus what was there where `accumulate` says so.
template <typename C>
__global__ void __launch_bounds__(kCfcRowThreads)
    cfc_scan_sum_kernel(const C* terms, int64_t count, int64_t size, bool accumulate, C* out) {
  const int64_t i = int64_t(blockIdx.x) * kCfcRowThreads + threadIdx.x;
  if (i >= size) return;
  double sum = accumulate ? double(out[i]) : 0.0;
  for (int64_t term = 0; term < count; ++term) sum += double(terms[term * size + i]);
  out[i] = C(sum);
}

}  // namespace cuda
}  // namespace ember
