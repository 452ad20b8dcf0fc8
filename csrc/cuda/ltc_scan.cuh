// The LTC scan on a GPU: what is recurrent.
//
// A block takes one row of the batch through all steps of a stretch of time, with the state in
// shared memory. Each thread has a few synapses of one unit, a piece, and keeps their weights in
// registers; networks with too many synapses for that are read anew at every solver step, from the
// caches. In a solver step the threads add up what their pieces conduct, and then one thread for
// each unit adds up its pieces and computes the next state. Backward goes over the solver steps in
// reverse, opens the synapses again, and leaves the gradients of each step's numerators and
// denominators. What needs no recurrence is in ltc_gradients.cuh.
//
// The order of every sum depends on the shape alone.
#pragma once

#include "ltc_network.cuh"

namespace ember {
namespace cuda {

// Synapses that a thread keeps in registers, at most; it goes through them by kLtcTogether.
constexpr int kLtcHeld = 8, kLtcTogether = 4;

// Threads of a block, at most: such that each has registers for its synapses.
template <typename C>
constexpr int kLtcMostThreads = sizeof(C) == 4 ? 512 : 256;

struct LtcScanPlan {
  LtcList list;   // the recurrent synapses
  int64_t first;  // step of the stretch
  int steps;
  int log_lanes;  // backward: of how many threads add up what a unit has caused
  // C [2, units, batch * steps]: what sensory synapses add to numerators and denominators.
  const void* sensory;
  // States after solver steps, C [batch, slots, units], from the first slot of the stretch, which
  // is the state before it. Forward writes them, unless null; slots of a row are row_stride long.
  void* tape;
  int64_t tape_stride;
  // Forward: the state before the stretch, and, or null, where the one after it goes. Backward:
  // gradients of the state after it, and before it. C [batch, units], but rows of `from` are
  // from_stride apart.
  const void* from;
  int64_t from_stride;
  void* to;
  // Forward, or null: where to keep the state before it, rows border_stride apart.
  void* border;
  int64_t border_stride;
  // Backward, C [batch, steps * unfolds, 2, units], or null: gradients of each solver step's
  // numerators and denominators. And C [batch, steps, 3, units]: these, summed over the solver
  // steps of each time step, and the gradients of cm / (timespan / unfolds).
  void *grads, *totals;
  // Where not in shared memory: the blocks' vectors, and their numbers for each synapse.
  void *vectors, *numbers;
};

// Where a unit's pieces and the contributions to it are.
struct LtcUnit {
  int first_piece, pieces, begin, end;

  __device__ __forceinline__ LtcUnit(const LtcList& list, int unit) {
    const int from = list.begin_target[unit];
    first_piece = list.first_piece(unit, from);
    pieces = list.pieces_of(list.begin_target[unit + 1] - from);
    begin = list.begin_source[unit];
    end = list.begin_source[unit + 1];
  }
};

// What backward keeps of a unit. Its size is an odd number of values, so that those of neighbouring
// units are in different banks.
template <typename C>
struct LtcValues {
  static constexpr int kSize = 7 + 4 * sizeof(int) / sizeof(C);  // in elements of C

  LtcUnit unit;
  C capacitance, denominator;  // of the time step, besides the recurrent synapses
  C sensory, grad_y;
  C totals[3];  // sums over the time step, as in LtcScanPlan
};

// Elements of a block's vectors, and its numbers for each synapse.
template <typename C>
EMBER_HD int64_t ltc_vectors(const LtcList& list, bool backward) {
  const int64_t units = list.units, pieces = list.num_pieces();
  // Even, so that the pairs that backward keeps here are aligned in every row's part.
  return backward ? ((5 + LtcValues<C>::kSize) * units + pieces + 1) / 2 * 2
                  : 4 * units + 2 * pieces;
}
EMBER_HD int64_t ltc_numbers(const LtcList& list, bool backward, bool held) {
  return backward ? (held ? 1 : 2) * int64_t(list.count) : 0;
}

// A block's pieces, with their weights in registers: a piece to a thread. Slots after a piece's
// last synapse repeat it, with a conductance of 0.
template <typename C, bool held>
struct LtcPieces {
  int unit_and_count;  // of the piece; registers are short
  LtcSynapse<C> synapses[kLtcHeld];
  unsigned places[kLtcHeld];  // the source and, above, the rank
  C slopes[kLtcHeld];         // of what a synapse conducts, in its source

