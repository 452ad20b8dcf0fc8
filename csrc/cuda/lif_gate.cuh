// The LIF gate on a GPU: one read of x and one write of y forward; one read of x and grad_y and one
// write of grad_x backward.
//
// A thread works on several packs at once, so that their loads overlap. Where a norm, or sums over
// rows, need whole rows, they lie along a row, which belongs to a team of threads: part of a warp,
// a warp, which needs no barriers, or a block. The row stays in registers between the sums for its
// norms and what follows from them; only columns beyond what a team holds are read twice. Else the
// packs lie below each other, in rows that share the parameters of their columns.
//
// Parameter gradients are added up in two stages in an order that depends on the shape alone: each
// block leaves partial sums, and a second kernel adds those.
#pragma once

#include "../common/lif_gate.h"
#include "../common/lif_gate_math.h"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kLifGateThreads = 128;  // of a block of several teams, and of the largest team
constexpr int kLifGateSumThreads = 256;

// How the matrix is shared out. Block b works on tile b % tiles of row block b / tiles.
struct LifGatePlan {
  int team;            // threads that share a row
  int threads;         // of a block
  int rounds;          // rows that each team works on
  int64_t row_blocks;  // of threads / team * rounds rows
  int64_t tile_cols;   // the parts of a row; with a norm there is one
  unsigned tiles;
  bool vectors;  // whether packs can be loaded and stored whole
  // Partial parameter gradients, C [outer, 3, units, inner]: units that are columns have one for
  // each row block (outer), units that are rows one for each row and tile.
  int64_t outer, inner;
};

// A pack is 16 bytes of fp32 or fp64, 8 of bf16 or fp16: 16 would leave half a warp without work
// more often, and take more registers.
template <typename T>
constexpr int kLifGatePack = sizeof(T) == 8 ? 2 : 4;
constexpr int kLifGatePacks = 4;  // of a thread
// Of a multiprocessor at least: a thread gets 128 registers, or 168 for fp64.
template <typename T>
constexpr int kLifGateBlocks = sizeof(T) == 8 ? 3 : 4;

__device__ __forceinline__ float square_root(float v) {
  return sqrtf(v);
}
__device__ __forceinline__ double square_root(double v) {
  return sqrt(v);
}

// A thread's pack of a strip, the columns of a row that a team has one pack each of. Without
// `vectors`, packs cannot be accessed whole, and neighbouring threads take neighbouring columns.
template <typename T, bool vectors>
struct LifGateStrip {
  static constexpr int kWidth = kLifGatePack<T>;

  int cols, origin, step;

  __device__ __forceinline__ LifGateStrip(int team, int lane)
      : cols(team * kWidth), origin(vectors ? lane * kWidth : lane), step(vectors ? 1 : team) {}

  __device__ __forceinline__ int column(int i) const { return origin + i * step; }

  // Columns from `limit` on become 0.
  template <typename U>
  __device__ __forceinline__ Pack<U, kWidth> load(const U* strip, int limit) const {
    Pack<U, kWidth> to{};
    if (vectors) {
      if (origin < limit) to = *reinterpret_cast<const Pack<U, kWidth>*>(strip + origin);
    } else {
      int at = in_place(origin);
#pragma unroll
      for (int i = 0; i < kWidth; ++i, at += step) {
        if (at < limit) to.values[i] = strip[at];
      }
    }
    return to;
  }

  __device__ __forceinline__ void store(const compute_t<T> (&from)[kWidth], T* strip,
                                        int limit) const {
    if (vectors) {
      if (origin >= limit) return;
      Pack<T, kWidth> values;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) narrow(from[i], values.values[i]);
      *reinterpret_cast<Pack<T, kWidth>*>(strip + origin) = values;
    } else {
      int at = in_place(origin);
#pragma unroll
      for (int i = 0; i < kWidth; ++i, at += step) {
        if (at < limit) narrow(from[i], strip[at]);
      }
    }
  }
};

