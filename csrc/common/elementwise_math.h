// exp, sigmoid and tanh as branch-free polynomials that a compiler vectorises.
//
// Plain loops over these functions become SIMD code under -O3 -fno-math-errno -fno-trapping-math;
// libm's would stay scalar calls. NaN goes through; exp is 0 below 2^-126.5 and at
// most 2^126 (fp64: 2^1022), so that its reciprocal is no subnormal number, which a thread may take
// for 0. On a GPU the toolkit's own functions are used.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

#ifdef __CUDACC__
#include <cmath>
#endif

namespace ember {
inline namespace EMBER_ISA {

template <typename To, typename From>
EMBER_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__aarch64__) && !defined(__CUDACC__)
// For vectors gcc 12 makes eight instructions of a choice by x > high, since it turns the
// comparison into one that holds for NaN. These forms take one or two for each bound.

// Returns NaN for NaN.
EMBER_HD float clamp(float x, float low, float high) {
  const float inside = __builtin_fmaxf(__builtin_fminf(x, high), low);
  return x == x ? inside : x;
}
EMBER_HD double clamp(double x, double low, double high) {
  const double inside = __builtin_fmax(__builtin_fmin(x, high), low);
  return x == x ? inside : x;
}

EMBER_HD float at_most(float x, float high) {
  const float inside = __builtin_fminf(x, high);
  return x == x ? inside : x;
}

// 0 where x < limit, and `value` elsewhere.
EMBER_HD float zero_below(float limit, float x, float value) {
  const uint32_t below = x < limit ? ~uint32_t(0) : 0;
  return bit_cast<float>(bit_cast<uint32_t>(value) & ~below);
}
EMBER_HD double zero_below(double limit, double x, double value) {
  const uint64_t below = x < limit ? ~uint64_t(0) : 0;
  return bit_cast<double>(bit_cast<uint64_t>(value) & ~below);
}

#else

// Returns NaN for NaN.
EMBER_HD float clamp(float x, float low, float high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}
EMBER_HD double clamp(double x, double low, double high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}
EMBER_HD float at_most(float x, float high) {
  return x > high ? high : x;
}

#endif

EMBER_HD float absolute(float x) {
  return __builtin_fabsf(x);
}
EMBER_HD double absolute(double x) {
  return __builtin_fabs(x);
}

#ifdef __CUDACC__

// Never infinite, as on the CPU, nor too large for quotient(): lif_gate_math.h multiplies the
// result by its reciprocal.
EMBER_HD float exponential(float x) {
  return expf(x > 87.33654f ? 87.33654f : x);
}
EMBER_HD double exponential(double x) {
  return exp(x > 708.39 ? 708.39 : x);
}

// a / b for |b| up to 2^126, within two units in the last place. A correctly rounded quotient takes
// ten instructions and a branch.
EMBER_HD float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
EMBER_HD double quotient(double a, double b) {
  return a / b;
}
EMBER_HD float hyperbolic_tangent(float x) {
  return tanhf(x);
}
EMBER_HD double hyperbolic_tangent(double x) {
  return tanh(x);
}

#else

template <typename T>
EMBER_HD T quotient(T a, T b) {
  return a / b;
}

// e^x = 2^n e^r with n = round(x / ln 2). Adding 1.5 * 2^23 rounds to an integer and leaves n in
// the low bits, from where a shift moves it into the exponent. Polynomial: Cephes expf.
EMBER_HD float exponential(float x) {
  x = clamp(x, -88.02f, 87.33654f);
  const float rounder = 12582912.0f;
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (bit_cast<uint32_t>(shifted) + 127u) << 23;
  return p * bit_cast<float>(power);
}

// e^r for |r| <= ln(2) / 2 in double, or a vector of such: the next term of the series is 4e-18.
template <typename V>
EMBER_HD V taylor_exponential(V r) {
  V p = r * 1.6059043836821613e-10 + 2.0876756987868099e-9;
  p = p * r + 2.5052108385441719e-8;
  p = p * r + 2.7557319223985891e-7;
  p = p * r + 2.7557319223985893e-6;
  p = p * r + 2.4801587301587302e-5;
  p = p * r + 1.9841269841269841e-4;
  p = p * r + 1.3888888888888889e-3;
  p = p * r + 8.3333333333333333e-3;
  p = p * r + 4.1666666666666667e-2;
  p = p * r + 0.16666666666666667;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p;
}

// The same with 1.5 * 2^52.
EMBER_HD double exponential(double x) {
  x = clamp(x, -709.0, 708.39);
  const double rounder = 6755399441055744.0;
  const double shifted = x * 1.4426950408889634 + rounder;
  const double n = shifted - rounder;
  const double r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  const double p = taylor_exponential(r);
  const uint64_t power = (bit_cast<uint64_t>(shifted) + 1023u) << 52;
  return p * bit_cast<double>(power);
}

// E / (E + 2) with E = e^2u - 1 and u = |x|. With 2u = n ln 2 + 2r, E = 2^n (e^2r - 1) + (2^n - 1),
// which keeps small E accurate, since n is 0 there. An error of E is damped by 2 / (E + 2), so ln 2
// needs no second part. The polynomial is fitted to a relative error of 1.4e-8 of E. The result is
// off by up to 2.6 units in the last place, with fused multiply-adds and without, and beyond 0.5 by
// up to 1.5. It is never above 1. A rational approximation in x takes about as many instructions,
// but its numerator and denominator round to 6 units in the last place where tanh nears 1, and
// every slope 1 - tanh^2 shows it.
EMBER_HD float hyperbolic_tangent(float x) {
  const float u = at_most(absolute(x), 9.02f);  // where tanh rounds to 1
  const float rounder = 12582912.0f + 127.0f;   // with the exponent's bias
  const float shifted = u * 2.88539008f + rounder;
  const float r = u - (shifted - rounder) * 0.34657359f;
  float p = 4.4386216e-2f;
  p = p * r + 1.3386035e-1f;
  p = p * r + 3.3333948e-1f;
  p = p * r + 6.6666186e-1f;
  p = p * r + 9.9999994e-1f;
  p = p * (r * r) + r;
  const float power = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  const float half = p * power + (power * 0.5f - 0.5f);  // E / 2
  return __builtin_copysignf(half / (half + 1.0f), x);
}

// Below 0.625 the rational approximation of Cephes tanh.
EMBER_HD double hyperbolic_tangent(double x) {
  const double u = absolute(x);
  const double large = 1.0 - 2.0 / (exponential(2.0 * u) + 1.0);
  const double s = x * x;
  double p = -9.64399179425052238628e-1;
  p = p * s - 9.92877231001918586564e1;
  p = p * s - 1.61468768441708447952e3;
  double q = s + 1.12811678491632931402e2;
  q = q * s + 2.23548839060100448583e3;
  q = q * s + 4.84406305325125486048e3;
  const double small = x + x * s * (p / q);
  return u < 0.625 ? small : __builtin_copysign(large, x);
}

#endif  // __CUDACC__

// Not 1 / (1 + e^-x), which never falls to 0: it would leave something of the product with a large
// negative number.
template <typename T>
EMBER_HD T sigmoid(T x) {
  const T e = exponential(x);
  return quotient(e, T(1) + e);
}

}  // namespace EMBER_ISA
}  // namespace ember
