// Launchers of the LTC scan's kernels.
#include <algorithm>
#include <type_traits>

#include "ltc_gradients.cuh"
#include "ltc_scan.cuh"

namespace ember {
namespace cuda {
namespace {

int64_t rounded_up(int64_t a, int64_t to) {
  return ceil_div(a, to) * to;
}

// Short pieces where a block of at most `most` threads holds them in registers, so that many
// threads share the work; else such that the sums of pieces are few.
int piece_size_of(LtcList list, int64_t most) {
  for (int size = kLtcTogether; size <= kLtcHeld; size += kLtcTogether) {
    list.piece_size = size;
    if (list.num_pieces() <= most) return size;
  }
  const int least = 16, most_pieces = 2048;
  return std::max(least, list.count / most_pieces);
}

// Steps that are worked on at once: a stretch. Enough to keep a GPU busy, and few enough that their
// states and gradients stay small.
int64_t stretch_steps(const LtcScanParams& p) {
  const int64_t most_elements = 1 << 24, most_columns = 1 << 15;
  const int64_t of_cell = 2 * p.inputs + (8 + 5 * p.unfolds) * p.units;
  const int64_t batch = std::max<int64_t>(p.batch, 1);
  const int64_t steps = std::min(most_elements / std::max<int64_t>(of_cell * batch, 1),
                                 most_columns / (batch * p.unfolds));
  return std::max<int64_t>(std::min(steps, p.chunk ? p.chunk : p.steps), 1);
}

// Columns to a part of a weight gradient's sum: so few that fp32 sums stay accurate, and that the
// parts fill a GPU; but not so few that parts get many.
int64_t columns_of_part(int64_t columns) {
  const int64_t least = 2048, most_parts = 128;
  return std::max(least, ceil_div(columns, most_parts));
}
int64_t parts_of(int64_t columns) {
  return ceil_div(columns, columns_of_part(columns));
}

// Where the parts of the workspace begin, in bytes. With `memory` null it is only measured.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename E>
  E* take(int64_t elements) {
    E* const part = memory_ ? reinterpret_cast<E*>(memory_ + size_) : nullptr;
    size_ += rounded_up(elements * int64_t(sizeof(E)), 32);
    return part;
  }
  int64_t size() const { return size_; }

 private:
  unsigned char* memory_;
  int64_t size_ = 0;
};

template <typename T>
class Scan {
 public:
  using C = compute_t<T>;

  // `memory` is size() bytes, or null to find that out.
  Scan(const LtcScanParams& p, bool backward, void* memory, cudaStream_t stream)
      : p_(p), stream_(stream), stretch_(stretch_steps(p)) {
    Workspace w(memory);
    sensory_list_ = list(p.sensory, w);
    recurrent_list_ = list(p.recurrent, w);
    recurrent_list_.piece_size = piece_size_of(recurrent_list_, kLtcMostThreads<C>);
    recurrent_list_.pieces = w.template take<LtcPiece>(recurrent_list_.num_pieces());
    held_ = recurrent_list_.piece_size <= kLtcHeld;
    const int64_t cells = stretch_ * p.batch, columns = cells * p.unfolds;
    x_ = w.template take<C>(p.inputs * cells);
    sensory_ = w.template take<C>(2 * p.units * cells);
    int64_t vectors = ltc_vectors<C>(recurrent_list_, backward), numbers = 0;
    if (backward) {
      vectors = std::max(vectors, ltc_vectors<C>(recurrent_list_, false));
      numbers = ltc_numbers(recurrent_list_, true, held_);
      tape_slots_ = (p.chunk ? p.chunk : p.steps) * p.unfolds + 1;
      tape_ =
          p.chunk ? w.template take<C>(tape_slots_ * p.batch * p.units) : static_cast<C*>(p.saved);
      totals_ = w.template take<C>(3 * p.units * cells);
      totals_by_unit_ = w.template take<C>(3 * p.units * cells);
      if (p.grad_x) grad_x_ = w.template take<C>(p.inputs * cells);
      if (wants_weights()) {
        grads_ = w.template take<C>(2 * p.units * columns);
        grads_by_unit_ = w.template take<C>(2 * p.units * columns);
        states_by_unit_ = w.template take<C>(p.units * columns);
        const int64_t recurrent = 4 * p.recurrent.count, sensory = 4 * p.sensory.count;
        partial_ = w.template take<C>(std::max(parts_of(columns) * recurrent,
                                               parts_of(cells) * std::max(sensory, 3 * p.units)));
        recurrent_sums_ = w.template take<double>(recurrent);
        sensory_sums_ = w.template take<double>(sensory);
        unit_sums_ = w.template take<double>(3 * p.units);
      }
    } else if (p.saved && !p.chunk) {
      tape_ = static_cast<C*>(p.saved);
      tape_slots_ = p.steps * p.unfolds + 1;
    }
    if (!held_) {
      vectors_ = w.template take<C>(p.batch * vectors);
      numbers_ = w.template take<C>(p.batch * numbers);
    }
    size_ = w.size();
  }