// Where a thread works: its block's tile, its team's rows and its packs of those.
template <typename T, bool along, bool vectors>
struct LifGatePlace {
  // Packs, and rows, that a thread works on at once. An access for each element takes registers.
  static constexpr int kPacks = along || vectors ? kLifGatePacks : kLifGatePacks / 2;
  static constexpr int kRows = along ? 1 : kPacks;

  LifGateStrip<T, vectors> strip;
  int64_t first, row, offset, row_step;  // column and row, the first element, between rows
  int row_block, tile;
  int64_t cols;  // of the tile
  int held;      // those of them that the team has packs of
  int rows;      // that the team has
  int row_gap;   // between these

  __device__ __forceinline__ LifGatePlace(const LifGateParams& p, const LifGatePlan& plan, int lane,
                                          int team, int teams)
      : strip(plan.team, lane) {
    tile = int(blockIdx.x % plan.tiles);
    row_block = int(blockIdx.x / plan.tiles);
    first = int64_t(tile) * plan.tile_cols;
    cols = min(plan.tile_cols, p.cols - first);
    held = int(min(cols, int64_t(strip.cols) * (along ? kPacks : 1)));
    row = int64_t(row_block) * plan.rounds * teams + team;
    row_gap = teams;
    rows = int(max(int64_t(0), min(int64_t(plan.rounds), (p.rows - row + teams - 1) / teams)));
    offset = row * p.cols + first;
    row_step = teams * p.cols;
  }

  // Of pack j: its strip, seen from the thread's row, and the columns of it that exist where there
  // are `left` rows from there on.
  __device__ __forceinline__ int64_t at(int j) const {
    const int pack = vectors ? j : in_place(j);
    return along ? int64_t(pack * strip.cols) : pack * row_step;
  }
  __device__ __forceinline__ int limit(int j, int left) const {
    return (along ? 0 : j) < left ? held - (along ? j * strip.cols : 0) : 0;
  }

  // Whether anyone has columns in pack j.
  __device__ __forceinline__ bool has(int j) const { return !along || j * strip.cols < held; }

  __device__ __forceinline__ void load(const T* from, int left,
                                       Pack<T, kLifGatePack<T>> (&to)[kPacks]) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) to[j] = strip.load(from + at(j), limit(j, left));
  }
};

// The parameters of a pack's columns, or of its row.
template <typename T, bool per_column>
struct LifGateUnits {
  using C = compute_t<T>;
  Pack<C, per_column ? kLifGatePack<T> : 1> threshold, leak, steepness;

  // Of the columns of a strip, the first of which is `unit`.
  template <typename Strip>
  __device__ __forceinline__ void load(const LifGateParams& p, int64_t unit, const Strip& strip,
                                       int limit) {
    threshold = strip.load(static_cast<const C*>(p.threshold) + unit, limit);
    leak = strip.load(static_cast<const C*>(p.leak) + unit, limit);
    steepness = strip.load(static_cast<const C*>(p.steepness) + unit, limit);
  }
  __device__ __forceinline__ void load_one(const LifGateParams& p, int64_t unit) {
    threshold.values[0] = static_cast<const C*>(p.threshold)[unit];
    leak.values[0] = static_cast<const C*>(p.leak)[unit];
    steepness.values[0] = static_cast<const C*>(p.steepness)[unit];
  }

  __device__ __forceinline__ C theta(int i) const { return threshold.values[per_column ? i : 0]; }
  __device__ __forceinline__ C lambda(int i) const { return leak.values[per_column ? i : 0]; }
  __device__ __forceinline__ C k(int i) const { return steepness.values[per_column ? i : 0]; }

