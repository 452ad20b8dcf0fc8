// What the kernels of refractory_lif_attention_half_keys.cuh and
// refractory_lif_attention_half_queries.cuh share.
#pragma once

#include "refractory_lif_attention_half.cuh"

namespace ember {
namespace cuda {

// The gates of a head, and what their slopes are multiplied by in the gradients of p and of P.
struct GradientGate : HalfThresholds {
  float steep, tau;

  __device__ __forceinline__ GradientGate(const RefractoryLifAttentionParams& p, int head)
      : HalfThresholds(p, head),
        steep(static_cast<const float*>(p.steepness)[head] * open),
        tau(-steep * static_cast<const float*>(p.within)[head]) {}
};

// tau enters sums that a product takes, as numbers of bf16, which has the range of fp32: where
// results are of fp16, as two.
template <typename T>
constexpr int kTauParts = std::is_same<T, float16>::value ? 2 : 1;
using TauSums = QuerySums<bfloat16, true>;

// t = M (grad_out . v) + a / H, from products with v, of which `kept` says which dropout keeps.
template <bool whole, typename T>
__device__ __forceinline__ void add_above(const AttentionHead<T>& head, unsigned kept, float share,
                                          const float (&above)[4], float (&products)[4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float& value = products[n];
    if (!whole) value = kept >> n & 1 ? value * head.keep_factor : 0.0f;
    value = fmaf(above[n], share, value);
  }
}
template <bool whole, typename T>
__device__ __forceinline__ void add_above(const AttentionHead<T>& head, unsigned kept, float share,
                                          const float (&above)[2][4], float (&products)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    add_above<whole>(head, kept >> 4 * n, share, above[n], products[n]);
  }
}

}  // namespace cuda
}  // namespace ember
