// The instruction sets that CPU kernels are built for, and the choice among them.
#pragma once

#include "parallel.h"

namespace ember {

// x86 has baseline, avx2 and avx512; aarch64, where every processor has NEON, has neon; any other
// architecture has baseline.
enum class Isa : int32_t { baseline, avx2, avx512, neon };

// The one named by the environment variable EMBER_EXT_ISA (isa_name(), in letters of either case),
// or, if that names none that this machine has, the best that it has. Decided once, at the first
// call.
Isa selected_isa();
const char* isa_name(Isa isa);

}  // namespace ember

// The set that every machine of the architecture has.
#ifdef EMBER_AARCH64
#define EMBER_LEAST_ISA neon
#else
#define EMBER_LEAST_ISA baseline
#endif

#ifdef EMBER_X86
#define EMBER_DECLARE_X86_KERNELS(name, Params) \
  namespace avx2 {                              \
  void name(const Params&, const ThreadPool&);  \
  }                                             \
  namespace avx512 {                            \
  void name(const Params&, const ThreadPool&);  \
  }
#define EMBER_X86_CASES(name)   \
  case Isa::avx2:               \
    return avx2::name(p, pool); \
  case Isa::avx512:             \
    return avx512::name(p, pool);
#else
#define EMBER_DECLARE_X86_KERNELS(name, Params)
#define EMBER_X86_CASES(name)
#endif

// Declares ember::cpu::name(const Params&, const ThreadPool&), which calls the build of the kernel
// of that name for the selected instruction set. Use at global scope.
#define EMBER_CPU_KERNEL(name, Params)                        \
  namespace ember {                                           \
  namespace EMBER_LEAST_ISA {                                 \
  void name(const Params&, const ThreadPool&);                \
  }                                                           \
  EMBER_DECLARE_X86_KERNELS(name, Params)                     \
  namespace cpu {                                             \
  inline void name(const Params& p, const ThreadPool& pool) { \
    switch (selected_isa()) {                                 \
      EMBER_X86_CASES(name)                                   \
      default:                                                \
        return EMBER_LEAST_ISA::name(p, pool);                \
    }                                                         \
  }                                                           \
  }                                                           \
  }