  __device__ __forceinline__ LtcPieces(const LtcList& list, C*) {
    const int own = int(threadIdx.x);
    LtcPiece piece{};
    if (own < list.num_pieces()) piece = list.pieces[own];
    const int count = piece.end - piece.begin;
    unit_and_count = piece.unit << 8 | count;
#pragma unroll
    for (int i = 0; i < kLtcHeld; ++i) {
      synapses[i] = {};
      places[i] = 0;
      slopes[i] = 0;
      if (count > 0) {
        const int e = min(piece.begin + i, piece.end - 1);
        synapses[i] = list.synapse<C>(e);
        if (i >= count) synapses[i].w = synapses[i].erev = 0;
        places[i] = unsigned(list.sources[e]) | unsigned(list.ranks[e]) << 16;
      }
    }
  }

  __device__ __forceinline__ int count() const { return unit_and_count & 0xff; }

  // body(i) for the thread's synapses, as many at a time as should overlap.
  template <typename Body>
  __device__ __forceinline__ void each(const LtcList& list, const Body& body) {
    if (count() == 0) return;
#pragma unroll
    for (int first = 0; first < kLtcHeld; first += kLtcTogether) {
      if (first < list.piece_size) {
#pragma unroll
        for (int i = 0; i < kLtcTogether; ++i) body(first + i);
      }
    }
  }

  // What each piece adds to numerator and denominator of its unit.
  __device__ __forceinline__ void conduct(const LtcList& list, const C* state,
                                          Pack<C, 2>* partial) {
    Pack<C, 2> sums = {};
    each(list, [&](int i) {
      const LtcOpening<C> opening(synapses[i], state[places[i] & 0xffffu]);
      const C conducted = synapses[i].w * opening.open;
      sums.values[0] += conducted * synapses[i].erev;
      sums.values[1] += conducted;
    });
    if (count() > 0) partial[threadIdx.x] = sums;
  }

  // The denominators alone, and what `contribute` needs.
  __device__ __forceinline__ void open(const LtcList& list, const C* state, C* partial) {
    C sum = 0;
    each(list, [&](int i) {
      const LtcOpening<C> opening(synapses[i], state[places[i] & 0xffffu]);
      slopes[i] = synapses[i].w * opening.slope * synapses[i].sigma;
      sum += synapses[i].w * opening.open;
    });
    if (count() > 0) partial[threadIdx.x] = sum;
  }

  // The gradient that each synapse hands to its source, from those of numerators and denominators.
  __device__ __forceinline__ void contribute(const LtcList& list, const Pack<C, 2>* gradients,
                                             C* contributions) {
    const Pack<C, 2> g = gradients[unit_and_count >> 8];
    each(list, [&](int i) {
      const C contribution = (g.values[0] * synapses[i].erev + g.values[1]) * slopes[i];
      if (i < count()) contributions[places[i] >> 16] = contribution;
    });
  }
};

// The same with any number of pieces to a thread and nothing in registers.
template <typename C>
struct LtcPieces<C, false> {
  C* slopes;  // [synapses]: of what a synapse conducts, in its source

  __device__ __forceinline__ LtcPieces(const LtcList&, C* slopes_) : slopes(slopes_) {}

  // body(synapse, e, source) for all synapses of a thread's pieces, and done(piece) after each.
  template <typename Body, typename Done>
  static __device__ __forceinline__ void each(const LtcList& list, const Body& body,
                                              const Done& done) {
    for (int q = int(threadIdx.x); q < list.num_pieces(); q += int(blockDim.x)) {
      const LtcPiece piece = list.pieces[q];
#pragma unroll 2
      for (int e = piece.begin; e < piece.end; ++e) body(list.synapse<C>(e), e, piece.unit);
      done(q);
    }
  }

  __device__ __forceinline__ void conduct(const LtcList& list, const C* state,
                                          Pack<C, 2>* partial) {
    Pack<C, 2> sums = {};
    each(
        list,
        [&](const LtcSynapse<C>& s, int e, int) {
          const C conducted = s.w * LtcOpening<C>(s, state[list.sources[e]]).open;
          sums.values[0] += conducted * s.erev;
          sums.values[1] += conducted;
        },
        [&](int q) {
          partial[q] = sums;
          sums = Pack<C, 2>{};
        });
  }

  __device__ __forceinline__ void open(const LtcList& list, const C* state, C* partial) {
    C sum = 0;
    each(
        list,
        [&](const LtcSynapse<C>& s, int e, int) {
          const LtcOpening<C> opening(s, state[list.sources[e]]);
          slopes[e] = s.w * opening.slope * s.sigma;
          sum += s.w * opening.open;
        },
        [&](int q) {
          partial[q] = sum;
          sum = 0;
        });
  }

