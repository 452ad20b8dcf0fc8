// Shared by the CfC scan's CPU kernels: where rows lie in the tapes, and how threads share work.
//
// Every thread takes some rows of the batch through all steps of a chunk, without waiting for the
// others. A step multiplies the rows [1, x_t, h_{t-1}] by the packed weights, panel by panel: a
// panel holds one vector of units for each head, so that the heads of a unit meet in registers and
// the cell is computed as soon as the products are there. The new state is written into the next
// step's row; those rows are, at the same time, what the backward pass needs.
//
// The files: cfc_scan_layers.cpp applies a layer to the rows of one step, cfc_scan_steps.h walks
// through the steps, cfc_scan.cpp is the forward pass, cfc_scan_backward.cpp the backward pass, and
// cfc_scan_weight_gradients.h what the latter does for the weights.
//
// Loops that hold a struct carry `GCC ivdep` where others carry `omp simd`: with the latter, gcc
// keeps the struct in memory and does not vectorise.
#pragma once

#include "../common/cfc_scan.h"
#include "parallel.h"

namespace ember {
inline namespace EMBER_ISA {

template <typename From, typename To>
EMBER_HD void convert(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) narrow(widen(from[i]), to[i]);
}

template <typename C>
EMBER_HD void copy(const C* from, int64_t n, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// One step of the rows [begin, end): its place in the tape and, backward, in the gradient tape.
struct CfcStep {
  int64_t t;
  int32_t begin, end;
  int64_t slot, grad_slot;
};

// A piece of work that several threads can share, each for some of a layer's units: one step of a
// layer, forward or backward, or the inputs' part of the first layer's products for `steps` steps.
struct CfcJob {
  enum Kind : int8_t { layer_step, layer_gradients, inputs_part } kind;
  int32_t layer;
  CfcStep step;
  // Whether to keep the values that the derivatives need, and whether the inputs' part is done.
  bool keep = false, resumes = false;
  int32_t steps = 1;
};

// The tapes of a pass: where its rows lie in them, and the properties of a row in a step.
template <typename C>
struct CfcTapes {
  CfcTapes(const CfcScanParams& params, bool backward)
      : p(params),
        heads(params.layers[params.num_layers - 1]),
        is_whole(params.saved && !params.chunk),
        chunk(cfc_chunk_steps(params, backward)),
        slots(is_whole ? params.steps : chunk) {
    const CfcWorkspace parts = cfc_workspace(p, backward);
    C* workspace = static_cast<C*>(p.workspace);
    tape = is_whole ? static_cast<C*>(p.saved) : workspace + parts.tape;
    grad_tape = workspace + parts.grad_tape;
  }

  C* input(int64_t layer, int64_t slot, int64_t b) const {
    const CfcLayer& l = p.layers[layer];
    return tape + l.input_offset * slots * p.batch + (slot * p.batch + b) * l.input_stride;
  }
  C* state(int64_t slot, int64_t b) const { return input(0, slot, b) + 1 + p.inputs; }
  C* kept(const CfcLayer& l, int64_t slot, int64_t b) const {
    return tape + l.kept_offset * slots * p.batch + (slot * p.batch + b) * l.kept_stride;
  }
  C* grads(const CfcLayer& l, int64_t slot, int64_t b) const {
    return grad_tape + l.grad_offset * chunk * p.batch + (slot * p.batch + b) * l.grad_stride;
  }

  C timespan(int64_t b, int64_t t) const {
    return static_cast<const C*>(p.timespans)[b * p.steps + t];
  }
  bool runs(int64_t b, int64_t t) const { return !p.lengths || t < p.lengths[b]; }

  // States of the rows [begin, end), `stride` apart, to the first slot.
  void place_state(const C* from, int64_t stride, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) copy(from + b * stride, p.hidden, state(0, b));
  }

  const CfcScanParams& p;
  const CfcLayer& heads;
  bool is_whole;  // the tape has a slot for every step, and is what forward leaves for backward
  int64_t chunk;  // steps that are worked on at once: slots of the gradient tape
  int64_t slots;  // of the tape
  C *tape, *grad_tape;
};

// Lays the weights out for cfc_layer_job(), cfc_packed_size() elements.
template <typename C>
void cfc_pack(const CfcScanParams& p, C* packed);

// Does a share of a job of the forward pass with packed weights.
template <typename C>
void cfc_layer_job(const CfcTapes<C>& tapes, const C* packed, const CfcJob& job,
                   const Share& share);

// The threads that a job is worth: one for every 8192 multiply-adds.
inline int64_t cfc_helpers_for(const CfcScanParams& p, const CfcJob& job) {
  const CfcLayer& layer = p.layers[job.layer];
  int64_t depth = job.kind == CfcJob::layer_gradients ? layer.units * layer.segments
                  : job.layer == 0                    ? p.hidden
                                                      : layer.inputs;
  int64_t width = job.kind == CfcJob::layer_gradients ? layer.inputs : layer.units * layer.segments;
  int64_t rows = job.step.end - job.step.begin;
  if (job.kind == CfcJob::inputs_part) {
    depth = p.inputs;
    rows *= job.steps;
  }
  return depth * width * rows / 8192;
}

// body(begin, end, run) for blocks of rows, where run(job) does a job by work(job, share). Where
// there are fewer rows than threads, the threads share the jobs.
template <typename Work, typename Body>
void cfc_for_row_blocks(const CfcScanParams& p, const ThreadPool& pool, const Work& work,
                        const Body& body) {
  int64_t helpers = 1;
  if (p.batch < pool.threads) {
    for (int32_t l = 0; l < p.num_layers; ++l) {
      const int64_t most =
          cfc_helpers_for(p, CfcJob{CfcJob::layer_step, l, {0, 0, int32_t(p.batch), 0, 0}});
      helpers = most > helpers ? most : helpers;
    }
    helpers = helpers < pool.threads ? helpers : pool.threads;
  }
  if (helpers > p.batch) {
    Team<CfcJob> team;
    parallel_for(pool, helpers, 1, [&](int64_t, int64_t) {
      team.enter(
          [&] {
            body(0, int32_t(p.batch),
                 [&](const CfcJob& job) { team.run(job, cfc_helpers_for(p, job), work); });
          },
          work);
    });
    return;
  }
  // A block's rows stay in the first-level cache from panel to panel. How rows are grouped has no
  // influence on their values, so the number of threads may decide it.
  const int64_t most = 32;
  int64_t blocks = (p.batch + most - 1) / most;
  blocks = (blocks + pool.threads - 1) / pool.threads * pool.threads;
  if (blocks > p.batch) blocks = p.batch;
  parallel_for(pool, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      body(int32_t(p.batch * i / blocks), int32_t(p.batch * (i + 1) / blocks),
           [&](const CfcJob& job) { work(job, Share{0, 1}); });
    }
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
