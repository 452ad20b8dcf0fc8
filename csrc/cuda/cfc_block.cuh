// Shared by the CfC scan's recurrent kernels on a GPU: the plan of a launch, a block's rows of the
// batch and share of the units, and the product of these rows by a matrix.
#pragma once

#include "../common/cfc_scan.h"
#include "cfc_product.cuh"
#include "cluster.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kCfcParts = 4, kCfcMostLayers = 16;

constexpr int kCfcThreads = 512;  // of a block

constexpr int kCfcMostClusterLog2 = 3;  // 8 blocks, as many as every GPU with clusters takes

// Rows of the batch to a block. Each weight is read once for all of them, so that reading it from
// shared memory takes about as long as the arithmetic.
template <typename C>
constexpr int kCfcRows = WidestPack<C>::kElements;

// A value of each of a block's rows.
template <typename C>
using CfcRows = Pack<C, kCfcRows<C>>;

// What a thread reads of a row of weights: neighbouring units of one head.
template <typename C>
using CfcWeights = Pack<C, kCfcParts>;

// A matrix [depth, heads, units] by which a cluster's rows are multiplied at every step, packed as
// [depth, packs, heads, kCfcParts], a pack being kCfcParts units, with zeros after the last unit.
// The blocks of a cluster share out the packs. A block's part of a row is at most `width` pieces of
// kCfcParts weights. A thread adds up one of them over one of the `slices` of the depth; `lanes`
// threads share a slice.
struct CfcMap {
  const void* weight;                          // CfcWeights<C> [depth, packs * heads]
  int depth, units, heads, packs, row, width;  // row: packs * heads
  int lanes, slices;
  // Up to so many rows of each slice are in shared memory, from this element on. They are a slice's
  // first or its last: while some slices work on theirs, others do on what the cache brings.
  int resident, resident_at;
  int turn;  // slices of one kind before some of the other: whole warps

  EMBER_HD int begin_of(int slice) const { return depth * slice / slices; }
  EMBER_HD bool is_late(int slice) const { return slice / turn % 2 != 0; }
  EMBER_HD int held_from(int slice) const {
    const int begin = begin_of(slice), late = begin_of(slice + 1) - resident;
    return is_late(slice) && late > begin ? late : begin;
  }
  EMBER_HD int held_to(int slice) const {
    const int end = begin_of(slice + 1), early = begin_of(slice) + resident;
    return is_late(slice) || early > end ? end : early;
  }
  // Between the parts of a slice's sums in shared memory: such that neighbouring units, whether of
  // one part or of several, lie in different banks.
  EMBER_HD int part_stride() const { return (lanes + 5) / 8 * 8 + 2; }
};

// A layer as one pass sees it. Tapes are as in ../common/cfc_scan.h, at the chunk's first slot.
struct CfcScanLayer {
  CfcMap map;  // forward: of its input; backward: of the gradients of its output
  // Forward: where its input lies among the block's vectors; for the first layer two states.
  // Backward: where the gradients of its output do.
  int vector;
  const void* bias;  // C, elements `bias_stride` apart; not of the first layer
  int64_t bias_stride;
  void *input, *kept;
  int64_t input_stride, kept_stride;
  void* grads;  // C [steps, batch, segments * units]
};

struct CfcScanPlan {
  CfcScanLayer layers[kCfcMostLayers];
  // Elements of shared memory, which begins with what slices exchange: then the sums of warps, the
  // vectors, and the weights.
  int sums_at, vectors_at;
  int cluster_log2;  // of the number of blocks to a cluster
  // The blocks' vectors, C [blocks, vectors, kCfcRows], where they do not fit in shared memory.
  void* vectors;
  int64_t vectors_size;
  int64_t first;  // step of the chunk
  int steps;
  bool keep;  // forward: whether to write the tape
  // Forward: the state before the chunk, and where to leave the one after it and, or null, to keep
  // the one before it. Backward: gradients of the state after the chunk, and before it.
  const void* from;
  int64_t from_stride;
  void *to, *border;
  int64_t to_stride;
  void* decay_grads;  // C [batch, 2, hidden], added to by backward; or null
};

