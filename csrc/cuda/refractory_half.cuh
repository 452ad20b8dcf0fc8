// Shared by the kernels of refractory LIF attention of 16-bit types, whose scores stay in registers
// (attention_fragments.cuh): thresholds, and sums over the queries of a warp.
//
// A warp has 16 queries, and forward leaves the loads where each 16 begin: no sum crosses warps.
// Within the 16, the sums up to each query, or from it on, are a product of the values with a
// triangle of ones. Their layout in registers is an operand's if keys are rows; if queries are, one
// instruction for each 8 x 8 piece turns it into one. Probabilities are split into two numbers of
// fp16, which together are as exact as fp32 up to 3e-8.
#pragma once

#include "half_scores.cuh"
#include "refractory_tile.cuh"

namespace ember {
namespace cuda {

static_assert(kLoadRows == kFragmentRows, "no sum over queries crosses warps");

// What a launch's parameters come to.
struct RefractoryOptions : HalfOptions {
  float share;      // of a head in a mean over heads
  int load_blocks;  // of queries, whose loads are saved: [B, H, load_blocks, K]
  bool in_pairs;    // whether rows of keys, of all arrays in fp32, begin at even addresses

  explicit RefractoryOptions(const RefractoryLifAttentionParams& p)
      : HalfOptions(p),
        share(1 / float(p.heads)),
        load_blocks(p.look_ahead ? 1 : int(ceil_div(p.queries, kLoadRows))) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(p.previous_load) / 4 |
                          uint64_t(p.previous_strides[0]) | uint64_t(p.previous_strides[1]) |
                          uint64_t(p.keys) | reinterpret_cast<uintptr_t>(p.block_loads) / 4 |
                          reinterpret_cast<uintptr_t>(p.next_load) / 4 |
                          reinterpret_cast<uintptr_t>(p.grad_previous_load) / 4 |
                          reinterpret_cast<uintptr_t>(p.grad_probabilities) / 4;
    in_pairs = bits % 2 == 0;
  }
};

// 1 over the number of queries that the load of query i is a mean over.
__device__ __forceinline__ float inverse_count(const RefractoryLifAttentionParams& p, int i) {
  return fast_reciprocal(float(p.look_ahead ? int(p.queries) : int(p.keys - p.queries) + i + 1));
}

// What the gates of a head are made of. (1 - f) / f is `rest` times a power of two, of which the
// exponent is
//   rate p + start + within load + across previous_load.
struct HalfThresholds {
  float rate, start, rest, within, across;
  float leak, open;  // g = open f + leak

  __device__ __forceinline__ HalfThresholds(const RefractoryLifAttentionParams& p, int head)
      : rate(-static_cast<const float*>(p.steepness)[head] * kLog2e),
        within(-rate * static_cast<const float*>(p.within)[head]),
        across(-rate * static_cast<const float*>(p.across)[head]),
        leak(static_cast<const float*>(p.leak)[head]),
        open(1 - leak) {
    const GateStart exact(static_cast<const float*>(p.steepness)[head], rate,
                          static_cast<const float*>(p.threshold)[head]);
    start = exact.start;
    rest = exact.rest;
  }

  // f, where `base` is the exponent without p.
  __device__ __forceinline__ float fire(float p, float base) const {
    const float exponent = fast_at_most(fmaf(p, rate, base), kLargestGateExponent);
    return fast_reciprocal(fmaf(fast_exp2(exponent), rest, 1.0f));
  }
};

// What the gradients of a weight p g are made of.
struct GateTerms {
  float smoulder, slope, weight, derivative;  // p (1 - f), p f (1 - f), p g, p d(p g)/dp

