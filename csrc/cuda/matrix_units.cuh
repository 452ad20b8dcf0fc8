// The GPU's instructions for matrix units, asynchronous copies and fast functions, one to a
// function.
//
// A host compiler takes each from python_tests/cuda_shim/ptx.h, which does what NVIDIA documents:
// where an element of a matrix lies in the registers of a warp is part of that, unlike wmma's. In
// every layout of 16-bit elements and of sums, lane l has the place (l / 4, 2 (l % 4) and + 1) of
// an 8 x 8 piece.
//
// Shared memory is named by 32-bit addresses, which shared_address() makes of pointers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/elementwise_math.h"
#include "../common/types.h"
#include "launch.cuh"

#ifndef __NVCC__
#include <ptx.h>
#endif

namespace ember {
namespace cuda {

// Whether matrix units take T where the code is compiled for; for fp32 these round to tf32.
template <typename T>
__host__ __device__ constexpr bool has_matrix_units() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return std::is_same<T, float16>::value;
#else
  return !std::is_same<T, double>::value;
#endif
}

// Whether the code is compiled for GPUs that have all of what follows: from sm_80 on.
__host__ __device__ constexpr bool has_fragments() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return false;
#else
  return true;
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
#ifdef __NVCC__
  return uint32_t(__cvta_generic_to_shared(shared));
#else
  return cuda_shim::shared_address(shared);
#endif
}

#ifdef __NVCC__
#define EMBER_PLACE
#define EMBER_PLACE_ARGUMENT
#else
// Where in the source the lanes of a warp meet.
#define EMBER_PLACE , EMBER_SHIM_PLACE
#define EMBER_PLACE_ARGUMENT \
  , {                        \
    file, line               \
  }
#endif

// Four 8 x 8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m: 8
// elements, aligned to 16 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4],
                                              uint32_t address EMBER_PLACE) {
#ifdef __NVCC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
#else
  cuda_shim::load_matrices(matrices, address, false EMBER_PLACE_ARGUMENT);
#endif
}

// The same, each of them transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&matrices)[4],
                                                uint32_t address EMBER_PLACE) {
#ifdef __NVCC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
#else
  cuda_shim::load_matrices(matrices, address, true EMBER_PLACE_ARGUMENT);
#endif
}

// The transposed of an 8 x 8 matrix of 16-bit elements.
__device__ __forceinline__ uint32_t transposed_matrix(uint32_t matrix EMBER_PLACE) {
#ifdef __NVCC__
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
#else
  return cuda_shim::transposed_matrix(matrix EMBER_PLACE_ARGUMENT);
#endif
}

// d = a b + c for a of 16 x 16, b of 16 x 8, c and d of 16 x 8 in fp32. a: pieces (0, 0), (1, 0),
// (0, 1), (1, 1); b: pieces (0, 0), (1, 0), transposed; c, d: two numbers of either piece.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4] EMBER_PLACE) {
  constexpr bool is_half = std::is_same<T, float16>::value;
#ifdef __NVCC__
#define EMBER_MULTIPLY_ADD(type)                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"            \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), \
        "f"(c[2]), "f"(c[3]))
  if constexpr (is_half) {
    EMBER_MULTIPLY_ADD("f16");
  } else {
    EMBER_MULTIPLY_ADD("bf16");
  }
#undef EMBER_MULTIPLY_ADD
#else
  cuda_shim::multiply_add(d, a, b0, b1, c, is_half EMBER_PLACE_ARGUMENT);
#endif
}

// x rounded to tf32, 10 bits of fraction: to the nearest, and of two to the one further from 0.
__device__ __forceinline__ float rounded_to_tf32(float x) {
#ifdef __NVCC__
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return bit_cast<float>(result);
#else
  return cuda_shim::rounded_to_tf32(x);
#endif
}

// d += a b for a of 16 x 8 and b of 8 x 8, which hold fp32 rounded to tf32, one number to a
// register. a: pieces of 8 x 4 (0, 0), (1, 0), (0, 1), (1, 1), of which lane l has the number
// (l / 4, l % 4); b: pieces (0, 0), (1, 0), transposed; d: as above. load_matrices() brings four
// pieces of 8 x 4.
__device__ __forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1 EMBER_PLACE) {
#ifdef __NVCC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_shim::multiply_add_tf32(d, a, b0, b1 EMBER_PLACE_ARGUMENT);
#endif
}

// The two numbers of T that a pair holds.
template <typename T>
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high) {
  low = widen(bit_cast<T>(uint16_t(pair)));
  high = widen(bit_cast<T>(uint16_t(pair >> 16)));
}

// Two numbers rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
#ifdef __NVCC__
  uint32_t pair;
  if constexpr (std::is_same<T, float16>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  T values[2];
  narrow(low, values[0]);
  narrow(high, values[1]);
  return uint32_t(bit_cast<uint16_t>(values[0])) | uint32_t(bit_cast<uint16_t>(values[1])) << 16;
#endif
}

// Starts to copy 16 bytes to shared memory, or to write 16 zeros there; they are there once
// wait_for_copies() has been called in this thread and a barrier has been passed by the others.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool exists) {
#ifndef __NVCC__
  cuda_shim::copy_async(to, from, exists);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#ifndef __NVCC__
  cuda_shim::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the last `under_way`.
template <int under_way>
__device__ __forceinline__ void wait_for_copies() {
#ifndef __NVCC__
  cuda_shim::wait_for_copies(under_way);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(under_way) : "memory");
#endif
}

// 2^x within 2 units in the last place, 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __NVCC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return cuda_shim::fast_exp2(x);
#endif
}

__device__ __forceinline__ float fast_log2(float x) {
#ifdef __NVCC__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return cuda_shim::fast_log2(x);
#endif
}

// 1 / x within a unit in the last place, 0 above 2^126.
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __NVCC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return cuda_shim::fast_reciprocal(x);
#endif
}

// at_most() in one instruction, which GPUs have from sm_80 on.
__device__ __forceinline__ float fast_at_most(float x, float high) {
#if defined(__NVCC__) && __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(high));
  return result;
#else
  return at_most(x, high);
#endif
}

#undef EMBER_PLACE
#undef EMBER_PLACE_ARGUMENT

}  // namespace cuda
}  // namespace ember