  int64_t size() const { return size_; }

  cudaError_t forward() {
    cudaError_t status = prepare();
    for (int64_t first = 0; status == cudaSuccess && (first == 0 || first < p_.steps);) {
      // A chunk begins with a stretch, whose state before it is kept.
      const int64_t end = p_.saved && p_.chunk ? first / p_.chunk * p_.chunk + p_.chunk : p_.steps;
      const int64_t steps = std::min({stretch_, end - first, p_.steps - first});
      LtcScanPlan plan = plan_for(first, steps, first);
      plan.from = first ? p_.h_last : p_.h0;
      plan.to = p_.h_last;
      if (p_.saved && p_.chunk && p_.steps && first % p_.chunk == 0) {
        plan.border = border(first / p_.chunk);
        plan.border_stride = borders() * p_.units;
      }
      status = run_forward(plan);
      first += std::max<int64_t>(steps, 1);
    }
    return status;
  }

  cudaError_t backward() {
    cudaError_t status = prepare();
    const int64_t chunk = std::max<int64_t>(p_.chunk ? p_.chunk : p_.steps, 1);
    bool is_last = true;
    for (int64_t c = ceil_div(p_.steps, chunk) - 1; status == cudaSuccess && c >= 0; --c) {
      const int64_t begin = c * chunk, end = std::min(begin + chunk, p_.steps);
      if (p_.chunk) status = run_chunk_again(c, begin, end);
      for (int64_t s = ceil_div(end - begin, stretch_) - 1; status == cudaSuccess && s >= 0; --s) {
        const int64_t first = begin + s * stretch_;
        LtcScanPlan plan = plan_for(first, std::min(stretch_, end - first), first - begin);
        plan.from = is_last ? p_.grad_h_last : p_.grad_h0;
        plan.to = p_.grad_h0;
        status = run_backward(plan, is_last);
        is_last = false;
      }
    }
    if (status == cudaSuccess && is_last) {
      LtcScanPlan plan = plan_for(0, 0, 0);
      plan.from = p_.grad_h_last;
      plan.to = p_.grad_h0;
      status =
          scan(ltc_scan_backward_kernel<T, true>, ltc_scan_backward_kernel<T, false>, plan, true);
      if (status == cudaSuccess && wants_weights()) status = sum_nothing();
    }
    if (status == cudaSuccess && wants_weights()) status = finish();
    return status;
  }

 private:
  bool wants_weights() const { return p_.grad_unit_weights != nullptr; }

  LtcList list(const LtcSynapses& from, Workspace& w) const {
    LtcList to{};
    to.piece_size = 1;
    to.count = int(from.count);
    to.units = int(p_.units);
    to.num_sources = int(from.num_sources);
    to.synapses = w.template take<LtcSynapse<C>>(from.count);
    to.sources = w.template take<int>(from.count);
    to.targets = w.template take<int>(from.count);
    to.by_source = w.template take<int>(from.count);
    to.ranks = w.template take<int>(from.count);
    to.begin_target = w.template take<int>(p_.units + 1);
    to.begin_source = w.template take<int>(from.num_sources + 1);
    return to;
  }

  int64_t borders() const { return count_chunks(p_.steps, p_.chunk); }
  C* border(int64_t chunk) const { return static_cast<C*>(p_.saved) + chunk * p_.units; }

