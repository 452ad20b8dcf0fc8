// The CfC scan on a GPU.
//
// A block takes a few rows of the batch through all steps of a chunk. It keeps their states and as
// much of the recurrent weights as fits in shared memory; the other weights are read anew at every
// step, from the second-level cache. A step is a product by each map of the cell, shared out over
// columns of the matrix and over slices of its depth, whose sums meet in shared memory. There, one
// thread for each unit and row computes the cell. Backward walks a chunk in reverse in the same way
// and leaves the gradients before activation of each step and row.
//
// What is not recurrent is done for a whole chunk at once, before or after it: the product of the
// input, the input's gradient, and the weights' gradients, which are added up in an order that
// depends on the shape alone. Nor do other results depend on how much fits in shared memory.
#pragma once

#include "../common/cfc_scan.h"
#include "pack.cuh"
#include "team.cuh"

namespace ember {
namespace cuda {

constexpr int kCfcParts = 4, kCfcMostLayers = 16;

constexpr int kCfcThreads = 512;  // of a block

// Terms that are added up one after the other: rounding errors grow with their number.
constexpr int kCfcStretch = 128;

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

// A matrix [depth, heads, units] by which a block multiplies at every step, packed as [depth,
// units / kCfcParts, heads, kCfcParts] with zeros after the last unit. A row is `width` packs. A
// thread adds up one of them over one of the `slices` of the depth; `lanes` threads share a slice.
struct CfcMap {
  const void* weight;  // CfcWeights<C> [depth, width]
  int depth, units, width;
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
template <typename C>
struct CfcBlock {
  static constexpr int kRows = kCfcRows<C>;

  const CfcScanParams& p;
  const CfcScanPlan& plan;
  C* shared;
  CfcRows<C>* vectors;
  int64_t first_row;