  // `steep` is the steepness times 1 - leak.
  __device__ __forceinline__ GateTerms(float p, float fire, float leak, float steep) {
    const float fired = p * fire;
    smoulder = p - fired;
    slope = fmaf(-fired, fire, fired);
    weight = fmaf(smoulder, leak, fired);
    derivative = fmaf(p * slope, steep, weight);
  }
};

// Sums over 16 queries up to each, or `from` each on, of 16 x 16 values rounded to T, which
// left_operand() has packed. All lanes of the warp must call together.
template <typename T, bool from>
struct QuerySums {
  static constexpr uint32_t kOnes = std::is_same<T, float16>::value ? 0x3c003c00u : 0x3f803f80u;
  uint32_t triangle;

  __device__ __forceinline__ explicit QuerySums(int thread = int(threadIdx.x)) {
    const int row = thread % kWarp / 4, column = thread % 4 * 2;
    const bool low = from ? column >= row : column <= row;
    const bool high = from ? column + 1 >= row : column + 1 <= row;
    triangle = ((low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u)) & kOnes;
  }

  // sums += those of values in pairs whose rows are keys.
  __device__ __forceinline__ void add_columns(const uint32_t (&pairs)[4],
                                              float (&sums)[2][4]) const {
    multiply_add<T>(sums[0], pairs, triangle, from ? kOnes : 0u, sums[0]);
    multiply_add<T>(sums[1], pairs, from ? 0u : kOnes, triangle, sums[1]);
  }
  // The same of values as they are, in `parts` numbers of T each.
  template <int parts>
  __device__ __forceinline__ void add_columns(const float (&values)[2][4],
                                              float (&sums)[2][4]) const {
    uint32_t pairs[4];
    left_operand<T>(values, pairs);
    add_columns(pairs, sums);
    if constexpr (parts > 1) {
      float rest[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t of_piece[2] = {pairs[2 * n], pairs[2 * n + 1]};
        lost(values[n], of_piece, rest[n]);
      }
      add_columns<parts - 1>(rest, sums);
    }
  }
  // Of values whose rows are queries, 8 columns of them.
  template <int parts>
  __device__ __forceinline__ void add_rows(const float (&values)[4], float (&sums)[4]) const {
    const uint32_t left[4] = {triangle, from ? 0u : kOnes, from ? kOnes : 0u, triangle};
    const uint32_t pairs[2] = {rounded_pair<T>(values[0], values[1]),
                               rounded_pair<T>(values[2], values[3])};
    multiply_add<T>(sums, left, transposed_matrix(pairs[0]), transposed_matrix(pairs[1]), sums);
    if constexpr (parts > 1) {
      float rest[4];
      lost(values, pairs, rest);
      add_rows<parts - 1>(rest, sums);
    }
  }

 private:
  // What rounding has taken away.
  static __device__ __forceinline__ void lost(const float (&values)[4], const uint32_t (&pairs)[2],
                                              float (&rest)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float low, high;
      widen_pair<T>(pairs[half], low, high);
      rest[2 * half] = values[2 * half] - low;
      rest[2 * half + 1] = values[2 * half + 1] - high;
    }
  }
};
using LoadSums = QuerySums<float16, false>;

// The lane's numbers of rows of keys, those of its two queries, at `column` and + 1: of what of
// them `visible` has not, the first four bits of visible_scores(), 0.
template <bool whole>
__device__ __forceinline__ void read_piece(const float* const (&rows)[2], int column,
                                           unsigned visible, float (&values)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* const from = rows[half] + column;
    if constexpr (whole) {
      const auto pair = *reinterpret_cast<const Pack<float, 2>*>(from);
      values[2 * half] = pair.values[0];
      values[2 * half + 1] = pair.values[1];
    } else {
      values[2 * half] = visible >> 2 * half & 1 ? from[0] : 0.0f;
      values[2 * half + 1] = visible >> 2 * half & 2 ? from[1] : 0.0f;
    }
  }
}
// The same where both queries have one row.
template <bool whole>
__device__ __forceinline__ void read_piece(const float* row, int column, unsigned visible,
                                           float (&values)[4]) {
  const float* const from = row + column;
  if constexpr (whole) {
    const auto pair = *reinterpret_cast<const Pack<float, 2>*>(from);
    values[0] = pair.values[0];
    values[1] = pair.values[1];
  } else {
    values[0] = (visible | visible >> 2) & 1 ? from[0] : 0.0f;
    values[1] = (visible | visible >> 2) & 2 ? from[1] : 0.0f;
  }
  values[2] = values[0];
  values[3] = values[1];
}
// Both pieces of 8 keys.
template <bool whole, typename Rows>
__device__ __forceinline__ void read_pairs(const Rows& rows, int column, unsigned visible,
                                           float (&values)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) read_piece<whole>(rows, column + 8 * n, visible >> 4 * n, values[n]);
}
// The same where keys are rows: from the lane's first query and key on, queries being `stride`
// apart, what visible_transposed() has.
template <bool whole>
__device__ __forceinline__ void read_transposed(const float* from, int64_t stride, unsigned visible,
                                                float (&values)[2][4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float* const row = from + (q / 2 * 8 + q % 2) * stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool wanted = whole || visible >> (q / 2 * 4 + 2 * half + q % 2) & 1;
      values[q / 2][2 * half + q % 2] = wanted ? row[8 * half] : 0.0f;
    }
  }
}

