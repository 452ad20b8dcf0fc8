// The LIF gate's forward kernel for all shapes, dtypes and alignments.
#pragma once

#include "lif_gate_norms.cuh"

namespace ember {
namespace cuda {

// Gates a pack in place and adds its part to the sums for a norm.
template <bool normed, typename Units, typename C, int n>
__device__ __forceinline__ void gate_pack(Norm norm, const Units& units, C (&values)[n],
                                          C (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const C value = values[i];
    values[i] = units.gated(i, value);
    if (normed) {
      sums[0] += norm_term(norm, value);
      sums[1] += norm_term(norm, values[i]);
    }
  }
}

template <typename T, bool normed, bool per_column, bool vectors>
__device__ __forceinline__ void lif_gate_forward(const LifGateParams& p, const LifGatePlan& plan) {
  using C = compute_t<T>;
  constexpr bool along = normed || !per_column;
  constexpr int kWidth = kLifGatePack<T>;
  using Place = LifGatePlace<T, along, vectors>;
  const Team<C> team{plan.team, shared_memory<C>()};
  const Place place(p, plan, team.lane(), team.index(), team.count());
  const auto& strip = place.strip;
  const T* const x = static_cast<const T*>(p.x);
  // Single elements' addresses leave no room for the next row beside parameters and sums.
  constexpr bool ahead = vectors || !(normed && per_column);
  int64_t offset = place.offset;
  LifGateThreadUnits<T, along, per_column> units;
  int64_t unit = place.first;
  if (per_column) units.load(p, place, unit);
  Pack<T, kWidth> next[Place::kPacks];
  if constexpr (ahead) place.load(x + offset, place.rows, next);
  // Teams without a row still take part in the sums of their warp.
  const int rounds = normed ? plan.rounds : place.rows;
  for (int done = 0; done < rounds; done += Place::kRows) {
    const int left = place.rows - done;
    if (!per_column) {
      unit = lif_gate_unit(p, place.row + int64_t(done) * place.row_gap);
      units.load(p, place, unit);
    }
    if constexpr (!ahead) place.load(x + offset, left, next);
    C out[Place::kPacks][kWidth];
#pragma unroll
    for (int j = 0; j < Place::kPacks; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[j][i] = C(widen(next[j].values[i]));
    }
    const auto row = [&] { return x + in_place(offset); };
    const auto y = [&] { return static_cast<T*>(p.y) + in_place(offset); };
    const int64_t following = Place::kRows * place.row_step;
    if constexpr (ahead) place.load(row() + following, left - Place::kRows, next);

    C sums[2] = {}, ratio = 1;  // norm_term of x and y
#pragma unroll
    for (int j = 0; j < Place::kPacks; ++j) {
      if (place.has(j)) gate_pack<normed>(p.norm, units.pack(j), out[j], sums);
    }
    const int64_t count = left > 0 ? place.cols : 0;
    // Columns beyond those that are held: what they add to the sums, or their part of y.
    const auto beyond = [&](bool store) {
      for (int64_t at = place.held; at < count; at += strip.cols) {
        const int limit = int(min(count - at, int64_t(strip.cols)));
        const Pack<T, kWidth> pack = strip.load(row() + at, limit);
        LifGateUnits<T, per_column> gates = units.pack(0);
        if constexpr (per_column) gates.load(p, unit + at, strip, limit);
        C values[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] = C(widen(pack.values[i]));
        gate_pack<normed>(p.norm, gates, values, sums);
        if (!store) continue;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] *= ratio;
        strip.store(values, y() + at, limit);
      }
    };
    if constexpr (normed) {
      beyond(false);
      team.template reduce<Sum>(sums);
      ratio = row_of_sums<per_column>(p, team, count, unit, row(), row(), sums).ratio();
    }
#pragma unroll
    for (int j = 0; j < Place::kPacks; ++j) {
      if (normed) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out[j][i] *= ratio;
      }
      strip.store(out[j], y() + place.at(j), place.limit(j, left));
    }
    if constexpr (normed) beyond(true);
    offset += following;
  }
}

template <typename T, bool normed, bool per_column>
__global__ void __launch_bounds__(kLifGateThreads, kLifGateBlocks<T>)
    lif_gate_forward_kernel(LifGateParams p, LifGatePlan plan) {
  if (plan.vectors) {
    lif_gate_forward<T, normed, per_column, true>(p, plan);
  } else {
    lif_gate_forward<T, normed, per_column, false>(p, plan);
  }
}

}  // namespace cuda
}  // namespace ember
