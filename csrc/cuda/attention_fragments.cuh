// Products of attention whose scores stay in registers, for 16-bit types.
//
// Each of a block's 4 warps has 16 rows of a matrix, in registers as a left operand, and takes them
// past the rows of others that are brought to shared memory tile by tile while the one before is in
// use. 16 scores by 16 at a time come out in two accumulators, 8 columns each; rounded, these are
// the left operand of the next product, with the same rows of the tile or of another:
//
//   query.multiply(columns, keys, scores);         16 x 16 scores
//   left_operand<T>(scores, weights);              changed in between
//   add_rows<T>(weights, rows, values, out);       out += weights times 16 rows of values
//
// A lane has the scores of rows l / 4 and + 8, and of columns 2 (l % 4) and + 1 in either
// accumulator.
#pragma once

#include "attention_products.cuh"

namespace ember {
namespace cuda {

constexpr int kFragmentThreads = 128;
constexpr int kFragmentRows = 16;  // of a warp
static_assert(kFragmentThreads / kWarp * kFragmentRows == kTile, "a block has a tile of rows");

// A tile in shared memory, of rows of kSize 16-bit elements. The 16-byte pieces of a row are
// permuted, differently in any 8 rows, which are read together and so lie in different banks.
template <int kSize>
struct TileLayout {
  static constexpr int kRowBytes = 2 * kSize, kPieces = kSize / 8;
  // Rows that are brought at once.
  static constexpr int kRows = kSize > 64 ? 16 : 64;
  static constexpr int kBytes = kRows * kRowBytes;

  static __device__ __forceinline__ uint32_t offset(int row, int piece) {
    return uint32_t(row * kRowBytes + ((piece ^ (row & 7)) << 4));
  }
};

// The addresses at which a lane reads the first 16 rows of a tile, 16 columns at a time. Other rows
// and other tiles are a constant number of bytes away.
template <int kSize>
struct TileRows {
  uint32_t first;

  // As a left operand, or transposed as a right one.
  static __device__ __forceinline__ TileRows by_row(uint32_t tile) {
    const int lane = int(threadIdx.x) % kWarp;
    return {tile + TileLayout<kSize>::offset(lane % 16, lane / 16)};
  }
  // As a right operand whose columns they are.
  static __device__ __forceinline__ TileRows by_column(uint32_t tile) {
    const int lane = int(threadIdx.x) % kWarp;
    return {tile + TileLayout<kSize>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }

  // For columns from 16 `step` on. Pieces are counted in bits that rows do not change.
  __device__ __forceinline__ uint32_t at(int step) const { return first ^ uint32_t(step << 5); }
};

// Whether rows are pieces of 16 bytes, which can be copied as they are.
inline bool copies_whole(const AttentionTensor& t) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(t.data) | uint64_t(t.batch) * 2 |
                        uint64_t(t.head) * 2 | uint64_t(t.token) * 2;
  return bits % 16 == 0;
}

// How a block's threads share the rows of a tile.
template <int kSize>
struct TileShare {
  using Layout = TileLayout<kSize>;
  static constexpr int kStep = kFragmentThreads / Layout::kPieces;  // rows that are taken at once
  static_assert(kStep % 8 == 0, "all rows of a thread are permuted alike");
  int row, piece;

