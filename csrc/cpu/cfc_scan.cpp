// The CfC scan on the CPU.
//
// Every thread takes some rows of the batch through all steps of a chunk, without waiting for the
// others. A step multiplies the rows [1, x_t, h_{t-1}] by the packed weights, panel by panel: a
// panel holds one vector of units for each head, so that the heads of a unit meet in registers and
// the cell is computed as soon as the products are there. The new state is written into the next
// step's row; those rows are, at the same time, what the backward pass needs.
//
// Backward walks a chunk in reverse in the same way and leaves the gradients before activation of
// each step and row. What is not recurrent follows for the whole chunk: the gradient of x, and the
// weights' gradients, shared out over tiles of the weights and summed in a fixed order, which makes
// the result independent of the number of threads.
//
// Loops that hold a struct carry `GCC ivdep` where others carry `omp simd`: with the latter, gcc
// keeps the struct in memory and does not vectorise.
#include "../common/cfc_scan.h"

#include <type_traits>

#include "../common/chunks.h"
#include "parallel.h"
#include "sums.h"
#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

// `count` rows, `lda` elements apart, each of `segments` pieces of `length` values, the pieces
// `stride` apart.
template <typename C>
struct Rows {
  int64_t count;
  const C* values;
  int64_t lda;
  int64_t segments, length, stride;
};

// Weights as products take them: panels [depth, vectors, lanes], `size` elements apart, of which
// those in [begin, end) are wanted.
template <typename C>
struct Panels {
  const C* weights;
  int64_t size;
  int64_t begin, end;
};

// What the sums of a product begin with; the alternative is a function (panel, first row, rows,
// sums [N, rows, lanes]) that writes it.
struct FromZero {};

// out[n][r][lane] = sum over the row a + r * lda of its values times panel[value][n][lane], added
// to what out holds if `resumes`.
template <typename C, int N, int R, bool resumes>
void product(const C* a, const Rows<C>& rows, const C* panel, C* out) {
  using V = Vector<C>;
  V sum[N][R] = {};
  if constexpr (resumes) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) sum[n][r] = load_vector(out + (n * R + r) * lanes<C>);
    }
  }
  for (int64_t s = 0; s < rows.segments; ++s) {
    const C* values[R];
    for (int r = 0; r < R; ++r) values[r] = a + r * rows.lda + s * rows.stride;
    for (int64_t k = 0; k < rows.length; ++k) {
      V w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[n] = load_vector(panel + n * lanes<C>);
      panel += N * lanes<C>;
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const C value = values[r][k];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[n][r] += value * w[n];
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) store_vector(sum[n][r], out + (n * R + r) * lanes<C>);
  }
}

// Rows that a product of N vectors takes at once: its sums must fit the registers. Products that
// resume are those of few rows.
template <int N, bool resumes>
constexpr int max_rows = vector_sums / N < (resumes ? 4 : 12) ? vector_sums / N
                         : resumes                            ? 4
                                                              : 12;

template <typename C, int N, bool resumes, int R = max_rows<N, resumes>>
void product_of(int count, const C* a, const Rows<C>& rows, const C* panel, C* out) {
  if constexpr (R > 1) {
    if (count < R) return product_of<C, N, resumes, R - 1>(count, a, rows, panel, out);
  }
  product<C, N, R, resumes>(a, rows, panel, out);
}

// The largest result of a product, in elements.
template <typename C>
constexpr int product_size = vector_sums * lanes<C>;

// body(first, count) for groups of about equal size, at most `most` rows each.
template <typename Body>
void for_row_groups(int64_t rows, int64_t most, const Body& body) {
  const int64_t groups = (rows + most - 1) / most;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = rows * g / groups;
    body(first, int(rows * (g + 1) / groups - first));
  }
}

// As product() for one row and P panels, `size` elements apart: out[p][n][lane]. A single row by a
// single panel would have too few sums under way to keep the arithmetic units busy.
template <typename C, int N, int P, bool resumes>
void product_of_panels(const Rows<C>& row, const C* panels, int64_t size, C* out) {
  Vector<C> sum[P][N] = {};
  if constexpr (resumes) {
    for (int p = 0; p < P; ++p) {
      for (int n = 0; n < N; ++n) sum[p][n] = load_vector(out + (p * N + n) * lanes<C>);
    }
  }
  for (int64_t s = 0; s < row.segments; ++s) {
    for (int64_t k = 0; k < row.length; ++k) {
      const C value = row.values[s * row.stride + k];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          sum[p][n] += value * load_vector(panels + p * size + n * lanes<C>);
        }
      }
      panels += N * lanes<C>;
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int n = 0; n < N; ++n) store_vector(sum[p][n], out + (p * N + n) * lanes<C>);
  }
}

// Multiplies one row by as many panels from `panel` on as go by P at once; returns the next.
template <int N, int P, typename C, typename Start, typename Epilogue>
int64_t multiply_row(int64_t panel, const Rows<C>& row, const Panels<C>& panels, const Start& start,
                     const Epilogue& epilogue) {
  constexpr bool resumes = !std::is_same_v<Start, FromZero>;
  alignas(64) C out[P * N * lanes<C>];
  for (; panel + P <= panels.end; panel += P) {
    for (int p = 0; p < P; ++p) {
      if constexpr (resumes) start(panel + p, 0, 1, out + p * N * lanes<C>);
    }
    product_of_panels<C, N, P, resumes>(row, panels.weights + panel * panels.size, panels.size,
                                        out);
    for (int p = 0; p < P; ++p) epilogue(panel + p, 0, 1, out + p * N * lanes<C>);
  }
  if constexpr (P > 1) {
    return multiply_row<N, P / 2>(panel, row, panels, start, epilogue);
  }
  return panel;
}

