// Shared by the kernels of LIF attention of 16-bit types: gates and scores, the masks of scores
// that exist and of weights that dropout keeps, and the shared memory of a block.
#pragma once

#include "attention_fragments.cuh"
#include "lif_attention.cuh"

namespace ember {
namespace cuda {

constexpr float kLog2e = 1.44269504f, kInfinity = __builtin_huge_valf();

// What backward's second kernel needs of a query, 16 bytes that are copied at once. Where the query
// does not exist they are 0.
struct alignas(16) HalfQuery {
  float exponent;            // p = 2^(score - exponent), scores being powers of two
  float delta;               // sum_j w_j t_j / R
  float inverse_weight_sum;  // 1 / R; 0 for a query that sees no key
  float mean;                // E R
};

// What a launch's parameters come to in fp32. Kernels' arguments take no registers.
struct HalfOptions {
  AttentionDropout keep;
  // Scores in powers of two are `exponents` times products, and scores `magnitude` times these,
  // whose sign is changed if the operator's scale is negative.
  float exponents, magnitude, scale;
  float keep_factor, eps;
  int shared_by;  // query heads that have one head of keys and values

  explicit HalfOptions(const LifAttentionParams& p)
      : keep(dropout_of(p)),
        exponents(float(fabs(p.scale) * 1.4426950408889634)),
        magnitude(float(fabs(p.scale))),
        scale(float(p.scale)),
        keep_factor(float(keep.factor)),
        eps(float(p.eps)),
        shared_by(p.groups > 0 ? int(p.heads / p.groups) : 1) {}
};

// Gates' powers of two, of which larger ones than this may be too large for fp32.
constexpr float kLargestGateExponent = 125;

// Where (1 - f) / f = rest 2^(rate p + start). What `start` is rounded by is the same for all of a
// head's scores, so it is made good for in `rest`. Up to kLargestGateExponent, `start` comes from
// the exact steepness. Above it, only p near the threshold have a gate that is neither open nor
// closed. There rate p and `start` cancel, so `start` comes from the rate as it was rounded.
struct GateStart {
  float start, rest;

  __device__ __forceinline__ GateStart(float steepness, float rate, float threshold) {
    double exact = double(steepness) * 1.4426950408889634 * double(threshold);
    if (!(exact < kLargestGateExponent)) exact = -double(rate) * double(threshold);
    start = float(exact);
    // Of 2^24 and more any exponent is rounded by more than 1.
    rest = absolute(start) < 16777216.0f ? fast_exp2(float(exact - double(start))) : 1.0f;
  }
};

// What the gates of a head are made of.
template <typename T>
struct HalfGate {
  float rate, start, rest;  // (1 - f) / f = rest 2^(rate p + start), rest being about 1
  float leak, open;         // g = open f + leak
  bool bounded;             // whether that power of two may be too large for fp32

  __device__ __forceinline__ explicit HalfGate(const AttentionHead<T>& head)
      : rate(-head.steepness * kLog2e), leak(head.leak), open(1 - head.leak) {
    const GateStart exact(head.steepness, rate, head.threshold);
    start = exact.start;
    rest = exact.rest;
    bounded = !(start < kLargestGateExponent);
  }