  __device__ __forceinline__ TileShare() {
    const int thread = in_place(int(threadIdx.x));  // the registers are for scores
    row = thread / Layout::kPieces;
    piece = thread % Layout::kPieces;
  }
  __device__ __forceinline__ uint32_t offset() const { return Layout::offset(row, piece); }
};

// Starts to bring rows [first, first + count) of one head to a tile. Rows and columns past the end
// become 0.
template <int kSize, int count = TileLayout<kSize>::kRows, typename T>
__device__ __forceinline__ void bring_rows(const AttentionRows<T>& rows, int first, uint32_t tile) {
  constexpr int kStep = TileShare<kSize>::kStep;
  const TileShare<kSize> share;
  const uint32_t to = tile + share.offset();
  first = in_place(first + share.row);
  const T* from = rows.data + first * rows.stride + share.piece * 8;
  const int left = share.piece * 8 < rows.size ? rows.count - first : 0;
#pragma unroll
  for (int n = 0; n < count; n += kStep) {
    copy_async(to + uint32_t(n * TileLayout<kSize>::kRowBytes), from, left > n);
    from += kStep * rows.stride;
  }
}

// Changes the sign of kTile rows that have arrived, each thread of what it has brought.
template <int kSize>
__device__ __forceinline__ void negate_rows(uint32_t tile) {
  const TileShare<kSize> share;
  unsigned char* const shared = shared_memory<unsigned char>();
  unsigned char* const to = shared + (tile - shared_address(shared)) + share.offset();
#pragma unroll 1
  for (int n = 0; n < kTile; n += TileShare<kSize>::kStep) {
    auto& piece = *reinterpret_cast<Pack<uint32_t, 4>*>(to + n * TileLayout<kSize>::kRowBytes);
    for (uint32_t& pair : piece.values) pair ^= 0x80008000u;
  }
}

// The warp's 16 rows of a tile of kTile rows: in registers, or where backward has too few of these
// in shared memory.
template <typename T, int kSize, bool in_registers>
struct KeptRows {
  uint32_t left[kSize / 16][4];

  __device__ __forceinline__ explicit KeptRows(uint32_t tile) {
    const int warp = int(threadIdx.x) / kWarp;
    const auto rows = TileRows<kSize>::by_row(tile + uint32_t(warp * kFragmentRows) *
                                                         TileLayout<kSize>::kRowBytes);
#pragma unroll
    for (int s = 0; s < kSize / 16; ++s) load_matrices(left[s], rows.at(s));
  }

  // Makes 0 of the lane's rows, of which it has two.
  __device__ __forceinline__ void clear(const bool (&which)[2]) {
#pragma unroll
    for (int s = 0; s < kSize / 16; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (which[i % 2]) left[s][i] = 0;
      }
    }
  }

  // scores += the products with 16 rows seen by_column(), `offset` bytes further.
  __device__ __forceinline__ void multiply(const TileRows<kSize>& rows, uint32_t offset,
                                           float (&scores)[2][4]) const {
#pragma unroll
    for (int s = 0; s < kSize / 16; ++s) {
      uint32_t right[4];
      load_matrices(right, rows.at(s) + offset);
      multiply_add<T>(scores[0], left[s], right[0], right[1], scores[0]);
      multiply_add<T>(scores[1], left[s], right[2], right[3], scores[1]);
    }
  }
};
template <typename T, int kSize>
struct KeptRows<T, kSize, false> {
  uint32_t tile;

  __device__ __forceinline__ explicit KeptRows(uint32_t tile) : tile(tile) {}
  __device__ __forceinline__ void multiply(const TileRows<kSize>& rows, uint32_t offset,
                                           float (&scores)[2][4]) const {
    const int warp = in_place(int(threadIdx.x)) / kWarp;
    const auto left = TileRows<kSize>::by_row(tile + uint32_t(warp * kFragmentRows) *
                                                         TileLayout<kSize>::kRowBytes);
#pragma unroll
    for (int s = 0; s < kSize / 16; ++s) {
      uint32_t mine[4], right[4];
      load_matrices(mine, left.at(s));
      load_matrices(right, rows.at(s) + offset);
      multiply_add<T>(scores[0], mine, right[0], right[1], scores[0]);
      multiply_add<T>(scores[1], mine, right[2], right[3], scores[1]);
    }
  }
};

// 16 x 16 values rounded to T, as a left operand.
template <typename T>
__device__ __forceinline__ void left_operand(const float (&values)[2][4], uint32_t (&left)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    left[i] = rounded_pair<T>(values[i / 2][i % 2 * 2], values[i / 2][i % 2 * 2 + 1]);
  }
}

