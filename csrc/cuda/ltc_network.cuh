// A liquid time-constant network as the GPU's kernels take it, and how synapses open and add up.
#pragma once

#include "../common/ltc_scan.h"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

// The four weights of a synapse side by side.
template <typename C>
struct alignas(16) LtcSynapse {
  C w, mu, sigma, erev;
};

// Neighbouring synapses of one target, which one thread adds up.
struct LtcPiece {
  int unit, begin, end;
};

// Synapses of one kind, sorted by target, then source. A unit's synapses are cut into pieces of
// piece_size, its last one being shorter. The pieces of unit j have the numbers from
// first_piece(j) on; the number after its last one may be an empty piece's, unless all synapses
// exist.
struct LtcList {
  int count, units, num_sources;
  void* synapses;     // LtcSynapse<C> [count]
  int* sources;       // [count]
  int* targets;       // [count]
  int* by_source;     // [count]: positions in these lists, sorted by source, then target
  int* ranks;         // [count]: the inverse of by_source
  int* begin_target;  // [units + 1]: where the synapses of each target begin
  int* begin_source;  // [num_sources + 1]: where in by_source those of each source do
  LtcPiece* pieces;   // [num_pieces], or null
  int piece_size;

  EMBER_HD int first_piece(int unit, int begin) const {
    const bool is_dense = count == int64_t(units) * num_sources;
    return is_dense ? unit * pieces_of(num_sources) : begin / piece_size + unit;
  }
  EMBER_HD int num_pieces() const { return first_piece(units, count); }
  EMBER_HD int pieces_of(int synapses_of_unit) const {
    return (synapses_of_unit + piece_size - 1) / piece_size;
  }

  template <typename C>
  __device__ __forceinline__ LtcSynapse<C> synapse(int e) const {
    return static_cast<const LtcSynapse<C>*>(synapses)[e];
  }
};

// How far a synapse is open, sigmoid(x), and the derivative of that. 1 / (1 + e^x) is not 1 minus
// the former: where x is large, their difference would be all rounding error, and potentials that
// multiply it may be large.
template <typename C>
struct LtcOpening {
  C open, slope;

  __device__ __forceinline__ LtcOpening(const LtcSynapse<C>& s, C potential) {
    const C e = exponential(s.sigma * (potential - s.mu));
    const C closed = quotient(C(1), C(1) + e);
    open = e * closed;
    slope = open * closed;
  }
};

constexpr int kLtcRowThreads = 128;

// The first of `size` positions with value(position) >= key, of values that do not descend.
template <typename Value>
__device__ __forceinline__ int lower_bound(int size, int64_t key, const Value& value) {
  int from = 0;
  while (size > 0) {
    const int half = size / 2;
    if (value(from + half) < key) {
      from += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  return from;
}

// Fills in what a list points to. There are as many threads as there are synapses, and as there
// are units or sources, plus one.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_list_kernel(LtcSynapses from, LtcList to) {
  const int64_t i = int64_t(blockIdx.x) * kLtcRowThreads + threadIdx.x;
  if (i < to.count) {
    const C* weights = static_cast<const C*>(from.weights) + i;
    static_cast<LtcSynapse<C>*>(to.synapses)[i] = {
        weights[0], weights[from.count], weights[2 * from.count], weights[3 * from.count]};
    to.sources[i] = int(from.sources[i]);
    to.targets[i] = int(from.targets[i]);
    to.by_source[i] = int(from.by_source[i]);
    to.ranks[from.by_source[i]] = int(i);
  }
  if (i <= to.num_sources) {
    to.begin_source[i] =
        lower_bound(to.count, i, [&](int q) { return from.sources[from.by_source[q]]; });
  }
  if (i > to.units) return;
  const auto target = [&](int e) { return from.targets[e]; };
  const int unit = int(i), begin = lower_bound(to.count, unit, target);
  to.begin_target[unit] = begin;
  if (unit == to.units || !to.pieces) return;
  const int end = lower_bound(to.count, unit + 1, target);
  const int first = to.first_piece(unit, begin), next = to.first_piece(unit + 1, end);
  for (int q = first; q < next; ++q) {
    const int at = min(begin + (q - first) * to.piece_size, end);
    to.pieces[q] = {unit, at, min(at + to.piece_size, end)};
  }
}

}  // namespace cuda
}  // namespace ember
