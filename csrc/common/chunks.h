// How the operators over sequences cut time into chunks, for memory's sake.
//
// With `chunk` = 0 forward keeps the activations of all steps for backward. With `chunk` > 0 it
// keeps only the states at the start of every chunk of that many steps, and backward computes a
// chunk's activations again.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ember {
inline namespace EMBER_ISA {

// The `chunk` of a sequence of `steps` for the one that was asked for, which may be below 0
// (nothing is kept) or above `steps`: at most as long as the sequence, so that no sum overflows.
EMBER_HD int64_t chunk_within(int64_t chunk, int64_t steps) {
  const int64_t longest = steps > 1 ? steps : 1;
  return chunk < 0 ? 0 : chunk < longest ? chunk : longest;
}

EMBER_HD int64_t count_chunks(int64_t steps, int64_t chunk) {
  return (steps + chunk - 1) / chunk;
}

}  // namespace EMBER_ISA
}  // namespace ember
