// How the CPU splits refractory LIF attention and what memory it takes for that. The split depends
// on the shape alone, so results do not change with the number of threads.
//
// A unit is a key and value head of one batch entry with the query heads that it serves.
#pragma once

#include "../common/refractory_lif_attention.h"
#include "attention_workspace.h"
#include "sums.h"

namespace ember {
inline namespace EMBER_ISA {

inline int64_t refractory_units(const RefractoryLifAttentionParams& p) {
  return p.batch * p.groups;
}

// Loads are sums over heads. With enough batch entries each is one task, which takes its units one
// after the other. With few, all units work on the same few strips of queries, and their parts are
// added up before the next step. (Units that look ahead have one row of loads each, added up at the
// end.)
inline bool refractory_in_step(const RefractoryLifAttentionParams& p) {
  const int64_t enough_tasks = 16;
  return !p.look_ahead && p.batch < enough_tasks && p.groups > 1;
}

// Queries of a strip. Causal strips begin where forward saved the loads.
inline int64_t refractory_strip_rows(const RefractoryLifAttentionParams& p) {
  const int64_t most = p.look_ahead ? 48 : p.block;
  return p.queries < most ? p.queries : most;
}

// Queries of a step, in whole strips: enough for a unit's keys and values to be worth fetching.
inline int64_t refractory_step_rows(const RefractoryLifAttentionParams& p) {
  const int64_t strips = 4;
  const int64_t rows = strips * refractory_strip_rows(p);
  return p.queries < rows ? p.queries : rows;
}

// The buffers of a thread, or of a unit if units run in step. Rows are over the keys. The symbols
// are those of common/refractory_lif_attention.h. Sums over queries are kept in double: a long
// sequence adds thousands of terms one by one.
template <typename C>
struct RefractoryWorkspace {
  int64_t stride;          // of rows
  double* load_sums;       // P, a row for each head of the group
  C* scores;               // rows of a strip, or with look_ahead of all queries
  C* share;                // in step: the rows that the unit adds to a sum over heads, for a step
  C *keep, *zeros;         // a row
  double* load_grads;      // c, a row for each head of the group
  double* weight_grads;    // a, a row
  C* grads;                // like scores
  C *loads, *extra;        // load_ij and a_ij / H for a strip; with look_ahead a row
  C* weights;              // look_ahead: u_ij M_ij for a strip
  C *fire, *smoulder, *w;  // a row
  AttentionOperands<C> operands;
  int64_t bytes;

  RefractoryWorkspace(const RefractoryLifAttentionParams& p, bool backward, void* block) {
    Arena arena(block);
    stride = attention_row_stride(p);
    const int64_t heads = p.heads / p.groups * stride;
    const int64_t strip = refractory_strip_rows(p) * stride;
    load_sums = arena.take<double>(heads);
    scores = arena.take<C>(p.look_ahead ? p.queries * stride : strip);
    share = arena.take<C>(refractory_in_step(p) ? refractory_step_rows(p) * stride : 0);
    keep = arena.take<C>(stride);
    zeros = arena.take<C>(stride);
    operands = AttentionOperands<C>(p, refractory_strip_rows(p), backward, arena);
    if (backward) {
      load_grads = arena.take<double>(heads);
      weight_grads = arena.take<double>(stride);
      grads = arena.take<C>(p.look_ahead ? p.queries * stride : strip);
      loads = arena.take<C>(p.look_ahead ? stride : strip);
      extra = arena.take<C>(p.look_ahead ? stride : strip);
      weights = arena.take<C>(p.look_ahead ? strip : 0);
      fire = arena.take<C>(stride);
      smoulder = arena.take<C>(stride);
      w = arena.take<C>(stride);
    }
    bytes = arena.bytes();
  }
};

// All scratch memory of a call.
template <typename C>
struct RefractoryScratch {
  LongSum<C>* gates;    // backward: the heads' parts of the gates' gradients, [B, H, 5]
  double* unit_rows;    // the units' parts of rows that all queries share, [B, G, K]
  double* weight_sums;  // forward: U, [B, K]
  char* workspaces;
  int64_t workspace_bytes;
  int64_t bytes;

  RefractoryScratch(const RefractoryLifAttentionParams& p, bool backward, int64_t threads,
                    void* block) {
    Arena arena(block);
    gates = arena.take<LongSum<C>>(backward ? p.batch * p.heads * 5 : 0);
    unit_rows = arena.take<double>(refractory_units(p) * p.keys);
    weight_sums = arena.take<double>(backward ? 0 : p.batch * p.keys);
    workspace_bytes = RefractoryWorkspace<C>(p, backward, nullptr).bytes;
    workspaces =
        arena.take<char>(workspace_bytes * (refractory_in_step(p) ? refractory_units(p) : threads));
    bytes = arena.bytes();
  }
};

inline int64_t refractory_scratch_bytes(const RefractoryLifAttentionParams& p, bool backward,
                                        int64_t threads) {
  return p.dtype == DType::f64 ? RefractoryScratch<double>(p, backward, threads, nullptr).bytes
                               : RefractoryScratch<float>(p, backward, threads, nullptr).bytes;
}

}  // namespace EMBER_ISA
}  // namespace ember