  // f where `rate` p is rate times the probability; to the last bits if it is `exact`.
  template <bool whole, bool exact = true>
  __device__ __forceinline__ float fire(float p, float rate) const {
    float exponent = fmaf(p, rate, start);
    // Only gates that are not `bounded` take the loop for whole tiles.
    if (!whole) exponent = fminf(exponent, kLargestGateExponent);
    const float odds = fast_exp2(exponent);
    return fast_reciprocal(exact ? fmaf(odds, rest, 1.0f) : 1 + odds);
  }
  __device__ __forceinline__ float gate(float p) const {
    return fmaf(fire<false>(p, rate), open, leak);
  }
};

// Which of the lane's 8 scores of 16 queries x 16 keys exist, bit 4 * accumulator + its element:
// of queries i and i + 8, keys j, j + 1, j + 8 and j + 9.
template <typename T>
__device__ __forceinline__ unsigned visible_scores(const AttentionHead<T>& head, int i, int j) {
  unsigned bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = i + 8 * half;
    const int keys = query < int(head.p.queries) ? head.end_of_keys(query) - j : 0;
    bits |= (unsigned(keys > 0) | unsigned(keys > 1) << 1 | unsigned(keys > 8) << 4 |
             unsigned(keys > 9) << 5)
            << 2 * half;
  }
  if (head.p.mask) {
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      if (bits >> n & 1 && !head.masked_in(i + (n >> 1 & 1) * 8, j + (n >> 2) * 8 + (n & 1))) {
        bits &= ~(1u << n);
      }
    }
  }
  return bits;
}
// The same of 16 keys x 16 queries: keys j and j + 8, queries i, i + 1, i + 8 and i + 9.
template <typename T>
__device__ __forceinline__ unsigned visible_transposed(const AttentionHead<T>& head, int i, int j) {
  unsigned bits = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int query = i + n / 2 * 8 + n % 2;
    const int keys = query < int(head.p.queries) ? head.end_of_keys(query) - j : 0;
    bits |= (unsigned(keys > 0) | unsigned(keys > 8) << 2) << (n / 2 * 4 + n % 2);
  }
  if (head.p.mask) {
#pragma unroll 1
    for (int n = 0; n < 8; ++n) {
      if (bits >> n & 1 && !head.masked_in(i + (n >> 2) * 8 + (n & 1), j + (n >> 1 & 1) * 8)) {
        bits &= ~(1u << n);
      }
    }
  }
  return bits;
}

// Whether all of a warp's 16 keys from `first` on exist, and query `i` and later ones see them,
// without a mask. Keys past the end have scores of 0, whose powers are not bounded.
template <typename T>
__device__ __forceinline__ bool all_visible(const AttentionHead<T>& head, int first, int i) {
  return first + kFragmentRows <= head.end_of_keys(i);
}

// Which of four weights dropout keeps, those of query i and keys j ... j + 3; j is a multiple of 4.
template <typename T>
__device__ __forceinline__ unsigned kept_weights(const AttentionHead<T>& head, int i, int j) {
  bool kept[kPatch];
  head.dropout(i, j, kept);
  unsigned bits = 0;
#pragma unroll
  for (int n = 0; n < kPatch; ++n) bits |= unsigned(kept[n]) << n;
  return bits;
}

// Which of the lane's scores dropout keeps, in visible_scores()' order, for queries i and i + 8 and
// keys from `column`, a multiple of 16, on. All lanes of the warp must call together.
template <typename T>
__device__ __forceinline__ unsigned kept_scores(const AttentionHead<T>& head, int i, int column) {
  unsigned bits = 0;
  const bool odd = threadIdx.x & 1;
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    // A pair of lanes needs four weights of two queries each, and draws one query's each.
    const int key = column + 8 * n + int(threadIdx.x & 2) * 2;
    const unsigned mine = kept_weights(head, odd ? i + 8 : i, key);
    const unsigned other = __shfl_xor_sync(kAllLanes, mine, 1);
    const unsigned words = odd ? (other >> 2) | (mine >> 2) << 2 : (mine & 3) | (other & 3) << 2;
    bits |= words << 4 * n;
  }
  return bits;
}
// The same in visible_transposed()' order, for keys j and j + 8 and queries from `column` on.
template <typename T>
__device__ __forceinline__ unsigned kept_transposed(const AttentionHead<T>& head, int j,
                                                    int column) {
  unsigned bits = 0;
  const int place = int(threadIdx.x) / 4 % 4;  // among four keys
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    // Four lanes need four weights of two queries in two places each, and draw one of these each.
    const int query = column + 8 * n + fragment_column() + place % 2;
    unsigned words = kept_weights(head, query, j - place + place / 2 * 8) << 4 * place;
    words |= __shfl_xor_sync(kAllLanes, words, 4);
    words |= __shfl_xor_sync(kAllLanes, words, 8);
    words >>= place;
    bits |= ((words & 1) | (words >> 4 & 1) << 1 | (words >> 8 & 1) << 2 | (words >> 12 & 1) << 3)
            << 4 * n;
  }
  return bits;
}

// Leaves those of a pair of 16-bit values whose bits are set.
__device__ __forceinline__ uint32_t kept_pair(uint32_t pair, unsigned bits) {
  return pair & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
}

