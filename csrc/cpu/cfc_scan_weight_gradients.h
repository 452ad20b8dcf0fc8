// The gradients of the CfC scan's weights on the CPU.
//
// They are shared out over tiles of the weights, each summed over steps and rows in a fixed order,
// which makes the result independent of the number of threads.
#pragma once

#include "cfc_scan.h"
#include "panels.h"

namespace ember {
inline namespace EMBER_ISA {

template <typename C>
class CfcWeightGradients {
 public:
  // Sums in `memory`, for each layer [segments * units, input_stride].
  CfcWeightGradients(const CfcTapes<C>& tapes, C* memory)
      : p_(tapes.p), tapes_(tapes), sums_(memory) {}

  void clear() const {
    int64_t size = 0;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      size += p_.layers[l].segments * p_.layers[l].units * p_.layers[l].input_stride;
    }
    for (int64_t i = 0; i < size; ++i) sums_[i] = 0;
  }

  // Adds the gradients of `steps` slots: the first of the gradient tape, and of the tape those from
  // `slot` on.
  void add(const ThreadPool& pool, int64_t slot, int64_t steps) const {
    C* grad = sums_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      if (layer.grad_weight) add_layer(pool, l, slot, steps, grad);
      grad += layer.segments * layer.units * layer.input_stride;
    }
  }

  void store() const {
    const C* grad = sums_;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const int64_t width = 1 + layer.inputs;
      C* out = static_cast<C*>(layer.grad_weight);
      for (int64_t i = 0; i < layer.segments * layer.units; ++i, grad += layer.input_stride) {
        if (out) copy(grad, width, out + i * width);
      }
    }
  }

 private:
  // A tile is three vectors of columns by four rows, or with twice as many registers two by twelve.
  static constexpr int tile_vectors = vector_sums < 24 ? 3 : 2;
  static constexpr int tile_rows = vector_sums / tile_vectors;
  // A thread takes `tile_vectors` columns by so many units at once.
  static constexpr int64_t group_units = 32;

  void add_layer(const ThreadPool& pool, int64_t l, int64_t slot, int64_t steps, C* grad) const {
    const CfcLayer& layer = p_.layers[l];
    const int64_t vectors = (1 + layer.inputs + lanes<C> - 1) / lanes<C>;
    const int64_t tiles = (vectors + tile_vectors - 1) / tile_vectors;
    const int64_t groups = (layer.units + group_units - 1) / group_units * layer.segments;
    const int64_t rows = steps * p_.batch, stretch = 64;
    parallel_for(pool, tiles * groups, 1, [&](int64_t begin, int64_t end) {
      // Sums are moved into the gradient every few rows: rounding errors grow with the number of
      // terms in one sum, and the stretch stays in the cache from tile to tile.
      for (int64_t m = 0; m < rows; m += stretch) {
        const int64_t count = rows - m < stretch ? rows - m : stretch;
        const C* right = tapes_.input(l, slot, 0) + m * layer.input_stride;
        const C* left = tapes_.grads(layer, 0, 0) + m * layer.grad_stride;
        for (int64_t i = begin; i < end; ++i) {
          add_tile(layer, i / groups * tile_vectors, vectors, i % groups, count, left, right, grad);
        }
      }
    });
  }

  void add_tile(const CfcLayer& layer, int64_t vector, int64_t vectors, int64_t group, int64_t m,
                const C* left, const C* right, C* grad) const {
    const int64_t per_segment = (layer.units + group_units - 1) / group_units;
    const int64_t segment = group / per_segment, from = group % per_segment * group_units;
    const int64_t to = from + group_units < layer.units ? from + group_units : layer.units;
    const int width = int(vectors - vector < tile_vectors ? vectors - vector : tile_vectors);
    right += vector * lanes<C>;
    left += segment * cfc_pad(layer.units);
    grad += segment * layer.units * layer.input_stride + vector * lanes<C>;
    for_row_groups(to - from, tile_rows, [&](int64_t first, int count) {
      const C* l = left + from + first;
      C* g = grad + (from + first) * layer.input_stride;
      const int64_t ls = layer.grad_stride, rs = layer.input_stride;
      if (width == 3) {
        outer_product_of<3>(count, m, l, ls, right, rs, g, rs);
      } else if (width == 2) {
        outer_product_of<2>(count, m, l, ls, right, rs, g, rs);
      } else {
        outer_product_of<1>(count, m, l, ls, right, rs, g, rs);
      }
    });
  }

  // grad[r][column] += sum over m of left[m][r] * right[m][column], for one tile.
  template <int N, int R>
  static void outer_product(int64_t m, const C* left, int64_t left_stride, const C* right,
                            int64_t right_stride, C* grad, int64_t grad_stride) {
    Vector<C> sum[R][N] = {};
    for (int64_t i = 0; i < m; ++i) {
      Vector<C> v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = load_vector(right + n * lanes<C>);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const C value = left[r];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] += value * v[n];
      }
      left += left_stride;
      right += right_stride;
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) {
        C* to = grad + r * grad_stride + n * lanes<C>;
        store_vector(load_vector(to) + sum[r][n], to);
      }
    }
  }

  template <int N, int R = tile_rows>
  static void outer_product_of(int rows, int64_t m, const C* left, int64_t left_stride,
                               const C* right, int64_t right_stride, C* grad, int64_t grad_stride) {
    if constexpr (R > 1) {
      if (rows < R) {
        return outer_product_of<N, R - 1>(rows, m, left, left_stride, right, right_stride, grad,
                                          grad_stride);
      }
    }
    outer_product<N, R>(m, left, left_stride, right, right_stride, grad, grad_stride);
  }

  const CfcScanParams& p_;
  const CfcTapes<C>& tapes_;
  C* const sums_;
};

}  // namespace EMBER_ISA
}  // namespace ember