// What one thread of a block knows of its place.
//
// The blocks of a cluster have the same rows of the batch, and each computes its share of the
// units: of every map those packs that its rank says. All that a map is applied to is in each
// block's vectors, so a unit's value is written to all of them, and then the blocks meet. One
// barrier to such an exchange is enough, because no two exchanges in succession write the same
// vector: where a block writes one again, all have met since the last of them read it.
template <typename C>
struct CfcBlock {
  static constexpr int kRows = kCfcRows<C>;

  const CfcScanParams& p;
  const CfcScanPlan& plan;
  C* shared;
  CfcRows<C>* vectors;
  int rank;  // within the cluster
  int64_t first_row;

  __device__ __forceinline__ CfcBlock(const CfcScanParams& p_, const CfcScanPlan& plan_)
      : p(p_), plan(plan_), shared(shared_memory<C>()), rank(has_clusters() ? cluster_rank() : 0) {
    first_row = int64_t(blockIdx.x >> cluster_log2()) * kRows;
    vectors = plan.vectors ? static_cast<CfcRows<C>*>(plan.vectors) + blockIdx.x * plan.vectors_size
                           : reinterpret_cast<CfcRows<C>*>(shared + plan.vectors_at);
    for (int l = 0; l < p.num_layers; ++l) load_resident(plan.layers[l].map);
  }

  __device__ __forceinline__ int cluster_log2() const {
    return has_clusters() ? plan.cluster_log2 : 0;
  }
  __device__ __forceinline__ int blocks() const { return 1 << cluster_log2(); }
  __device__ __forceinline__ bool is_clustered() const { return cluster_log2() > 0; }
  // For what two exchanges in succession would write: a cluster has two of it.
  __device__ __forceinline__ int turn(int slot) const { return is_clustered() ? slot % 2 : 0; }

  // The block's packs of so many are those from one to another. Computed anew for each use: kept
  // over a product, they cost registers that it needs.
  __device__ __forceinline__ int first_pack(int packs) const {
    return has_clusters() ? (packs * in_place(rank)) >> plan.cluster_log2 : 0;
  }
  __device__ __forceinline__ int end_pack(int packs) const {
    return has_clusters() ? (packs * (in_place(rank) + 1)) >> plan.cluster_log2 : packs;
  }
  // Of a row of a map how many pieces are the block's, and the unit after its last.
  __device__ __forceinline__ int columns(const CfcMap& map) const {
    return has_clusters() ? (end_pack(map.packs) - first_pack(map.packs)) * map.heads : map.row;
  }
  __device__ __forceinline__ int end_unit(const CfcMap& map) const {
    return has_clusters() ? min(end_pack(map.packs) * kCfcParts, map.units) : map.units;
  }

  __device__ __forceinline__ void load_resident(const CfcMap& map) const {
    const auto* weight =
        static_cast<const CfcWeights<C>*>(map.weight) + first_pack(map.packs) * map.heads;
    auto* resident = reinterpret_cast<CfcWeights<C>*>(shared + map.resident_at);
    const int columns = this->columns(map);
    for (int slice = 0; slice < map.slices; ++slice) {
      const int from = map.held_from(slice), size = (map.held_to(slice) - from) * columns;
      for (int i = int(threadIdx.x); i < size; i += kCfcThreads) {
        const int k = i / columns, column = i % columns;
        resident[(slice * map.resident + k) * map.width + column] =
            weight[int64_t(from + k) * map.row + column];
      }
    }
  }