// Scores that do not exist become -infinity, whose powers are 0.
__device__ __forceinline__ void hide_scores(float (&scores)[2][4], unsigned visible) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (!(visible >> n & 1)) scores[n / 4][n % 4] = -kInfinity;
  }
}

struct FastMaximum {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// The exponent of a row's sum of exponentials, of which `largest` is the row's largest score.
__device__ __forceinline__ float largest_exponent(float largest) {
  return largest * kLog2e;
}

// A tile of keys that a warp's queries are taken past.
struct KeyTile {
  int keys;        // the first of them
  int row;         // the lane's first query
  uint32_t place;  // from the first tile's place to this one's, two tiles having their own

  // The warp's first query.
  __device__ __forceinline__ int warp_first() const { return row / kFragmentRows * kFragmentRows; }
  // Whether all of the warp's queries see all of `count` keys, without a mask.
  template <typename T>
  __device__ __forceinline__ bool all_visible(const AttentionHead<T>& head, int count) const {
    return keys + count <= head.end_of_keys(warp_first());
  }
};

// Takes queries from `first` on past `tiles` tiles of keys: calls take(tile) for those of which the
// warp's queries see keys. bring(n) starts to bring what step n needs, of which `step` is the first
// and has been asked for, to the place that the tile before the last had.
template <int kSize, typename T, typename Bring, typename Take>
__device__ __forceinline__ void walk_keys(const AttentionHead<T>& head, int first, int tiles,
                                          int step, const Bring& bring, const Take& take) {
  using Layout = TileLayout<kSize>;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    bring(step + tile + 1);
    // Worked out anew for each tile: the registers are for scores.
    const KeyTile here{tile * Layout::kRows, first + in_place(fragment_row()),
                       uint32_t((step + tile) & 1) * Layout::kBytes};
    if (here.keys < head.end_of_keys(here.warp_first() + kFragmentRows - 1)) take(here);
  }
}

// Takes keys past the queries of head `h`: calls take(queries, tile) for tiles of them from `from`
// on, `stride` further each, before `to`. `tile` is the one of two that has them, and bring(step,
// head, queries) starts to bring more: the next ones, or at the end the first of the next head.
template <int stride, typename LastHead, typename Bring, typename Take>
__device__ __forceinline__ void walk_queries(int from, int to, int h, const LastHead& last_head,
                                             int& step, const Bring& bring, const Take& take) {
  for (int queries = from; stride > 0 ? queries < to : queries > to; queries += stride, ++step) {
    wait_for_copies<0>();
    __syncthreads();
    const int next = queries + stride;
    if (stride > 0 ? next < to : next > to) {
      bring(step + 1, h, next);
    } else if (h < last_head()) {
      bring(step + 1, h + 1, from);
    }
    take(queries, step & 1);
  }
}

// Calls take(c) for the chunks of a tile in order. Not unrolled, and where c is not known before,
// as the registers are for scores.
template <int chunks, typename Take>
__device__ __forceinline__ void each_chunk(const Take& take) {
  if constexpr (chunks == 1) {
    take(0);
  } else {
#pragma unroll 1
    for (int c = in_place(0); c < chunks; ++c) take(c);
  }
}
// take(whole, c), `whole` being a type that says that all scores exist and none is dropped.
template <int chunks, typename Take>
__device__ __forceinline__ void each_chunk(bool whole, const Take& take) {
  if (whole) {
    each_chunk<chunks>([&](int c) { take(std::true_type(), c); });
  } else {
    each_chunk<chunks>([&](int c) { take(std::false_type(), c); });
  }
}

// The rows of a warp: the largest product of each, and the sum of powers of two.
struct HalfMaxima {
  float largest[2] = {-kInfinity, -kInfinity};  // over this lane's keys
  float sum[2] = {};

