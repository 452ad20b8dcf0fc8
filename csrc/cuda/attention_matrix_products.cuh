// AttentionProducts on matrix units (attention_products.cuh): for 16-bit types, and for fp32
// rounded to tf32.
#pragma once

#include "attention_tiles.cuh"
#include "attention_warp_sums.cuh"

namespace ember {
namespace cuda {

// Matrix units: each of the 8 warps has 16 x 32 of every tile. Where wmma's elements lie within a
// warp's registers is not known, so scores go through shared memory on their way to the patches.
// The tile of weights takes the scores' place.
template <typename T, bool spare>
struct MatrixProducts {
  using C = float;
  using Result = WarpSums<T>;
  static constexpr int kStep = Result::kStep;
  static constexpr bool kSpare = spare && sizeof(T) > 2;
  // Steps that a turn of a product's loop takes, as many as there are registers for.
  static constexpr int kRowsUnroll = kSpare ? 4 : 2, kTileUnroll = kSpare ? 4 : 1;
  static constexpr int kDepth = 128 / int(sizeof(T));  // of a product, staged at once
  // Strides keep rows aligned as wmma and ldmatrix need them and spread them over the banks.
  static constexpr int kScoreStride = kTile + 4;                                 // of C
  static constexpr int kTileStride = kScoreStride * int(sizeof(C) / sizeof(T));  // of T, in place
  static constexpr int kPad = 16 / int(sizeof(T));
  static constexpr int kStride = kDepth + kPad;  // of staged operands
  static constexpr int kWideStride = kTile + Result::kWidePad;
  static constexpr int kStage =
      2 * kStride > kWideStride ? 2 * kTile * kStride : kTile * kWideStride;
  static constexpr size_t kBytes =
      kTile * kScoreStride * sizeof(C) + kStage * sizeof(T) + kAttentionThreads / kWarp * sizeof(C);
  static constexpr int kBlocks = kMostBlocks;
  // fp16 ends at 65504 and is coarse below 1e-4, where gradients may lie, and the weights of gates
  // that are all but closed.
  static constexpr bool kScales = std::is_same<T, float16>::value;

  C* scores;   // [kTile, kScoreStride]
  T* tile;     // in the same place, [kTile, kTileStride]
  T* stage;    // two of [kTile, kStride], or one of [kTile, kWideStride]
  C* maximum;  // one for each warp
  C unit = 1;  // of the tile's values

  __device__ __forceinline__ MatrixProducts()
      : scores(shared_memory<C>()),
        tile(shared_memory<T>()),
        stage(reinterpret_cast<T*>(scores + kTile * kScoreStride)),
        maximum(reinterpret_cast<C*>(stage + kStage)) {}

  __device__ __forceinline__ void rows(const AttentionRows<T>& a, int a_first,
                                       const AttentionRows<T>& b, int b_first,
                                       C (&sums)[kPatch][kPatch]) {
    T* const other = stage + kTile * kStride;
    Result products;
    // Other methods count on the loop's barriers.
    if (a.size == 0) __syncthreads();
    for (int first = 0; first < a.size; first += kDepth) {
      __syncthreads();
      stage_rows<kDepth, kTile, kStride, kSpare>(a, a_first, first, stage, rounded_pack);
      stage_rows<kDepth, kTile, kStride, kSpare>(b, b_first, first, other, rounded_pack);
      __syncthreads();
#pragma unroll kRowsUnroll
      for (int k = 0; k < kDepth; k += kStep) {
        if (first + k >= a.size) break;
        products.template add<kStride, kStride, false>(stage + warp_row() * kStride + k,
                                                       other + warp_column() * kStride + k);
      }
    }
    read_scores(products, sums);
  }

  // For values up to `most`, a power of two that makes the largest one within [2^13, 2^14).
  static __device__ __forceinline__ AttentionScale<C> scale_for(C most) {
    if constexpr (kScales) {
      uint32_t exponent = bit_cast<uint32_t>(most) >> 23;
      exponent = exponent < 20 ? 20 : exponent > 253 ? 253 : exponent;
      return {bit_cast<float>((267 - exponent) << 23), bit_cast<float>((exponent - 13) << 23)};
    } else {
      return {};
    }
  }

  // Multiplies each row of a tile of values >= 0 by the factor that suits it. Its unit goes to
  // `units`, and to `memory`, shared and [kTile, kAcross], for add_scaled_rows(), which waits
  // before it reads.
  static __device__ __forceinline__ void scale_rows(C (&values)[kPatch][kPatch], C* memory,
                                                    C (&units)[kPatch]) {
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      units[r] = 1;
      if constexpr (kScales) {
        C most = 0;
#pragma unroll
        for (int c = 0; c < kPatch; ++c) most = Maximum::of(values[r][c], most);
        const AttentionScale<C> scale = scale_for(across_columns<Maximum>(most));
#pragma unroll
        for (int c = 0; c < kPatch; ++c) values[r][c] *= scale.factor;
        units[r] = scale.unit;
        static_assert(Result::kPiece == kAcross, "each thread of a row writes one of its units");
        memory[(patch_row() + r) * kAcross + int(threadIdx.x) % kAcross] = scale.unit;
      }
    }
  }

  static __device__ __forceinline__ C rounded(C value) {
    T result;
    narrow(value, result);
    return widen(Result::round(result));
  }

