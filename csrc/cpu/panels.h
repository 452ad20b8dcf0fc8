// Products of a few rows by weights that are packed in panels, for operators that multiply by the
// same weights again and again.
//
// A panel holds, for every value of a row, N vectors of weights side by side: one vector of units
// for each of N segments, which then meet in registers, or N vectors of columns of a matrix. The
// caller's epilogue takes the sums panel by panel, while they are in the cache.
#pragma once

#include <type_traits>

#include "parallel.h"
#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {

// `count` rows, `lda` elements apart, each of `segments` pieces of `length` values, the pieces
// `stride` apart.
template <typename C>
struct PanelRows {
  int64_t count;
  const C* values;
  int64_t lda;
  int64_t segments, length, stride;
};

// Weights as products take them: panels [depth, vectors, lanes], `size` elements apart, of which
// those in [begin, end) are wanted.
template <typename C>
struct Panels {
  const C* weights;
  int64_t size;
  int64_t begin, end;
};

// Says that the sums of a product begin with 0. The alternative is a function (panel, first row,
// rows, sums [N, rows, lanes]) that writes their first values.
struct FromZero {};

// A chain of additions errs by more, the longer it is. So a sum over several segments is taken in
// pieces of some segments with 128 values or more, which are added up: body(first segment, piece).
template <typename C, typename Body>
void for_pieces(const PanelRows<C>& rows, const Body& body) {
  const int64_t most = rows.length < 128 ? 1 + 127 / (rows.length > 0 ? rows.length : 1) : 1;
  PanelRows<C> piece = rows;
  int64_t s = 0;
  do {
    piece.values = rows.values + s * rows.stride;
    piece.segments = rows.segments - s < most ? rows.segments - s : most;
    body(s, piece);
    s += most;
  } while (s < rows.segments);
}

// What `out` holds before a piece: nothing, the first values of its sums, or the sums of other
// pieces.
enum class Holds { nothing, start, others };

// out[n][r][lane] = sum over the row a + r * lda of its values times panel[value][n][lane].
template <typename C, int N, int R, Holds holds>
void product_piece(const C* a, const PanelRows<C>& rows, const C* panel, C* out) {
  using V = Vector<C>;
  V sum[N][R] = {};
  if constexpr (holds == Holds::start) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) sum[n][r] = load_vector(out + (n * R + r) * lanes<C>);
    }
  }
  for (int64_t s = 0; s < rows.segments; ++s) {
    const C* values[R];
    for (int r = 0; r < R; ++r) values[r] = a + r * rows.lda + s * rows.stride;
    for (int64_t k = 0; k < rows.length; ++k) {
      V w[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[n] = load_vector(panel + n * lanes<C>);
      panel += N * lanes<C>;
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const C value = values[r][k];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[n][r] += value * w[n];
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) {
      C* to = out + (n * R + r) * lanes<C>;
      store_vector(holds == Holds::others ? load_vector(to) + sum[n][r] : sum[n][r], to);
    }
  }
}

// Rows that a product of N vectors takes at once: its sums must fit the registers. Products that
// resume are those of few rows.
template <int N, bool resumes>
constexpr int max_product_rows = vector_sums / N < (resumes ? 4 : 12) ? vector_sums / N
                                 : resumes                            ? 4
                                                                      : 12;

template <typename C, int N, bool resumes, int R = max_product_rows<N, resumes>>
void product_of(int count, const C* a, const PanelRows<C>& rows, const C* panel, C* out) {
  if constexpr (R > 1) {
    if (count < R) return product_of<C, N, resumes, R - 1>(count, a, rows, panel, out);
  }
  if constexpr (resumes) {  // of one segment
    product_piece<C, N, R, Holds::start>(a, rows, panel, out);
  } else {
    for_pieces(rows, [&](int64_t s, const PanelRows<C>& piece) {
      const C *values = a + s * rows.stride, *weights = panel + s * rows.length * N * lanes<C>;
      if (s == 0) {
        product_piece<C, N, R, Holds::nothing>(values, piece, weights, out);
      } else {
        product_piece<C, N, R, Holds::others>(values, piece, weights, out);
      }
    });
  }
}