  // `n` chunks of 16 keys.
  template <bool whole, int n>
  __device__ __forceinline__ void add(const float (&scores)[n][2][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int c = 0; c < n; ++c) {
#pragma unroll
        for (int a = 0; a < 4; ++a) most = fmaxf(most, scores[c][a / 2][2 * half + a % 2]);
      }
      float top = rounded_product(most, scale);
      if (!whole && most == -kInfinity) top = 0;  // no key so far
      // The sum so far is of powers with `top` as it was rounded then: unchanged, it stays as it
      // is.
      float total = sum[half] * fast_exp2(rounded_product(largest[half], scale) - top);
#pragma unroll
      for (int c = 0; c < n; ++c) {
#pragma unroll
        for (int a = 0; a < 4; ++a) {
          total += fast_exp2(fmaf(scores[c][a / 2][2 * half + a % 2], scale, -top));
        }
      }
      largest[half] = most;
      sum[half] = total;
    }
  }

  // Adds all keys that queries from `first` on see, tile by tile of `tiles`; bring(n) starts to
  // bring the n-th.
  template <int kSize, typename T, typename Rows, typename Bring>
  __device__ __forceinline__ void sweep(const LifAttentionParams& p, const AttentionHead<T>& head,
                                        const Rows& query, uint32_t key_tiles, int first, int tiles,
                                        float scale, const Bring& bring) {
    using Layout = TileLayout<kSize>;
    constexpr int kKeys = Layout::kRows, kChunks = kKeys / 16;
    walk_keys<kSize>(head, first, tiles, 0, bring, [&](const KeyTile& tile) {
      const auto columns = TileRows<kSize>::by_column(key_tiles + tile.place);
      if (!p.mask && tile.all_visible(head, kKeys)) {
        float scores[kChunks][2][4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          query.multiply(columns, uint32_t(c * 16 * Layout::kRowBytes), scores[c]);
        }
        add<true>(scores, scale);
      } else {
#pragma unroll 1
        for (int c = 0; c < kChunks; ++c) {
          float scores[1][2][4] = {};
          query.multiply(columns, uint32_t(c * 16 * Layout::kRowBytes), scores[0]);
          const int column = tile.keys + 16 * c + fragment_column();
          hide_scores(scores[0], visible_scores(head, tile.row, column));
          add<false>(scores, scale);
        }
      }
    });
  }

  // Of a row: its largest score, and 1 over the sum of exponentials; 0 if there is none.
  __device__ __forceinline__ void finish(int half, const HalfOptions& options, float& row_largest,
                                         float& inverse_sum) const {
    const float mine = largest[half], most = across_lanes<FastMaximum>(mine);
    const bool none = most == -kInfinity && sum[half] == 0;
    row_largest = none ? 0 : rounded_product(most, options.magnitude);
    const float exponent = largest_exponent(row_largest);
    const float top = mine == -kInfinity ? exponent : rounded_product(mine, options.exponents);
    const float total = across_lanes<Sum>(sum[half] * fast_exp2(top - exponent));
    inverse_sum = total == 0 ? 0.0f : 1 / total;
  }
};

// A power of two by which values that a product takes rounded to fp16 are multiplied, the same for
// the warp and for all of a sum. It shrinks, and the sum with it, when a value calls for that; bf16
// has the range of fp32.
template <typename T>
struct HalfScale {
  static constexpr bool kScales = AttentionProducts<T, true>::kScales;
  float factor = kScales ? AttentionProducts<T, true>::scale_for(0).factor : 1.0f;

  // Scales values, and rescales sums of those before. All lanes of the warp must call together.
  template <typename... Sums>
  __device__ __forceinline__ void apply(float (&values)[2][4], Sums&... sums) {
    if constexpr (kScales) {
      float most = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) most = fmaxf(most, absolute(values[i / 4][i % 4]));
      if (__any_sync(kAllLanes, most * factor > 32768.0f)) {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
        }
        const float before = factor;
        factor = AttentionProducts<T, true>::scale_for(most).factor;
        (scale_rows(sums, factor / before, factor / before), ...);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i / 4][i % 4] *= factor;
    }
  }
};

// The gradients of a query's scores add up to 0, so that what keys have in common cancels in the
// query's gradient. Rounded to T they do not, and it would be multiplied by rounding. These are the
// sums over keys of what has been rounded. With them the query's gradient is one of differences.
template <typename T>
struct RoundedSums {
  // One of four numbers that four lanes have together, as the registers are for scores: the sums of
  // gradients and of probabilities of their first row, and of their second.
  float sum = 0;