// The thresholds of a lane's two queries.
template <typename T>
struct QueryLoads {
  const HalfThresholds& gate;
  const RefractoryLifAttentionParams& p;
  int64_t saved;             // where in an array of blocks the warp's one has the lane's first key
  const float* previous[2];  // null without previous loads
  float within[2];           // what P is multiplied by in the exponents

  // Of the queries from `row` on, the lane's first one.
  __device__ __forceinline__ QueryLoads(const AttentionHead<T>& head,
                                        const RefractoryLifAttentionParams& p,
                                        const RefractoryOptions& options,
                                        const HalfThresholds& gate, int row)
      : gate(gate), p(p) {
    const int64_t pair = head.batch * p.heads + head.head;
    const int index = p.look_ahead ? 0 : head.existing(row) / kLoadRows;
    saved = (pair * options.load_blocks + index) * p.keys + fragment_column();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = head.existing(row + 8 * half);
      within[half] = gate.within * inverse_count(p, i);
      previous[half] = nullptr;
      if (p.previous_load) {
        previous[half] = static_cast<const float*>(p.previous_load) +
                         head.batch * p.previous_strides[0] + i * p.previous_strides[1] +
                         fragment_column();
      }
    }
  }

  // Of an array [B, H, load_blocks, K] what belongs to the warp's queries, at the lane's first key.
  __device__ __forceinline__ const float* block(const void* array) const {
    return static_cast<const float*>(array) + saved;
  }

  // Begins the sums and the exponents of 8 keys from `column` on, of which `visible` says what a
  // lane sees.
  template <bool whole>
  __device__ __forceinline__ void begin(int column, unsigned visible, float (&sums)[4],
                                        float (&bases)[4]) const {
    read_piece<whole>(block(p.block_loads), column, visible, sums);
    if (p.previous_load) {
      read_piece<whole>(previous, column, visible, bases);
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) bases[n] = 0;
    }
  }
  // Of both pieces of 8 keys.
  template <bool whole>
  __device__ __forceinline__ void begin(int column, unsigned visible, float (&sums)[2][4],
                                        float (&bases)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) begin<whole>(column + 8 * n, visible >> 4 * n, sums[n], bases[n]);
  }

  // From the probabilities of 8 keys: sums that are P, and exponents without p.
  __device__ __forceinline__ void finish(const LoadSums& loads, const float (&probabilities)[4],
                                         float (&sums)[4], float (&bases)[4]) const {
    if (!p.look_ahead) loads.template add_rows<2>(probabilities, sums);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      bases[n] = fmaf(sums[n], within[n / 2], fmaf(bases[n], gate.across, gate.start));
    }
  }
  __device__ __forceinline__ void finish(const LoadSums& loads, const float (&probabilities)[2][4],
                                         float (&sums)[2][4], float (&bases)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) finish(loads, probabilities[n], sums[n], bases[n]);
  }
};

