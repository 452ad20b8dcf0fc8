// The norms of a row before and after the gate, and what follows from them.
#pragma once

#include "lif_gate_units.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

// Of fp32 within a unit in the last place: correctly rounded, it takes a branch and eight
// instructions more.
__device__ __forceinline__ float square_root(float v) {
#ifdef __NVCC__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
  return root;
#else
  return sqrtf(v);
#endif
}
__device__ __forceinline__ double square_root(double v) {
  return sqrt(v);
}

template <typename C>
__device__ __forceinline__ C norm_term(Norm norm, C v) {
  return norm == Norm::l2 ? v * v : absolute(v);
}

// d|v|/dv, but for l2's division by the norm.
template <typename C>
__device__ __forceinline__ C norm_slope(Norm norm, C v) {
  return norm == Norm::l2 ? v : C(v > 0) - C(v < 0);
}

// A power of two that brings `largest` to about 1. It keeps sums of squares in range and costs no
// rounding.
__device__ __forceinline__ float inverse_scale(float largest) {
  const uint32_t exponent = bit_cast<uint32_t>(largest) >> 23;
  return bit_cast<float>((254u - (exponent > 253u ? 253u : exponent < 1u ? 1u : exponent)) << 23);
}
__device__ __forceinline__ double inverse_scale(double largest) {
  const uint64_t exponent = bit_cast<uint64_t>(largest) >> 52;
  const uint64_t held = exponent > 2045u ? 2045u : exponent < 1u ? 1u : exponent;
  return bit_cast<double>((2046u - held) << 52);
}

// Sums over a row and what follows from them. The row counts as multiplied by `inverse`, which is 1
// unless its squares leave the range of C.
template <typename C>
struct LifGateRow {
  C inverse;
  C x_norm, y_norm, eps;
  C dot;      // of grad_y and y
  bool zero;  // or no row at all

  // |x| / (|y| + eps); 0, its limit, for a row of zeros.
  __device__ __forceinline__ C ratio() const {
    return zero ? C(0) : quotient(x_norm, y_norm + eps);
  }
};

// Turns a row's sums of |x|, |y| (as norm_term has it) and grad_y * y into what follows from them.
// Sums that may have overflowed or lost terms are taken again on the scaled row, by the team.
//
// `count` columns, 0 where there is no row, are of `unit` and those that follow, or all of `unit`.
template <bool per_column, typename Team, typename T, int n>
__device__ __forceinline__ LifGateRow<compute_t<T>> row_of_sums(const LifGateParams& p,
                                                                const Team& team, int64_t count,
                                                                int64_t unit, const T* x,
                                                                const T* grad_y,
                                                                compute_t<T> (&sums)[n]) {
  using C = compute_t<T>;
  const C tiny = C(sizeof(C) == 4 ? 1e-24 : 1e-280), huge = C(sizeof(C) == 4 ? 1e36 : 1e280);
  LifGateRow<C> row{};
  row.inverse = 1;
  row.zero = count == 0;
  const bool doubtful = count > 0 && !(sums[0] > tiny && sums[0] < huge && sums[1] > tiny);
  // Teams of several warps are blocks, of one mind here.
  if (team.size > kWarp ? doubtful : __any_sync(kAllLanes, doubtful)) {
    C largest[1] = {0};
#pragma unroll 1
    for (int64_t j = team.lane(); j < count; j += team.size) {
      largest[0] = Maximum::of(C(absolute(widen(x[j]))), largest[0]);
    }
    team.template reduce<Maximum>(largest);
    const C inverse = inverse_scale(largest[0]);
    C again[n] = {};
#pragma unroll 1
    for (int64_t j = team.lane(); j < count; j += team.size) {
      const C value = widen(x[j]);
      LifGateUnits<T, false> units;
      units.load_one(p, per_column ? unit + j : unit);
      const C y = units.gated(0, value) * inverse;
      again[0] += norm_term(p.norm, value * inverse);
      again[1] += norm_term(p.norm, y);
      if (n == 3) again[n - 1] += C(widen(grad_y[j])) * y;
    }
    team.template reduce<Sum>(again);
    if (doubtful) {
      row.zero = largest[0] == 0 && sums[0] == 0;  // and not a row of NaN
      row.inverse = inverse;
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i] = again[i];
    }
  }
  const bool l2 = p.norm == Norm::l2;
  row.x_norm = l2 ? square_root(sums[0]) : sums[0];
  row.y_norm = l2 ? square_root(sums[1]) : sums[1];
  row.eps = C(p.eps) * row.inverse;
  if (n == 3) row.dot = sums[n - 1];
  return row;
}

// What backward knows of a row: the sums of norm_term of x and y and of grad_y * y, and what
// reaches y and x, ratio * grad_y + from_y * d|y|/dy, and from_x * d|x|/dx, the norms' slopes being
// taken at the row multiplied by `inverse`.
template <typename C>
struct LifGateRowBackward {
  C sums[3] = {};
  C ratio = 1, from_y = 0, from_x = 0, inverse = 1;

  __device__ __forceinline__ void finish(Norm norm, const LifGateRow<C>& row) {
    inverse = row.inverse;
    ratio = row.ratio();
    if (row.zero) return;
    from_x = quotient(row.dot, row.y_norm + row.eps);
    from_y = -from_x * ratio;
    if (norm == Norm::l2) {
      from_y = row.y_norm > 0 ? quotient(from_y, row.y_norm) : C(0);
      from_x = quotient(from_x, row.x_norm);
    }
  }

  template <typename Units, typename T, int n>
  __device__ __forceinline__ void add(Norm norm, const Units& units, const Pack<T, n>& xs,
                                      const Pack<T, n>& grad_ys) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C x = widen(xs.values[i]), y = units.gated(i, x);
      sums[0] += norm_term(norm, x);
      sums[1] += norm_term(norm, y);
      sums[2] += C(widen(grad_ys.values[i])) * y;
    }
  }

  // The gradient of x; those of threshold, leak and steepness are added to `gradients`, one for
  // each column or (m = 1) for all.
  template <bool normed, typename Units, typename T, int n, int m>
  __device__ __forceinline__ void differentiate(Norm norm, const Units& units, const Pack<T, n>& xs,
                                                const Pack<T, n>& grad_ys, C (&grad_x)[n],
                                                C (&gradients)[3][m]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C x = widen(xs.values[i]), magnitude = absolute(x);
      C fire, smoulder;
      units.firing(i, x, fire, smoulder);
      const C g = gate_value(fire, smoulder, units.lambda(i));
      C dy = widen(grad_ys.values[i]), through_norm = 0;
      if (normed) {
        dy = ratio * dy + from_y * norm_slope(norm, x * g * inverse);
        through_norm = from_x * norm_slope(norm, x * inverse);
      }
      const C k = units.k(i), open = x * smoulder;
      const C sloped = (1 - units.lambda(i)) * (open * fire);  // x dg/dz, z = k (|x| - theta)
      const int at = m > 1 ? i : 0;
      gradients[0][at] += dy * (-k * sloped);
      gradients[1][at] += dy * open;
      gradients[2][at] += dy * ((magnitude - units.theta(i)) * sloped);
      grad_x[i] = through_norm + dy * (g + k * absolute(sloped));
    }
  }
};

}  // namespace cuda
}  // namespace ember
