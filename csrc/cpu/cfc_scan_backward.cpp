// The CfC scan's backward pass on the CPU.
//
// It walks a chunk in reverse, every thread with some rows as in forward, and leaves the gradients
// before activation of each step and row. What is not recurrent follows for the whole chunk: the
// gradient of x, and the weights' gradients.
#include <type_traits>

#include "../common/chunks.h"
#include "cfc_scan.h"
#include "cfc_scan_steps.h"
#include "cfc_scan_weight_gradients.h"
#include "panels.h"
#include "sums.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

template <typename T>
class Backward {
 public:
  using C = compute_t<T>;

  explicit Backward(const CfcScanParams& p)
      : Backward(p, cfc_workspace(p, true), static_cast<C*>(p.workspace)) {}

  void run(const ThreadPool& pool) {
    if (p_.chunk) cfc_pack(p_, packed_);
    pack_transposed();
    weight_gradients_.clear();
    place_gradients();
    const auto work = [this](const CfcJob& job, const Share& share) {
      if (job.kind == CfcJob::layer_gradients) {
        layer_gradients(job, share);
      } else {
        cfc_layer_job(tapes_, packed_, job, share);
      }
    };
    for (int64_t c = count_chunks(p_.steps, tapes_.chunk) - 1; c >= 0; --c) {
      const int64_t first = c * tapes_.chunk;
      const int64_t steps = p_.steps - first < tapes_.chunk ? p_.steps - first : tapes_.chunk;
      const int64_t slot = tapes_.is_whole ? first : 0;
      cfc_for_row_blocks(p_, pool, work, [&](int32_t begin, int32_t end, const auto& run) {
        if (p_.chunk) {
          const C* border = static_cast<const C*>(p_.saved) + c * p_.batch * p_.hidden;
          tapes_.place_state(border, p_.hidden, begin, end);
          steps_.walk({first, steps, begin, end, true}, false, run);
        }
        for (int64_t i = steps - 1; i >= 0; --i) {
          head_gradients({first + i, begin, end, slot + i, i});
          for (int32_t l = int32_t(p_.num_layers) - 1; l >= 0; --l) {
            run(CfcJob{CfcJob::layer_gradients, l, {first + i, begin, end, slot + i, i}});
          }
        }
      });
      if (p_.grad_x) input_gradients(pool, first, steps);
      weight_gradients_.add(pool, slot, steps);
    }
    store_gradients();
    weight_gradients_.store();
  }

 private:
  Backward(const CfcScanParams& p, const CfcWorkspace& parts, C* workspace)
      : p_(p),
        tapes_(p, true),
        steps_(tapes_),
        weight_gradients_(tapes_, workspace + parts.weight_grads),
        packed_(workspace + parts.packed),
        transposed_(workspace + parts.transposed),
        carry_(workspace + parts.carry),
        decay_grads_(workspace + parts.decay_grads) {}

  void place_gradients() {
    const C* grad_h_last = static_cast<const C*>(p_.grad_h_last);
    for (int64_t b = 0; b < p_.batch; ++b) {
      copy(grad_h_last + b * p_.hidden, p_.hidden, carry_ + b * cfc_pad(p_.hidden));
    }
    if (!p_.grad_decay) return;
    for (int64_t i = 0; i < p_.batch * 2 * cfc_pad(p_.hidden); ++i) decay_grads_[i] = 0;
  }