  // f and 1 - f.
  __device__ __forceinline__ void firing(int i, C x, C& fire, C& smoulder) const {
    const C odds = gate_odds(absolute(x), theta(i), k(i));
    fire = quotient(C(1), C(1) + odds);
    smoulder = odds * fire;
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
//
// `count` columns, 0 where there is no row, are of `unit` and those that follow, or all of `unit`.
template <bool per_column, typename T, int n>
__device__ __forceinline__ LifGateRow<compute_t<T>> finish_row(const LifGateParams& p,
                                                               const Team<compute_t<T>>& team,
                                                               int64_t count, int64_t unit,
                                                               const T* x, const T* grad_y,
                                                               compute_t<T> (&sums)[n]) {
  using C = compute_t<T>;
  const C tiny = C(sizeof(C) == 4 ? 1e-24 : 1e-280), huge = C(sizeof(C) == 4 ? 1e36 : 1e280);
  LifGateRow<C> row{};
  row.inverse = 1;
  row.zero = count == 0;
  team.template reduce<Sum>(sums);
  const bool doubtful = count > 0 && !(sums[0] > tiny && sums[0] < huge && sums[1] > tiny);
  // Teams of several warps are blocks, of one mind here.
  if (team.size > kWarp ? doubtful : __any_sync(kAllLanes, doubtful)) {
    C largest[1] = {0};
    for (int64_t j = team.lane(); j < count; j += team.size) {
      largest[0] = Maximum::of(C(absolute(widen(x[j]))), largest[0]);
    }
    team.template reduce<Maximum>(largest);
    const C inverse = inverse_scale(largest[0]);
    C again[n] = {};
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
      ratio = finish_row<per_column>(p, team, count, unit, row(), row(), sums).ratio();
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
    from_x = row.dot / (row.y_norm + row.eps);
    from_y = -from_x * ratio;
    if (norm == Norm::l2) {
      from_y = row.y_norm > 0 ? from_y / row.y_norm : C(0);
      from_x /= row.x_norm;
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
      const C slope = gate_slope(fire, smoulder, units.lambda(i));
      C dy = widen(grad_ys.values[i]), through_norm = 0;
      if (normed) {
        dy = ratio * dy + from_y * norm_slope(norm, x * g * inverse);
        through_norm = from_x * norm_slope(norm, x * inverse);
      }
      const int at = m > 1 ? i : 0;
      gradients[0][at] += dy * gate_dy_dthreshold(x, units.k(i), slope);
      gradients[1][at] += dy * x * smoulder;
      gradients[2][at] += dy * gate_dy_dsteepness(x, magnitude, units.theta(i), slope);
      grad_x[i] = through_norm + dy * gate_dy_dx(magnitude, units.k(i), g, slope);
    }
  }
};

// Adds up the teams' sums of a strip's columns and leaves the block's, [3, units], at `partial`.
template <typename Strip, typename C, int n>
__device__ __forceinline__ void store_column_sums(const Team<C>& team, const Strip& strip,
                                                  C (&sums)[3][n], int limit, int64_t units,
                                                  C* partial) {
  const bool alone = team.count() == 1;
  const int warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      for (int offset = kWarp / 2; offset >= team.size; offset /= 2) {
        sums[k][i] += __shfl_xor_sync(kAllLanes, sums[k][i], offset);
      }
      const int column = strip.column(i);
      if (!alone) {
        if (int(threadIdx.x) % kWarp < team.size) {
          team.exchange[(warp * 3 + k) * strip.cols + column] = sums[k][i];
        }
      } else if (column < limit) {
        partial[k * units + column] = sums[k][i];
      }
    }
  }
  if (alone) return;
  __syncthreads();
  const int values = 3 * strip.cols, warps = int(blockDim.x) / kWarp;
  for (int value = int(threadIdx.x); value < values; value += int(blockDim.x)) {
    const int k = value / strip.cols, column = value % strip.cols;
    if (column >= limit) continue;
    C sum = team.exchange[value];
    for (int w = 1; w < warps; ++w) sum += team.exchange[w * values + value];
    partial[k * units + column] = sum;
  }
  __syncthreads();
}

