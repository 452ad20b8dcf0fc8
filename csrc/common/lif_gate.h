// The arguments of the LIF gate's kernels, the same for every device.
#pragma once

#include <cstdint>

#include "types.h"

namespace ember {

enum class Norm : int32_t { none, l1, l2 };

// x is seen as a row-major matrix [rows, cols] whose rows are what `norm` measures. Either every
// column is a unit (unit_rows = 0, units = cols), or every row belongs to one: unit
// (row / unit_rows) % units.
//
// T is the type that `dtype` names, C its compute type (types.h). Row-major, no padding.
struct LifGateParams {
  DType dtype;
  Norm norm;
  int64_t rows, cols, units, unit_rows;
  double eps;  // added to the norm of y before dividing by it

  const void* x;          // T [rows, cols]
  const void* threshold;  // C [units]
  const void* leak;       // C [units]
  const void* steepness;  // C [units]

  void* y;  // T [rows, cols], written by forward

  const void* grad_y;     // T [rows, cols]
  void* grad_x;           // T [rows, cols], written by backward
  void* grad_parameters;  // C [3, units] (threshold, leak, steepness), or null if not wanted
  // C, scratch, null with grad_parameters: [lif_gate_blocks(), 3, units] on a CPU, on a GPU as many
  // as ember::cuda::lif_gate_partial_gradients() says.
  void* partial_gradients;

  void* thread_scratch;  // CPU only: lif_gate_scratch_bytes() for each thread
};

inline namespace EMBER_ISA {

// On a CPU, backward adds up parameter gradients block by block of rows and then over the blocks.
// The split depends on the shape alone, so results do not change with the number of threads. A
// block has 16 rows or more if units lie along the rows, so that its three sums are few beside x.
inline int64_t lif_gate_block_rows(const LifGateParams& p) {
  const int64_t most = 64;
  int64_t blocks = p.units ? p.rows * p.cols / (16 * p.units) : 1;
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  return (p.rows + blocks - 1) / blocks;
}
inline int64_t lif_gate_blocks(const LifGateParams& p) {
  const int64_t rows = lif_gate_block_rows(p);
  return rows ? (p.rows + rows - 1) / rows : 0;
}

// Without a norm, columns do not depend on each other, and a row is worked on in tiles.
inline int64_t lif_gate_tile_cols(const LifGateParams& p) {
  const int64_t tile = 2048;
  return p.norm == Norm::none && p.cols > tile ? tile : p.cols;
}

inline int64_t lif_gate_scratch_bytes(const LifGateParams& p) {
  const int64_t row_buffers = 5, sums = 9;  // see Scratch in csrc/cpu/lif_gate.cpp
  const int64_t columns = lif_gate_tile_cols(p);
  const int64_t units = p.unit_rows ? p.units : columns;
  return (row_buffers * columns + sums * units) * int64_t(sizeof(double));
}

}  // namespace EMBER_ISA
}  // namespace ember
