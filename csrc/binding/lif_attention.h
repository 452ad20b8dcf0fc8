// What the bindings of attention operators share: checks, results and the tensors that a call
// reads.
//
// All that memory safety rests on is checked here, with a terse message; ops/ tells the user what
// is wrong.
#pragma once

#include <initializer_list>
#include <optional>

#include "../common/lif_attention.h"
#include "device.h"

namespace ember {
namespace binding {

using MaybeTensor = std::optional<Tensor>;

inline void check(bool good) {
  STD_TORCH_CHECK(good, "ember_ext: invalid arguments of an attention operator");
}

inline void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  check(t.dim() == int64_t(shape.size()) && t.device() == like.device());
  int64_t d = 0;
  for (int64_t n : shape) check(t.size(d++) == n);
}

inline AttentionTensor describe(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// [batch, heads, tokens, size], laid out as [batch, tokens, heads, size].
inline Tensor new_joined(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                         int64_t size) {
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, size}), 1,
                                  2);
}

inline Tensor new_joined_like(const Tensor& t) {
  return new_joined(t, t.size(0), t.size(1), t.size(2), t.size(3));
}

// `t` itself where its last dimension is dense, else one copy.
inline Tensor dense_rows(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// What a call reads, alive for as long as the parameters that point to it. Params is or extends
// LifAttentionParams.
template <typename Params>
struct AttentionInputs {
  Tensor query, key, value, threshold, leak, steepness;
  MaybeTensor mask, seed;
  Params p{};

  AttentionInputs(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                  const Tensor& threshold_, const Tensor& leak_, const Tensor& steepness_,
                  const MaybeTensor& mask_, const MaybeTensor& seed_, double dropout, bool causal,
                  double scale, double eps)
      : query(dense_rows(query_)),
        key(dense_rows(key_)),
        value(dense_rows(value_)),
        threshold(dense(threshold_)),
        leak(dense(leak_)),
        steepness(dense(steepness_)),
        mask(mask_),
        seed(seed_) {
    check(query.dim() == 4 && key.dim() == 4);
    p.dtype = dtype_of(query);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.groups = key.size(1);
    p.queries = query.size(2);
    p.keys = key.size(2);
    p.size = query.size(3);
    check(p.groups > 0 ? p.heads % p.groups == 0 : p.heads == 0);
    for (const Tensor* t : {&key, &value}) {
      check_like(*t, query, {p.batch, p.groups, p.keys, p.size});
      check(t->scalar_type() == query.scalar_type());
    }
    for (const Tensor* t : {&threshold, &leak, &steepness}) {
      check_like(*t, query, {p.heads});
      check(t->scalar_type() == compute_type(query));
    }
    p.causal = causal;
    p.scale = scale;
    p.eps = eps;
    p.dropout = dropout;
    p.query = describe(query);
    p.key = describe(key);
    p.value = describe(value);
    p.threshold = threshold.const_data_ptr();
    p.leak = leak.const_data_ptr();
    p.steepness = steepness.const_data_ptr();
    if (mask) {
      check_like(*mask, query, {p.batch, p.heads, p.queries, p.keys});
      check(mask->scalar_type() == ScalarType::Bool);
      p.mask = static_cast<const bool*>(mask->const_data_ptr());
      for (int d = 0; d < 4; ++d) p.mask_strides[d] = mask->stride(d);
    }
    if (seed) {
      check_like(*seed, query, {});
      check(seed->scalar_type() == ScalarType::Long);
      p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    check(valid_gates(p.dtype, p.heads, p.threshold, p.leak, p.steepness));
  }

  bool has_pairs() const { return p.batch * p.heads * p.queries * p.keys > 0; }
};

}  // namespace binding
}  // namespace ember