template <typename T, bool normed, bool per_column, bool vectors>
__device__ __forceinline__ void lif_gate_backward(const LifGateParams& p, const LifGatePlan& plan) {
  using C = compute_t<T>;
  constexpr bool along = normed || !per_column;
  constexpr int kWidth = kLifGatePack<T>, kStrips = along ? kLifGatePacks : 1;
  // With a norm, registers for a row's columns go to their sums: parameters are loaded anew.
  constexpr bool kept = !(normed && per_column);
  // Nor is there room for what single elements' addresses take: x and grad_y are loaded anew, too.
  constexpr bool again = !kept && !vectors;
  using Place = LifGatePlace<T, along, vectors>;
  const Team<C> team{plan.team, shared_memory<C>()};
  const Place place(p, plan, team.lane(), team.index(), team.count());
  const auto& strip = place.strip;
  const bool want_sums = p.grad_parameters != nullptr;
  int64_t offset = place.offset;
  C* const partial = static_cast<C*>(p.partial_gradients);
  // The block's sums, where units are columns.
  const auto columns = [&] {
    return partial + int64_t(in_place(place.row_block)) * 3 * p.units + place.first;
  };
  C column_sums[per_column ? kStrips : 1][3][kWidth] = {};
  LifGateThreadUnits<T, along && kept, per_column> units;
  int64_t unit = place.first;
  if (per_column && kept) units.load(p, place, unit);
  const int rounds = along ? plan.rounds : place.rows;
  for (int done = 0; done < rounds; done += Place::kRows) {
    const int left = place.rows - done;
    const int64_t count = left > 0 ? place.cols : 0;
    const int64_t row = place.row + int64_t(done) * place.row_gap;
    const auto x = [&] { return static_cast<const T*>(p.x) + in_place(offset); };
    const auto grad_y = [&] { return static_cast<const T*>(p.grad_y) + in_place(offset); };
    const auto grad_x = [&] { return static_cast<T*>(p.grad_x) + in_place(offset); };
    Pack<T, kWidth> xs[Place::kPacks], grad_ys[Place::kPacks];
    place.load(x(), left, xs);
    place.load(grad_y(), left, grad_ys);
    if (!per_column) {
      unit = lif_gate_unit(p, row);
      units.load(p, place, unit);
    }
    const auto gates_of = [&](int j) {
      LifGateUnits<T, per_column> gates;
      if constexpr (kept) {
        gates = units.pack(j);
      } else {
        const int first = in_place(j * strip.cols);
        gates.load(p, unit + first, strip, place.held - first);
      }
      return gates;
    };

    LifGateRowBackward<C> r;
    C row_sums[3][1] = {};
    // Columns beyond those that are held: what they add to the sums, or their gradients.
    const auto beyond = [&](bool store) {
      for (int64_t at = place.held; at < count; at += strip.cols) {
        const int limit = int(min(count - at, int64_t(strip.cols)));
        const Pack<T, kWidth> pack = strip.load(x() + at, limit);
        const Pack<T, kWidth> grad_pack = strip.load(grad_y() + at, limit);
        LifGateUnits<T, per_column> gates;
        if constexpr (per_column) {
          gates.load(p, unit + at, strip, limit);
        } else {
          gates = units.pack(0);
        }
        if (!store) {
          r.add(p.norm, gates, pack, grad_pack);
          continue;
        }
        C out[kWidth];
        if constexpr (per_column) {
          C gradients[3][kWidth] = {};
          r.template differentiate<normed>(p.norm, gates, pack, grad_pack, out, gradients);
          for (int k = 0; want_sums && k < 3; ++k) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              // A row of this length has the block to itself, and this thread its columns.
              C* sum = columns() + k * p.units + at + strip.column(i);
              if (strip.column(i) < limit) *sum = (done ? *sum : C(0)) + gradients[k][i];
            }
          }
        } else {
          r.template differentiate<normed>(p.norm, gates, pack, grad_pack, out, row_sums);
        }
        strip.store(out, grad_x() + at, limit);
      }
    };
    if constexpr (normed) {
#pragma unroll
      for (int j = 0; j < Place::kPacks; ++j) {
        if (place.has(j)) r.add(p.norm, gates_of(j), xs[j], grad_ys[j]);
      }
      beyond(false);
      r.finish(p.norm, finish_row<per_column>(p, team, count, unit, x(), grad_y(), r.sums));
    }