  // Writes a value of a vector, in every block of the cluster.
  __device__ __forceinline__ void publish(C* place, C value) const {
    if (!is_clustered()) {
      *place = value;
      return;
    }
    // Not all to the same block at the same time.
    for (int i = 0; i < blocks(); ++i) {
      *shared_of_rank(place, (rank + i) & (blocks() - 1)) = value;
    }
  }
  // All threads of the cluster meet, and what they published can be read.
  __device__ __forceinline__ void meet() const {
    if (is_clustered()) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ bool exists(int row) const { return first_row + row < p.batch; }
  __device__ __forceinline__ bool runs(int row, int64_t t) const {
    return exists(row) && (!p.lengths || t < p.lengths[first_row + row]);
  }
  __device__ __forceinline__ C timespan(int row, int64_t t) const {
    return static_cast<const C*>(p.timespans)[(first_row + row) * p.steps + t];
  }
  // Of a piece of the tape or of the gradients, the row that belongs to one of the block's.
  __device__ __forceinline__ C* piece(void* from, int64_t stride, int slot, int row) const {
    return static_cast<C*>(from) + (in_place(slot) * p.batch + first_row + row) * stride;
  }
  __device__ __forceinline__ C* state(int slot, int row) const {
    const CfcScanLayer& first = plan.layers[0];
    return piece(first.input, first.input_stride, slot, row) + 1 + p.inputs;
  }
  __device__ __forceinline__ const C* dropout_scale(int layer, int row, int64_t t) const {
    const int64_t scaled = p.num_layers - 2;
    if (!p.dropout_scale || layer == 0) return nullptr;
    return static_cast<const C*>(p.dropout_scale) +
           (((first_row + row) * p.steps + t) * scaled + layer - 1) * plan.layers[layer].map.units;
  }

  // body(unit, row, index) for the block's rows, and its share of the state or all of it. A thread
  // meets one row only.
  template <typename Body>
  __device__ __forceinline__ void for_own_states(const Body& body) const {
    const int packs = int(ceil_div(p.hidden, kCfcParts));
    const int64_t end = int64_t(end_pack(packs)) * kCfcParts;
    for_states(int64_t(first_pack(packs)) * kCfcParts, end < p.hidden ? end : p.hidden, body);
  }
  template <typename Body>
  __device__ __forceinline__ void for_all_states(const Body& body) const {
    for_states(0, p.hidden, body);
  }
  __device__ __forceinline__ bool owns(int unit) const {
    const int packs = int(ceil_div(p.hidden, kCfcParts));
    const int pack = unit / kCfcParts;
    return first_pack(packs) <= pack && pack < end_pack(packs);
  }

 private:
  template <typename Body>
  __device__ __forceinline__ void for_states(int64_t first, int64_t end, const Body& body) const {
    for (int64_t i = first * kRows + threadIdx.x; i < end * kRows; i += kCfcThreads) {
      body(int(i / kRows), int(i % kRows), i);
    }
  }
};

// Bytes of each part of the weights that a thread asks for ahead of using them: as many as fit the
// registers. For the newest architectures the compiler keeps more else there; in clusters few
// weights are not resident.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kCfcAhead = 16;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kCfcAhead = 24;
#else
constexpr int kCfcAhead = 32;
#endif

// A thread's sums: [part][row] of the weight times the row's value.
template <typename C>
struct CfcSums {
  C values[kCfcParts][kCfcRows<C>];

  __device__ __forceinline__ void add(CfcWeights<C> weights, CfcRows<C> in) {
#pragma unroll
    for (int part = 0; part < kCfcParts; ++part) {
#pragma unroll
      for (int row = 0; row < kCfcRows<C>; ++row) {
        values[part][row] += weights.values[part] * in.values[row];
      }
    }
  }

  // `count` weights that are `width` apart, in shared memory.
  __device__ __forceinline__ void add_resident(const CfcWeights<C>* weights, int width,
                                               const CfcRows<C>* in, int count) {
#pragma unroll 4
    for (; count > 0; --count, ++in, weights += width) add(*weights, *in);
  }

  // And in global memory: each is asked for several turns before it is used, since the second-level
  // cache takes long to answer.
  __device__ __forceinline__ void add_remote(const CfcWeights<C>* weights, int width,
                                             const CfcRows<C>* in, int count) {
    if (count <= 0) return;
    constexpr int ahead = kCfcAhead / sizeof(C);
    CfcWeights<C> next[ahead];
    int at = 0;
    const int last = (count - 1) * width;
    const auto ask = [&](int i) {
      next[i] = weights[at];
      at = min(at + width, last);
    };
#pragma unroll
    for (int i = 0; i < ahead; ++i) ask(i);
    for (; count > ahead; count -= ahead, in += ahead) {
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        add(next[i], in[i]);
        ask(i);
      }
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (i < count) add(next[i], in[i]);
    }
  }
};

