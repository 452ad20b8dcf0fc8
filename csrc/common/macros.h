// What lets one piece of scalar maths serve every instruction set and the GPU.
//
// Each CPU kernel file is compiled once per instruction set, with EMBER_ISA naming the set. All
// code that such a file contains or includes lives in the inline namespace ember::EMBER_ISA: two
// builds of one template then have different symbols, and the linker cannot hand the AVX-512 one to
// a machine without AVX-512.
#pragma once

#ifndef EMBER_ISA
#define EMBER_ISA generic
#endif

#ifdef __CUDACC__
#define EMBER_HD __host__ __device__ __forceinline__
#else
#define EMBER_HD inline __attribute__((always_inline))
#endif