#pragma unroll
    for (int j = 0; j < Place::kPacks; ++j) {
      if (!place.has(j)) continue;
      if constexpr (again) {
        xs[j] = strip.load(x() + place.at(j), place.limit(j, left));
        grad_ys[j] = strip.load(grad_y() + place.at(j), place.limit(j, left));
      }
      C out[kWidth];
      if constexpr (per_column) {
        r.template differentiate<normed>(p.norm, gates_of(j), xs[j], grad_ys[j], out,
                                         column_sums[along ? j : 0]);
      } else {
        r.template differentiate<normed>(p.norm, gates_of(j), xs[j], grad_ys[j], out, row_sums);
      }
      strip.store(out, grad_x() + place.at(j), place.limit(j, left));
    }
    if constexpr (normed) beyond(true);
    if (!per_column && want_sums) {
      C sums[3] = {row_sums[0][0], row_sums[1][0], row_sums[2][0]};
      team.template reduce<Sum>(sums);
      if (left > 0 && team.lane() == 0) {
        const int64_t group = row / p.unit_rows / p.units;
        const int64_t spot = row % p.unit_rows * plan.tiles + place.tile;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          partial[((group * 3 + k) * p.units + unit) * plan.inner + spot] = sums[k];
        }
      }
    }
    offset += Place::kRows * (in_place(place.row_gap) * p.cols);
  }
  if constexpr (per_column) {
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      if (!want_sums || !place.has(j)) return;
      store_column_sums(team, strip, column_sums[j], place.held - j * strip.cols, p.units,
                        columns() + j * strip.cols);
    }
  }
}

template <typename T, bool normed, bool per_column>
__global__ void __launch_bounds__(kLifGateThreads, kLifGateBlocks<T>)
    lif_gate_backward_kernel(LifGateParams p, LifGatePlan plan) {
  if (plan.vectors) {
    lif_gate_backward<T, normed, per_column, true>(p, plan);
  } else {
    lif_gate_backward<T, normed, per_column, false>(p, plan);
  }
}

// Adds the partial sums [outer, count, inner] over outer and inner, `slices` threads to an output.
// Where inner is 1, neighbouring threads should read neighbouring outputs, so thread t of a block
// works on output t % outputs.
template <typename C>
__global__ void __launch_bounds__(kLifGateSumThreads)
    lif_gate_sum_kernel(const C* partial, int64_t outer, int64_t count, int64_t inner, int slices,
                        C* out) {
  double* sums = shared_memory<double>();
  const int outputs = int(blockDim.x) / slices, slice = int(threadIdx.x) / outputs;
  const int64_t output = int64_t(blockIdx.x) * outputs + int(threadIdx.x) % outputs;
  double sum = 0;
  if (output < count) {
    // Term o * inner + i; the next is `slices` further, which takes no division.
    const int64_t steps = slices / inner, rest = slices % inner;
    int64_t o = slice / inner, i = slice % inner;
    while (o < outer) {
      // Loads in flight together; what is past the end adds 0.
      C terms[4] = {};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (o < outer) terms[n] = partial[(o * count + output) * inner + i];
        o += steps;
        i += rest;
        if (i >= inner) {
          i -= inner;
          ++o;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) sum += terms[n];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) sums[threadIdx.x] += sums[int(threadIdx.x) + half * outputs];
  }
  if (slice == 0 && output < count) out[output] = C(sums[threadIdx.x]);
}

}  // namespace cuda
}  // namespace ember