  __device__ __forceinline__ void contribute(const LtcList& list, const Pack<C, 2>* gradients,
                                             C* contributions) {
    each(
        list,
        [&](const LtcSynapse<C>& s, int e, int unit) {
          const Pack<C, 2> g = gradients[unit];
          contributions[list.ranks[e]] = (g.values[0] * s.erev + g.values[1]) * slopes[e];
        },
        [](int) {});
  }
};

// A vector in global memory, of which each thread asks for its first element long before it needs
// it; elements are `stride` apart.
template <typename C>
struct LtcAhead {
  C first;

  template <typename T>
  __device__ __forceinline__ void ask(const T* from, int64_t stride, int size) {
    if (int(threadIdx.x) < size) first = widen(from[int64_t(threadIdx.x) * stride]);
  }
  template <typename T>
  __device__ __forceinline__ C get(const T* from, int64_t stride, int i) const {
    return i == int(threadIdx.x) ? first : C(widen(from[i * stride]));
  }
  template <typename T>
  __device__ __forceinline__ void store(const T* from, int64_t stride, int size, C* to,
                                        int to_stride) const {
    for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
      to[i * to_stride] = get(from, stride, i);
    }
  }
};

// What one thread of a block knows of its place.
template <typename C, bool held, bool backward>
struct LtcBlock {
  const LtcScanParams& p;
  const LtcScanPlan& plan;
  int units, steps;  // steps of the row within the stretch
  C *vectors, *numbers;

  __device__ __forceinline__ LtcBlock(const LtcScanParams& p_, const LtcScanPlan& plan_)
      : p(p_), plan(plan_), units(plan_.list.units), steps(plan_.steps) {
    if (p.lengths) {
      const int64_t left = p.lengths[blockIdx.x] - plan.first;
      steps = int(max(min(left, int64_t(steps)), int64_t(0)));
    }
    const int64_t vectors_size = ltc_vectors<C>(plan.list, backward);
    vectors = shared_memory<C>();
    numbers = vectors + vectors_size;
    if constexpr (!held) {
      if (plan.vectors) {
        numbers = vectors;
        vectors = static_cast<C*>(plan.vectors) + row() * vectors_size;
      }
      if (plan.numbers) {
        numbers = static_cast<C*>(plan.numbers) + row() * ltc_numbers(plan.list, backward, held);
      }
    }
  }

  // Addresses that follow from it are computed anew each time: registers are short.
  __device__ __forceinline__ int64_t row() const { return in_place(int(blockIdx.x)); }
  // The length of a solver step.
  __device__ __forceinline__ C timespan(int slot) const {
    const C* spans = static_cast<const C*>(p.timespans) + row() * p.steps + plan.first;
    return spans[slot] / C(p.unfolds);
  }
  // Of what the sensory synapses of all cells add up to, this row's at one step.
  __device__ __forceinline__ int64_t cells() const { return p.batch * in_place(plan.steps); }
  __device__ __forceinline__ const C* numerators(int slot) const {
    return static_cast<const C*>(plan.sensory) + row() * plan.steps + slot;
  }
  __device__ __forceinline__ const C* denominators(int slot) const {
    return numerators(slot) + units * cells();
  }
  __device__ __forceinline__ C* tape(int64_t slot) const {
    return static_cast<C*>(plan.tape) + row() * plan.tape_stride + slot * units;
  }
  template <typename T>
  __device__ __forceinline__ T* outputs(void* of, int slot) const {
    return static_cast<T*>(of) + (row() * p.steps + plan.first + slot) * p.outputs;
  }
  // Of C [3, units].
  __device__ __forceinline__ C unit_weight(int which, int unit) const {
    return static_cast<const C*>(p.unit_weights)[which * units + unit];
  }