  void store_gradients() {
    C* grad_h0 = static_cast<C*>(p_.grad_h0);
    for (int64_t b = 0; b < p_.batch; ++b) {
      copy(carry_ + b * cfc_pad(p_.hidden), p_.hidden, grad_h0 + b * p_.hidden);
    }
    if (!p_.grad_decay) return;
    C* grad_decay = static_cast<C*>(p_.grad_decay);
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < p_.hidden; ++j) {
        LongSum<C> sum;
        for (int64_t b = 0; b < p_.batch; ++b) {
          sum.add(decay_grads_[(b * 2 + i) * cfc_pad(p_.hidden) + j]);
        }
        grad_decay[i * p_.hidden + j] = C(sum.value());
      }
    }
  }

  void pack_transposed() {
    C* packed = transposed_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const C* weight = static_cast<const C*>(layer.weight);
      const int64_t depth = layer.segments * layer.units, width = 1 + layer.inputs;
      const int64_t split = l == 0 ? p_.inputs : 0;
      // The input's columns apart from the state's: the former are not part of the recurrence.
      pack_matrix(depth, split, packed,
                  [&](int64_t k, int64_t column) { return weight[k * width + 1 + column]; });
      packed += depth * packed_width<C>(split);
      pack_matrix(depth, layer.inputs - split, packed, [&](int64_t k, int64_t column) {
        return weight[k * width + 1 + split + column];
      });
      packed += depth * packed_width<C>(layer.inputs - split);
    }
  }

  // The transposed weights of a layer from the input column `split` on.
  const C* transposed(int64_t l, int64_t split) const {
    const C* packed = transposed_;
    for (int64_t i = 0; i < l; ++i) {
      const CfcLayer& layer = p_.layers[i];
      const int64_t own = i == 0 ? p_.inputs : 0;
      packed += layer.segments * layer.units *
                (packed_width<C>(own) + packed_width<C>(layer.inputs - own));
    }
    return packed + p_.layers[l].segments * p_.layers[l].units * packed_width<C>(split);
  }

  // The gradients of `count` rows' layer, `lda` elements apart.
  PanelRows<C> grad_rows(const CfcLayer& layer, int64_t count, const C* first, int64_t lda) const {
    return {count, first, lda, layer.segments, layer.units, cfc_pad(layer.units)};
  }

  // The heads' gradients of one step. carry_ goes from the gradient of h_t to that of h_{t-1} in
  // the course of a step.
  void head_gradients(const CfcStep& step) {
    for (int64_t b = step.begin; b < step.end; ++b) {
      C* out = tapes_.grads(tapes_.heads, step.grad_slot, b);
      if (tapes_.runs(b, step.t)) {
        head_gradients(step.t, b, tapes_.kept(tapes_.heads, step.slot, b), out);
      } else {
        for (int64_t j = 0; j < tapes_.heads.kept_stride; ++j) out[j] = 0;
        if (p_.grad_timespans) static_cast<C*>(p_.grad_timespans)[b * p_.steps + step.t] = 0;
      }
    }
  }

  // From a layer's gradients to those of the layer below, or from the first layer's to the state's.
  void layer_gradients(const CfcJob& job, const Share& share) {
    const CfcLayer& layer = p_.layers[job.layer];
    const CfcStep& step = job.step;
    const int64_t depth = layer.segments * layer.units;
    const PanelRows<C> rows =
        grad_rows(layer, step.end - step.begin, tapes_.grads(layer, step.grad_slot, step.begin),
                  layer.grad_stride);
    if (job.layer == 0) {
      multiply(rows, PackedMatrix<C>{transposed(0, p_.inputs), depth, 0, p_.hidden}, share,
               FromZero{}, [&](int64_t unit, int64_t first, int count, const C* dh) {
                 for (int r = 0; r < count; ++r) {
                   const int64_t b = step.begin + first + r;
                   if (tapes_.runs(b, step.t)) {
                     copy_vector(dh + r * lanes<C>, carry_ + b * cfc_pad(p_.hidden) + unit);
                   }
                 }
               });
      return;
    }
    const CfcLayer& below = p_.layers[job.layer - 1];
    multiply(rows, PackedMatrix<C>{transposed(job.layer, 0), depth, 0, below.units}, share,
             FromZero{}, [&](int64_t unit, int64_t first, int count, const C* v) {
               for (int r = 0; r < count; ++r) {
                 const C* slope = tapes_.kept(below, step.slot, step.begin + first + r) + unit;
                 C* out = tapes_.grads(below, step.grad_slot, step.begin + first + r) + unit;
                 for (int j = 0; j < lanes<C>; ++j) out[j] = v[r * lanes<C> + j] * slope[j];
               }
             });
  }

  void head_gradients(int64_t t, int64_t b, const C* cell, C* out) {
    const int64_t n = p_.hidden, padded = cfc_pad(n);
    const T* grad_y = static_cast<const T*>(p_.grad_y) + (b * p_.steps + t) * n;
    C* dh = carry_ + b * padded;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) dh[j] += widen(grad_y[j]);
    LongSum<C> grad_dt;
    if (p_.heads == 1) {
      pure_head_gradients(tapes_.timespan(b, t), cell, dh, out, decay_grads_ + b * 2 * padded,
                          grad_dt);
    } else if (p_.heads == 3) {
      if (p_.mode == CfcMode::no_gate) {
        gated_head_gradients<true>(n, padded, cell, cell + 2 * padded, dh, out);
      } else {
        gated_head_gradients<false>(n, padded, cell, cell + 2 * padded, dh, out);
      }
    } else {
      // The gradient of the gate's exponent lands in time_a's place and is moved on from there.
      if (p_.mode == CfcMode::no_gate) {
        gated_head_gradients<true>(n, padded, cell, cell + 3 * padded, dh, out);
      } else {
        gated_head_gradients<false>(n, padded, cell, cell + 3 * padded, dh, out);
      }
      const C dt = tapes_.timespan(b, t);
      const C* time_a = cell + 2 * padded;
      C *grad_a = out + 2 * padded, *grad_b = out + 3 * padded;
      for (int64_t from = 0; from < n; from += sum_segment<C>) {
        const int64_t end = n - from < sum_segment<C> ? n : from + sum_segment<C>;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = from; j < end; ++j) {
          grad_b[j] = grad_a[j];
          sum += grad_a[j] * time_a[j];
          grad_a[j] *= dt;
        }
        grad_dt.add(sum);
      }
    }
    if (p_.grad_timespans)
      static_cast<C*>(p_.grad_timespans)[b * p_.steps + t] = C(grad_dt.value());
  }

  template <bool no_gate>
  static void gated_head_gradients(int64_t n, int64_t padded, const C* cell, const C* gate,
                                   const C* dh, C* out) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const GatedCell<C> g =
          gated_gradients<no_gate>(GatedCell<C>{cell[j], cell[padded + j], gate[j]}, dh[j]);
      out[j] = g.first;
      out[padded + j] = g.second;
      out[2 * padded + j] = g.gate;
    }
  }

  void pure_head_gradients(C dt, const C* cell, const C* dh, C* out, C* grad_decay,
                           LongSum<C>& grad_dt) {
    const int64_t n = p_.hidden, padded = cfc_pad(n);
    const C *w = static_cast<const C*>(p_.decay), *amplitude = w + n;
    constexpr int64_t block = 64;
    for (int64_t from = 0; from < n; from += block) {
      const int64_t width = n - from < block ? n - from : block;
      C grad_w[block], grad_amplitude[block], terms[block];
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const int64_t j = from + i;
        const PureGradients<C> g = pure_gradients(cell[j], w[j], amplitude[j], dt, dh[j]);
        out[j] = g.a;
        terms[i] = g.dt;
        grad_w[i] = g.w;
        grad_amplitude[i] = g.amplitude;
      }
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += terms[i];
      grad_dt.add(sum);
      if (!p_.grad_decay) continue;
      for (int64_t i = 0; i < width; ++i) {
        grad_decay[from + i] += grad_w[i];
        grad_decay[padded + from + i] += grad_amplitude[i];
      }
    }
  }

  // grad_x of the steps [first, first + steps), whose gradients fill the gradient tape from slot 0.
  void input_gradients(const ThreadPool& pool, int64_t first, int64_t steps) {
    const CfcLayer& layer = p_.layers[0];
    const int64_t most = 32, pieces = (steps + most - 1) / most;
    const C* weights = transposed(0, 0);
    T* grad_x = static_cast<T*>(p_.grad_x);
    parallel_for(pool, p_.batch * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / pieces, from = steps * (i % pieces) / pieces;
        const int64_t rows = steps * (i % pieces + 1) / pieces - from;
        T* out = grad_x + (b * p_.steps + first + from) * p_.inputs;
        multiply(grad_rows(layer, rows, tapes_.grads(layer, from, b), p_.batch * layer.grad_stride),
                 PackedMatrix<C>{weights, layer.segments * layer.units, 0, p_.inputs}, Share{0, 1},
                 FromZero{}, [&](int64_t column, int64_t row, int count, const C* dx) {
                   const int64_t left = p_.inputs - column;
                   const int64_t width = left < lanes<C> ? left : lanes<C>;
                   for (int r = 0; r < count; ++r) {
                     convert(dx + r * lanes<C>, width, out + (row + r) * p_.inputs + column);
                   }
                 });
      }
    });
  }

  const CfcScanParams& p_;
  const CfcTapes<C> tapes_;
  const CfcSteps<T> steps_;
  const CfcWeightGradients<C> weight_gradients_;
  C *const packed_, *const transposed_;
  C* const carry_;        // [batch, padded hidden]: the gradient of the state
  C* const decay_grads_;  // [batch, 2, padded hidden]
};

}  // namespace

void cfc_scan_backward(const CfcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Backward<std::remove_pointer_t<decltype(element)>>(p).run(pool);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