  __device__ __forceinline__ CfcBlock(const CfcScanParams& p_, const CfcScanPlan& plan_)
      : p(p_), plan(plan_), shared(shared_memory<C>()), first_row(int64_t(blockIdx.x) * kRows) {
    vectors = plan.vectors ? static_cast<CfcRows<C>*>(plan.vectors) + blockIdx.x * plan.vectors_size
                           : reinterpret_cast<CfcRows<C>*>(shared + plan.vectors_at);
    for (int l = 0; l < p.num_layers; ++l) {
      const CfcMap& map = plan.layers[l].map;
      const auto* weight = static_cast<const CfcWeights<C>*>(map.weight);
      auto* resident = reinterpret_cast<CfcWeights<C>*>(shared + map.resident_at);
      for (int slice = 0; slice < map.slices; ++slice) {
        const int from = map.held_from(slice), size = (map.held_to(slice) - from) * map.width;
        for (int i = int(threadIdx.x); i < size; i += kCfcThreads) {
          resident[slice * map.resident * map.width + i] = weight[int64_t(from) * map.width + i];
        }
      }
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
    return static_cast<C*>(from) + (slot * p.batch + first_row + row) * stride;
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

  // body(unit, row, index) for the block's units and rows. A thread meets one row only.
  template <typename Body>
  __device__ __forceinline__ void for_states(const Body& body) const {
    for (int64_t i = threadIdx.x; i < p.hidden * kRows; i += kCfcThreads) {
      body(int(i / kRows), int(i % kRows), i);
    }
  }
};

// Bytes of each part of the weights that a thread asks for ahead of using them: as many as fit the
// registers. For the newest architectures the compiler keeps more else there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kCfcAhead = 16;
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

// Multiplies a block's rows by a map: epilogue(unit, row, results), with the results of all heads.
// initial(unit, head, row), of kCfcParts units, is added to them. All threads must call this
// together, and may do so again at once.
template <int heads, typename C, typename Initial, typename Epilogue>
__device__ __forceinline__ void multiply(const CfcMap& map, C* shared, const CfcRows<C>* in,
                                         const Initial& initial, const Epilogue& epilogue) {
  constexpr int rows = kCfcRows<C>, parts = kCfcParts;
  const int lane = int(threadIdx.x) % map.lanes, slice = int(threadIdx.x) / map.lanes;
  const int part_stride = map.part_stride();
  for (int base = 0; base < map.width; base += map.lanes) {
    const int column = base + lane;
    if (slice < map.slices && column < map.width) {
      const int begin = map.begin_of(slice), end = map.begin_of(slice + 1);
      const bool late = map.is_late(slice);
      const int border = late ? map.held_from(slice) : map.held_to(slice);
      const int held = slice * map.resident - map.held_from(slice);
      const auto* resident = reinterpret_cast<const CfcWeights<C>*>(shared + map.resident_at);
      const auto* remote = static_cast<const CfcWeights<C>*>(map.weight);
      // Asked for before the products, whose time hides that of these reads.
      CfcWeights<C> totals[rows] = {};
      if (slice == 0) {
#pragma unroll
        for (int row = 0; row < rows; ++row) {
          totals[row] = initial(column / heads * parts, column % heads, row);
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
            sums.add_remote(remote + int64_t(k) * map.width + column, map.width, in + k, count);
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
    const int first = base / heads * parts;
    const int results_here = min(map.lanes / heads * parts, map.units - first) * rows;
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
    __syncthreads();
  }
}

template <typename C>
__device__ __forceinline__ Activated<C> activate(CfcActivation activation, C u) {
  switch (activation) {
    case CfcActivation::lecun_tanh:
      return activated<CfcActivation::lecun_tanh>(u);
    case CfcActivation::tanh:
      return activated<CfcActivation::tanh>(u);
    case CfcActivation::relu:
      return activated<CfcActivation::relu>(u);
    case CfcActivation::silu:
      return activated<CfcActivation::silu>(u);
    default:
      return activated<CfcActivation::gelu>(u);
  }
}

// The kept piece of the first layer holds the products of the input, and then what is kept.
template <typename T, int heads>
__global__ void __launch_bounds__(kCfcThreads, 1)
    cfc_scan_forward_kernel(CfcScanParams p, CfcScanPlan plan) {
  using C = compute_t<T>;
  constexpr int rows = kCfcRows<C>;
  const CfcBlock<C> block(p, plan);
  const int last = int(p.num_layers) - 1;
  const auto state_after = [&](int steps) { return block.vectors + steps % 2 * p.hidden; };
  const auto values = [](CfcRows<C>* vector) { return reinterpret_cast<C*>(vector); };
  block.for_states([&](int unit, int row, int64_t i) {
    C h = 0;
    if (block.exists(row)) {
      const int64_t b = block.first_row + row;
      h = static_cast<const C*>(plan.from)[b * plan.from_stride + unit];
      if (plan.border) static_cast<C*>(plan.border)[b * p.hidden + unit] = h;
      // The state of a row without steps is handed on and takes no part in anything else.
      if (!block.runs(row, 0)) h = 0;
      if (plan.keep) block.state(0, row)[unit] = h;
    }
    values(state_after(0))[i] = h;
  });
  // What the biases multiply, also above a layer without units.
  for (int l = 1; plan.keep && l <= last; ++l) {
    const CfcScanLayer& layer = plan.layers[l];
    for (int64_t i = threadIdx.x; i < int64_t(plan.steps) * rows; i += kCfcThreads) {
      if (!block.exists(int(i % rows))) continue;
      block.piece(layer.input, layer.input_stride, int(i / rows), int(i % rows))[0] = 1;
    }
  }
  __syncthreads();

  for (int slot = 0; slot < plan.steps; ++slot) {
    const int64_t t = plan.first + slot;
    const C* now = values(state_after(slot));
    C* next = values(state_after(slot + 1));
    // What `multiply` starts from: the input's product in the first layer, else the bias. Past the
    // last unit it is padding of the tape, which nobody writes; `multiply` drops what it leads to.
    const auto initial_of = [&](const CfcScanLayer& layer, bool is_first) {
      return [&block, &layer, is_first, slot](int unit, int head, int row) {
        CfcWeights<C> start = {};
        if (!is_first) {
          const int units = layer.map.units;
#pragma unroll
          for (int part = 0; part < kCfcParts; ++part) {
            const int64_t column = head * units + min(unit + part, units - 1);
            start.values[part] = static_cast<const C*>(layer.bias)[column * layer.bias_stride];
          }
        } else if (block.exists(row)) {
          const C* kept = block.piece(layer.kept, layer.kept_stride, slot, row);
          start = *reinterpret_cast<const CfcWeights<C>*>(kept + head * cfc_pad(layer.map.units) +
                                                          unit);
        }
        return start;
      };
    };
    const auto input_of = [&](int l) {
      return l ? block.vectors + plan.layers[l].vector : state_after(slot);
    };

    for (int l = 0; l < last; ++l) {
      const CfcScanLayer &layer = plan.layers[l], &above = plan.layers[l + 1];
      C* out = values(block.vectors + above.vector);
      multiply<1>(layer.map, block.shared, input_of(l), initial_of(layer, l == 0),
                  [&](int unit, int row, const C(&u)[1]) {
                    Activated<C> v = activate(p.activation, u[0]);
                    const bool runs = block.runs(row, t);
                    if (!runs) v = Activated<C>{0, 0};
                    if (block.exists(row)) {
                      if (const C* scale = runs ? block.dropout_scale(l, row, t) : nullptr) {
                        v.value *= scale[unit];
                        v.slope *= scale[unit];
                      }
                      if (plan.keep) {
                        C* kept = block.piece(above.input, above.input_stride, slot, row);
                        kept[1 + unit] = v.value;
                        block.piece(layer.kept, layer.kept_stride, slot, row)[unit] = v.slope;
                      }
                    }
                    out[unit * rows + row] = v.value;
                  });
    }

    const CfcScanLayer& layer = plan.layers[last];
    const int64_t padded = cfc_pad(p.hidden);
    multiply<heads>(layer.map, block.shared, input_of(last), initial_of(layer, last == 0),
                    [&](int unit, int row, C(&v)[heads]) {
                      C h = 0;
                      if (block.exists(row)) {
                        if constexpr (heads == 1) {
                          const C *w = static_cast<const C*>(p.decay), *amplitude = w + p.hidden;
                          h = pure_state(v[0], w[unit], amplitude[unit], block.timespan(row, t));
                        } else {
                          C exponent = v[2];
                          if constexpr (heads == 4) exponent = block.timespan(row, t) * v[2] + v[3];
                          const GatedCell<C> cell = gated_cell(v[0], v[1], exponent);
                          h = p.mode == CfcMode::no_gate ? gated_state<true>(cell)
                                                         : gated_state<false>(cell);
                          v[0] = cell.first;
                          v[1] = cell.second;
                          v[heads - 1] = cell.gate;  // with four heads the third stays time_a
                        }
                        const bool runs = block.runs(row, t);
                        if (p.y) {
                          const int64_t cell = (block.first_row + row) * p.steps + t;
                          narrow(runs ? h : C(0), static_cast<T*>(p.y)[cell * p.hidden + unit]);
                        }
                        if (!runs) h = now[unit * rows + row];
                        if (plan.keep) {
                          C* kept = block.piece(layer.kept, layer.kept_stride, slot, row) + unit;
#pragma unroll
                          for (int head = 0; head < heads; ++head) kept[head * padded] = v[head];
                          block.state(slot + 1, row)[unit] = h;
                        }
                      }
                      next[unit * rows + row] = h;
                    });
  }

  if (!plan.to) return;
  const C* state = values(state_after(plan.steps));
  block.for_states([&](int unit, int row, int64_t i) {
    if (!block.exists(row)) return;
    const int64_t b = block.first_row + row;
    static_cast<C*>(plan.to)[b * plan.to_stride + unit] =
        block.runs(row, 0) ? state[i]
                           : static_cast<const C*>(plan.from)[b * plan.from_stride + unit];
  });
}

// The gradients of the heads before activation, from what forward kept and the gradient of the
// state. Returns that of the time span, 0 where it is fixed.
template <int heads, typename C>
__device__ __forceinline__ C head_gradients(const CfcBlock<C>& block, const C* kept, int64_t padded,
                                            int unit, int row, int64_t t, C grad_h,
                                            C (&out)[heads]) {
  const CfcScanParams& p = block.p;
  if constexpr (heads == 1) {
    const C *w = static_cast<const C*>(p.decay), *amplitude = w + p.hidden;
    const PureGradients<C> g =
        pure_gradients(kept[0], w[unit], amplitude[unit], block.timespan(row, t), grad_h);
    out[0] = g.a;
    if (block.plan.decay_grads) {
      C* sums =
          static_cast<C*>(block.plan.decay_grads) + (block.first_row + row) * 2 * p.hidden + unit;
      sums[0] += g.w;
      sums[p.hidden] += g.amplitude;
    }
    return g.dt;
  } else {
    const GatedCell<C> cell{kept[0], kept[padded], kept[(heads - 1) * padded]};
    const GatedCell<C> g = p.mode == CfcMode::no_gate ? gated_gradients<true>(cell, grad_h)
                                                      : gated_gradients<false>(cell, grad_h);
    out[0] = g.first;
    out[1] = g.second;
    out[heads - 1] = g.gate;
    if constexpr (heads == 4) {
      out[2] = g.gate * block.timespan(row, t);
      return g.gate * kept[2 * padded];
    }
    return 0;
  }
}

template <typename T, int heads>
__global__ void __launch_bounds__(kCfcThreads, 1)
    cfc_scan_backward_kernel(CfcScanParams p, CfcScanPlan plan) {
  using C = compute_t<T>;
  constexpr int rows = kCfcRows<C>, warps = kCfcThreads / kWarp;
  const CfcBlock<C> block(p, plan);
  const int last = int(p.num_layers) - 1;
  const CfcScanLayer& head_layer = plan.layers[last];
  const int64_t padded = cfc_pad(p.hidden);
  C* carry = reinterpret_cast<C*>(block.vectors);
  C* sums = block.shared + plan.sums_at;
  const auto gradients_of = [&](const CfcScanLayer& layer) {
    return reinterpret_cast<C*>(block.vectors + layer.vector);
  };
  const auto no_start = [](int, int, int) { return CfcWeights<C>{}; };
  block.for_states([&](int unit, int row, int64_t i) {
    const int64_t b = block.first_row + row;
    carry[i] =
        block.exists(row) ? static_cast<const C*>(plan.from)[b * plan.from_stride + unit] : C(0);
  });
  __syncthreads();

  for (int slot = plan.steps - 1; slot >= 0; --slot) {
    const int64_t t = plan.first + slot;
    C grad_dt[1] = {0};
    block.for_states([&](int unit, int row, int64_t i) {
      C g[heads] = {};
      if (block.runs(row, t)) {
        const int64_t cell = (block.first_row + row) * p.steps + t;
        const C grad_h =
            carry[i] + C(widen(static_cast<const T*>(p.grad_y)[cell * p.hidden + unit]));
        const C* kept = block.piece(head_layer.kept, head_layer.kept_stride, slot, row) + unit;
        grad_dt[0] += head_gradients(block, kept, padded, unit, row, t, grad_h, g);
      }
      C* out = gradients_of(head_layer);
      C* kept = block.piece(head_layer.grads, heads * p.hidden, slot, row) + unit;
#pragma unroll
      for (int head = 0; head < heads; ++head) {
        out[(head * p.hidden + unit) * rows + row] = g[head];
        if (block.exists(row)) kept[head * p.hidden] = g[head];
      }
    });
    const bool wants_timespans = heads != 3 && p.grad_timespans;
    if (wants_timespans) {
      // Threads that are kCfcRows apart have the same row.
      for (int offset = kWarp / 2; offset >= rows; offset /= 2) {
        grad_dt[0] += __shfl_xor_sync(kAllLanes, grad_dt[0], offset);
      }
      const int lane = int(threadIdx.x) % kWarp;
      if (lane < rows) sums[int(threadIdx.x) / kWarp * rows + lane] = grad_dt[0];
    }
    __syncthreads();
    if (wants_timespans && int(threadIdx.x) < rows && block.exists(int(threadIdx.x))) {
      C total = 0;
      for (int warp = 0; warp < warps; ++warp) total += sums[warp * rows + int(threadIdx.x)];
      static_cast<C*>(p.grad_timespans)[(block.first_row + threadIdx.x) * p.steps + t] = total;
    }

    for (int l = last; l > 0; --l) {
      const CfcScanLayer &layer = plan.layers[l], &below = plan.layers[l - 1];
      C* out = gradients_of(below);
      multiply<1>(layer.map, block.shared, block.vectors + layer.vector, no_start,
                  [&](int unit, int row, const C(&v)[1]) {
                    C g = 0;
                    if (block.exists(row)) {
                      g = v[0] * block.piece(below.kept, below.kept_stride, slot, row)[unit];
                      block.piece(below.grads, layer.map.units, slot, row)[unit] = g;
                    }
                    out[unit * rows + row] = g;
                  });
    }
    multiply<1>(plan.layers[0].map, block.shared, block.vectors + plan.layers[0].vector, no_start,
                [&](int unit, int row, const C(&v)[1]) {
                  if (block.runs(row, t)) carry[unit * rows + row] = v[0];
                });
  }

  block.for_states([&](int unit, int row, int64_t i) {
    if (!block.exists(row)) return;
    static_cast<C*>(plan.to)[(block.first_row + row) * plan.to_stride + unit] = carry[i];
  });
}

constexpr int kCfcRowThreads = 256;

// The rows [1, x] of the tape for a chunk of steps; a warp writes a row. Padding becomes 0, so that
// not even infinities there reach the weights' gradients.
template <typename T>
__global__ void __launch_bounds__(kCfcRowThreads)
    cfc_scan_input_kernel(CfcScanParams p, int64_t first, int64_t steps, void* to, int64_t stride) {
  using C = compute_t<T>;
  const int64_t row = int64_t(blockIdx.x) * (kCfcRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= steps * p.batch) return;
  const int64_t b = row % p.batch, t = first + row / p.batch;
  const bool runs = !p.lengths || t < p.lengths[b];
  const T* x = static_cast<const T*>(p.x) + (b * p.steps + t) * p.inputs;
  C* out = static_cast<C*>(to) + row * stride;
  for (int64_t i = threadIdx.x % kWarp; i <= p.inputs; i += kWarp) {
    out[i] = i == 0 ? C(1) : runs ? C(widen(x[i - 1])) : C(0);
  }
}

// Packs weights [depth, heads, units] with these strides as CfcMap has them.
template <typename C>
__global__ void __launch_bounds__(kCfcRowThreads)
    cfc_scan_pack_kernel(const C* weight, int64_t depth_stride, int64_t column_stride,
                         int64_t depth, int64_t heads, int64_t units, C* to) {
  const int64_t i = int64_t(blockIdx.x) * kCfcRowThreads + threadIdx.x;
  const int64_t columns = ceil_div(units, kCfcParts) * heads * kCfcParts;
  if (i >= depth * columns) return;
  const int64_t pack = i % columns / kCfcParts;
  const int64_t head = pack % heads, unit = pack / heads * kCfcParts + i % kCfcParts;
  to[i] = unit < units ? weight[i / columns * depth_stride + (head * units + unit) * column_stride]
                       : C(0);
}

constexpr int kCfcProductTile = 64, kCfcProductDepth = 16, kCfcProductThreads = 256;

// out[m, n] = sum over the depth k of a[m, k] b[n, k]. The depth may be split in parts, each with a
// result of its own.
struct CfcProduct {
  const void *a, *b;                       // C
  int64_t a_row, a_depth, b_row, b_depth;  // strides, one of each pair being 1
  int64_t m, n, depth, depth_of_split;
  unsigned tiles_m, tiles_n;
  void* out;  // [splits], split_stride apart
  int64_t split_stride;
  // Row m is at m / rows * outer_row + m % rows * row, column n likewise.
  int64_t rows, outer_row, row;
  int64_t columns, outer_column;
};

// A tile of 64 rows and 16 depths of a or b on its way to shared memory. `along_depth` says which
// of the strides is 1, and so which elements neighbouring threads should read.
template <typename C, bool along_depth>
struct CfcProductTile {
  static constexpr int kEach = kCfcProductTile * kCfcProductDepth / kCfcProductThreads;
  static constexpr int kStride = kCfcProductTile + 16 / sizeof(C);  // of a depth in shared memory

  C values[kEach];

  static __device__ __forceinline__ int row(int i) {
    const int index = i * kCfcProductThreads + int(threadIdx.x);
    return along_depth ? index / kCfcProductDepth : index % kCfcProductTile;
  }
  static __device__ __forceinline__ int depth(int i) {
    const int index = i * kCfcProductThreads + int(threadIdx.x);
    return along_depth ? index % kCfcProductDepth : index / kCfcProductTile;
  }

  __device__ __forceinline__ void load(const void* from, int64_t row_stride, int64_t depth_stride,
                                       int64_t first_row, int64_t rows, int64_t first_depth,
                                       int64_t end_depth) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t r = first_row + row(i), k = first_depth + depth(i);
      values[i] = r < rows && k < end_depth
                      ? static_cast<const C*>(from)[r * row_stride + k * depth_stride]
                      : C(0);
    }
  }

  __device__ __forceinline__ void store(C* shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) shared[depth(i) * kStride + row(i)] = values[i];
  }
};

template <typename C, typename Out, bool a_along_depth, bool b_along_depth>
__global__ void __launch_bounds__(kCfcProductThreads) cfc_scan_product_kernel(CfcProduct p) {
  using A = CfcProductTile<C, a_along_depth>;
  using B = CfcProductTile<C, b_along_depth>;
  C *shared_a = shared_memory<C>(), *shared_b = shared_a + kCfcProductDepth * A::kStride;
  const int64_t split = blockIdx.x / p.tiles_n / p.tiles_m;
  const int64_t first_m = int64_t(blockIdx.x / p.tiles_n % p.tiles_m) * kCfcProductTile;
  const int64_t first_n = int64_t(blockIdx.x % p.tiles_n) * kCfcProductTile;
  const int64_t begin = split * p.depth_of_split, end = min(begin + p.depth_of_split, p.depth);
  const int own_m = int(threadIdx.x) / 16 * 4, own_n = int(threadIdx.x) % 16 * 4;
  C totals[4][4] = {}, sums[4][4] = {};
  A a;
  B b;
  a.load(p.a, p.a_row, p.a_depth, first_m, p.m, begin, end);
  b.load(p.b, p.b_row, p.b_depth, first_n, p.n, begin, end);
  for (int64_t k = begin; k < end; k += kCfcProductDepth) {
    a.store(shared_a);
    b.store(shared_b);
    __syncthreads();
    // On their way while the present tiles are multiplied.
    a.load(p.a, p.a_row, p.a_depth, first_m, p.m, k + kCfcProductDepth, end);
    b.load(p.b, p.b_row, p.b_depth, first_n, p.n, k + kCfcProductDepth, end);
#pragma unroll 4
    for (int d = 0; d < kCfcProductDepth; ++d) {
      const auto left = *reinterpret_cast<const Pack<C, 4>*>(shared_a + d * A::kStride + own_m);
      const auto right = *reinterpret_cast<const Pack<C, 4>*>(shared_b + d * B::kStride + own_n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left.values[i] * right.values[j];
      }
    }
    __syncthreads();
    if ((k - begin) % kCfcStretch == kCfcStretch - kCfcProductDepth ||
        k + kCfcProductDepth >= end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }
  Out* out = static_cast<Out*>(p.out) + split * p.split_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = first_m + own_m + i;
    if (m >= p.m) break;
    Out* row = out + m / p.rows * p.outer_row + m % p.rows * p.row;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = first_n + own_n + j;
      if (n < p.n) narrow(totals[i][j], row[n / p.columns * p.outer_column + n % p.columns]);
    }
  }
}

// out[i] = the sum of terms [count of them, size], plus what was there where `accumulate` says so.
template <typename C>
__global__ void __launch_bounds__(kCfcRowThreads)
    cfc_scan_sum_kernel(const C* terms, int64_t count, int64_t size, bool accumulate, C* out) {
  const int64_t i = int64_t(blockIdx.x) * kCfcRowThreads + threadIdx.x;
  if (i >= size) return;
  double sum = accumulate ? double(out[i]) : 0.0;
  for (int64_t term = 0; term < count; ++term) sum += double(terms[term * size + i]);
  out[i] = C(sum);
}

}  // namespace cuda
}  // namespace ember