// Multiplies a block's rows by its share of a map: epilogue(unit, row, results), with the results
// of all heads. initial(unit, head, row), of kCfcParts units, is added to them. All threads must
// call this together, and may do so again at once. If the epilogue publishes, the cluster meets at
// the end, else only the block does.
template <int heads, typename C, typename Initial, typename Epilogue>
__device__ __forceinline__ void multiply(const CfcBlock<C>& block, const CfcMap& map,
                                         const CfcRows<C>* in, bool publishes,
                                         const Initial& initial, const Epilogue& epilogue) {
  constexpr int rows = kCfcRows<C>, parts = kCfcParts;
  C* const shared = block.shared;
  const int lane = int(threadIdx.x) % map.lanes, slice = int(threadIdx.x) / map.lanes;
  const int part_stride = map.part_stride();
  for (int base = 0; base < block.columns(map); base += map.lanes) {
    const int column = base + lane;
    if (slice < map.slices && column < block.columns(map)) {
      const int begin = map.begin_of(slice), end = map.begin_of(slice + 1);
      const bool late = map.is_late(slice);
      const int border = late ? map.held_from(slice) : map.held_to(slice);
      const int held = slice * map.resident - map.held_from(slice);
      const auto* resident = reinterpret_cast<const CfcWeights<C>*>(shared + map.resident_at);
      const auto* remote =
          static_cast<const CfcWeights<C>*>(map.weight) + block.first_pack(map.packs) * heads;
      // Asked for before the products, whose time hides that of these reads.
      CfcWeights<C> totals[rows] = {};
      if (slice == 0) {
        const int first_pack = block.first_pack(map.packs);
#pragma unroll
        for (int row = 0; row < rows; ++row) {
          totals[row] = initial((first_pack + column / heads) * parts, column % heads, row);
        }
      }
      for (int from = begin; from < end; from += kCfcStretch) {
        const int to = min(from + kCfcStretch, end), middle = min(max(border, from), to);
        CfcSums<C> sums = {};
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const int k = half ? middle : from, count = (half ? to : middle) - k;
          if (int(late) == half) {
            sums.add_resident(resident + (held + k) * map.width + column, map.width, in + k, count);
          } else {
            sums.add_remote(remote + int64_t(k) * map.row + column, map.row, in + k, count);
          }
        }
#pragma unroll
        for (int row = 0; row < rows; ++row) {
#pragma unroll
          for (int part = 0; part < parts; ++part) {
            totals[row].values[part] += sums.values[part][row];
          }
        }
      }
      auto* exchange = reinterpret_cast<CfcRows<C>*>(shared) + slice * parts * part_stride + lane;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        CfcRows<C> result;
#pragma unroll
        for (int row = 0; row < rows; ++row) result.values[row] = totals[row].values[part];
        exchange[part * part_stride] = result;
      }
    }
    __syncthreads();
    const int first = (block.first_pack(map.packs) + base / heads) * parts;
    const int results_here = min(map.lanes / heads * parts, block.end_unit(map) - first) * rows;
    for (int i = int(threadIdx.x); i < results_here; i += kCfcThreads) {
      const int row = i % rows, unit = i / rows;
      const C* sums = shared + (unit % parts * part_stride + unit / parts * heads) * rows + row;
      C results[heads];
#pragma unroll
      for (int head = 0; head < heads; ++head) results[head] = sums[head * rows];
#pragma unroll 2
      for (int other = 1; other < map.slices; ++other) {
        sums += parts * part_stride * rows;
#pragma unroll
        for (int head = 0; head < heads; ++head) results[head] += sums[head * rows];
      }
      epilogue(first + unit, row, results);
    }
    if (base + map.lanes < block.columns(map)) __syncthreads();
  }
  if (publishes) {
    block.meet();
  } else {
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace ember
