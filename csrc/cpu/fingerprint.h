// Fingerprints of memory: whether weights still hold what they held when a copy of them was made.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ember {

struct MemoryPiece {
  const void* data;
  int64_t bytes;
};

struct FingerprintParams {
  const MemoryPiece* pieces;
  int64_t count;
  uint64_t* result;
};

}  // namespace ember

EMBER_CPU_KERNEL(fingerprint, FingerprintParams)