// sums += a left operand times 16 rows seen by_row(), `offset` bytes further.
template <typename T, int kSize>
__device__ __forceinline__ void add_rows(const uint32_t (&left)[4], const TileRows<kSize>& rows,
                                         uint32_t offset, float (&sums)[kSize / 8][4]) {
#pragma unroll
  for (int s = 0; s < kSize / 16; ++s) {
    uint32_t right[4];
    load_transposed(right, rows.at(s) + offset);
    multiply_add<T>(sums[2 * s], left, right[0], right[1], sums[2 * s]);
    multiply_add<T>(sums[2 * s + 1], left, right[2], right[3], sums[2 * s + 1]);
  }
}
// The same for two left operands.
template <typename T, int kSize>
__device__ __forceinline__ void add_rows(const uint32_t (&left)[4], const uint32_t (&other)[4],
                                         const TileRows<kSize>& rows, uint32_t offset,
                                         float (&sums)[kSize / 8][4],
                                         float (&other_sums)[kSize / 8][4]) {
#pragma unroll
  for (int s = 0; s < kSize / 16; ++s) {
    uint32_t right[4];
    load_transposed(right, rows.at(s) + offset);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float (&sum)[4] = sums[2 * s + n];
      float (&other_sum)[4] = other_sums[2 * s + n];
      multiply_add<T>(sum, left, right[2 * n], right[2 * n + 1], sum);
      multiply_add<T>(other_sum, other, right[2 * n], right[2 * n + 1], other_sum);
    }
  }
}

// The lane's first row of the warp's, its second being 8 further, and its first column of 8.
__device__ __forceinline__ int fragment_row() {
  return int(threadIdx.x) / kWarp * kFragmentRows + int(threadIdx.x) % kWarp / 4;
}
__device__ __forceinline__ int fragment_column() {
  return int(threadIdx.x) % 4 * 2;
}

// Combines a value over the 4 lanes that share rows.
template <typename Operation>
__device__ __forceinline__ float across_lanes(float value) {
  value = Operation::of(value, __shfl_xor_sync(kAllLanes, value, 1));
  return Operation::of(value, __shfl_xor_sync(kAllLanes, value, 2));
}

template <int n>
__device__ __forceinline__ void scale_rows(float (&sums)[n][4], float first, float second) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    sums[i][0] *= first;
    sums[i][1] *= first;
    sums[i][2] *= second;
    sums[i][3] *= second;
  }
}

// Writes the warp's rows of a result whose rows are tokens from `first` on; columns are a multiple
// of 8.
template <typename T, int kSize>
__device__ __forceinline__ void store_rows(const AttentionTensor& t, int batch, int head, int first,
                                           int tokens, int columns,
                                           const float (&values)[kSize / 8][4]) {
  const int row = first + fragment_row();
  T* const to =
      static_cast<T*>(t.data) + batch * t.batch + head * t.head + row * t.token + fragment_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      if (row + 8 * half < tokens && 8 * n < columns) {
        *reinterpret_cast<uint32_t*>(to + 8 * half * t.token + 8 * n) =
            rounded_pair<T>(values[n][2 * half], values[n][2 * half + 1]);
      }
    }
  }
}

// Reads what store_rows() has written, and 0 where it has not.
template <typename T, int kSize>
__device__ __forceinline__ void load_rows(const AttentionTensor& t, int batch, int head, int first,
                                          int tokens, int columns, float (&values)[kSize / 8][4]) {
  const int row = first + fragment_row();
  const T* const from = static_cast<const T*>(t.data) + batch * t.batch + head * t.head +
                        row * t.token + fragment_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      uint32_t pair = 0;
      if (row + 8 * half < tokens && 8 * n < columns) {
        pair = *reinterpret_cast<const uint32_t*>(from + 8 * half * t.token + 8 * n);
      }
      widen_pair<T>(pair, values[n][2 * half], values[n][2 * half + 1]);
    }
  }
}

}  // namespace cuda
}  // namespace ember