  // For 16 keys; where there is nothing of either, 0.
  __device__ __forceinline__ void add(const uint32_t (&gradients)[4],
                                      const uint32_t (&probabilities)[4]) {
    // Right operands with ones in columns 0 and 4, or 2 and 6.
    const int thread = in_place(int(threadIdx.x));
    const int column_of_4 = thread & 12;  // 4 (column % 4)
    const uint32_t ones = rounded_pair<T>(1, 1);
    const uint32_t first = column_of_4 == 0 ? ones : 0, second = column_of_4 == 8 ? ones : 0;
    float sums[4] = {};
    multiply_add<T>(sums, gradients, first, first, sums);
    multiply_add<T>(sums, probabilities, second, second, sums);
    sum += thread & 2 ? sums[2] : sums[0];
  }

  // Turns sums of keys times rounded probabilities into means; of no keys, into 0.
  template <int n>
  __device__ __forceinline__ void divide(float (&keys)[n][4]) const {
    const float first = of_lane(1), second = of_lane(3);
    scale_rows(keys, first == 0 ? 0.0f : 1 / first, second == 0 ? 0.0f : 1 / second);
  }
  // Takes the sum of rounded gradients times the mean of keys out of a query's gradient.
  template <int n>
  __device__ __forceinline__ void centre(const float (&mean_key)[n][4],
                                         float (&gradient)[n][4]) const {
    const float excess[2] = {of_lane(0), of_lane(2)};
#pragma unroll
    for (int i = 0; i < 4 * n; ++i) {
      float& value = gradient[i / 4][i % 4];
      value = fmaf(-excess[i / 2 % 2], mean_key[i / 4][i % 4], value);
    }
  }

 private:
  __device__ __forceinline__ float of_lane(int lane) const {
    return __shfl_sync(kAllLanes, sum, (int(threadIdx.x) % kWarp & ~3) + lane);
  }
};
// As for other sums of values that HalfScale scales, the same for all rows.
template <typename T>
__device__ __forceinline__ void scale_rows(RoundedSums<T>& rounded, float factor, float) {
  if (!(threadIdx.x & 1)) rounded.sum *= factor;
}

// What the weights that multiply grad_out are multiplied by, for fp16 to hold small ones. Those of
// a row add up to 1.
template <typename T>
constexpr float kHalfWeight = std::is_same<T, float16>::value ? 4096.0f : 1.0f;

// What a block works on: heads (or groups of heads) come first in its index, then the batch.
struct HalfBlock {
  int head, batch, tile;

  __device__ __forceinline__ HalfBlock(const LifAttentionParams& p, int64_t heads)
      : HalfBlock(p, heads, int(blockIdx.x)) {}
  // The same, but worked out again: the registers are for scores.
  static __device__ __forceinline__ HalfBlock again(const LifAttentionParams& p, int64_t heads) {
    return {p, heads, in_place(int(blockIdx.x))};
  }

 private:
  __device__ __forceinline__ HalfBlock(const LifAttentionParams& p, int64_t heads, int index) {
    head = int(unsigned(index) % unsigned(heads));
    index = int(unsigned(index) / unsigned(heads));
    batch = int(unsigned(index) % unsigned(p.batch));
    tile = int(unsigned(index) / unsigned(p.batch));
  }
};

// Shared memory of the kernels: two tiles of keys and two of values, or of queries and gradients;
// `kept` tiles of 64 rows that a block keeps there; and what `extra` says.
template <int kSize>
__host__ __device__ constexpr size_t half_shared_bytes(int kept, size_t extra) {
  return 4 * TileLayout<kSize>::kBytes + size_t(kept * kTile * 2 * kSize) + extra;
}
// Up to 64 columns kept rows are in registers, and pass through the second tiles on their way.
template <int kSize>
constexpr bool kHalfInRegisters = kSize <= 64;
template <int kSize>
constexpr size_t kHalfForwardBytes = half_shared_bytes<kSize>(kHalfInRegisters<kSize> ? 0 : 1, 0);
template <int kSize>
constexpr size_t kHalfKept = half_shared_bytes<kSize>(kHalfInRegisters<kSize> ? 0 : 2, 0);
template <int kSize>
constexpr size_t kHalfQueriesBytes = kHalfKept<kSize> + kTile * sizeof(float);
template <int kSize>
constexpr size_t kHalfKeysBytes =
    kHalfKept<kSize> + 2 * TileLayout<kSize>::kRows * sizeof(HalfQuery);

}  // namespace cuda
}  // namespace ember
