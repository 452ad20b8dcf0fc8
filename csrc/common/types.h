// Element types as kernels see them: storage formats and the type that each is computed in.
#pragma once

#include "elementwise_math.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ember {

enum class DType : int32_t { f64, f32, bf16, f16 };

inline namespace EMBER_ISA {

#ifdef __CUDACC__

using bfloat16 = __nv_bfloat16;
using float16 = __half;

EMBER_HD float widen(bfloat16 x) {
  return __bfloat162float(x);
}
EMBER_HD float widen(float16 x) {
  return __half2float(x);
}
EMBER_HD void narrow(float x, bfloat16& to) {
  to = __float2bfloat16(x);
}
EMBER_HD void narrow(float x, float16& to) {
  to = __float2half(x);
}

#else

// The conversions are integer arithmetic without branches, so that loops over them vectorise.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

EMBER_HD float widen(bfloat16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}

EMBER_HD void narrow(float x, bfloat16& to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// A larger exponent moves half's bias to float's. A subnormal gets the smallest exponent and gives
// back the leading one that it does not have. No float on the way is subnormal, so that the result
// is the same where the processor takes subnormal numbers for 0 (torch.set_flush_denormal).
EMBER_HD float widen(float16 x) {
#ifdef __aarch64__
  // One instruction there, which takes no half-precision number for 0 in any mode.
  return float(bit_cast<__fp16>(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu);
  const bool subnormal = magnitude < 0x0400u;
  const uint32_t bias = subnormal ? 113u : magnitude >= 0x7c00u ? 224u : 112u;
  const float shifted = bit_cast<float>((magnitude << 13) + (bias << 23));
  const float finite = shifted - (subnormal ? 0x1p-14f : 0.0f);
  return bit_cast<float>(sign | bit_cast<uint32_t>(finite));
#endif
}

// Adding a power of two whose last place is half's last place makes the adder do the rounding.
EMBER_HD void narrow(float x, float16& to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // The exponent of the result, held at half's smallest so that subnormals round at their own
  // place.
  const uint32_t exponent = magnitude & 0x7f800000u;
  const uint32_t held = exponent < 0x38800000u ? 0x38800000u : exponent;
  const float magic = bit_cast<float>(held + (13u << 23));
  const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + magic);
  const uint32_t normal = ((held - 0x38800000u) >> 13) + (rounded & 0x7fffffu);
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = uint16_t(sign | (magnitude >= 0x477ff000u ? overflow : normal));
}

#endif  // __CUDACC__

EMBER_HD float widen(float x) {
  return x;
}
EMBER_HD double widen(double x) {
  return x;
}
EMBER_HD void narrow(float x, float& to) {
  to = x;
}
EMBER_HD void narrow(double x, double& to) {
  to = x;
}
EMBER_HD void narrow(double x, float& to) {
  to = float(x);
}

// What a storage type is computed and accumulated in.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

// Calls `body` with a null pointer of the element type that `dtype` names.
template <typename Body>
inline void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64:
      return body(static_cast<double*>(nullptr));
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<bfloat16*>(nullptr));
    case DType::f16:
      return body(static_cast<float16*>(nullptr));
  }
}

}  // namespace EMBER_ISA
}  // namespace ember
