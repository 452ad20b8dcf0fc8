#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace ember {
namespace {

bool machine_has(Isa isa) {
#ifdef EMBER_X86
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             machine_has(Isa::avx2);
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("EMBER_EXT_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (machine_has(isa) && (!wanted || !*wanted || !std::strcmp(wanted, isa_name(isa))))
      return isa;
  }
  return Isa::baseline;
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
    default:
      return "baseline";
  }
}

}  // namespace ember