  // Lays the network out, and finds how much shared memory there is.
  cudaError_t prepare() {
    const int64_t most = 1 << 30;
    if (std::max({p_.sensory.count, p_.recurrent.count, p_.inputs, p_.units}) > most ||
        std::max(stretch_, p_.unfolds) > most / p_.unfolds) {
      return cudaErrorInvalidValue;
    }
    int bytes = 0;
    cudaError_t status = most_shared_memory(bytes);
    shared_limit_ = bytes / int64_t(sizeof(C));
    if (status == cudaSuccess) status = lay_out(p_.sensory, sensory_list_);
    if (status == cudaSuccess) status = lay_out(p_.recurrent, recurrent_list_);
    return status;
  }

  cudaError_t lay_out(const LtcSynapses& from, const LtcList& to) {
    const int64_t threads = 1 + std::max({from.count, from.num_sources, p_.units});
    return launch_rows(ltc_scan_list_kernel<C>, threads, from, to);
  }

  // `slot_step` is the step whose slots of the tape begin the stretch's.
  LtcScanPlan plan_for(int64_t first, int64_t steps, int64_t slot_step) const {
    LtcScanPlan plan{};
    plan.list = recurrent_list_;
    plan.first = first;
    plan.steps = int(steps);
    const int64_t log_warp = 5;
    while (plan.log_lanes < log_warp && p_.units << (plan.log_lanes + 1) <= threads()) {
      ++plan.log_lanes;
    }
    plan.sensory = sensory_;
    plan.from_stride = p_.units;
    if (tape_) {
      plan.tape = tape_ + slot_step * p_.unfolds * p_.units;
      plan.tape_stride = tape_slots_ * p_.units;
    }
    plan.grads = grads_;
    plan.totals = totals_;
    return plan;
  }

  int64_t threads() const {
    const int64_t pieces = recurrent_list_.num_pieces();
    return held_ ? rounded_up(std::max<int64_t>(pieces, 1), kWarp) : kLtcMostThreads<C>;
  }

  cudaError_t run_forward(const LtcScanPlan& plan) {
    cudaError_t status = sum_sensory(plan);
    if (status != cudaSuccess) return status;
    return scan(ltc_scan_forward_kernel<T, true>, ltc_scan_forward_kernel<T, false>, plan, false);
  }

  // The tape of a chunk, from the state at its border.
  cudaError_t run_chunk_again(int64_t c, int64_t begin, int64_t end) {
    cudaError_t status = cudaSuccess;
    for (int64_t first = begin; status == cudaSuccess && first < end; first += stretch_) {
      LtcScanPlan plan = plan_for(first, std::min(stretch_, end - first), first - begin);
      if (first == begin) {
        plan.from = border(c);
        plan.from_stride = borders() * p_.units;
      } else {
        plan.from = plan.tape;
        plan.from_stride = plan.tape_stride;
      }
      status = run_forward(plan);
    }
    return status;
  }

  // x becomes [inputs, cells], and sums of it what the scan takes.
  cudaError_t sum_sensory(const LtcScanPlan& plan) {
    const int64_t cells = plan.steps * p_.batch;
    LtcTransposition t = transposition(plan, plan.steps, p_.inputs, 1);
    t.in = static_cast<const T*>(p_.x) + plan.first * p_.inputs;
    t.in_batch = p_.steps * p_.inputs;
    t.out = x_;
    cudaError_t status = transpose<T, C>(t);
    if (status != cudaSuccess) return status;
    return launch(ltc_scan_sensory_kernel<C>, p_.units * ceil_div(cells, kLtcRowThreads),
                  kLtcRowThreads, 0, stream_, sensory_list_, x_, cells, sensory_);
  }

