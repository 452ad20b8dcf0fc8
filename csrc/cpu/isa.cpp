#include "isa.h"

#include <strings.h>

#include <cstdlib>
#include <initializer_list>

#ifdef EMBER_X86
#include <cpuid.h>
#endif

namespace ember {
namespace {

#ifdef EMBER_X86
// Not every supported compiler's __builtin_cpu_supports() knows this name.
bool machine_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool machine_has(Isa isa) {
#ifdef EMBER_X86
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             machine_has(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && machine_has_f16c();
    default:
      return isa == Isa::EMBER_LEAST_ISA;
  }
#else
  return isa == Isa::EMBER_LEAST_ISA;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("EMBER_EXT_ISA");
  Isa best = Isa::EMBER_LEAST_ISA;
  for (Isa isa : {Isa::EMBER_LEAST_ISA, Isa::avx2, Isa::avx512}) {
    if (!machine_has(isa)) continue;
    if (wanted && !strcasecmp(wanted, isa_name(isa))) return isa;
    best = isa;
  }
  return best;
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::neon:
      return "neon";
    default:
      return "baseline";
  }
}

}  // namespace ember
