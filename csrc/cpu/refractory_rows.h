// Rows over the keys, which the passes of refractory LIF attention on the CPU add up: over queries,
// over the heads of a unit, and over units, always in the same order.
#pragma once

#include "attention_strips.h"
#include "parallel.h"
#include "refractory_lif_attention.h"

namespace ember {
inline namespace EMBER_ISA {

template <typename C>
struct RefractoryGate : Gate<C> {
  C within, across;

  RefractoryGate(const RefractoryLifAttentionParams& p, int64_t h)
      : Gate<C>(gate_of<C>(p, h)),
        within(static_cast<const C*>(p.within)[h]),
        across(static_cast<const C*>(p.across)[h]) {}
};

struct Unit {
  int64_t index, b, group, first_head, heads;

  Unit(const RefractoryLifAttentionParams& p, int64_t index)
      : index(index),
        b(index / p.groups),
        group(index % p.groups),
        first_head(group * (p.heads / p.groups)),
        heads(p.heads / p.groups) {}
};

// Where a unit's heads add rows over the keys: to one row for all queries, or row r of a strip to
// rows + r * stride, where the first head to come writes instead, with zeros for invisible keys.
// Both null if the sum is not wanted.
template <typename C>
struct HeadShare {
  double* one_row;
  C* rows;
  int64_t stride;
  bool first;
};

// sums += row * factor.
template <typename C, typename Sum>
void add_row(int64_t n, Sum factor, const C* row, Sum* sums) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += row[j] * factor;
}

template <typename C>
void add_to_share(int64_t n, int64_t keys, const C* values, C factor, const HeadShare<C>& share,
                  int64_t row) {
  if (share.one_row) return add_row(n, double(factor), values, share.one_row);
  if (!share.rows) return;
  C* const to = share.rows + row * share.stride;
  if (share.first) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = values[j] * factor;
    memset(to + n, 0, size_t(keys - n) * sizeof(C));
  } else {
    add_row(n, factor, values, to);
  }
}

template <typename C>
const C* previous_row(const RefractoryLifAttentionParams& p, int64_t b, int64_t query,
                      const C* zeros) {
  if (!p.previous_load) return zeros;
  return static_cast<const C*>(p.previous_load) + b * p.previous_strides[0] +
         query * p.previous_strides[1];
}

// 1 over the number of queries that a load is the mean of.
template <typename C>
C inverse_count(const RefractoryLifAttentionParams& p, int64_t query) {
  return C(1) / C(p.look_ahead ? p.queries : p.keys - p.queries + query + 1);
}

template <typename C>
C* block_loads(const RefractoryLifAttentionParams& p, int64_t b, int64_t h, int64_t first) {
  const int64_t blocks = p.look_ahead ? 1 : (p.queries + p.block - 1) / p.block;
  const int64_t block = p.look_ahead ? 0 : first / p.block;
  return static_cast<C*>(p.block_loads) + ((b * p.heads + h) * blocks + block) * p.keys;
}

template <typename From, typename To>
void copy_row(const From* from, int64_t n, To* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = To(from[j]);
}

inline void clear_row(int64_t n, double* row) {
  memset(row, 0, size_t(n) * sizeof(double));
}

// Sums that start from elements `offset` ... of a tensor of C, or from zero if that is null.
template <typename C>
void start_sums(const void* from, int64_t offset, int64_t n, double* sums) {
  if (from) {
    copy_row(static_cast<const C*>(from) + offset, n, sums);
  } else {
    clear_row(n, sums);
  }
}

template <typename C>
RefractoryWorkspace<C> workspace(const RefractoryLifAttentionParams& p,
                                 const RefractoryScratch<C>& scratch, int64_t index,
                                 bool backward) {
  return {p, backward, scratch.workspaces + index * scratch.workspace_bytes};
}

// What a unit does before its first strip.
template <typename T, typename C>
void begin_unit(const RefractoryLifAttentionParams& p, const Unit& unit, bool backward,
                const RefractoryWorkspace<C>& s) {
  pack_keys<T>(p, unit.b, unit.group, backward, s.operands);
  memset(s.zeros, 0, size_t(s.stride) * sizeof(C));
  if (backward) clear_key_gradients(p, s.operands);
}

