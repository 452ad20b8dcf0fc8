// The vector registers of the instruction set that a kernel file is compiled for, by the compiler's
// vector extensions. For micro-kernels only: plain loops vectorise by themselves.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/macros.h"

namespace ember {
inline namespace EMBER_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_sums = 24;  // running sums that a micro-kernel keeps in registers
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_sums = 12;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16;
// Of 32 registers. gcc loads all factors of a term first, which would spill some of 24 sums.
constexpr int vector_sums = 20;
#else
constexpr int vector_bytes = 16;
constexpr int vector_sums = 12;
#endif

// Whether a multiplication and the addition of its product are one instruction, rounded once.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool fuses_multiply_add = true;
#else
constexpr bool fuses_multiply_add = false;
#endif

template <typename C>
constexpr int lanes = vector_bytes / int(sizeof(C));

template <typename C>
struct VectorTypes {
  using Integer = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
  typedef Integer Bits __attribute__((vector_size(vector_bytes)));
  typedef C Register __attribute__((vector_size(vector_bytes)));
  typedef C Unaligned __attribute__((vector_size(vector_bytes), aligned(sizeof(C)), may_alias));
};
template <typename C>
using Vector = typename VectorTypes<C>::Register;

template <typename C>
using VectorBits = typename VectorTypes<C>::Bits;

template <typename C>
EMBER_HD Vector<C> load_vector(const C* from) {
  return *reinterpret_cast<const typename VectorTypes<C>::Unaligned*>(from);
}
template <typename V, typename C>
EMBER_HD void store_vector(V value, C* to) {
  *reinterpret_cast<typename VectorTypes<C>::Unaligned*>(to) = value;
}
template <typename C>
EMBER_HD void copy_vector(const C* from, C* to) {
  store_vector(load_vector(from), to);
}

}  // namespace EMBER_ISA
}  // namespace ember
