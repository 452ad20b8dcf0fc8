// What of the LTC scan needs no recurrence, for all rows and steps of a stretch at once: what the
// sensory synapses add up to, and the gradients of inputs, time spans and weights.
//
// A column is one row of the batch at one step, a cell, or at one solver step. Here columns are
// neighbours in memory, and so are the threads that work on them; in ltc_scan.cuh units are.
#pragma once

#include "ltc_network.cuh"

namespace ember {
namespace cuda {

// The steps of a row within a stretch.
__device__ __forceinline__ int64_t running_steps(const LtcScanParams& p, int64_t row, int64_t first,
                                                 int64_t steps) {
  if (!p.lengths) return steps;
  return max(min(p.lengths[row] - first, steps), int64_t(0));
}

// For each row of the batch, out[column, row] = in[row, column]. What belongs to steps that do not
// run becomes 0.
struct LtcTransposition {
  const void* in;
  int64_t in_batch, in_row;  // strides; columns are neighbours
  void* out;
  int64_t out_batch, out_row;
  int64_t rows, columns;
  int64_t first, steps;  // the stretch
  int64_t of_step;       // rows of `in` to a step, or 0 if a step is a column
};

constexpr int kLtcTile = 32;

template <typename In, typename Out>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_transpose_kernel(LtcScanParams p, LtcTransposition t) {
  using C = compute_t<In>;
  constexpr int stride = kLtcTile + 1, at_once = kLtcRowThreads / kLtcTile;
  C* tile = shared_memory<C>();
  const int64_t tiles_r = ceil_div(t.rows, kLtcTile), tiles_c = ceil_div(t.columns, kLtcTile);
  const int64_t b = blockIdx.x / tiles_c / tiles_r;
  const int64_t first_r = blockIdx.x / tiles_c % tiles_r * kLtcTile;
  const int64_t first_c = blockIdx.x % tiles_c * kLtcTile;
  const int lane = int(threadIdx.x) % kLtcTile, line = int(threadIdx.x) / kLtcTile;
  const int64_t running = running_steps(p, b, t.first, t.steps);
  const int64_t rows = t.of_step ? running * t.of_step : t.rows;
  const int64_t columns = t.of_step ? t.columns : running;
  const In* in = static_cast<const In*>(t.in) + b * t.in_batch;
  for (int i = line; i < kLtcTile; i += at_once) {
    const int64_t r = first_r + i, c = first_c + lane;
    tile[i * stride + lane] = r < rows && c < columns ? C(widen(in[r * t.in_row + c])) : C(0);
  }
  __syncthreads();
  Out* out = static_cast<Out*>(t.out) + b * t.out_batch;
  for (int i = line; i < kLtcTile; i += at_once) {
    const int64_t r = first_r + lane, c = first_c + i;
    if (r < t.rows && c < t.columns) narrow(tile[lane * stride + i], out[c * t.out_row + r]);
  }
}

// What the sensory synapses add to each unit's numerator and denominator, C [2, units, cells],
// from the input C [inputs, cells]. A thread computes one of these.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_sensory_kernel(LtcList list, const void* x, int64_t cells, void* out) {
  const int unit = int(blockIdx.x % unsigned(list.units));
  const int64_t cell = int64_t(blockIdx.x / unsigned(list.units)) * kLtcRowThreads + threadIdx.x;
  if (cell >= cells) return;
  C numerator = 0, denominator = 0;
  const int end = list.begin_target[unit + 1];
#pragma unroll 4
  for (int e = list.begin_target[unit]; e < end; ++e) {
    const LtcSynapse<C> s = list.synapse<C>(e);
    const C potential = static_cast<const C*>(x)[list.sources[e] * cells + cell];
    const C conducted = s.w * LtcOpening<C>(s, potential).open;
    numerator += conducted * s.erev;
    denominator += conducted;
  }
  C* to = static_cast<C*>(out) + unit * cells + cell;
  to[0] = numerator;
  to[list.units * cells] = denominator;
}

// The input's gradient, C [inputs, cells], from those of numerators and denominators, C [2, units,
// cells].
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_input_kernel(LtcList list, const void* x, const void* grads, int64_t cells,
                          void* out) {
  const int source = int(blockIdx.x % unsigned(list.num_sources));
  const int64_t cell =
      int64_t(blockIdx.x / unsigned(list.num_sources)) * kLtcRowThreads + threadIdx.x;
  if (cell >= cells) return;
  const C potential = static_cast<const C*>(x)[source * cells + cell];
  C sum = 0;
  const int end = list.begin_source[source + 1];
#pragma unroll 4
  for (int q = list.begin_source[source]; q < end; ++q) {
    const int e = list.by_source[q];
    const LtcSynapse<C> s = list.synapse<C>(e);
    const C* g = static_cast<const C*>(grads) + list.targets[e] * cells + cell;
    sum +=
        (g[0] * s.erev + g[list.units * cells]) * s.w * LtcOpening<C>(s, potential).slope * s.sigma;
  }
  static_cast<C*>(out)[source * cells + cell] = sum;
}

// What the gradients of w, mu, sigma and erev follow from, C [parts, 4, synapses]: over the columns
// of each part, the sums of a conductance's gradient times how far it is open, of the gradient g of
// sigma (potential - mu), of g (potential - mu), and of a numerator's gradient times how far the
// synapse is open. Potentials are C [sources, columns], gradients C [2, units, columns].
//
// A block works for one unit and part. A warp has four of the unit's synapses at a time,
// for which it reads the unit's gradients once; its lanes are columns.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_weights_kernel(LtcList list, const void* potentials, const void* grads,
                            int64_t columns, int64_t columns_of_part, void* out) {
  const int unit = int(blockIdx.x % unsigned(list.units));
  const int64_t part = blockIdx.x / unsigned(list.units), first = part * columns_of_part;
  const int64_t last = min(first + columns_of_part, columns);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  constexpr int together = 4, warps = kLtcRowThreads / kWarp;
  const C* numerators = static_cast<const C*>(grads) + unit * columns;
  const C* denominators = numerators + list.units * columns;
  const int end = list.begin_target[unit + 1];
  for (int e = list.begin_target[unit] + warp * together; e < end; e += warps * together) {
    LtcSynapse<C> synapses[together];
    const C* from[together];
    C sums[together][4] = {};
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const int own = min(e + i, end - 1);
      synapses[i] = list.synapse<C>(own);
      from[i] = static_cast<const C*>(potentials) + list.sources[own] * columns;
    }
    for (int64_t n = first + lane; n < last; n += kWarp) {
      const C numerator = numerators[n], denominator = denominators[n];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        const LtcSynapse<C>& s = synapses[i];
        const C potential = from[i][n];
        const LtcOpening<C> opening(s, potential);
        const C conductance = numerator * s.erev + denominator;
        const C slope = conductance * s.w * opening.slope;
        sums[i][0] += conductance * opening.open;
        sums[i][1] += slope;
        sums[i][2] += slope * (potential - s.mu);
        sums[i][3] += numerator * opening.open;
      }
    }