// How a query's scores become probabilities: p = 2^(score - exponent) / sum. Added to the exponent,
// the sum's logarithm would lose its places where scores are large.
struct QueryExponent {
  float exponent, inverse_sum;

  // Of a query that is not there, or that no key has a score for, all are 0.
  template <typename T>
  __device__ __forceinline__ QueryExponent(const AttentionHead<T>& head, int i) {
    const AttentionRowStats<float> stats(head, i);
    const bool exists = i < int(head.p.queries) && stats.inverse_sum != 0;
    exponent = exists ? largest_exponent(stats.largest) : kInfinity;
    inverse_sum = exists ? stats.inverse_sum : 0.0f;
  }
};

__device__ __forceinline__ float probability(float score, float scale, float exponent,
                                             float inverse_sum) {
  return fast_exp2(fmaf(score, scale, -exponent)) * inverse_sum;
}

// The same of a lane's two queries. A row of NaN makes the loads of the warp's later queries NaN:
// from it on `broken` is true and rows are left out, as in a product with zeros NaN would reach
// the earlier ones, too.
struct QueryExponents {
  float exponent[2], inverse_sum[2];
  bool broken[2];

  template <typename T>
  __device__ __forceinline__ QueryExponents(const AttentionHead<T>& head, const LoadSums& loads,
                                            int row) {
    float bad[4], sums[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryExponent query(head, row + 8 * half);
      exponent[half] = query.exponent;
      inverse_sum[half] = query.inverse_sum;
      bad[2 * half] = bad[2 * half + 1] = query.inverse_sum != query.inverse_sum ? 1.0f : 0.0f;
    }
    loads.template add_rows<1>(bad, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      broken[half] = sums[2 * half] > 0;
      if (!broken[half]) continue;
      exponent[half] = kInfinity;
      inverse_sum[half] = 0;
    }
  }

  __device__ __forceinline__ float probability(float score, float scale, int half) const {
    return cuda::probability(score, scale, exponent[half], inverse_sum[half]);
  }
};

// Shared memory of kernels that keep 64 rows and take others past them, two tiles at a time; in
// `loads` with what their scores become probabilities by.
template <int kSize>
constexpr size_t kHalfRowsBytes =
    2 * TileLayout<kSize>::kBytes + kTile * TileLayout<kSize>::kRowBytes;
template <int kSize>
constexpr size_t kHalfLoadsBytes =
    kHalfRowsBytes<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(QueryExponent);
// Of those that have one tile of each of `tensors`.
template <int kSize, int tensors>
constexpr size_t kHalfPairBytes = tensors * kTile * TileLayout<kSize>::kRowBytes;

// Arrays between the kernels of backward. With look_ahead what is the same for all queries has one
// row.
struct RefractoryHalfScratch {
  double* gates;     // [B, H, tiles of queries, 5]
  HalfQuery* rows;   // [B, H, Q]; `mean` is what is known of E, and at last what that lacks, with
                     // 1 / sum in place of `delta`
  float* rest;       // [B, H, Q]: what that lacks, where grad_query is made afterwards
  float* ends;       // c where blocks of 16 queries end, [B, H, load_blocks, K]
  float* above;      // a, [B, rows, K], or null for zeros
  float* grad_key;   // what is known of it, [B, G, K, D]
  float* mean_sums;  // [B, tiles of queries, K]: of across tau
};

// The rows of a lane's two queries in an array [B, Q, K], or [B, 1, K] with look_ahead, at its
// first key.
template <typename T>
__device__ __forceinline__ void pair_rows(const AttentionHead<T>& head, bool look_ahead,
                                          const float* array, int row, const float* (&rows)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i =
        look_ahead ? head.batch : head.batch * head.p.queries + head.existing(row + 8 * half);
    rows[half] = array + i * head.p.keys + fragment_column();
  }
}

// Not a number, of a row that is broken.
__device__ __forceinline__ float unless_broken(bool broken, float value) {
  return broken ? kInfinity - kInfinity : value;
}

}  // namespace cuda
}  // namespace ember
