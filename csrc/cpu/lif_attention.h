// How the CPU splits LIF attention and what memory it takes for that. The split depends on the
// shape alone, so results do not change with the number of threads.
#pragma once

#include <initializer_list>

#include "attention_workspace.h"

namespace ember {
inline namespace EMBER_ISA {

// A task is a segment of the queries of one batch entry and head.
inline int64_t lif_attention_segments(const LifAttentionParams& p) {
  const int64_t enough_tasks = 16, fewest_queries = 256;
  const int64_t pairs = p.batch * p.heads;
  if (pairs >= enough_tasks || pairs == 0) return 1;
  const int64_t wanted = (enough_tasks + pairs - 1) / pairs;
  const int64_t most = (p.queries + fewest_queries - 1) / fewest_queries;
  return wanted < most ? wanted : most > 0 ? most : 1;
}

inline int64_t lif_attention_tasks(const LifAttentionParams& p) {
  return p.batch * p.heads * lif_attention_segments(p);
}

// Whether gradients of keys and values are sums over several tasks.
inline bool lif_attention_sums_keys(const LifAttentionParams& p) {
  return lif_attention_segments(p) > 1 || p.heads != p.groups;
}

// Queries whose scores against all keys are held at once.
inline int64_t lif_attention_strip_rows(const LifAttentionParams& p) {
  const int64_t most = 48;
  return p.queries < most ? p.queries : most;
}

// One thread's buffers. Rows are over the keys.
template <typename C>
struct LifAttentionWorkspace {
  int64_t stride;                     // of rows
  C *scores, *grads;                  // rows of a strip
  C *keep, *p, *fire, *smoulder, *w;  // a row
  double* load;                       // forward: [2, keys], see summarize_row
  AttentionOperands<C> operands;
  int64_t bytes;

  LifAttentionWorkspace(const LifAttentionParams& params, bool backward, void* block) {
    Arena arena(block);
    stride = attention_row_stride(params);
    const int64_t rows = lif_attention_strip_rows(params);
    for (C** row : {&keep, &p, &fire, &smoulder, &w}) *row = arena.take<C>(stride);
    scores = arena.take<C>(rows * stride);
    operands = AttentionOperands<C>(params, rows, backward, arena);
    if (backward) {
      grads = arena.take<C>(rows * stride);
    } else {
      load = arena.take<double>(2 * params.keys);
    }
    bytes = arena.bytes();
  }
};

inline int64_t lif_attention_scratch_bytes(const LifAttentionParams& p, bool backward) {
  return p.dtype == DType::f64 ? LifAttentionWorkspace<double>(p, backward, nullptr).bytes
                               : LifAttentionWorkspace<float>(p, backward, nullptr).bytes;
}

}  // namespace EMBER_ISA
}  // namespace ember
