// A stand-in for the toolkit's header of matrix units: the part of nvcuda::wmma that csrc/cuda
// uses.
//
// All 32 lanes of a warp must meet at each call with the same address and stride, as on a GPU.
// Where an element of a matrix lies in the lanes' fragments is NVIDIA's secret; here it is
// shuffled, so that kernels which count on a place fail. Operands must be aligned as the
// programming guide asks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

}  // namespace wmma
}  // namespace nvcuda

namespace cuda_shim {

inline float value_of(__half x) {
  return __half2float(x);
}
inline float value_of(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rows and columns of an operand of m x n x k.
template <typename Use, int m, int n, int k>
struct FragmentShape;
template <int m, int n, int k>
struct FragmentShape<nvcuda::wmma::matrix_a, m, n, k> {
  static constexpr int rows = m, columns = k;
};
template <int m, int n, int k>
struct FragmentShape<nvcuda::wmma::matrix_b, m, n, k> {
  static constexpr int rows = k, columns = n;
};
template <int m, int n, int k>
struct FragmentShape<nvcuda::wmma::accumulator, m, n, k> {
  static constexpr int rows = m, columns = n;
};

}  // namespace cuda_shim

namespace nvcuda {
namespace wmma {

// One lane's share. It holds NaN until it is filled or loaded.
template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
  using Shape = cuda_shim::FragmentShape<Use, m, n, k>;
  using Element = T;
  static constexpr int num_elements = Shape::rows * Shape::columns / 32;
  Element x[num_elements];

  fragment() { memset(x, 0xff, sizeof(x)); }
};

}  // namespace wmma
}  // namespace nvcuda

namespace cuda_shim {

template <typename Fragment>
auto& element(Fragment* const* lanes, int row, int column) {
  const int index = row * Fragment::Shape::columns + column;
  const int part = index / 32, lane = (index + 11 * part) % 32;
  return lanes[lane]->x[(part * 3 + lane) % Fragment::num_elements];
}

// What every lane hands in for a load, a store or a product.
template <typename Fragment, typename T>
struct FragmentMove {
  Fragment* fragment;
  T* memory;
  unsigned stride;
  bool by_rows;
  Place place;
};

// Fills `fragments`, and checks that lanes agree and that the memory is aligned.
template <typename Move, typename Fragment>
void agree(void* const* arguments, Fragment** fragments) {
  const Move& first = *static_cast<Move*>(arguments[0]);
  for (int lane = 0; lane < 32; ++lane) {
    const Move& move = *static_cast<Move*>(arguments[lane]);
    if (move.memory != first.memory || move.stride != first.stride) {
      fault("lanes name different memory", move.place);
    }
    fragments[lane] = move.fragment;
  }
  if (reinterpret_cast<uintptr_t>(first.memory) % 32 != 0 ||
      first.stride * sizeof(*first.memory) % 16 != 0) {
    fault("a matrix that is not aligned to 32 bytes, its rows to 16", first.place);
  }
}

template <bool store, typename Fragment, typename T>
void move_fragment(Fragment* fragment, T* memory, unsigned stride, bool by_rows, Place place) {
  using Move = FragmentMove<Fragment, T>;
  Move move{fragment, memory, stride, by_rows, place};
  const auto together = [](void* const* arguments) {
    Fragment* lanes[32];
    agree<Move>(arguments, lanes);
    const Move& first = *static_cast<Move*>(arguments[0]);
    for (int row = 0; row < Fragment::Shape::rows; ++row) {
      for (int column = 0; column < Fragment::Shape::columns; ++column) {
        T& place =
            first.memory[first.by_rows ? row * first.stride + column : column * first.stride + row];
        if constexpr (store) {
          place = element(lanes, row, column);
        } else {
          element(lanes, row, column) = place;
        }
      }
    }
  };
  meet(&move, together, place);
}

}  // namespace cuda_shim

namespace nvcuda {
namespace wmma {

template <typename Fragment, typename T>
void fill_fragment(Fragment& fragment, const T& value) {
  for (auto& x : fragment.x) x = value;
}

template <typename Use, int m, int n, int k, typename T, typename Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& to,
                      const typename fragment<Use, m, n, k, T, Layout>::Element* from,
                      unsigned stride, EMBER_SHIM_PLACE) {
  cuda_shim::move_fragment<false>(&to, from, stride, std::is_same<Layout, row_major>::value,
                                  {file, line});
}

template <int m, int n, int k, typename T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& to, const T* from, unsigned stride,
                      layout_t layout, EMBER_SHIM_PLACE) {
  cuda_shim::move_fragment<false>(&to, from, stride, layout == mem_row_major, {file, line});
}

template <int m, int n, int k, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, m, n, k, T>& from, unsigned stride,
                       layout_t layout, EMBER_SHIM_PLACE) {
  cuda_shim::move_fragment<true>(&from, to, stride, layout == mem_row_major, {file, line});
}

// Products and sums in fp32, in the order of k.
template <int m, int n, int k, typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& d,
              const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b,
              const fragment<accumulator, m, n, k, float>& c, EMBER_SHIM_PLACE) {
  struct Operands {
    const fragment<matrix_a, m, n, k, T, LayoutA>* a;
    const fragment<matrix_b, m, n, k, T, LayoutB>* b;
    const fragment<accumulator, m, n, k, float>* c;
    fragment<accumulator, m, n, k, float>* d;
  };
  Operands operands{&a, &b, &c, &d};
  const auto together = [](void* const* arguments) {
    Operands lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = *static_cast<Operands*>(arguments[lane]);
    const auto gather = [&lanes](auto Operands::* operand) {
      using Pointer = std::decay_t<decltype(lanes[0].*operand)>;
      std::array<Pointer, 32> pointers;
      for (int lane = 0; lane < 32; ++lane) pointers[lane] = lanes[lane].*operand;
      return pointers;
    };
    const auto as = gather(&Operands::a);
    const auto bs = gather(&Operands::b);
    const auto cs = gather(&Operands::c);
    const auto ds = gather(&Operands::d);
    float left[m][k], right[k][n];
    for (int i = 0; i < m; ++i) {
      for (int l = 0; l < k; ++l)
        left[i][l] = cuda_shim::value_of(cuda_shim::element(as.data(), i, l));
    }
    for (int l = 0; l < k; ++l) {
      for (int j = 0; j < n; ++j)
        right[l][j] = cuda_shim::value_of(cuda_shim::element(bs.data(), l, j));
    }
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        float sum = cuda_shim::element(cs.data(), i, j);
        for (int l = 0; l < k; ++l) sum += left[i][l] * right[l][j];
        cuda_shim::element(ds.data(), i, j) = sum;
      }
    }
  };
  cuda_shim::meet(&operands, together, {file, line});
}

}  // namespace wmma
}  // namespace nvcuda
