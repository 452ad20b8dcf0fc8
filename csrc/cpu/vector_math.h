// exp of whole vectors, for micro-kernels that spend most of their time in it, and gathering.
//
// exp takes a third fewer instructions than what plain loops over elementwise_math.h become: minima
// and maxima instead of comparisons and masks, one instruction for both halves of ln 2 where
// multiply-adds are fused, and a polynomial that is no better than the result's last place.
#pragma once

#ifdef __x86_64__
// gcc takes what its own header leaves undefined on purpose for an oversight.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../common/elementwise_math.h"
#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {

// Within [low, high]; NaN stays NaN: x86 returns the second operand then, and Arm the NaN.
template <typename C>
EMBER_HD Vector<C> clamp_vector(Vector<C> x, C low, C high) {
  const Vector<C> bottom = Vector<C>{} + low, top = Vector<C>{} + high;
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return Vector<C>(_mm512_max_ps(bottom, _mm512_min_ps(top, x)));
  } else {
    return Vector<C>(_mm512_max_pd(bottom, _mm512_min_pd(top, x)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) {
    return Vector<C>(_mm256_max_ps(bottom, _mm256_min_ps(top, x)));
  } else {
    return Vector<C>(_mm256_max_pd(bottom, _mm256_min_pd(top, x)));
  }
#elif defined(__x86_64__)
  if constexpr (sizeof(C) == 4) {
    return Vector<C>(_mm_max_ps(bottom, _mm_min_ps(top, x)));
  } else {
    return Vector<C>(_mm_max_pd(bottom, _mm_min_pd(top, x)));
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(C) == 4) {
    return Vector<C>(vmaxq_f32(bottom, vminq_f32(top, x)));
  } else {
    return Vector<C>(vmaxq_f64(bottom, vminq_f64(top, x)));
  }
#else
  x = x > top ? top : x;
  return x < bottom ? bottom : x;
#endif
}

template <typename C>
EMBER_HD Vector<C> gather_vector(const C* from, const int32_t* index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return Vector<C>(_mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4));
  } else {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return Vector<C>(_mm512_i32gather_pd(eight, from, 8));
  }
#else
  Vector<C> v;
  for (int lane = 0; lane < lanes<C>; ++lane) v[lane] = from[index[lane]];
  return v;
#endif
}

template <typename C>
EMBER_HD Vector<C> minus_multiple_of_ln2(Vector<C> x, Vector<C> n) {
  if constexpr (sizeof(C) == 4) {
    if constexpr (fuses_multiply_add) {
      return x - n * 0.69314718f;
    } else {
      return (x - n * 0.693359375f) + n * 2.12194440e-4f;
    }
  } else {
    return (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  }
}

// e^x, clamped above to that of `most`; 0 below 2^-126.5 (fp64 2^-1022.5). n = round(x / ln 2) is
// left in the low bits by adding 1.5 * 2^23, with the exponent's bias, from where a shift moves it
// into the exponent. The polynomial of fp32 is fitted to a relative error of 3.1e-9; with fused
// multiply-adds the result is off by up to 0.75 units in the last place for |x| < 10, by 2.5 up to
// the LTC's |x| = 43, and by 4.5 near 87.
EMBER_HD Vector<float> exponential(Vector<float> x, float most) {
  x = clamp_vector(x, -88.02f, most);
  const float rounder = 12582912.0f + 127.0f;
  const Vector<float> shifted = x * 1.44269504f + rounder;
  const Vector<float> r = minus_multiple_of_ln2<float>(x, shifted - rounder);
  Vector<float> p = r * 1.381454e-3f + 8.368745e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bit_cast<Vector<float>>(bit_cast<VectorBits<float>>(shifted) << 23);
}
EMBER_HD Vector<double> exponential(Vector<double> x, double most) {
  x = clamp_vector(x, -709.0, most);
  const double rounder = 6755399441055744.0 + 1023.0;
  const Vector<double> shifted = x * 1.4426950408889634 + rounder;
  const Vector<double> r = minus_multiple_of_ln2<double>(x, shifted - rounder);
  const Vector<double> p = taylor_exponential(r);
  return p * bit_cast<Vector<double>>(bit_cast<VectorBits<double>>(shifted) << 52);
}

}  // namespace EMBER_ISA
}  // namespace ember