// Multiplies rows by packed panels of N vectors;
// epilogue(panel, first row, rows, products [N, rows, lanes]).
template <int N, typename C, typename Start, typename Epilogue>
void multiply_panels(const Rows<C>& rows, const Panels<C>& panels, const Start& start,
                     const Epilogue& epilogue) {
  if (rows.count == 1) {
    multiply_row<N, N == 1                 ? 8
                    : 4 * N <= vector_sums ? 4
                                           : 2>(panels.begin, rows, panels, start, epilogue);
    return;
  }
  constexpr bool resumes = !std::is_same_v<Start, FromZero>;
  alignas(64) C out[product_size<C>];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for_row_groups(rows.count, max_rows<N, resumes>, [&](int64_t first, int count) {
      if constexpr (resumes) start(panel, first, count, out);
      product_of<C, N, resumes>(count, rows.values + first * rows.lda, rows,
                                panels.weights + panel * panels.size, out);
      epilogue(panel, first, count, out);
    });
  }
}

// Elements that `columns` packed columns take for each value of a row.
template <typename C>
int64_t packed_width(int64_t columns) {
  return (columns + lanes<C> - 1) / lanes<C> * lanes<C>;
}

// Packed weights of `depth` values for each of `columns` columns, two vectors of columns to a
// panel; a product takes the values from `skipped` on.
template <typename C>
struct Matrix {
  const C* packed;
  int64_t depth, skipped, columns;
};

// Multiplies rows by a share of a matrix; epilogue(first column, first row, rows, products [rows,
// lanes]), and start() likewise.
template <typename C, typename Start, typename Epilogue>
void multiply(const Rows<C>& rows, const Matrix<C>& matrix, const Share& share, const Start& start,
              const Epilogue& epilogue) {
  const int64_t vectors = (matrix.columns + lanes<C> - 1) / lanes<C>, pairs = vectors / 2;
  const auto for_pair = [](const auto& body) {
    return [&](int64_t panel, int64_t first, int count, C* out) {
      const int64_t column = panel * 2 * lanes<C>;
      body(column, first, count, out);
      body(column + lanes<C>, first, count, out + count * lanes<C>);
    };
  };
  const int64_t left = pairs * 2 * lanes<C>;
  const auto for_last = [left](const auto& body) {
    return
        [&body, left](int64_t, int64_t first, int count, C* out) { body(left, first, count, out); };
  };
  const Panels<C> two{matrix.packed + matrix.skipped * 2 * lanes<C>, matrix.depth * 2 * lanes<C>,
                      share.begin(pairs), share.end(pairs)};
  const bool has_last = vectors % 2 != 0 && share.index == share.members - 1;
  const Panels<C> one{matrix.packed + left * matrix.depth + matrix.skipped * lanes<C>, 0, 0,
                      has_last ? 1 : 0};
  if constexpr (std::is_same_v<Start, FromZero>) {
    multiply_panels<2>(rows, two, start, for_pair(epilogue));
    multiply_panels<1>(rows, one, start, for_last(epilogue));
  } else {
    multiply_panels<2>(rows, two, for_pair(start), for_pair(epilogue));
    multiply_panels<1>(rows, one, for_last(start), for_last(epilogue));
  }
}

// weight [segments, units, depth] -> panels of one vector of units for each of the segments,
// [panels, depth, segments, lanes].
template <typename C>
void pack_heads(const C* weight, int64_t segments, int64_t units, int64_t depth, C* packed) {
  for (int64_t unit = 0; unit < units; unit += lanes<C>) {
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t lane = 0; lane < lanes<C>; ++lane) {
        const C* row = weight + (s * units + unit + lane) * depth;
        const bool inside = unit + lane < units;
        for (int64_t k = 0; k < depth; ++k) {
          packed[(k * segments + s) * lanes<C> + lane] = inside ? row[k] : C(0);
        }
      }
    }
    packed += depth * segments * lanes<C>;
  }
}

// A matrix given by its columns, value(depth index, column), to panels of two vectors of columns;
// the last has one if one is enough.
template <typename C, typename Value>
void pack_columns(int64_t depth, int64_t columns, C* packed, const Value& value) {
  for (int64_t column = 0; column < columns; column += 2 * lanes<C>) {
    const int64_t width = columns - column > lanes<C> ? 2 * lanes<C> : lanes<C>;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t lane = 0; lane < width; ++lane) {
        packed[k * width + lane] = column + lane < columns ? value(k, column + lane) : C(0);
      }
    }
    packed += depth * width;
  }
}

template <typename From, typename To>
EMBER_HD void convert(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) narrow(widen(from[i]), to[i]);
}

