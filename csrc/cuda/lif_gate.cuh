// The LIF gate on a GPU: one read of x and one write of y forward; one read of x and grad_y and one
// write of grad_x backward.
//
// A row belongs to a team of threads, 1 to 512 as it needs, which keeps it in registers between the
// sums for its norms and what follows from them. Only columns beyond what 512 threads hold are read
// twice. Parameter gradients are added up in two stages in an order that depends on the shape
// alone: each block leaves partial sums, and a second kernel adds those.
#pragma once

#include "../common/lif_gate.h"
#include "../common/lif_gate_math.h"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kLifGateThreads = 256, kLifGateMostThreads = 512;

// How the matrix is shared out. Block b works on tile b % tiles of row block b / tiles.
struct LifGatePlan {
  int team;            // threads that share a row
  int threads;         // of a block
  int rounds;          // rows that each team works on, one after the other
  int64_t row_blocks;  // of threads / team * rounds rows
  int64_t tile_cols;   // the parts of a row; with a norm there is one
  unsigned tiles;
  bool vectors;  // whether packs can be loaded and stored whole
  // Partial parameter gradients, C [outer, 3, units, inner]: units that are columns have one for
  // each row block (outer), units that are rows one for each row and tile.
  int64_t outer, inner;
};

// A pack is what a thread works on at a time: 16 bytes of fp32 or fp64, 8 of bf16 or fp16, whose 16
// would take more registers than there are. Of each row it holds the first pack in registers.
template <typename T>
constexpr int kLifGatePack = sizeof(T) == 8 ? 2 : 4;

__device__ __forceinline__ float square_root(float v) {
  return sqrtf(v);
}
__device__ __forceinline__ double square_root(double v) {
  return sqrt(v);
}

// The columns of a tile that one thread works on. Where packs cannot be accessed whole,
// neighbouring threads take neighbouring columns.
template <typename T>
struct LifGateColumns {
  using C = compute_t<T>;
  static constexpr int kWidth = kLifGatePack<T>;

  int64_t count;  // columns of the tile; 0 where there is no row
  int lane, team;
  bool vectors;

  template <typename Index>
  __device__ __forceinline__ Index column(Index pack, int i) const {
    return vectors ? (pack * team + lane) * kWidth + i : (pack * kWidth + i) * team + lane;
  }

  // Columns past the end become 0.
  template <typename U, typename Index>
  __device__ __forceinline__ void load(const U* row, Index pack, C (&to)[kWidth]) const {
    if (vectors) {
      Pack<U, kWidth> values{};
      const Index first = column(pack, 0);
      if (first < count) values = *reinterpret_cast<const Pack<U, kWidth>*>(row + first);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[i] = C(widen(values.values[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Index at = column(pack, i);
        to[i] = at < count ? C(widen(row[at])) : C(0);
      }
    }
  }

  template <typename Index>
  __device__ __forceinline__ void store(const C (&from)[kWidth], Index pack, T* row) const {
    if (vectors) {
      const Index first = column(pack, 0);
      if (first >= count) return;
      Pack<T, kWidth> values;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) narrow(from[i], values.values[i]);
      *reinterpret_cast<Pack<T, kWidth>*>(row + first) = values;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Index at = column(pack, i);
        if (at < count) narrow(from[i], row[at]);
      }
    }
  }

  // Whether the team has columns in this pack; asked of packs beyond those that are held.
  __device__ __forceinline__ bool reach(int64_t pack) const { return pack * team * kWidth < count; }
};

// The parameters of the units that a row's columns, or the row, belong to.
template <typename C>
struct LifGateParameters {
  const C *threshold, *leak, *steepness;
  bool per_column;

  __device__ __forceinline__ LifGateParameters(const LifGateParams& p, int64_t row, int64_t first)
      : per_column(p.unit_rows == 0) {
    const int64_t unit = per_column ? first : row / p.unit_rows % p.units;
    threshold = static_cast<const C*>(p.threshold) + unit;
    leak = static_cast<const C*>(p.leak) + unit;
    steepness = static_cast<const C*>(p.steepness) + unit;
  }
};

// The gate's state on one pack.
template <typename T>
struct LifGatePack {
  using C = compute_t<T>;
  static constexpr int kWidth = kLifGatePack<T>;

  C threshold[kWidth], leak[kWidth], steepness[kWidth];