  __device__ __forceinline__ void store(const C (&values)[kPatch][kPatch]) {
    // The warp's own rows alone are overwritten, once all of its lanes have read theirs.
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      Pack<T, kPatch> row;
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        narrow(values[r][c], row.values[c]);
        row.values[c] = Result::round(row.values[c]);
      }
      *reinterpret_cast<Pack<T, kPatch>*>(tile + (patch_row() + r) * kTileStride + patch_column()) =
          row;
    }
  }

  // fp16 holds the values as multiples of a power of two that suits the largest of them; `values`
  // are lost.
  __device__ __forceinline__ void store_scaled(C (&values)[kPatch][kPatch]) {
    if constexpr (!kScales) {
      store(values);
    } else {
      C most = 0;
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) most = Maximum::of(absolute(values[r][c]), most);
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        most = Maximum::of(most, __shfl_xor_sync(kAllLanes, most, offset));
      }
      if (threadIdx.x % kWarp == 0) maximum[threadIdx.x / kWarp] = most;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kAttentionThreads / kWarp; ++w) most = Maximum::of(maximum[w], most);
      const AttentionScale<C> scale = scale_for(most);
      unit = scale.unit;
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) values[r][c] *= scale.factor;
      }
      store(values);
    }
  }

  template <bool scaled = false>
  __device__ __forceinline__ void add_tile(const AttentionRows<T>& b, int first, int column,
                                           Result& sums) {
    stage_rows<kTile, kTile, kWideStride, kSpare>(b, first, column, stage, rounded_pack);
    __syncthreads();
    add_staged<scaled>(sums);
  }

  // store_scaled() and add_tile<true>(). Where the values of a row add up to 0, what the rows of b
  // have in common cancels. Rounded to 16 bits they do not, so what has been rounded off follows as
  // a tile of its own.
  __device__ __forceinline__ void add_in_parts(C (&values)[kPatch][kPatch],
                                               const AttentionRows<T>& b, int first, int column,
                                               Result& sums) {
    store_scaled(values);
    add_tile<true>(b, first, column, sums);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int r = 0; r < kPatch; ++r) {
#pragma unroll
        for (int c = 0; c < kPatch; ++c) values[r][c] -= rounded(values[r][c]);
      }
      __syncthreads();
      store(values);
      __syncthreads();
      add_staged<true>(sums);
    }
  }

  // The same for a tile whose rows scale_rows() has scaled.
  __device__ __forceinline__ void add_scaled_rows(const AttentionRows<T>& b, int first, int column,
                                                  const C* memory, Result& sums) {
    if constexpr (kScales) {
      Result products;
      add_tile(b, first, column, products);
      typename Result::Accumulator units;
      nvcuda::wmma::load_matrix_sync(units, memory + warp_row() * kAcross, kAcross,
                                     nvcuda::wmma::mem_row_major);
#pragma unroll
      for (int n = 0; n < Result::kPieces; ++n) {
#pragma unroll
        for (int i = 0; i < Result::Accumulator::num_elements; ++i) {
          sums.pieces[n].x[i] += products.pieces[n].x[i] * units.x[i];
        }
      }
    } else {
      add_tile(b, first, column, sums);
    }
  }

  __device__ __forceinline__ void read(const Result& sums, C (&values)[kPatch][kPatch]) {
    __syncthreads();
    read_scores(sums, values);
  }

 private:
  // Where the warp's sums begin.
  static __device__ __forceinline__ int warp_row() { return int(threadIdx.x) / (2 * kWarp) * 16; }
  static __device__ __forceinline__ int warp_column() { return int(threadIdx.x) / kWarp % 2 * 32; }

  static __device__ __forceinline__ WidestPack<T> rounded_pack(WidestPack<T> pack) {
#pragma unroll
    for (T& value : pack.values) value = Result::round(value);
    return pack;
  }

  // sums += the tile times the stage; `scaled` if the tile is one of store_scaled().
  template <bool scaled>
  __device__ __forceinline__ void add_staged(Result& sums) const {
    if constexpr (scaled && kScales) {
      Result products;
      multiply_tile(products);
#pragma unroll
      for (int n = 0; n < Result::kPieces; ++n) {
#pragma unroll
        for (int i = 0; i < Result::Accumulator::num_elements; ++i) {
          sums.pieces[n].x[i] += products.pieces[n].x[i] * unit;
        }
      }
    } else {
      multiply_tile(sums);
    }
  }

  // sums += the tile times the stage, as the tile's values are.
  __device__ __forceinline__ void multiply_tile(Result& sums) const {
#pragma unroll kTileUnroll
    for (int k = 0; k < kTile; k += kStep) {
      sums.template add<kTileStride, kWideStride, true>(tile + warp_row() * kTileStride + k,
                                                        stage + k * kWideStride + warp_column());
    }
  }

  // Nobody may be reading scores or the tile any more.
  __device__ __forceinline__ void read_scores(const Result& sums, C (&values)[kPatch][kPatch]) {
    sums.template store<kScoreStride>(scores + warp_row() * kScoreStride + warp_column());
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      const Pack<C, kPatch> row = *reinterpret_cast<const Pack<C, kPatch>*>(
          scores + (patch_row() + r) * kScoreStride + patch_column());
#pragma unroll
      for (int c = 0; c < kPatch; ++c) values[r][c] = row.values[c];
    }
  }
};

}  // namespace cuda
}  // namespace ember