template <typename C>
EMBER_HD void copy(const C* from, int64_t n, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

template <typename T>
class Scan {
 public:
  using C = compute_t<T>;

  Scan(const CfcScanParams& p, bool backward)
      : p_(p),
        chunk_(cfc_chunk_steps(p, backward)),
        heads_(p.layers[p.num_layers - 1]),
        has_tape_(p.saved && !p.chunk) {
    const CfcWorkspace w = cfc_workspace(p, backward);
    C* workspace = static_cast<C*>(p.workspace);
    packed_ = p.packed ? static_cast<C*>(p.packed) : workspace + w.packed;
    transposed_ = workspace + w.transposed;
    tape_ = has_tape_ ? static_cast<C*>(p.saved) : workspace + w.tape;
    slots_ = has_tape_ ? p.steps : chunk_;
    grad_tape_ = workspace + w.grad_tape;
    carry_ = workspace + w.carry;
    weight_grads_ = workspace + w.weight_grads;
    decay_grads_ = workspace + w.decay_grads;
  }

  void pack_forward() {
    C* packed = packed_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const C* weight = static_cast<const C*>(layer.weight);
      const int64_t depth = 1 + layer.inputs;
      if (&layer == &heads_) {
        pack_heads(weight, layer.segments, layer.units, depth, packed);
      } else {
        pack_columns(depth, layer.units, packed,
                     [&](int64_t k, int64_t unit) { return weight[unit * depth + k]; });
      }
      packed += layer.segments * packed_width<C>(layer.units) * depth;
    }
  }

  void forward(const ThreadPool& pool) {
    if (!p_.packed) pack_forward();
    for_row_blocks(pool, [&](int32_t begin, int32_t end, const auto& run) {
      place_state(static_cast<const C*>(p_.h0), p_.h_stride, begin, end);
      for (int64_t b = begin; b < end; ++b) {
        // The state of a row without steps is handed on and takes no part in anything else.
        for (int64_t j = 0; j < p_.hidden && !runs(b, 0); ++j) state(0, b)[j] = 0;
      }
      for (int64_t first = 0; first < p_.steps; first += slots_) {
        const int64_t steps = p_.steps - first < slots_ ? p_.steps - first : slots_;
        if (p_.saved && p_.chunk) store_border(first, begin, end);
        forward_steps({first, steps, begin, end, has_tape_}, true, run);
        if (first + steps < p_.steps) move_state(steps, begin, end);
      }
      const int64_t last = p_.steps ? (p_.steps - 1) % slots_ + 1 : 0;
      C* h_last = static_cast<C*>(p_.h_last);
      for (int64_t b = begin; b < end; ++b) {
        const C* h = runs(b, 0) ? state(last, b) : static_cast<const C*>(p_.h0) + b * p_.h_stride;
        copy(h, p_.hidden, h_last + b * p_.h_stride);
      }
    });
  }

  void backward(const ThreadPool& pool) {
    if (p_.chunk) pack_forward();
    pack_transposed();
    for (int64_t i = 0; i < weight_grads_size(); ++i) weight_grads_[i] = 0;
    const C* grad_h_last = static_cast<const C*>(p_.grad_h_last);
    for (int64_t b = 0; b < p_.batch; ++b) {
      copy(grad_h_last + b * p_.hidden, p_.hidden, carry_ + b * cfc_pad(p_.hidden));
    }
    if (p_.grad_decay) {
      for (int64_t i = 0; i < p_.batch * 2 * cfc_pad(p_.hidden); ++i) decay_grads_[i] = 0;
    }
    const int64_t chunks = count_chunks(p_.steps, chunk_);
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const int64_t first = c * chunk_;
      const int64_t steps = p_.steps - first < chunk_ ? p_.steps - first : chunk_;
      const int64_t slot = has_tape_ ? first : 0;
      for_row_blocks(pool, [&](int32_t begin, int32_t end, const auto& run) {
        if (p_.chunk) {
          const C* border = static_cast<const C*>(p_.saved) + c * p_.batch * p_.hidden;
          place_state(border, p_.hidden, begin, end);
          forward_steps({first, steps, begin, end, true}, false, run);
        }
        for (int64_t i = steps - 1; i >= 0; --i) {
          head_gradients({first + i, begin, end, slot + i, i});
          for (int32_t l = int32_t(p_.num_layers) - 1; l >= 0; --l) {
            run(Job{Job::layer_gradients, l, {first + i, begin, end, slot + i, i}});
          }
        }
      });
      if (p_.grad_x) input_gradients(pool, first, steps);
      weight_gradients(pool, slot, steps);
    }
    C* grad_h0 = static_cast<C*>(p_.grad_h0);
    for (int64_t b = 0; b < p_.batch; ++b) {
      copy(carry_ + b * cfc_pad(p_.hidden), p_.hidden, grad_h0 + b * p_.hidden);
    }
    store_weight_gradients();
  }

 private:
  // ---- rows and pieces

  // One step of the rows [begin, end): its place in the tape and, backward, in the gradient tape.
  struct Step {
    int64_t t;
    int32_t begin, end;
    int64_t slot, grad_slot;
  };
  // Several, from slot 0 on. Whether what the derivatives need is kept.
  struct Stretch {
    int64_t first, steps;
    int32_t begin, end;
    bool keep;
  };

  // What several threads can do at once, each for some of a layer's units: one step of a layer,
  // forward or backward, or the inputs' part of the first layer's products for `steps` steps.
  struct Job {
    enum Kind : int8_t { layer_step, layer_gradients, inputs_part } kind;
    int32_t layer;
    Step step;
    bool keep = false, resumes = false;
    int32_t steps = 1;
  };

  void work(const Job& job, const Share& share) {
    if (share.members > 1 && job.kind == Job::layer_step) {
      // Parts of the rows come from other cores: asked for at once, they arrive at once.
      const Rows<C> rows = layer_rows(job);
      for (int64_t r = 0; r < rows.count; ++r) {
        for (int64_t k = 0; k < rows.length; k += 64 / int64_t(sizeof(C))) {
          __builtin_prefetch(rows.values + r * rows.lda + k);
        }
      }
    }
    switch (job.kind) {
      case Job::layer_step:
        return job.layer + 1 < p_.num_layers ? backbone_step(job, share) : heads_step(job, share);
      case Job::layer_gradients:
        return layer_gradients(job, share);
      case Job::inputs_part:
        return inputs_part(job, share);
    }
  }

  // The threads that a job is worth: one for every 8192 multiply-adds.
  int64_t helpers_for(const Job& job) const {
    const CfcLayer& layer = p_.layers[job.layer];
    int64_t depth = job.kind == Job::layer_gradients ? layer.units * layer.segments
                    : job.layer == 0                 ? p_.hidden
                                                     : layer.inputs;
    int64_t width = job.kind == Job::layer_gradients ? layer.inputs : layer.units * layer.segments;
    int64_t rows = job.step.end - job.step.begin;
    if (job.kind == Job::inputs_part) {
      depth = p_.inputs;
      rows *= job.steps;
    }
    return depth * width * rows / 8192;
  }

  // body(begin, end, run) for blocks of rows, where run(job) does a job. Where there are fewer rows
  // than threads, the threads share the jobs.
  template <typename Body>
  void for_row_blocks(const ThreadPool& pool, const Body& body) {
    int64_t helpers = 1;
    if (p_.batch < pool.threads) {
      for (int32_t l = 0; l < p_.num_layers; ++l) {
        const int64_t most = helpers_for(Job{Job::layer_step, l, {0, 0, int32_t(p_.batch), 0, 0}});
        helpers = most > helpers ? most : helpers;
      }
      helpers = helpers < pool.threads ? helpers : pool.threads;
    }
    const auto work = [this](const Job& job, const Share& share) { this->work(job, share); };
    if (helpers > p_.batch) {
      Team<Job> team;
      parallel_for(pool, helpers, 1, [&](int64_t, int64_t) {
        team.enter(
            [&] {
              body(0, int32_t(p_.batch),
                   [&](const Job& job) { team.run(job, helpers_for(job), work); });
            },
            work);
      });
      return;
    }
    // A block's rows stay in the first-level cache from panel to panel. How rows are grouped has no
    // influence on their values, so the number of threads may decide it.
    const int64_t most = 32;
    int64_t blocks = (p_.batch + most - 1) / most;
    blocks = (blocks + pool.threads - 1) / pool.threads * pool.threads;
    if (blocks > p_.batch) blocks = p_.batch;
    parallel_for(pool, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        body(int32_t(p_.batch * i / blocks), int32_t(p_.batch * (i + 1) / blocks),
             [&](const Job& job) { work(job, Share{0, 1}); });
      }
    });
  }

  C* input(int64_t layer, int64_t slot, int64_t b) const {
    const CfcLayer& l = p_.layers[layer];
    return tape_ + l.input_offset * slots_ * p_.batch + (slot * p_.batch + b) * l.input_stride;
  }
  C* kept(const CfcLayer& l, int64_t slot, int64_t b) const {
    return tape_ + l.kept_offset * slots_ * p_.batch + (slot * p_.batch + b) * l.kept_stride;
  }
  C* grads(const CfcLayer& l, int64_t slot, int64_t b) const {
    return grad_tape_ + l.grad_offset * chunk_ * p_.batch + (slot * p_.batch + b) * l.grad_stride;
  }
  C* state(int64_t slot, int64_t b) const { return input(0, slot, b) + 1 + p_.inputs; }

  C timespan(int64_t b, int64_t t) const {
    return static_cast<const C*>(p_.timespans)[b * p_.steps + t];
  }
  bool runs(int64_t b, int64_t t) const { return !p_.lengths || t < p_.lengths[b]; }
  const C* dropout_scale(int64_t layer, int64_t b, int64_t t) const {
    const int64_t scaled = p_.num_layers - 2;
    if (!p_.dropout_scale || layer == 0) return nullptr;
    return static_cast<const C*>(p_.dropout_scale) +
           ((b * p_.steps + t) * scaled + layer - 1) * p_.layers[layer].units;
  }

  void place_state(const C* from, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) copy(from + b * stride, p_.hidden, state(0, b));
  }
  void move_state(int64_t slot, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) copy(state(slot, b), p_.hidden, state(0, b));
  }
  void store_border(int64_t first, int64_t begin, int64_t end) {
    C* border = static_cast<C*>(p_.saved) + first / chunk_ * p_.batch * p_.hidden;
    for (int64_t b = begin; b < end; ++b) copy(state(0, b), p_.hidden, border + b * p_.hidden);
  }

  // ---- forward

  template <typename Run>
  void forward_steps(const Stretch& all, bool want_y, const Run& run) {
    // With few rows the weights' way into the core takes longer than the arithmetic. Those of the
    // inputs are then applied to several steps at a time; the order of the sums stays the same.
    const bool ahead = all.end - all.begin <= 4 && p_.inputs > 0;
    // x and y are read and written several steps at a time, since a row's steps lie side by side.
    const int64_t stretch = ahead ? 32 : 8;
    for (int64_t from = 0; from < all.steps; from += stretch) {
      const int64_t to = from + stretch < all.steps ? from + stretch : all.steps;
      place_inputs(all, from, to);
      const Step start{all.first + from, all.begin, all.end, from, 0};
      if (ahead) run(Job{Job::inputs_part, 0, start, all.keep, false, int32_t(to - from)});
      for (int64_t slot = from; slot < to; ++slot) {
        const Step step{all.first + slot, all.begin, all.end, slot, 0};
        for (int32_t l = 0; l < p_.num_layers; ++l) {
          run(Job{Job::layer_step, l, step, all.keep, ahead && l == 0});
        }
      }
      if (want_y) store_outputs(all, from, to);
    }
  }

  void place_inputs(const Stretch& all, int64_t from, int64_t to) {
    const T* x = static_cast<const T*>(p_.x);
    for (int64_t b = all.begin; b < all.end; ++b) {
      for (int64_t slot = from; slot < to; ++slot) {
        C* row = input(0, slot, b);
        row[0] = C(1);
        if (runs(b, all.first + slot)) {
          convert(x + (b * p_.steps + all.first + slot) * p_.inputs, p_.inputs, row + 1);
        } else {  // not even NaN there reaches a gradient
          for (int64_t j = 1; j <= p_.inputs; ++j) row[j] = 0;
        }
      }
    }
  }

  void store_outputs(const Stretch& all, int64_t from, int64_t to) {
    T* y = static_cast<T*>(p_.y);
    for (int64_t b = all.begin; b < all.end; ++b) {
      for (int64_t slot = from; slot < to; ++slot) {
        T* out = y + (b * p_.steps + all.first + slot) * p_.hidden;
        if (runs(b, all.first + slot)) {
          convert(state(slot + 1, b), p_.hidden, out);
        } else {
          for (int64_t j = 0; j < p_.hidden; ++j) narrow(C(0), out[j]);
        }
      }
    }
  }

  const C* packed(int64_t layer) const {
    const C* weights = packed_;
    for (int64_t l = 0; l < layer; ++l) {
      weights += packed_width<C>(p_.layers[l].units) * (1 + p_.layers[l].inputs);
    }
    return weights;
  }

  // The rows that a layer is applied to, or if it resumes, what of them is left: the states.
  Rows<C> layer_rows(const Job& job) const {
    const CfcLayer& layer = p_.layers[job.layer];
    const Step& step = job.step;
    const int64_t skipped = job.resumes ? 1 + p_.inputs : 0;
    return {step.end - step.begin,      input(job.layer, step.slot, step.begin) + skipped,
            layer.input_stride,         1,
            1 + layer.inputs - skipped, 0};
  }

  // Sums over the inputs, left where the layer's kept values go afterwards.
  void inputs_part(const Job& job, const Share& share) {
    const CfcLayer& layer = p_.layers[0];
    const int64_t stride = p_.batch * layer.input_stride, from = job.step.slot;
    for (int64_t b = job.step.begin; b < job.step.end; ++b) {
      const Rows<C> rows{job.steps, input(0, from, b), stride, 1, 1 + p_.inputs, 0};
      if (p_.num_layers > 1) {
        multiply(rows, Matrix<C>{packed(0), 1 + layer.inputs, 0, layer.units}, share, FromZero{},
                 [&](int64_t unit, int64_t first, int count, const C* sums) {
                   for (int r = 0; r < count; ++r) {
                     copy_vector(sums + r * lanes<C>, kept(layer, from + first + r, b) + unit);
                   }
                 });
        continue;
      }
      dispatch_heads([&](auto heads, auto) {
        constexpr int K = decltype(heads)::value;
        multiply_panels<K>(rows, head_panels<K>(0, share), FromZero{},
                           [&](int64_t panel, int64_t first, int count, const C* sums) {
                             for (int r = 0; r < count; ++r) {
                               C* to = kept(heads_, from + first + r, b) + panel * lanes<C>;
                               for (int k = 0; k < K; ++k) {
                                 copy_vector(sums + (k * count + r) * lanes<C>,
                                             to + k * cfc_pad(p_.hidden));
                               }
                             }
                           });
      });
    }
  }

  template <int K>
  Panels<C> head_panels(int64_t skipped, const Share& share) const {
    const int64_t panels = (p_.hidden + lanes<C> - 1) / lanes<C>;
    return {packed(p_.num_layers - 1) + skipped * K * lanes<C>, (1 + heads_.inputs) * K * lanes<C>,
            share.begin(panels), share.end(panels)};
  }

  template <typename Body>
  void dispatch_activation(const Body& body) {
    using A = CfcActivation;
    switch (p_.activation) {
      case A::lecun_tanh:
        return body(std::integral_constant<A, A::lecun_tanh>());
      case A::tanh:
        return body(std::integral_constant<A, A::tanh>());
      case A::relu:
        return body(std::integral_constant<A, A::relu>());
      case A::silu:
        return body(std::integral_constant<A, A::silu>());
      case A::gelu:
        return body(std::integral_constant<A, A::gelu>());
    }
  }

  void backbone_step(const Job& job, const Share& share) {
    dispatch_activation([&](auto activation) {
      if (job.resumes) {
        const CfcLayer& layer = p_.layers[0];
        backbone_step<decltype(activation)::value>(
            job, share, [&](int64_t unit, int64_t first, int count, C* sums) {
              for (int r = 0; r < count; ++r) {
                copy_vector(kept(layer, job.step.slot, job.step.begin + first + r) + unit,
                            sums + r * lanes<C>);
              }
            });
      } else {
        backbone_step<decltype(activation)::value>(job, share, FromZero{});
      }
    });
  }

  template <CfcActivation activation, typename Start>
  void backbone_step(const Job& job, const Share& share, const Start& start) {
    const CfcLayer& layer = p_.layers[job.layer];
    const Step& step = job.step;
    for (int64_t b = step.begin; b < step.end && share.index == 0; ++b) {
      input(job.layer + 1, step.slot, b)[0] = C(1);
    }
    const auto epilogue = [&](int64_t unit, int64_t first, int count, const C* u) {
      alignas(64) C value[product_size<C>], slope[product_size<C>];
#pragma GCC ivdep
      for (int i = 0; i < count * lanes<C>; ++i) {
        const Activated<C> v = activated<activation>(u[i]);
        value[i] = v.value;
        slope[i] = v.slope;
      }
      for (int r = 0; r < count; ++r) {
        const int64_t b = step.begin + first + r;
        if (!runs(b, step.t)) {
          for (int64_t j = 0; j < lanes<C>; ++j)
            value[r * lanes<C> + j] = slope[r * lanes<C> + j] = 0;
        } else if (const C* scale = dropout_scale(job.layer, b, step.t)) {
          for (int64_t j = 0; j < lanes<C> && unit + j < layer.units; ++j) {
            value[r * lanes<C> + j] *= scale[unit + j];
            slope[r * lanes<C> + j] *= scale[unit + j];
          }
        }
        copy_vector(value + r * lanes<C>, input(job.layer + 1, step.slot, b) + 1 + unit);
        if (job.keep) copy_vector(slope + r * lanes<C>, kept(layer, step.slot, b) + unit);
      }
    };
    const Rows<C> rows = layer_rows(job);
    const int64_t depth = 1 + layer.inputs;
    multiply(rows, Matrix<C>{packed(job.layer), depth, depth - rows.length, layer.units}, share,
             start, epilogue);
  }

  // body(number of heads, mode), both as constants.
  template <typename Body>
  void dispatch_heads(const Body& body) {
    using std::integral_constant;
    using M = CfcMode;
    const integral_constant<M, M::gated> gated;
    const integral_constant<M, M::no_gate> no_gate;
    switch (p_.heads) {
      case 1:
        return body(integral_constant<int, 1>(), integral_constant<M, M::pure>());
      case 3:
        return p_.mode == M::no_gate ? body(integral_constant<int, 3>(), no_gate)
                                     : body(integral_constant<int, 3>(), gated);
      default:
        return p_.mode == M::no_gate ? body(integral_constant<int, 4>(), no_gate)
                                     : body(integral_constant<int, 4>(), gated);
    }
  }

  void heads_step(const Job& job, const Share& share) {
    dispatch_heads([&](auto heads, auto mode) {
      constexpr int K = decltype(heads)::value;
      if (job.resumes) {
        heads_step<K, decltype(mode)::value>(
            job, share, [&](int64_t panel, int64_t first, int count, C* sums) {
              for (int r = 0; r < count; ++r) {
                const C* from =
                    kept(heads_, job.step.slot, job.step.begin + first + r) + panel * lanes<C>;
                for (int k = 0; k < K; ++k) {
                  copy_vector(from + k * cfc_pad(p_.hidden), sums + (k * count + r) * lanes<C>);
                }
              }
            });
      } else {
        heads_step<K, decltype(mode)::value>(job, share, FromZero{});
      }
    });
  }

  template <int K, CfcMode mode, typename Start>
  void heads_step(const Job& job, const Share& share, const Start& start) {
    const int64_t padded = cfc_pad(p_.hidden), t = job.step.t, slot = job.step.slot;
    const auto epilogue = [&](int64_t panel, int64_t first, int count, C* products) {
      alignas(64) C h[product_size<C>];
      const int64_t unit = panel * lanes<C>, b = job.step.begin + first;
      cells<K, mode>(unit, b, t, count, products, h);
      for (int r = 0; r < count; ++r) {
        C* next = state(slot + 1, b + r) + unit;
        copy_vector(runs(b + r, t) ? h + r * lanes<C> : state(slot, b + r) + unit, next);
        if (!job.keep) continue;
        C* to = kept(heads_, slot, b + r) + unit;
        for (int k = 0; k < K; ++k) {
          copy_vector(products + (k * count + r) * lanes<C>, to + k * padded);
        }
      }
    };
    const Rows<C> rows = layer_rows(job);
    multiply_panels<K>(rows, head_panels<K>(1 + heads_.inputs - rows.length, share), start,
                       epilogue);
  }

  // products [K, rows, lanes] -> h [rows, lanes]; what the derivatives need replaces the products.
  template <int K, CfcMode mode>
  void cells(int64_t unit, int64_t b, int64_t t, int rows, C* products, C* h) {
    const int n = rows * lanes<C>;
    if constexpr (mode == CfcMode::pure) {
      const C *w = static_cast<const C*>(p_.decay) + unit, *amplitude = w + p_.hidden;
      for (int r = 0; r < rows; ++r) {
        const C dt = timespan(b + r, t);
        const int64_t width = p_.hidden - unit < lanes<C> ? p_.hidden - unit : lanes<C>;
        C *a = products + r * lanes<C>, *out = h + r * lanes<C>;
        for (int64_t j = width; j < lanes<C>; ++j) out[j] = 0;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) out[j] = pure_state(a[j], w[j], amplitude[j], dt);
      }
    } else {
      C *a = products, *b_ = products + n, *s = products + 2 * n;
      if constexpr (K == 4) {
        const C* offset = products + 3 * n;
        alignas(64) C scaled[product_size<C>];
        for (int r = 0; r < rows; ++r) {
          const C dt = timespan(b + r, t);
          for (int j = 0; j < lanes<C>; ++j) {
            const int i = r * lanes<C> + j;
            scaled[i] = dt * s[i] + offset[i];
          }
        }
        gated<mode == CfcMode::no_gate>(n, a, b_, scaled, h);
        // Kept as tanh(ff1), tanh(ff2), time_a, gate.
        for (int i = 0; i < n; ++i) products[3 * n + i] = scaled[i];
      } else {
        gated<mode == CfcMode::no_gate>(n, a, b_, s, h);
      }
    }
  }

  template <bool no_gate>
  static void gated(int n, C* a, C* b, C* s, C* h) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      const GatedCell<C> c = gated_cell(a[i], b[i], s[i]);
      a[i] = c.first;
      b[i] = c.second;
      s[i] = c.gate;
      h[i] = gated_state<no_gate>(c);
    }
  }

  // ---- backward

  void pack_transposed() {
    C* packed = transposed_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const C* weight = static_cast<const C*>(layer.weight);
      const int64_t depth = layer.segments * layer.units, width = 1 + layer.inputs;
      const int64_t split = l == 0 ? p_.inputs : 0;
      // The input's columns apart from the state's: the former are not part of the recurrence.
      pack_columns(depth, split, packed,
                   [&](int64_t k, int64_t column) { return weight[k * width + 1 + column]; });
      packed += depth * packed_width<C>(split);
      pack_columns(depth, layer.inputs - split, packed, [&](int64_t k, int64_t column) {
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
  Rows<C> grad_rows(const CfcLayer& layer, int64_t count, const C* first, int64_t lda) const {
    return {count, first, lda, layer.segments, layer.units, cfc_pad(layer.units)};
  }

  // The heads' gradients of one step. carry_ goes from the gradient of h_t to that of h_{t-1} in
  // the course of a step.
  void head_gradients(const Step& step) {
    for (int64_t b = step.begin; b < step.end; ++b) {
      C* out = grads(heads_, step.grad_slot, b);
      if (runs(b, step.t)) {
        head_gradients(step.t, b, kept(heads_, step.slot, b), out);
      } else {
        for (int64_t j = 0; j < heads_.kept_stride; ++j) out[j] = 0;
        if (p_.grad_timespans) static_cast<C*>(p_.grad_timespans)[b * p_.steps + step.t] = 0;
      }
    }
  }

  // From a layer's gradients to those of the layer below, or from the first layer's to the state's.
  void layer_gradients(const Job& job, const Share& share) {
    const CfcLayer& layer = p_.layers[job.layer];
    const Step& step = job.step;
    const int64_t depth = layer.segments * layer.units;
    const Rows<C> rows = grad_rows(layer, step.end - step.begin,
                                   grads(layer, step.grad_slot, step.begin), layer.grad_stride);
    if (job.layer == 0) {
      multiply(rows, Matrix<C>{transposed(0, p_.inputs), depth, 0, p_.hidden}, share, FromZero{},
               [&](int64_t unit, int64_t first, int count, const C* dh) {
                 for (int r = 0; r < count; ++r) {
                   const int64_t b = step.begin + first + r;
                   if (runs(b, step.t)) {
                     copy_vector(dh + r * lanes<C>, carry_ + b * cfc_pad(p_.hidden) + unit);
                   }
                 }
               });
      return;
    }
    const CfcLayer& below = p_.layers[job.layer - 1];
    multiply(rows, Matrix<C>{transposed(job.layer, 0), depth, 0, below.units}, share, FromZero{},
             [&](int64_t unit, int64_t first, int count, const C* v) {
               for (int r = 0; r < count; ++r) {
                 const C* slope = kept(below, step.slot, step.begin + first + r) + unit;
                 C* out = grads(below, step.grad_slot, step.begin + first + r) + unit;
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
      pure_head_gradients(timespan(b, t), cell, dh, out, decay_grads_ + b * 2 * padded, grad_dt);
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
      const C dt = timespan(b, t);
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
        multiply(grad_rows(layer, rows, grads(layer, from, b), p_.batch * layer.grad_stride),
                 Matrix<C>{weights, layer.segments * layer.units, 0, p_.inputs}, Share{0, 1},
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

  // ---- gradients of the weights

  // Three vectors by four rows, or with twice as many registers two by twelve.
  static constexpr int tile_vectors = vector_sums < 24 ? 3 : 2;
  static constexpr int tile_rows = vector_sums / tile_vectors;
  static constexpr int64_t group_units = 32;

  int64_t weight_grads_size() const {
    int64_t size = 0;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      size += p_.layers[l].segments * p_.layers[l].units * p_.layers[l].input_stride;
    }
    return size;
  }

  // grad[r][column] += sum over m of left[m][r] * right[m][column], for one tile.
  template <int N, int R>
  static void outer_product(int64_t m, const C* left, int64_t left_stride, const C* right,
                            int64_t right_stride, C* grad, int64_t grad_stride) {
    Vector<C> sum[R][N] = {};
    for (int64_t i = 0; i < m; ++i) {
      Vector<C> v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = load_vector(right + n * lanes<C>);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const C value = left[r];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] += value * v[n];
      }
      left += left_stride;
      right += right_stride;
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) {
        C* to = grad + r * grad_stride + n * lanes<C>;
        store_vector(load_vector(to) + sum[r][n], to);
      }
    }
  }

  template <int N, int R = tile_rows>
  static void outer_product_of(int rows, int64_t m, const C* left, int64_t left_stride,
                               const C* right, int64_t right_stride, C* grad, int64_t grad_stride) {
    if constexpr (R > 1) {
      if (rows < R) {
        return outer_product_of<N, R - 1>(rows, m, left, left_stride, right, right_stride, grad,
                                          grad_stride);
      }
    }
    outer_product<N, R>(m, left, left_stride, right, right_stride, grad, grad_stride);
  }

  // One layer's gradients, shared out over tiles of `tile_vectors` columns and `group_units` units.
  void weight_gradients(const ThreadPool& pool, int64_t slot, int64_t steps) {
    C* grad = weight_grads_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      if (layer.grad_weight) layer_weight_gradients(pool, l, slot, steps, grad);
      grad += layer.segments * layer.units * layer.input_stride;
    }
  }

  void layer_weight_gradients(const ThreadPool& pool, int64_t l, int64_t slot, int64_t steps,
                              C* grad) {
    const CfcLayer& layer = p_.layers[l];
    const int64_t vectors = (1 + layer.inputs + lanes<C> - 1) / lanes<C>;
    const int64_t tiles = (vectors + tile_vectors - 1) / tile_vectors;
    const int64_t groups = (layer.units + group_units - 1) / group_units * layer.segments;
    const int64_t rows = steps * p_.batch, stretch = 64;
    parallel_for(pool, tiles * groups, 1, [&](int64_t begin, int64_t end) {
      // Sums are moved into the gradient every few rows: rounding errors grow with the number of
      // terms in one sum, and the stretch stays in the cache from tile to tile.
      for (int64_t m = 0; m < rows; m += stretch) {
        const int64_t count = rows - m < stretch ? rows - m : stretch;
        const C* right = input(l, slot, 0) + m * layer.input_stride;
        const C* left = grads(layer, 0, 0) + m * layer.grad_stride;
        for (int64_t i = begin; i < end; ++i) {
          weight_gradient_tile(layer, i / groups * tile_vectors, vectors, i % groups, count, left,
                               right, grad);
        }
      }
    });
  }

  void weight_gradient_tile(const CfcLayer& layer, int64_t vector, int64_t vectors, int64_t group,
                            int64_t m, const C* left, const C* right, C* grad) const {
    const int64_t per_segment = (layer.units + group_units - 1) / group_units;
    const int64_t segment = group / per_segment, from = group % per_segment * group_units;
    const int64_t to = from + group_units < layer.units ? from + group_units : layer.units;
    const int width = int(vectors - vector < tile_vectors ? vectors - vector : tile_vectors);
    right += vector * lanes<C>;
    left += segment * cfc_pad(layer.units);
    grad += segment * layer.units * layer.input_stride + vector * lanes<C>;
    for_row_groups(to - from, tile_rows, [&](int64_t first, int count) {
      const C* l = left + from + first;
      C* g = grad + (from + first) * layer.input_stride;
      const int64_t ls = layer.grad_stride, rs = layer.input_stride;
      if (width == 3) {
        outer_product_of<3>(count, m, l, ls, right, rs, g, rs);
      } else if (width == 2) {
        outer_product_of<2>(count, m, l, ls, right, rs, g, rs);
      } else {
        outer_product_of<1>(count, m, l, ls, right, rs, g, rs);
      }
    });
  }

  void store_weight_gradients() {
    const C* grad = weight_grads_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const int64_t width = 1 + layer.inputs;
      C* out = static_cast<C*>(layer.grad_weight);
      for (int64_t i = 0; i < layer.segments * layer.units; ++i, grad += layer.input_stride) {
        if (out) copy(grad, width, out + i * width);
      }
    }
    if (!p_.grad_decay) return;
    C* out = static_cast<C*>(p_.grad_decay);
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < p_.hidden; ++j) {
        LongSum<C> sum;
        for (int64_t b = 0; b < p_.batch; ++b) {
          sum.add(decay_grads_[(b * 2 + i) * cfc_pad(p_.hidden) + j]);
        }
        out[i * p_.hidden + j] = C(sum.value());
      }
    }
  }

  const CfcScanParams& p_;
  const int64_t chunk_;
  const CfcLayer& heads_;
  const bool has_tape_;
  int64_t slots_;
  C *packed_, *transposed_, *tape_, *grad_tape_;
  C* carry_;  // [batch, padded hidden]: the gradient of the state
  C* weight_grads_;
  C* decay_grads_;  // [batch, 2, padded hidden]
};

}  // namespace

void cfc_scan_pack(const CfcScanParams& p, const ThreadPool&) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Scan<std::remove_pointer_t<decltype(element)>>(p, false).pack_forward();
  });
}

void cfc_scan_forward(const CfcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Scan<std::remove_pointer_t<decltype(element)>>(p, false).forward(pool);
  });
}

void cfc_scan_backward(const CfcScanParams& p, const ThreadPool& pool) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    Scan<std::remove_pointer_t<decltype(element)>>(p, true).backward(pool);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
