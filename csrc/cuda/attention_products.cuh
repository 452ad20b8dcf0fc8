// Products of 64 x 64 tiles for the attention kernels, whose elements each thread then works on.
//
// A block of 256 threads multiplies rows of two matrices in memory, a tile of scores, and hands
// every thread a patch of 4 x 4 scores. From the patches the block makes a tile of weights or of
// gradients and adds its product with rows of a third matrix to a result that stays in registers:
//
//   Products products;  Products::Result out;
//   products.rows(query, i, key, j, scores);     scores = query rows times key rows
//   products.store(scores);                      the tile = scores, changed in between
//   products.add_tile(value, j, column, out);    out += tile times columns of value rows
//
// Kernels are written once for both kinds: sums in registers, for any type, and matrix units, for
// 16-bit types and for fp32 rounded to tf32.
#pragma once

#include <type_traits>

#include "attention_matrix_products.cuh"
#include "attention_register_products.cuh"

namespace ember {
namespace cuda {

// `spare`: whether the kernel has registers left for loads of whole tiles.
template <typename T, bool matrix_units, bool spare = true>
using AttentionProducts =
    std::conditional_t<matrix_units, MatrixProducts<T, spare>, RegisterProducts<T, spare>>;

// What a kernel of T uses if it asks for matrix units or not. Both kinds run with any launch of
// attention_shared_bytes(), so that the host need not know what the device's code was compiled for.
template <typename T, bool matrix_units, bool spare = true>
using AttentionProductsFor = AttentionProducts<T, matrix_units && has_matrix_units<T>(), spare>;

template <typename T, bool matrix_units>
constexpr size_t attention_shared_bytes() {
  const size_t plain = AttentionProducts<T, false>::kBytes;
  const size_t other = AttentionProducts<T, matrix_units>::kBytes;
  return plain > other ? plain : other;
}

}  // namespace cuda
}  // namespace ember
