// Memory for attention on the CPU: the operands that strips of queries are worked on with.
//
// A layout is written once, as the constructor of a struct: given a null block its pieces' sizes
// add up, given a block the pieces lie there.
#pragma once

#include <initializer_list>

#include "../common/lif_attention.h"

namespace ember {
inline namespace EMBER_ISA {

// Hands out pieces of a block of memory, each at the start of a cache line.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <typename E>
  E* take(int64_t elements) {
    char* piece = block_ ? block_ + bytes_ : nullptr;
    bytes_ += (elements * int64_t(sizeof(E)) + 63) / 64 * 64;
    return reinterpret_cast<E*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

// Room for whole vectors of any instruction set.
inline int64_t attention_padded(int64_t n) {
  return (n + 31) / 32 * 32;
}

// Elements from one row over the keys to the next; not a power of two, which would crowd few cache
// sets.
inline int64_t attention_row_stride(const LifAttentionParams& p) {
  return attention_padded(p.keys) + 16;
}

// Queries, keys and values of one head and their gradients, as the products of matrices take them:
// panels are [depth, columns of a tile], one after the other.
template <typename C>
struct AttentionOperands {
  int64_t stride;                     // of rows of `size` elements
  C *query, *result, *grad_out;       // [rows, stride]
  C *query_panels, *grad_out_panels;  // panels of columns, [rows, ...]
  C *key_t, *value_t;                 // panels of tokens, [size, ...]
  C *key, *value;                     // panels of columns, [keys, ...]
  C *grad_key, *grad_value;           // [keys, stride]

  AttentionOperands() = default;
  AttentionOperands(const LifAttentionParams& p, int64_t rows, bool backward, Arena& arena)
      : stride(attention_padded(p.size)) {
    const int64_t strip = rows * stride, matrix = attention_padded(p.keys) * stride;
    query = arena.take<C>(strip);
    result = arena.take<C>(strip);
    key_t = arena.take<C>(matrix);
    if (!backward) {
      value = arena.take<C>(matrix);
      return;
    }
    for (C** operand : {&grad_out, &query_panels, &grad_out_panels})
      *operand = arena.take<C>(strip);
    for (C** operand : {&value_t, &key, &grad_key, &grad_value}) *operand = arena.take<C>(matrix);
  }
};

}  // namespace EMBER_ISA
}  // namespace ember
