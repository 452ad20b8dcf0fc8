// The LIF gate on the CPU: one read of x and one write of y forward; one read of x and grad_y and
// one write of grad_x backward. Threads share out the rows, or tiles of them where a row needs no
// norm.
#include "../common/lif_gate.h"

#include <type_traits>

#include "lif_gate_row.h"
#include "parallel.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

// Row buffers and running sums of one thread.
template <typename C>
struct Scratch {
  Totals total;
  C* sums;                  // [3, columns of a tile] over a few rows, where columns are units
  C *fire, *smoulder;       // of a row
  C *x, *grad_y, *written;  // rows in their compute type, where they are stored in a narrower one

  Scratch(const LifGateParams& p, const ThreadPool& pool) {
    const int64_t cols = lif_gate_tile_cols(p);
    const int64_t units = p.unit_rows ? p.units : cols;
    total.sums = reinterpret_cast<double*>(static_cast<char*>(p.thread_scratch) +
                                           pool.thread_index() * lif_gate_scratch_bytes(p));
    total.rests = total.sums + 3 * units;
    sums = reinterpret_cast<C*>(total.rests + 3 * units);
    fire = sums + 3 * units;
    smoulder = fire + cols;
    x = smoulder + cols;
    grad_y = x + cols;
    written = grad_y + cols;
  }
};

template <typename C>
EMBER_HD const C* load_row(const C* row, int64_t, C*) {
  return row;
}
template <typename T, typename C>
EMBER_HD const C* load_row(const T* row, int64_t n, C* buffer) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) buffer[j] = widen(row[j]);
  return buffer;
}

template <typename C>
EMBER_HD C* row_to_write(C* row, C*) {
  return row;
}
template <typename T, typename C>
EMBER_HD C* row_to_write(T*, C* buffer) {
  return buffer;
}
template <typename C>
EMBER_HD void store_row(const C*, int64_t, C*) {}
template <typename T, typename C>
EMBER_HD void store_row(const C* buffer, int64_t n, T* row) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(buffer[j], row[j]);
}

template <typename C, bool per_column>
struct GatesOf;
template <typename C>
struct GatesOf<C, true> {
  static EMBER_HD ColumnGates<C> at(const LifGateParams& p, int64_t, int64_t column) {
    return {static_cast<const C*>(p.threshold) + column, static_cast<const C*>(p.leak) + column,
            static_cast<const C*>(p.steepness) + column};
  }
};
template <typename C>
struct GatesOf<C, false> {
  static EMBER_HD RowGate<C> at(const LifGateParams& p, int64_t row, int64_t) {
    const int64_t unit = row / p.unit_rows % p.units;
    return {static_cast<const C*>(p.threshold)[unit], static_cast<const C*>(p.leak)[unit],
            static_cast<const C*>(p.steepness)[unit]};
  }
};

template <typename T, Norm norm, bool per_column>
void forward(const LifGateParams& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  const int64_t tile = lif_gate_tile_cols(p), tiles = (p.cols + tile - 1) / tile;
  parallel_for(pool, p.rows * tiles, grain_for(tile), [&](int64_t begin, int64_t end) {
    const Scratch<C> s(p, pool);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, first = i % tiles * tile;
      const int64_t n = p.cols - first < tile ? p.cols - first : tile;
      const T* x = static_cast<const T*>(p.x) + row * p.cols + first;
      T* y = static_cast<T*>(p.y) + row * p.cols + first;
      C* written = row_to_write(y, s.written);
      forward_row<norm>(n, load_row(x, n, s.x), GatesOf<C, per_column>::at(p, row, first), p.eps,
                        written);
      store_row(written, n, y);
    }
  });
}

// Moves the running sums into the block's totals.
template <typename C>
EMBER_HD void flush(int64_t n, C* sums, const Totals& total) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    total.add(j, double(sums[j]));
    sums[j] = 0;
  }
}