#pragma unroll
    for (int i = 0; i < together; ++i) {
#pragma unroll
      for (int which = 0; which < 4; ++which) {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          sums[i][which] += __shfl_xor_sync(kAllLanes, sums[i][which], offset);
        }
        if (lane == 0 && e + i < end) {
          static_cast<C*>(out)[(part * 4 + which) * list.count + e + i] = sums[i][which];
        }
      }
    }
  }
}

// The sums, C [parts, 3, units], over the cells of each part: of the gradients of a unit's
// numerator and denominator, and of that of its capacitance over the length of a solver step, over
// that length. From C [3, units, cells]; a cell is `steps` of a row, from `first` on.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_units_kernel(LtcScanParams p, const void* totals, int64_t first, int64_t steps,
                          int64_t cells_of_part, void* out) {
  const int64_t cells = p.batch * steps;
  const int64_t unit = blockIdx.x % p.units, part = blockIdx.x / p.units;
  const int64_t last = min((part + 1) * cells_of_part, cells);
  const C* from = static_cast<const C*>(totals) + unit * cells;
  const int64_t stride = p.units * cells;
  C sums[3] = {};
  for (int64_t cell = part * cells_of_part + threadIdx.x; cell < last; cell += kLtcRowThreads) {
    const int64_t row = cell / steps, slot = cell % steps;
    if (slot >= running_steps(p, row, first, steps)) continue;
    const C span = static_cast<const C*>(p.timespans)[row * p.steps + first + slot];
    sums[0] += from[cell];
    sums[1] += from[stride + cell];
    sums[2] += from[2 * stride + cell] / (span / C(p.unfolds));
  }
  const Team<C> team{kLtcRowThreads, shared_memory<C>()};
  team.template reduce<Sum>(sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    static_cast<C*>(out)[(part * 3 + i) * p.units + unit] = sums[i];
  }
}