  cudaError_t run_backward(const LtcScanPlan& plan, bool is_last) {
    cudaError_t status = sum_sensory(plan);
    if (status == cudaSuccess) {
      status =
          scan(ltc_scan_backward_kernel<T, true>, ltc_scan_backward_kernel<T, false>, plan, true);
    }
    if (status == cudaSuccess) {
      LtcTransposition t = transposition(plan, plan.steps, 3 * p_.units, 1);
      t.in = totals_;
      t.in_batch = plan.steps * t.in_row;
      t.out = totals_by_unit_;
      status = transpose<C, C>(t);
    }
    if (status == cudaSuccess && p_.grad_x) status = input_gradient(plan);
    if (status == cudaSuccess && p_.grad_timespans) {
      status = launch_rows(ltc_scan_timespans_kernel<C>, plan.steps * p_.batch, p_,
                           totals_by_unit_ + 2 * p_.units * plan.steps * p_.batch, plan.first,
                           int64_t(plan.steps));
    }
    if (status == cudaSuccess && wants_weights()) status = weight_gradients(plan, !is_last);
    return status;
  }

  cudaError_t input_gradient(const LtcScanPlan& plan) {
    const int64_t cells = plan.steps * p_.batch;
    const cudaError_t status =
        launch(ltc_scan_input_kernel<C>, p_.inputs * ceil_div(cells, kLtcRowThreads),
               kLtcRowThreads, 0, stream_, sensory_list_, x_, totals_by_unit_, cells, grad_x_);
    if (status != cudaSuccess) return status;
    LtcTransposition t = transposition(plan, p_.inputs, plan.steps, 0);
    t.in = grad_x_;
    t.in_batch = plan.steps;
    t.in_row = cells;
    t.out = static_cast<T*>(p_.grad_x) + plan.first * p_.inputs;
    t.out_batch = p_.steps * p_.inputs;
    t.out_row = p_.inputs;
    return transpose<C, T>(t);
  }

  cudaError_t weight_gradients(const LtcScanPlan& plan, bool accumulate) {
    const int64_t cells = plan.steps * p_.batch, columns = cells * p_.unfolds;
    LtcTransposition t = transposition(plan, plan.steps * p_.unfolds, 2 * p_.units, p_.unfolds);
    t.in = grads_;
    t.in_batch = t.rows * t.in_row;
    t.out = grads_by_unit_;
    cudaError_t status = transpose<C, C>(t);
    if (status != cudaSuccess) return status;
    t = transposition(plan, plan.steps * p_.unfolds, p_.units, p_.unfolds);
    t.in = plan.tape;
    t.in_batch = plan.tape_stride;
    t.out = states_by_unit_;
    status = transpose<C, C>(t);
    if (status == cudaSuccess) {
      status = synapse_sums(recurrent_list_, states_by_unit_, grads_by_unit_, columns, accumulate,
                            recurrent_sums_);
    }
    if (status == cudaSuccess) {
      status = synapse_sums(sensory_list_, x_, totals_by_unit_, cells, accumulate, sensory_sums_);
    }
    if (status != cudaSuccess) return status;
    const int64_t parts = parts_of(cells);
    status = launch(ltc_scan_units_kernel<C>, p_.units * parts, kLtcRowThreads,
                    3 * kLtcRowThreads / kWarp * sizeof(C), stream_, p_, totals_by_unit_,
                    plan.first, plan.steps, columns_of_part(cells), partial_);
    if (status != cudaSuccess) return status;
    return sum(parts, 3 * p_.units, accumulate, unit_sums_);
  }

  cudaError_t synapse_sums(const LtcList& list, const C* potentials, const C* grads,
                           int64_t columns, bool accumulate, double* sums) {
    const int64_t parts = list.count ? parts_of(columns) : 0;
    const cudaError_t status =
        launch(ltc_scan_weights_kernel<C>, p_.units * parts, kLtcRowThreads, 0, stream_, list,
               potentials, grads, columns, columns_of_part(columns), partial_);
    if (status != cudaSuccess) return status;
    return sum(parts, 4 * int64_t(list.count), accumulate, sums);
  }

  cudaError_t sum(int64_t parts, int64_t size, bool accumulate, double* sums) {
    return launch_rows(ltc_scan_sum_kernel<C>, size, partial_, parts, size, accumulate, sums);
  }

  cudaError_t sum_nothing() {
    cudaError_t status = sum(0, 4 * p_.recurrent.count, false, recurrent_sums_);
    if (status == cudaSuccess) status = sum(0, 4 * p_.sensory.count, false, sensory_sums_);
    if (status == cudaSuccess) status = sum(0, 3 * p_.units, false, unit_sums_);
    return status;
  }