  template <typename Body>
  __device__ __forceinline__ void for_units(const Body& body) const {
    for (int j = int(threadIdx.x); j < units; j += int(blockDim.x)) body(j);
  }
};

template <typename T, bool held>
__global__ void __launch_bounds__(kLtcMostThreads<compute_t<T>>, 1)
    ltc_scan_forward_kernel(LtcScanParams p, LtcScanPlan plan) {
  using C = compute_t<T>;
  const LtcBlock<C, held, false> block(p, plan);
  const int units = block.units, unfolds = int(p.unfolds);
  auto* partial = reinterpret_cast<Pack<C, 2>*>(block.vectors);
  C* state = block.vectors + 2 * plan.list.num_pieces();
  // What the unit's next state has besides the recurrent synapses.
  C *capacitance = state + units, *numerator = capacitance + units,
    *denominator = numerator + units;
  LtcPieces<C, held> pieces(plan.list, nullptr);
  const LtcUnit own(plan.list, min(int(threadIdx.x), units - 1));
  const int64_t stride = block.cells();
  LtcAhead<C> numerators, denominators;
  C span = 1;

  block.for_units([&](int j) {
    const C h = static_cast<const C*>(plan.from)[block.row() * plan.from_stride + j];
    state[j] = h;
    if (plan.border) static_cast<C*>(plan.border)[block.row() * plan.border_stride + j] = h;
    if (plan.tape) block.tape(0)[j] = h;
  });
  const auto ask = [&](int slot) {
    if (slot >= block.steps) return;
    numerators.ask(block.numerators(slot), stride, units);
    denominators.ask(block.denominators(slot), stride, units);
    span = block.timespan(slot);
  };
  ask(0);
  __syncthreads();

  for (int slot = 0; slot < block.steps; ++slot) {
    // One thread reads and writes these values of a unit.
    block.for_units([&](int j) {
      const C leak = block.unit_weight(1, j), c = block.unit_weight(0, j) / span;
      capacitance[j] = c;
      numerator[j] =
          leak * block.unit_weight(2, j) + numerators.get(block.numerators(slot), stride, j);
      denominator[j] = c + leak + denominators.get(block.denominators(slot), stride, j) + C(p.eps);
    });
    ask(slot + 1);
    for (int k = 0; k < unfolds; ++k) {
      pieces.conduct(plan.list, state, partial);
      __syncthreads();
      block.for_units([&](int j) {
        const LtcUnit unit = j == int(threadIdx.x) ? own : LtcUnit(plan.list, j);
        Pack<C, 2> sums = {};
        const Pack<C, 2>* terms = partial + unit.first_piece;
#pragma unroll 4
        for (int i = 0; i < unit.pieces; ++i) {
          sums.values[0] += terms[i].values[0];
          sums.values[1] += terms[i].values[1];
        }
        const C h = (capacitance[j] * state[j] + (numerator[j] + sums.values[0])) /
                    (denominator[j] + sums.values[1]);
        state[j] = h;
        if (plan.tape) block.tape(1 + int64_t(slot) * unfolds + k)[j] = h;
        if (p.y && k == unfolds - 1 && j < p.outputs) {
          narrow(h, block.template outputs<T>(p.y, slot)[j]);
        }
      });
      __syncthreads();
    }
  }

  if (p.y) {
    T* y = block.template outputs<T>(p.y, block.steps);
    const int64_t left = (plan.steps - block.steps) * p.outputs;
    for (int64_t i = threadIdx.x; i < left; i += blockDim.x) narrow(C(0), y[i]);
  }
  if (plan.to) {
    block.for_units([&](int j) { static_cast<C*>(plan.to)[block.row() * units + j] = state[j]; });
  }
}

template <typename T, bool held>
__global__ void __launch_bounds__(kLtcMostThreads<compute_t<T>>, 1)
    ltc_scan_backward_kernel(LtcScanParams p, LtcScanPlan plan) {
  using C = compute_t<T>;
  const LtcBlock<C, held, true> block(p, plan);
  const LtcList& list = plan.list;
  const int units = block.units, unfolds = int(p.unfolds);
  const auto grad_after = [&](int j) {
    return static_cast<const C*>(plan.from)[block.row() * plan.from_stride + j];
  };
  const auto grad_before = [&](int j) -> C& {
    return static_cast<C*>(plan.to)[block.row() * units + j];
  };
  if (block.steps == 0) {
    block.for_units([&](int j) { grad_before(j) = grad_after(j); });
    return;
  }
  auto* gradients = reinterpret_cast<Pack<C, 2>*>(block.vectors);
  C* states = block.vectors + 2 * units;  // of three solver steps
  auto* values = reinterpret_cast<LtcValues<C>*>(states + 3 * units);
  C* partial = block.vectors + (5 + LtcValues<C>::kSize) * units;
  C* contributions = block.numbers;
  LtcPieces<C, held> pieces(list, contributions + list.count);

  const int last = block.steps * unfolds - 1;
  const auto state = [&](int slot) { return states + slot % 3 * units; };
  LtcAhead<C> state_ahead, sensory_ahead;
  const int outputs = int(p.outputs);
  const auto grads_of = [&](int t) {
    return block.template outputs<const T>(const_cast<void*>(p.grad_y), t);
  };
  const auto ask_step = [&](int t) {
    if (t < 0) return;
    sensory_ahead.ask(block.denominators(t), block.cells(), units);
  };
  const auto store_step = [&](int t) {
    constexpr int apart = LtcValues<C>::kSize;
    sensory_ahead.store(block.denominators(t), block.cells(), units, &values->sensory, apart);
    for (int j = int(threadIdx.x); j < outputs; j += int(blockDim.x)) {
      values[j].grad_y = widen(grads_of(t)[j]);
    }
    ask_step(t - 1);
  };
  const auto store_state = [&](int slot) {
    state_ahead.store(block.tape(slot), 1, units, state(slot), 1);
    if (slot > 0) state_ahead.ask(block.tape(slot - 1), 1, units);
  };
  // body(unit, contributions, pieces) with the sums of the contributions to a unit, unless there
  // are none yet, and of its pieces; one thread gets both. All threads must call this together.
  const auto for_sums = [&](bool contributed, const auto& body) {
    const int thread = in_place(int(threadIdx.x)), lanes = 1 << plan.log_lanes;
    const int lane = thread & (lanes - 1), stride = int(blockDim.x) >> plan.log_lanes;
    for (int base = 0; base < units; base += stride) {
      const int j = base + (thread >> plan.log_lanes);
      C sums[2] = {};
      if (j < units) {
        const LtcUnit& unit = values[j].unit;
        if (contributed) {
#pragma unroll 2
          for (int q = unit.begin + lane; q < unit.end; q += lanes) sums[0] += contributions[q];
        }
#pragma unroll 1
        for (int i = lane; i < unit.pieces; i += lanes) sums[1] += partial[unit.first_piece + i];
      }
      Team<C>{lanes, nullptr}.template reduce<Sum>(sums);
      if (j < units && lane == 0) body(j, sums[0], sums[1]);
    }
  };

  block.for_units([&](int j) { values[j].unit = LtcUnit(list, j); });
  state_ahead.ask(block.tape(last + 1), 1, units);
  store_state(last + 1);
  store_state(last);
  C span = block.timespan(block.steps - 1);
  ask_step(block.steps - 1);
  store_step(block.steps - 1);
  __syncthreads();
  pieces.open(list, state(last), partial);
  __syncthreads();

  for (int s = last; s >= 0; --s) {
    const int t = s / unfolds, k = s - t * unfolds;
    if (s > 0) store_state(s - 1);
    for_sums(s < last, [&](int j, C contributed, C conducted) {
      // Of the state after this solver step, which is a numerator over a denominator.
      LtcValues<C>& own_values = values[j];
      C g =
          s < last ? contributed + own_values.capacitance * gradients[j].values[0] : grad_after(j);
      C sums[3] = {};
      if (k == unfolds - 1) {
        if (j < outputs) g += own_values.grad_y;
        const C c = block.unit_weight(0, j) / span;
        own_values.capacitance = c;
        own_values.denominator = c + block.unit_weight(1, j) + own_values.sensory + C(p.eps);
      } else {
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i] = own_values.totals[i];
      }
      const C numerator_grad = g / (own_values.denominator + conducted);
      const C denominator_grad = -numerator_grad * state(s + 1)[j];
      gradients[j] = {{numerator_grad, denominator_grad}};
      sums[0] += numerator_grad;
      sums[1] += denominator_grad;
      sums[2] += numerator_grad * state(s)[j] + denominator_grad;
#pragma unroll
      for (int i = 0; i < 3; ++i) own_values.totals[i] = sums[i];
      if (k == 0) {
        C* totals =
            static_cast<C*>(plan.totals) + (block.row() * plan.steps + t) * 3 * int64_t(units) + j;
#pragma unroll
        for (int i = 0; i < 3; ++i) totals[i * units] = sums[i];
      }
      if (plan.grads) {
        C* grads =
            static_cast<C*>(plan.grads) + (block.row() * plan.steps * unfolds + s) * 2 * units + j;
        grads[0] = numerator_grad;
        grads[units] = denominator_grad;
      }
    });
    if (k == unfolds - 1 && t > 0) span = block.timespan(t - 1);
    __syncthreads();
    pieces.contribute(list, gradients, contributions);
    if (s > 0) {
      pieces.open(list, state(s - 1), partial);
      if (k == 0) store_step(t - 1);
    }
    __syncthreads();
  }

  for_sums(true, [&](int j, C contributed, C) {
    grad_before(j) = contributed + values[j].capacitance * gradients[j].values[0];
  });
}

}  // namespace cuda
}  // namespace ember
