// The part of the toolkit's half header that csrc/common/types.h uses.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to nearest even, as std::nearbyint does by default.
inline __half __float2half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = -24;
  if (magnitude > 0) std::frexp(magnitude, &exponent);
  const int place = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last bit
  const int steps = int(std::nearbyint(std::ldexp(magnitude, -place)));
  // A carry out of the fraction moves into the exponent, as it should.
  return {uint16_t(sign | (((place + 24) << 10) + steps))};
}