  template <typename Index>
  __device__ __forceinline__ LifGatePack(const LifGateParameters<C>& from,
                                         const LifGateColumns<T>& columns, Index pack) {
    if (from.per_column) {
      columns.load(from.threshold, pack, threshold);
      columns.load(from.leak, pack, leak);
      columns.load(from.steepness, pack, steepness);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        threshold[i] = *from.threshold;
        leak[i] = *from.leak;
        steepness[i] = *from.steepness;
      }
    }
  }

  // f and 1 - f.
  __device__ __forceinline__ void firing(int i, C x, C& fire, C& smoulder) const {
    const C odds = gate_odds(absolute(x), threshold[i], steepness[i]);
    fire = quotient(C(1), C(1) + odds);
    smoulder = odds * fire;
  }

  __device__ __forceinline__ C gated(int i, C x) const {
    C fire, smoulder;
    firing(i, x, fire, smoulder);
    return x * gate_value(fire, smoulder, leak[i]);
  }
};

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
  __device__ __forceinline__ C ratio() const { return zero ? C(0) : x_norm / (y_norm + eps); }
};

// Turns each thread's sums of |x|, |y| (as norm_term has it) and grad_y * y into the row's. Sums
// that may have overflowed or lost terms are taken again on the scaled row.
template <typename T, int n>
__device__ __forceinline__ LifGateRow<compute_t<T>> finish_row(
    const LifGateParams& p, const Team<compute_t<T>>& team, const LifGateColumns<T>& columns,
    const LifGateParameters<compute_t<T>>& parameters, const T* x, const T* grad_y,
    compute_t<T> (&sums)[n]) {
  using C = compute_t<T>;
  const C tiny = C(sizeof(C) == 4 ? 1e-24 : 1e-280), huge = C(sizeof(C) == 4 ? 1e36 : 1e280);
  LifGateRow<C> row{};
  row.inverse = 1;
  row.zero = columns.count == 0;
  team.template reduce<Sum>(sums);
  const bool doubtful = columns.count > 0 && !(sums[0] > tiny && sums[0] < huge && sums[1] > tiny);
  if (team.any(doubtful)) {
    C largest[1] = {0};
    for (int64_t j = team.lane(); j < columns.count; j += team.size) {
      largest[0] = Maximum::of(C(absolute(widen(x[j]))), largest[0]);
    }
    team.template reduce<Maximum>(largest);
    const C inverse = inverse_scale(largest[0]);
    C again[n] = {};
    for (int64_t j = team.lane(); j < columns.count; j += team.size) {
      const int64_t unit = parameters.per_column ? j : 0;
      const C value = widen(x[j]);
      const C odds =
          gate_odds(absolute(value), parameters.threshold[unit], parameters.steepness[unit]);
      const C fire = quotient(C(1), C(1) + odds);
      const C y = value * gate_value(fire, odds * fire, parameters.leak[unit]) * inverse;
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

// One row, or tile of one, in forward.
template <typename T, bool normed>
struct LifGateForward {
  using C = compute_t<T>;
  static constexpr int kWidth = kLifGatePack<T>;

  Norm norm;
  LifGateColumns<T> columns;
  LifGateParameters<C> parameters;
  const T* x;
  T* y;
  C sums[2];  // norm_term of x and y
  C ratio;

  template <typename Index>
  __device__ __forceinline__ void gate(Index pack, C (&out)[kWidth]) {
    columns.load(x, pack, out);
    const LifGatePack<T> gates(parameters, columns, pack);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const C value = out[i];
      out[i] = gates.gated(i, value);
      if (normed) {
        sums[0] += norm_term(norm, value);
        sums[1] += norm_term(norm, out[i]);
      }
    }
  }

  template <typename Index>
  __device__ __forceinline__ void store(Index pack, C (&out)[kWidth]) const {
    if (normed) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out[i] *= ratio;
    }
    columns.store(out, pack, y);
  }
};

template <typename T, bool normed>
__global__ void __launch_bounds__(kLifGateMostThreads, 1)
    lif_gate_forward_kernel(LifGateParams p, LifGatePlan plan) {
  using C = compute_t<T>;
  constexpr int kWidth = kLifGatePack<T>;
  const Team<C> team{plan.team, shared_memory<C>()};
  const int64_t first = int64_t(blockIdx.x % plan.tiles) * plan.tile_cols;
  const int64_t cols = min(plan.tile_cols, p.cols - first);
  for (int round = 0; round < plan.rounds; ++round) {
    const int64_t row =
        (int64_t(blockIdx.x / plan.tiles) * plan.rounds + round) * team.count() + team.index();
    const int64_t offset = row * p.cols + first;
    LifGateForward<T, normed> r{p.norm,
                                {row < p.rows ? cols : 0, team.lane(), team.size, plan.vectors},
                                LifGateParameters<C>(p, row, first),
                                static_cast<const T*>(p.x) + offset,
                                static_cast<T*>(p.y) + offset,
                                {},
                                1};
    C held[kWidth], out[kWidth];
    r.gate(0, held);
    if (normed) {
      for (int64_t pack = 1; r.columns.reach(pack); ++pack) r.gate(pack, out);
      r.ratio = finish_row(p, team, r.columns, r.parameters, r.x, r.x, r.sums).ratio();
    }
    r.store(0, held);
    if (normed) {
      for (int64_t pack = 1; r.columns.reach(pack); ++pack) {
        r.gate(pack, out);
        r.store(pack, out);
      }
    }
  }
}

// A pack in backward. `gradients` are those of threshold, leak and steepness.
template <typename T>
struct LifGateBackwardPack {
  using C = compute_t<T>;
  static constexpr int kWidth = kLifGatePack<T>;
  C x[kWidth], grad_y[kWidth], fire[kWidth], smoulder[kWidth], gradients[3][kWidth];
};

// One row, or tile of one, in backward.
template <typename T, bool normed>
struct LifGateBackward {
  using C = compute_t<T>;
  static constexpr int kWidth = kLifGatePack<T>;

  Norm norm;
  LifGateColumns<T> columns;
  LifGateParameters<C> parameters;
  const T *x, *grad_y;
  T* grad_x;
  C sums[3];  // norm_term of x and y, grad_y * y
  // What reaches y and x: ratio * grad_y + from_y * d|y|/dy, and from_x * d|x|/dx, the norms'
  // slopes being taken at the row multiplied by `inverse`.
  C ratio, from_y, from_x, inverse;

  template <typename Index>
  __device__ __forceinline__ void load(Index at, LifGateBackwardPack<T>& pack) {
    columns.load(x, at, pack.x);
    columns.load(grad_y, at, pack.grad_y);
    const LifGatePack<T> gates(parameters, columns, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      gates.firing(i, pack.x[i], pack.fire[i], pack.smoulder[i]);
      if (normed) {
        const C y = pack.x[i] * gate_value(pack.fire[i], pack.smoulder[i], gates.leak[i]);
        sums[0] += norm_term(norm, pack.x[i]);
        sums[1] += norm_term(norm, y);
        sums[2] += pack.grad_y[i] * y;
      }
    }
  }

  __device__ __forceinline__ void finish(const LifGateRow<C>& row) {
    inverse = row.inverse;
    ratio = row.ratio();
    if (row.zero) return;
    from_x = row.dot / (row.y_norm + row.eps);
    from_y = -from_x * ratio;
    if (norm == Norm::l2) {
      from_y = row.y_norm > 0 ? from_y / row.y_norm : C(0);
      from_x /= row.x_norm;
    }
  }

  // Stores the gradient of x and fills in those of the parameters.
  template <typename Index>
  __device__ __forceinline__ void differentiate(Index at, LifGateBackwardPack<T>& pack) const {
    const LifGatePack<T> gates(parameters, columns, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const C value_of_x = pack.x[i], magnitude = absolute(value_of_x);
      const C g = gate_value(pack.fire[i], pack.smoulder[i], gates.leak[i]);
      const C slope = gate_slope(pack.fire[i], pack.smoulder[i], gates.leak[i]);
      C dy = pack.grad_y[i], through_norm = 0;
      if (normed) {
        dy = ratio * dy + from_y * norm_slope(norm, value_of_x * g * inverse);
        through_norm = from_x * norm_slope(norm, value_of_x * inverse);
      }
      pack.gradients[0][i] = dy * gate_dy_dthreshold(value_of_x, gates.steepness[i], slope);
      pack.gradients[1][i] = dy * value_of_x * pack.smoulder[i];
      pack.gradients[2][i] =
          dy * gate_dy_dsteepness(value_of_x, magnitude, gates.threshold[i], slope);
      pack.grad_y[i] = through_norm + dy * gate_dy_dx(magnitude, gates.steepness[i], g, slope);
    }
    columns.store(pack.grad_y, at, grad_x);
  }
};

// Adds up each thread's sums over the block's teams; the threads of the first team get the result.
template <typename C, int n>
__device__ __forceinline__ void add_teams(const Team<C>& team, C (&sums)[n]) {
  if (team.count() == 1) return;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    for (int offset = kWarp / 2; offset >= team.size; offset /= 2) {
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], offset);
    }
    team.exchange[k * blockDim.x + threadIdx.x] = sums[k];
  }
  __syncthreads();
  if (int(threadIdx.x) >= team.size) return;
  const int stride = team.size < kWarp ? kWarp : team.size;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    for (int other = int(threadIdx.x) + stride; other < int(blockDim.x); other += stride) {
      sums[k] += team.exchange[k * blockDim.x + other];
    }
  }
}

