// How the LIF gate's kernels share out a matrix, and how a thread reads and writes its packs.
#pragma once

#include "../common/lif_gate.h"
#include "launch.cuh"
#include "pack.cuh"

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
// For sm_120 nvcc needs a few registers more where sums of columns and of rows meet.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <typename T, bool normed, bool per_column>
constexpr int kLifGateBackwardBlocks = normed && per_column ? 3 : kLifGateBlocks<T>;
#else
template <typename T, bool normed, bool per_column>
constexpr int kLifGateBackwardBlocks = kLifGateBlocks<T>;
#endif

// A thread's pack of a strip, the columns of a row that a team has one pack each of. Without
// `vectors`, packs cannot be accessed whole, and neighbouring threads take neighbouring columns.
template <typename T, bool vectors, int width = kLifGatePack<T>>
struct LifGateStrip {
  static constexpr int kWidth = width;

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

}  // namespace cuda
}  // namespace ember