// The largest result of a product, in elements.
template <typename C>
constexpr int product_size = vector_sums * lanes<C>;

// body(first, count) for groups of about equal size, at most `most` rows each.
template <typename Body>
void for_row_groups(int64_t rows, int64_t most, const Body& body) {
  const int64_t groups = (rows + most - 1) / most;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = rows * g / groups;
    body(first, int(rows * (g + 1) / groups - first));
  }
}

// As product_piece() for one row and P panels, `size` elements apart: out[p][n][lane]. A single row
// by a single panel would have too few sums under way to keep the arithmetic units busy.
template <typename C, int N, int P, Holds holds>
void product_piece_of_panels(const PanelRows<C>& row, const C* panels, int64_t size, C* out) {
  Vector<C> sum[P][N] = {};
  if constexpr (holds == Holds::start) {
    for (int p = 0; p < P; ++p) {
      for (int n = 0; n < N; ++n) sum[p][n] = load_vector(out + (p * N + n) * lanes<C>);
    }
  }
  for (int64_t s = 0; s < row.segments; ++s) {
    for (int64_t k = 0; k < row.length; ++k) {
      const C value = row.values[s * row.stride + k];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          sum[p][n] += value * load_vector(panels + p * size + n * lanes<C>);
        }
      }
      panels += N * lanes<C>;
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int n = 0; n < N; ++n) {
      C* to = out + (p * N + n) * lanes<C>;
      store_vector(holds == Holds::others ? load_vector(to) + sum[p][n] : sum[p][n], to);
    }
  }
}

// Multiplies one row by as many panels from `panel` on as go by P at once; returns the next.
template <int N, int P, typename C, typename Start, typename Epilogue>
int64_t multiply_row(int64_t panel, const PanelRows<C>& row, const Panels<C>& panels,
                     const Start& start, const Epilogue& epilogue) {
  constexpr bool resumes = !std::is_same_v<Start, FromZero>;
  alignas(64) C out[P * N * lanes<C>];
  for (; panel + P <= panels.end; panel += P) {
    for (int p = 0; p < P; ++p) {
      if constexpr (resumes) start(panel + p, 0, 1, out + p * N * lanes<C>);
    }
    const C* first = panels.weights + panel * panels.size;
    if constexpr (resumes) {  // of one segment
      product_piece_of_panels<C, N, P, Holds::start>(row, first, panels.size, out);
    } else {
      for_pieces(row, [&](int64_t s, const PanelRows<C>& piece) {
        const C* weights = first + s * row.length * N * lanes<C>;
        if (s == 0) {
          product_piece_of_panels<C, N, P, Holds::nothing>(piece, weights, panels.size, out);
        } else {
          product_piece_of_panels<C, N, P, Holds::others>(piece, weights, panels.size, out);
        }
      });
    }
    for (int p = 0; p < P; ++p) epilogue(panel + p, 0, 1, out + p * N * lanes<C>);
  }
  if constexpr (P > 1) {
    return multiply_row<N, P / 2>(panel, row, panels, start, epilogue);
  }
  return panel;
}

// Multiplies rows by packed panels of N vectors;
// epilogue(panel, first row, rows, products [N, rows, lanes]).
template <int N, typename C, typename Start, typename Epilogue>
void multiply_panels(const PanelRows<C>& rows, const Panels<C>& panels, const Start& start,
                     const Epilogue& epilogue) {
  if (rows.count == 1) {
    multiply_row<N, N == 1                 ? 8
                    : 4 * N <= vector_sums ? 4
                                           : 2>(panels.begin, rows, panels, start, epilogue);
    return;
  }
  constexpr bool resumes = !std::is_same_v<Start, FromZero>;
  alignas(64) C out[product_size<C>];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for_row_groups(rows.count, max_product_rows<N, resumes>, [&](int64_t first, int count) {
      if constexpr (resumes) start(panel, first, count, out);
      product_of<C, N, resumes>(count, rows.values + first * rows.lda, rows,
                                panels.weights + panel * panels.size, out);
      epilogue(panel, first, count, out);
    });
  }
}

