// The CfC scan on a GPU.
//
// A block takes a few rows of the batch through all steps of a chunk. It keeps their states and as
// much of the recurrent weights as fits in shared memory; the other weights are read anew at every
// step, from the second-level cache. A step is a product by each map of the cell, shared out over
// columns of the matrix and over slices of its depth, whose sums meet in shared memory. There, one
// thread for each unit and row computes the cell. Backward walks a chunk in reverse in the same way
// and leaves the gradients before activation of each step and row.
//
// GPUs from sm_90 on take weights that one block cannot hold in clusters of 2, 4 or 8 blocks. Each
// block then has a share of the units, and the weights of these, and the blocks write each other's
// vectors (CfcBlock). A map takes one exchange, of its output; the last map backward takes none, as
// the gradient of a unit's state is wanted in the same block only.
//
// What is not recurrent is done for a whole chunk at once, before or after it: the product of the
// input, the input's gradient, and the weights' gradients, which are added up in an order that
// depends on the shape alone. Other results depend on the size of a cluster, which splits sums
// otherwise. That size follows from the shape, from how much fits in a block's shared memory and
// from what the driver says of clusters (choose_cluster), so two kinds of GPUs from sm_90 on may
// give other bits. With the same size, and always where there are no clusters, results do not
// depend on how much fits in shared memory.
#pragma once

#include "cfc_block.cuh"

namespace ember {
namespace cuda {

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
  block.for_all_states([&](int unit, int row, int64_t i) {
    const bool is_own = block.owns(unit);
    C h = 0;
    if (block.exists(row)) {
      const int64_t b = block.first_row + row;
      h = static_cast<const C*>(plan.from)[b * plan.from_stride + unit];
      if (plan.border && is_own) static_cast<C*>(plan.border)[b * p.hidden + unit] = h;
      // The state of a row without steps is handed on and takes no part in anything else.
      if (!block.runs(row, 0)) h = 0;
      if (plan.keep && is_own) block.state(0, row)[unit] = h;
    }
    values(state_after(0))[i] = h;
  });
  // What the biases multiply, also above a layer without units.
  for (int l = 1; plan.keep && block.rank == 0 && l <= last; ++l) {
    const CfcScanLayer& layer = plan.layers[l];
    for (int64_t i = threadIdx.x; i < int64_t(plan.steps) * rows; i += kCfcThreads) {
      if (!block.exists(int(i % rows))) continue;
      block.piece(layer.input, layer.input_stride, int(i / rows), int(i % rows))[0] = 1;
    }
  }
  block.meet();

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
      multiply<1>(block, layer.map, input_of(l), true, initial_of(layer, l == 0),
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
                    block.publish(out + unit * rows + row, v.value);
                  });
    }

    const CfcScanLayer& layer = plan.layers[last];
    const int64_t padded = cfc_pad(p.hidden);
    multiply<heads>(block, layer.map, input_of(last), true, initial_of(layer, last == 0),
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
                      block.publish(next + unit * rows + row, h);
                    });
  }

  if (!plan.to) return;
  const C* state = values(state_after(plan.steps));
  block.for_own_states([&](int unit, int row, int64_t i) {
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
  // The sums of the warps of all blocks, [blocks, warps, rows].
  const auto warp_sums_of = [&](int slot) {
    const int of_cluster = block.blocks() * warps * rows;
    return block.shared + plan.sums_at + block.turn(in_place(slot)) * of_cluster;
  };
  const auto gradients_of = [&](const CfcScanLayer& layer) {
    return reinterpret_cast<C*>(block.vectors + layer.vector);
  };
  const auto no_start = [](int, int, int) { return CfcWeights<C>{}; };
  block.for_own_states([&](int unit, int row, int64_t i) {
    const int64_t b = block.first_row + row;
    carry[i] =
        block.exists(row) ? static_cast<const C*>(plan.from)[b * plan.from_stride + unit] : C(0);
  });
  block.meet();

  for (int slot = plan.steps - 1; slot >= 0; --slot) {
    const int64_t t = plan.first + slot;
    const int64_t turn = block.turn(slot);
    C* head_gradient = gradients_of(head_layer) + turn * heads * p.hidden * rows;
    C grad_dt[1] = {0};
    block.for_own_states([&](int unit, int row, int64_t i) {
      C g[heads] = {};
      if (block.runs(row, t)) {
        const int64_t cell = (block.first_row + row) * p.steps + t;
        const C grad_h =
            carry[i] + C(widen(static_cast<const T*>(p.grad_y)[cell * p.hidden + unit]));
        const C* kept = block.piece(head_layer.kept, head_layer.kept_stride, slot, row) + unit;
        grad_dt[0] += head_gradients(block, kept, padded, unit, row, t, grad_h, g);
      }
      C* kept = block.piece(head_layer.grads, heads * p.hidden, slot, row) + unit;
#pragma unroll
      for (int head = 0; head < heads; ++head) {
        block.publish(head_gradient + (head * p.hidden + unit) * rows + row, g[head]);
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
      if (lane < rows) {
        C* place =
            warp_sums_of(slot) + (block.rank * warps + int(threadIdx.x) / kWarp) * rows + lane;
        *(block.is_clustered() ? shared_of_rank(place, 0) : place) = grad_dt[0];
      }
    }
    block.meet();
    // The last warp, which the product rarely needs.
    const int row = int(threadIdx.x) - (kCfcThreads - rows);
    if (wants_timespans && block.rank == 0 && row >= 0 && block.exists(row)) {
      const C* warp_sums = warp_sums_of(slot);
      C total = 0;
      for (int warp = 0; warp < block.blocks() * warps; ++warp) {
        total += warp_sums[warp * rows + row];
      }
      static_cast<C*>(p.grad_timespans)[(block.first_row + row) * p.steps + t] = total;
    }

    for (int l = last; l > 0; --l) {
      const CfcScanLayer &layer = plan.layers[l], &below = plan.layers[l - 1];
      C* out = gradients_of(below);
      const C* in = l == last ? head_gradient : gradients_of(layer);
      multiply<1>(block, layer.map, reinterpret_cast<const CfcRows<C>*>(in), true, no_start,
                  [&](int unit, int row, const C(&v)[1]) {
                    C g = 0;
                    if (block.exists(row)) {
                      g = v[0] * block.piece(below.kept, below.kept_stride, slot, row)[unit];
                      block.piece(below.grads, layer.map.units, slot, row)[unit] = g;
                    }
                    block.publish(out + unit * rows + row, g);
                  });
    }
    const C* in = last == 0 ? head_gradient : gradients_of(plan.layers[0]);
    multiply<1>(block, plan.layers[0].map, reinterpret_cast<const CfcRows<C>*>(in), false, no_start,
                [&](int unit, int row, const C(&v)[1]) {
                  if (block.runs(row, t)) carry[unit * rows + row] = v[0];
                });
  }

  block.for_own_states([&](int unit, int row, int64_t i) {
    if (!block.exists(row)) return;
    static_cast<C*>(plan.to)[(block.first_row + row) * plan.to_stride + unit] = carry[i];
  });
}

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

}  // namespace cuda
}  // namespace ember
