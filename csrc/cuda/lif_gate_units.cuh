// The gate's parameters as a thread has them.
#pragma once

#include "../common/lif_gate_math.h"
#include "lif_gate_layout.cuh"
#include "matrix_units.cuh"

namespace ember {
namespace cuda {

// The exponent of (1 - f) / f is a rate times |x| - theta: -k and a power of e in fp64, -k log2(e)
// and a power of two, which takes one instruction, in fp32.
__device__ __forceinline__ float gate_rate(float steepness) {
  return steepness * -1.44269504f;
}
__device__ __forceinline__ double gate_rate(double steepness) {
  return -steepness;
}
__device__ __forceinline__ float gate_steepness(float rate) {
  return rate * -0.693147181f;
}
__device__ __forceinline__ double gate_steepness(double rate) {
  return -rate;
}

// f and 1 - f where |x| - theta is `excess`. Odds are no larger than what has a reciprocal.
__device__ __forceinline__ void gate_firing(float excess, float rate, float& fire,
                                            float& smoulder) {
  const float odds = fast_exp2(fast_at_most(excess * rate, 125.0f));
  fire = fast_reciprocal(1 + odds);
  smoulder = odds * fire;
}
__device__ __forceinline__ void gate_firing(double excess, double rate, double& fire,
                                            double& smoulder) {
  const double odds = exponential(excess * rate);
  fire = 1 / (1 + odds);
  smoulder = odds * fire;
}

// The parameters of a pack's columns, or of its row.
template <typename T, bool per_column>
struct LifGateUnits {
  using C = compute_t<T>;
  Pack<C, per_column ? kLifGatePack<T> : 1> threshold, leak, rate;

  // Of the columns of a strip, the first of which is `unit`.
  template <typename Strip>
  __device__ __forceinline__ void load(const LifGateParams& p, int64_t unit, const Strip& strip,
                                       int limit) {
    threshold = strip.load(static_cast<const C*>(p.threshold) + unit, limit);
    leak = strip.load(static_cast<const C*>(p.leak) + unit, limit);
    rate = strip.load(static_cast<const C*>(p.steepness) + unit, limit);
#pragma unroll
    for (C& value : rate.values) value = gate_rate(value);
  }
  __device__ __forceinline__ void load_one(const LifGateParams& p, int64_t unit) {
    threshold.values[0] = static_cast<const C*>(p.threshold)[unit];
    leak.values[0] = static_cast<const C*>(p.leak)[unit];
    rate.values[0] = gate_rate(static_cast<const C*>(p.steepness)[unit]);
  }

  __device__ __forceinline__ C theta(int i) const { return threshold.values[per_column ? i : 0]; }
  __device__ __forceinline__ C lambda(int i) const { return leak.values[per_column ? i : 0]; }
  __device__ __forceinline__ C k(int i) const {
    return gate_steepness(rate.values[per_column ? i : 0]);
  }

  // f and 1 - f.
  __device__ __forceinline__ void firing(int i, C x, C& fire, C& smoulder) const {
    gate_firing(absolute(x) - theta(i), rate.values[per_column ? i : 0], fire, smoulder);
  }

  __device__ __forceinline__ C gated(int i, C x) const {
    C fire, smoulder;
    firing(i, x, fire, smoulder);
    return x * gate_value(fire, smoulder, lambda(i));
  }
};

// The parameters of a thread's packs, by strip, or of its row.
template <typename T, bool along, bool per_column>
struct LifGateThreadUnits {
  static constexpr int kStrips = along && per_column ? kLifGatePacks : 1;
  LifGateUnits<T, per_column> of[kStrips];

  template <typename Place>
  __device__ __forceinline__ void load(const LifGateParams& p, const Place& place, int64_t unit) {
    if constexpr (per_column) {
#pragma unroll
      for (int j = 0; j < kStrips; ++j) {
        const int first = j * place.strip.cols;
        of[j].load(p, unit + first, place.strip, place.held - first);
      }
    } else {
      of[0].load_one(p, unit);
    }
  }
  __device__ __forceinline__ const LifGateUnits<T, per_column>& pack(int j) const {
    return of[kStrips > 1 ? j : 0];
  }
};

__device__ __forceinline__ int64_t lif_gate_unit(const LifGateParams& p, int64_t row) {
  return row / p.unit_rows % p.units;
}

}  // namespace cuda
}  // namespace ember