  cudaError_t finish() {
    cudaError_t status = launch_rows(ltc_scan_synapse_gradients_kernel<C>, p_.recurrent.count,
                                     p_.recurrent, recurrent_sums_);
    if (status == cudaSuccess) {
      status = launch_rows(ltc_scan_synapse_gradients_kernel<C>, p_.sensory.count, p_.sensory,
                           sensory_sums_);
    }
    if (status == cudaSuccess) {
      status = launch_rows(ltc_scan_unit_gradients_kernel<C>, p_.units, p_, unit_sums_);
    }
    return status;
  }

  // Of rows that are dense to columns that are neighbours within the whole stretch.
  LtcTransposition transposition(const LtcScanPlan& plan, int64_t rows, int64_t columns,
                                 int64_t of_step) const {
    LtcTransposition t{};
    t.rows = rows;
    t.columns = columns;
    t.in_row = columns;
    t.out_batch = rows;
    t.out_row = rows * p_.batch;
    t.first = plan.first;
    t.steps = plan.steps;
    t.of_step = of_step;
    return t;
  }

  template <typename In, typename Out>
  cudaError_t transpose(const LtcTransposition& t) {
    const int64_t blocks = p_.batch * ceil_div(t.rows, kLtcTile) * ceil_div(t.columns, kLtcTile);
    return launch(ltc_scan_transpose_kernel<In, Out>, blocks, kLtcRowThreads,
                  kLtcTile * (kLtcTile + 1) * sizeof(C), stream_, p_, t);
  }

  // A block's vectors and numbers go to shared memory, as long as they fit.
  using Kernel = void (*)(LtcScanParams, LtcScanPlan);
  cudaError_t scan(Kernel held, Kernel streamed, LtcScanPlan plan, bool backward) {
    int64_t shared = 0;
    const auto place = [&](int64_t size, void* elsewhere) {
      if (held_ || shared + size <= shared_limit_) {
        shared += size;
        elsewhere = nullptr;
      }
      return elsewhere;
    };
    plan.vectors = place(ltc_vectors<C>(recurrent_list_, backward), vectors_);
    plan.numbers = place(ltc_numbers(recurrent_list_, backward, held_), numbers_);
    return launch(held_ ? held : streamed, p_.batch, int(threads()), size_t(shared) * sizeof(C),
                  stream_, p_, plan);
  }

  // A thread for each of `count` things.
  template <typename... P>
  cudaError_t launch_rows(void (*kernel)(P...), int64_t count,
                          typename Identity<P>::type... arguments) {
    return launch(kernel, ceil_div(count, kLtcRowThreads), kLtcRowThreads, 0, stream_,
                  arguments...);
  }

  const LtcScanParams& p_;
  cudaStream_t stream_;
  const int64_t stretch_;
  bool held_ = false;
  LtcList sensory_list_, recurrent_list_;
  C *x_ = nullptr, *sensory_ = nullptr, *tape_ = nullptr, *totals_ = nullptr;
  C *totals_by_unit_ = nullptr, *grad_x_ = nullptr, *grads_ = nullptr, *grads_by_unit_ = nullptr;
  C *states_by_unit_ = nullptr, *partial_ = nullptr, *vectors_ = nullptr, *numbers_ = nullptr;
  double *recurrent_sums_ = nullptr, *sensory_sums_ = nullptr, *unit_sums_ = nullptr;
  int64_t tape_slots_ = 0, size_ = 0;
  int64_t shared_limit_ = 0;  // elements that a block may have
};

}  // namespace

// Elements of C.
int64_t ltc_scan_workspace(const LtcScanParams& p, bool backward) {
  int64_t elements = 0;
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    elements = Scan<T>(p, backward, nullptr, nullptr).size() / int64_t(sizeof(compute_t<T>));
  });
  return elements;
}

cudaError_t ltc_scan_forward(const LtcScanParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    status =
        Scan<std::remove_pointer_t<decltype(element)>>(p, false, p.workspace, stream).forward();
  });
  return status;
}

cudaError_t ltc_scan_backward(const LtcScanParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    status =
        Scan<std::remove_pointer_t<decltype(element)>>(p, true, p.workspace, stream).backward();
  });
  return status;
}

}  // namespace cuda
}  // namespace ember