template <typename T, bool normed, bool per_column>
__global__ void __launch_bounds__(kLifGateMostThreads, 1)
    lif_gate_backward_kernel(LifGateParams p, LifGatePlan plan) {
  using C = compute_t<T>;
  constexpr int kWidth = kLifGatePack<T>;
  const Team<C> team{plan.team, shared_memory<C>()};
  const bool want_sums = p.grad_parameters != nullptr;
  const int64_t tile = blockIdx.x % plan.tiles, first = tile * plan.tile_cols;
  const int64_t row_block = blockIdx.x / plan.tiles;
  const int64_t cols = min(plan.tile_cols, p.cols - first);
  C* partial = static_cast<C*>(p.partial_gradients);
  C column_sums[3 * kWidth] = {};  // [3, kWidth]
  for (int round = 0; round < plan.rounds; ++round) {
    const int64_t row = (row_block * plan.rounds + round) * team.count() + team.index();
    const int64_t offset = row * p.cols + first;
    LifGateBackward<T, normed> r{p.norm,
                                 {row < p.rows ? cols : 0, team.lane(), team.size, plan.vectors},
                                 LifGateParameters<C>(p, row, first),
                                 static_cast<const T*>(p.x) + offset,
                                 static_cast<const T*>(p.grad_y) + offset,
                                 static_cast<T*>(p.grad_x) + offset,
                                 {},
                                 1,
                                 0,
                                 0,
                                 1};
    LifGateBackwardPack<T> held, beyond;
    r.load(0, held);
    if (normed) {
      for (int64_t pack = 1; r.columns.reach(pack); ++pack) r.load(pack, beyond);
      r.finish(finish_row(p, team, r.columns, r.parameters, r.x, r.grad_y, r.sums));
    }

    C row_sums[3] = {};
    r.differentiate(0, held);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        (per_column ? column_sums[k * kWidth + i] : row_sums[k]) += held.gradients[k][i];
      }
    }
    if (normed) {
      for (int64_t pack = 1; r.columns.reach(pack); ++pack) {
        r.load(pack, beyond);
        r.differentiate(pack, beyond);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const int64_t column = r.columns.column(pack, i);
            if (!per_column) {
              row_sums[k] += beyond.gradients[k][i];
            } else if (want_sums && column < r.columns.count) {
              // A row of this length has the block to itself, and this thread its columns.
              C* sum = partial + (row_block * 3 + k) * p.units + column;
              *sum = (round ? *sum : C(0)) + beyond.gradients[k][i];
            }
          }
        }
      }
    }
    if (!per_column && want_sums) {
      team.template reduce<Sum>(row_sums);
      if (r.columns.count > 0 && team.lane() == 0) {
        const int64_t unit = row / p.unit_rows % p.units, group = row / p.unit_rows / p.units;
        const int64_t place = row % p.unit_rows * plan.tiles + tile;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          partial[((group * 3 + k) * p.units + unit) * plan.inner + place] = row_sums[k];
        }
      }
    }
  }
  if (!per_column || !want_sums) return;
  add_teams(team, column_sums);
  if (team.index() > 0) return;
  const LifGateColumns<T> columns{cols, team.lane(), team.size, plan.vectors};
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < kWidth; ++i) {
      const int64_t column = columns.column(0, i);
      if (column >= cols) continue;
      partial[(row_block * 3 + k) * p.units + first + column] = column_sums[k * kWidth + i];
    }
  }
}

// Adds the partial sums [outer, count, inner] over outer and inner, `slices` threads to an output.
// Where inner is 1, neighbouring threads should read neighbouring outputs, so thread t of a block
// works on output t % outputs.
template <typename C>
__global__ void __launch_bounds__(kLifGateThreads)
    lif_gate_sum_kernel(const C* partial, int64_t outer, int64_t count, int64_t inner, int slices,
                        C* out) {
  double* sums = shared_memory<double>();
  const int outputs = int(blockDim.x) / slices, slice = int(threadIdx.x) / outputs;
  const int64_t output = int64_t(blockIdx.x) * outputs + int(threadIdx.x) % outputs;
  double sum = 0;
  if (output < count) {
    for (int64_t term = slice; term < outer * inner; term += slices) {
      sum += partial[(term / inner * count + output) * inner + term % inner];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || output >= count) return;
  for (int other = 1; other < slices; ++other) sum += sums[other * outputs + int(threadIdx.x)];
  out[output] = C(sum);
}

}  // namespace cuda
}  // namespace ember