// The rows [row, row_end) and columns [first, first + n): one block, or one tile of it.
template <typename T, Norm norm, bool per_column, bool want_sums>
void backward_block(const LifGateParams& p, const Scratch<compute_t<T>>& s, int64_t block,
                    int64_t first, int64_t n) {
  using C = compute_t<T>;
  const int64_t flush_rows = 16, block_rows = lif_gate_block_rows(p);
  const int64_t row_end = (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
  const int64_t units = per_column ? n : p.units;
  for (int64_t j = 0; want_sums && j < 3 * units; ++j) {
    s.sums[j] = 0;
    s.total.sums[j] = s.total.rests[j] = 0;
  }
  for (int64_t row = block * block_rows; row < row_end; ++row) {
    const int64_t tile = lif_gate_tile_cols(p);
    const int64_t unit = per_column ? 0 : row / p.unit_rows % p.units;
    const Totals total{s.total.sums + unit, s.total.rests + unit};
    for (int64_t from = first; from < first + n; from += tile) {
      const int64_t width = first + n - from < tile ? first + n - from : tile;
      const int64_t offset = row * p.cols + from;
      T* grad_x = static_cast<T*>(p.grad_x) + offset;
      C* written = row_to_write(grad_x, s.written);
      backward_whole_row<norm, want_sums>(
          width, load_row(static_cast<const T*>(p.x) + offset, width, s.x),
          load_row(static_cast<const T*>(p.grad_y) + offset, width, s.grad_y),
          GatesOf<C, per_column>::at(p, row, from), p.eps, s.fire, s.smoulder, written, s.sums,
          total, units);
      store_row(written, width, grad_x);
    }
    if (want_sums && per_column && (row + 1) % flush_rows == 0) flush(3 * units, s.sums, s.total);
  }
  if (!want_sums) return;
  if (per_column) flush(3 * units, s.sums, s.total);
  C* partial = static_cast<C*>(p.partial_gradients) + block * 3 * p.units + first;
  for (int64_t parameter = 0; parameter < 3; ++parameter) {
    for (int64_t j = 0; j < units; ++j) {
      partial[parameter * p.units + j] = C(s.total.value(parameter * units + j));
    }
  }
}

template <typename T, Norm norm, bool per_column>
void backward(const LifGateParams& p, const ThreadPool& pool) {
  using C = compute_t<T>;
  // A row that belongs to one unit is summed up as a whole; columns can be shared out.
  const int64_t width = per_column ? lif_gate_tile_cols(p) : p.cols;
  const int64_t tiles = (p.cols + width - 1) / width, blocks = lif_gate_blocks(p);
  const int64_t grain = grain_for(2 * lif_gate_block_rows(p) * width);
  parallel_for(pool, blocks * tiles, grain, [&](int64_t begin, int64_t end) {
    const Scratch<C> s(p, pool);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * width;
      const int64_t n = p.cols - first < width ? p.cols - first : width;
      if (p.grad_parameters) {
        backward_block<T, norm, per_column, true>(p, s, i / tiles, first, n);
      } else {
        backward_block<T, norm, per_column, false>(p, s, i / tiles, first, n);
      }
    }
  });
  if (!p.grad_parameters) return;
  const C* partial = static_cast<const C*>(p.partial_gradients);
  C* out = static_cast<C*>(p.grad_parameters);
  parallel_for(pool, 3 * p.units, grain_for(blocks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      LongSum<C> sum;
      for (int64_t block = 0; block < blocks; ++block) sum.add(partial[block * 3 * p.units + i]);
      out[i] = C(sum.value());
    }
  });
}

// Calls body.template run<T, norm, per_column>() for what the parameters ask.
template <typename T, Norm norm, typename Body>
void dispatch_units(const LifGateParams& p, const Body& body) {
  if (p.unit_rows) {
    body.template run<T, norm, false>();
  } else {
    body.template run<T, norm, true>();
  }
}

template <typename Body>
void dispatch(const LifGateParams& p, const Body& body) {
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    switch (p.norm) {
      case Norm::none:
        return dispatch_units<T, Norm::none>(p, body);
      case Norm::l1:
        return dispatch_units<T, Norm::l1>(p, body);
      case Norm::l2:
        return dispatch_units<T, Norm::l2>(p, body);
    }
  });
}

struct Forward {
  const LifGateParams& p;
  const ThreadPool& pool;
  template <typename T, Norm norm, bool per_column>
  void run() const {
    forward<T, norm, per_column>(p, pool);
  }
};

struct Backward {
  const LifGateParams& p;
  const ThreadPool& pool;
  template <typename T, Norm norm, bool per_column>
  void run() const {
    backward<T, norm, per_column>(p, pool);
  }
};

}  // namespace

void lif_gate_forward(const LifGateParams& p, const ThreadPool& pool) {
  if (p.rows * p.cols > 0) dispatch(p, Forward{p, pool});
}

void lif_gate_backward(const LifGateParams& p, const ThreadPool& pool) {
  dispatch(p, Backward{p, pool});
}

}  // namespace EMBER_ISA
}  // namespace ember