// The unit's part of a row that all queries share.
template <typename C>
HeadShare<C> unit_row(const RefractoryLifAttentionParams& p, const Unit& unit,
                      const RefractoryScratch<C>& scratch) {
  return {scratch.unit_rows + unit.index * p.keys, nullptr, 0, false};
}

// All rows [B, Q, K] of a strip, shared by the units of one batch entry.
template <typename C>
HeadShare<C> shared_rows(const RefractoryLifAttentionParams& p, const Unit& unit,
                         const Strip& strip, void* rows) {
  return {nullptr, static_cast<C*>(rows) + (unit.b * p.queries + strip.first) * p.keys, p.keys,
          unit.group == 0};
}

// Rows [B, Q, K] of a step: the sums over units in step of what they share; keys [begin, end).
template <typename C>
void add_shares(const RefractoryLifAttentionParams& p, const RefractoryScratch<C>& scratch,
                bool backward, int64_t b, const Strip& strip, int64_t begin, int64_t end,
                void* to) {
  for (int64_t group = 0; group < p.groups; ++group) {
    const RefractoryWorkspace<C> s = workspace(p, scratch, b * p.groups + group, backward);
    for (int64_t r = 0; r < strip.rows; ++r) {
      const C* const from = s.share + r * s.stride;
      C* const row = static_cast<C*>(to) + (b * p.queries + strip.first + r) * p.keys;
      if (group == 0) {
        copy_row(from + begin, end - begin, row + begin);
      } else {
        add_row(smaller(strip.visible(r), end) - begin, C(1), from + begin, row + begin);
      }
    }
  }
}

// Calls `body` with the batch entries and ranges of keys that a sum over units in step falls into.
template <typename Body>
void for_columns(const RefractoryLifAttentionParams& p, const ThreadPool& pool, int64_t rows,
                 const Body& body) {
  const int64_t width = 256, ranges = (p.keys + width - 1) / width;
  parallel_for(pool, p.batch * ranges, grain_for(rows * p.groups * width / 8),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % ranges * width;
                   body(i / ranges, first, smaller(first + width, p.keys));
                 }
               });
}

// About how many nanoseconds a unit spends on so many queries.
inline int64_t unit_cost(const RefractoryLifAttentionParams& p, int64_t queries) {
  return queries * p.keys * (p.size + 32) / 16 * (p.heads / p.groups);
}

// sums [B, K] = those of the units' rows, and `means`, if any, 1 / Q of them.
template <typename C>
void sum_unit_rows(const RefractoryLifAttentionParams& p, const RefractoryScratch<C>& scratch,
                   void* sums, void* means) {
  const double per_query = 1 / double(p.queries);
  for (int64_t b = 0; b < p.batch; ++b) {
    double* const first = scratch.unit_rows + b * p.groups * p.keys;
    for (int64_t group = 1; group < p.groups; ++group) {
      add_row(p.keys, 1.0, first + group * p.keys, first);
    }
    copy_row(first, p.keys, static_cast<C*>(sums) + b * p.keys);
    for (int64_t j = 0; means && j < p.keys; ++j) {
      static_cast<C*>(means)[b * p.keys + j] = C(first[j] * per_query);
    }
  }
}

// Calls body(i, workspace of the thread) for i in [0, n).
template <typename C, typename Body>
void for_each(const RefractoryLifAttentionParams& p, const ThreadPool& pool,
              const RefractoryScratch<C>& scratch, bool backward, int64_t n, const Body& body) {
  const int64_t cost = unit_cost(p, p.queries) * refractory_units(p) / n * (backward ? 2 : 1);
  parallel_for(pool, n, grain_for(cost), [&](int64_t begin, int64_t end) {
    const RefractoryWorkspace<C> s = workspace(p, scratch, pool.thread_index(), backward);
    for (int64_t i = begin; i < end; ++i) body(i, s);
  });
}

}  // namespace EMBER_ISA
}  // namespace ember