// Elements that `columns` packed columns take for each value of a row.
template <typename C>
int64_t packed_width(int64_t columns) {
  return (columns + lanes<C> - 1) / lanes<C> * lanes<C>;
}

// Packed weights of `depth` values for each of `columns` columns, two vectors of columns to a
// panel; a product takes the values from `skipped` on.
template <typename C>
struct PackedMatrix {
  const C* packed;
  int64_t depth, skipped, columns;
};

// Multiplies rows by a share of a matrix; epilogue(first column, first row, rows, products [rows,
// lanes]), and start() likewise.
template <typename C, typename Start, typename Epilogue>
void multiply(const PanelRows<C>& rows, const PackedMatrix<C>& matrix, const Share& share,
              const Start& start, const Epilogue& epilogue) {
  const int64_t vectors = (matrix.columns + lanes<C> - 1) / lanes<C>, pairs = vectors / 2;
  const auto for_pair = [](const auto& body) {
    return [&](int64_t panel, int64_t first, int count, C* out) {
      const int64_t column = panel * 2 * lanes<C>;
      body(column, first, count, out);
      body(column + lanes<C>, first, count, out + count * lanes<C>);
    };
  };
  const int64_t left = pairs * 2 * lanes<C>;
  const auto for_last = [left](const auto& body) {
    return
        [&body, left](int64_t, int64_t first, int count, C* out) { body(left, first, count, out); };
  };
  const Panels<C> two{matrix.packed + matrix.skipped * 2 * lanes<C>, matrix.depth * 2 * lanes<C>,
                      share.begin(pairs), share.end(pairs)};
  const bool has_last = vectors % 2 != 0 && share.index == share.members - 1;
  const Panels<C> one{matrix.packed + left * matrix.depth + matrix.skipped * lanes<C>, 0, 0,
                      has_last ? 1 : 0};
  if constexpr (std::is_same_v<Start, FromZero>) {
    multiply_panels<2>(rows, two, start, for_pair(epilogue));
    multiply_panels<1>(rows, one, start, for_last(epilogue));
  } else {
    multiply_panels<2>(rows, two, for_pair(start), for_pair(epilogue));
    multiply_panels<1>(rows, one, for_last(start), for_last(epilogue));
  }
}

// weight [segments, units, depth] -> panels of one vector of units for each of the segments,
// [panels, depth, segments, lanes].
template <typename C>
void pack_segments(const C* weight, int64_t segments, int64_t units, int64_t depth, C* packed) {
  for (int64_t unit = 0; unit < units; unit += lanes<C>) {
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t lane = 0; lane < lanes<C>; ++lane) {
        const C* row = weight + (s * units + unit + lane) * depth;
        const bool inside = unit + lane < units;
        for (int64_t k = 0; k < depth; ++k) {
          packed[(k * segments + s) * lanes<C> + lane] = inside ? row[k] : C(0);
        }
      }
    }
    packed += depth * segments * lanes<C>;
  }
}

// A matrix given by its columns, value(depth index, column), to panels of two vectors of columns;
// the last has one if one is enough.
template <typename C, typename Value>
void pack_matrix(int64_t depth, int64_t columns, C* packed, const Value& value) {
  for (int64_t column = 0; column < columns; column += 2 * lanes<C>) {
    const int64_t width = columns - column > lanes<C> ? 2 * lanes<C> : lanes<C>;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t lane = 0; lane < width; ++lane) {
        packed[k * width + lane] = column + lane < columns ? value(k, column + lane) : C(0);
      }
    }
    packed += depth * width;
  }
}

}  // namespace EMBER_ISA
}  // namespace ember
