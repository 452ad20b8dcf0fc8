// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
// 32-bit words from a 64-bit key and a 128-bit counter, by integer arithmetic alone.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ember {
inline namespace EMBER_ISA {

// Replaces the counter by the words.
EMBER_HD void philox(uint64_t key, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#ifndef __CUDACC__
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Dropout keeps the weight (b, h, i, j) if word j % 4 of counter (j / 4, i, h, b) is at least this:
// round(p 2^32); p below 1 but so close to it that this is 2^32 drops one weight fewer in 2^32.
inline uint32_t dropout_limit(double p) {
  const double limit = p * 4294967296.0 + 0.5;
  return limit >= 4294967295.0 ? 4294967295u : uint32_t(limit);
}

}  // namespace EMBER_ISA
}  // namespace ember