// The time spans' gradients, a thread to a cell, from C [units, cells].
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_timespans_kernel(LtcScanParams p, const void* grads, int64_t first, int64_t steps) {
  const int64_t cells = p.batch * steps;
  const int64_t cell = int64_t(blockIdx.x) * kLtcRowThreads + threadIdx.x;
  if (cell >= cells) return;
  const int64_t row = cell / steps, slot = cell % steps, at = row * p.steps + first + slot;
  C gradient = 0;
  if (slot < running_steps(p, row, first, steps)) {
    const C* from = static_cast<const C*>(grads) + cell;
    const C span = static_cast<const C*>(p.timespans)[at];
    C sum = 0;
#pragma unroll 4
    for (int64_t j = 0; j < p.units; ++j, from += cells) {
      sum += static_cast<const C*>(p.unit_weights)[j] * *from;
    }
    gradient = -sum / (span / C(p.unfolds)) / span;
  }
  static_cast<C*>(p.grad_timespans)[at] = gradient;
}

// sums[i] = the sum of terms [count of them, size], plus what was there where `accumulate` says so.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_sum_kernel(const void* terms, int64_t count, int64_t size, bool accumulate,
                        double* sums) {
  const int64_t i = int64_t(blockIdx.x) * kLtcRowThreads + threadIdx.x;
  if (i >= size) return;
  double sum = accumulate ? sums[i] : 0.0;
#pragma unroll 4
  for (int64_t term = 0; term < count; ++term) {
    sum += double(static_cast<const C*>(terms)[term * size + i]);
  }
  sums[i] = sum;
}

// The gradients of w, mu, sigma and erev from the sums that ltc_scan_weights_kernel makes.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_synapse_gradients_kernel(LtcSynapses list, const double* sums) {
  const int64_t e = int64_t(blockIdx.x) * kLtcRowThreads + threadIdx.x;
  if (e >= list.count) return;
  const C* weights = static_cast<const C*>(list.weights) + e;
  C* out = static_cast<C*>(list.grad_weights) + e;
  out[0] = C(sums[e]);
  out[list.count] = C(-double(weights[2 * list.count]) * sums[list.count + e]);
  out[2 * list.count] = C(sums[2 * list.count + e]);
  out[3 * list.count] = C(double(weights[0]) * sums[3 * list.count + e]);
}

// The gradients of cm, gleak and vleak from the sums that ltc_scan_units_kernel makes.
template <typename C>
__global__ void __launch_bounds__(kLtcRowThreads)
    ltc_scan_unit_gradients_kernel(LtcScanParams p, const double* sums) {
  const int64_t j = int64_t(blockIdx.x) * kLtcRowThreads + threadIdx.x;
  if (j >= p.units) return;
  const C* weights = static_cast<const C*>(p.unit_weights) + j;
  C* out = static_cast<C*>(p.grad_unit_weights) + j;
  const double numerator = sums[j], denominator = sums[p.units + j];
  out[0] = C(sums[2 * p.units + j]);
  out[p.units] = C(numerator * double(weights[2 * p.units]) + denominator);
  out[2 * p.units] = C(numerator * double(weights[p.units]));
}

}  // namespace cuda
}  // namespace ember
