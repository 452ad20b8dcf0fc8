// A stand-in for the instructions of csrc/cuda/matrix_units.cuh.
//
// All 32 lanes of a warp must meet at each matrix instruction. Asynchronous copies leave NaN where
// they write until the thread that started them waits: what is read too early, or still read when
// the next copy starts, shows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cuda_shim {

// Offsets into the block's shared memory stand for addresses.
uint32_t shared_address(const void* shared);
// The place of `bytes` there; a fault if they are not aligned to 16 bytes or not the block's.
unsigned char* shared_place(uint32_t address, size_t bytes, Place place);

void copy_async(uint32_t to, const void* from, bool exists);
void commit_copies();
void wait_for_copies(int under_way);

inline void load_matrices(uint32_t (&matrices)[4], uint32_t address, bool transposed, Place place) {
  struct Lane {
    uint32_t* matrices;
    uint32_t address;
    bool transposed;
    Place place;
  } mine{matrices, address, transposed, place};
  const auto together = [](void* const* arguments) {
    for (int m = 0; m < 4; ++m) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row) {
        const Lane& lane = *static_cast<Lane*>(arguments[8 * m + row]);
        memcpy(rows[row], shared_place(lane.address, 16, lane.place), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const Lane& to = *static_cast<Lane*>(arguments[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        const uint16_t low = to.transposed ? rows[column][row] : rows[row][column];
        const uint16_t high = to.transposed ? rows[column + 1][row] : rows[row][column + 1];
        to.matrices[m] = uint32_t(low) | uint32_t(high) << 16;
      }
    }
  };
  meet(&mine, together, place);
}

inline uint32_t transposed_matrix(uint32_t matrix, Place place) {
  struct Lane {
    uint32_t matrix, result;
  } mine{matrix, 0};
  const auto together = [](void* const* arguments) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t pair = static_cast<Lane*>(arguments[lane])->matrix;
      for (int n = 0; n < 2; ++n) elements[lane / 4][lane % 4 * 2 + n] = uint16_t(pair >> 16 * n);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      static_cast<Lane*>(arguments[lane])->result =
          uint32_t(elements[column][row]) | uint32_t(elements[column + 1][row]) << 16;
    }
  };
  meet(&mine, together, place);
  return mine.result;
}

inline float half_of(uint32_t pair, int which, bool is_half) {
  const uint16_t bits = uint16_t(pair >> (16 * which));
  return is_half ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const float (&c)[4], bool is_half, Place place) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    float c[4];
    bool is_half;
  } mine{d, a, {b0, b1}, {c[0], c[1], c[2], c[3]}, is_half};
  const auto together = [](void* const* arguments) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(arguments[l]);
      const int row = l / 4, column = l % 4 * 2;
      for (int piece = 0; piece < 4; ++piece) {
        for (int n = 0; n < 2; ++n) {
          left[row + piece % 2 * 8][column + piece / 2 * 8 + n] =
              half_of(lane.a[piece], n, lane.is_half);
        }
      }
      for (int piece = 0; piece < 2; ++piece) {
        for (int n = 0; n < 2; ++n) {
          right[column + piece * 8 + n][row] = half_of(lane.b[piece], n, lane.is_half);
        }
      }
    }
    float sums[16][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(arguments[l]);
      for (int n = 0; n < 4; ++n) sums[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2] = lane.c[n];
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(arguments[l]);
      for (int n = 0; n < 4; ++n) lane.d[n] = sums[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2];
    }
  };
  meet(&mine, together, place);
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Halves go away from zero.
inline float rounded_to_tf32(float x) {
  if (std::isinf(x)) return x;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return float_of(std::isnan(x) ? 0x7fffffffu : (bits + 0x1000u) & ~0x1fffu);
}

// The unit does not look at the bits that tf32 lacks.
inline float tf32_of(uint32_t bits) {
  return float_of(bits & ~0x1fffu);
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Place place) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  const auto together = [](void* const* arguments) {
    float left[16][8], right[8][8], sums[16][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(arguments[l]);
      for (int piece = 0; piece < 4; ++piece) {
        left[l / 4 + piece % 2 * 8][l % 4 + piece / 2 * 4] = tf32_of(lane.a[piece]);
      }
      for (int piece = 0; piece < 2; ++piece) {
        right[l % 4 + piece * 4][l / 4] = tf32_of(lane.b[piece]);
      }
      for (int n = 0; n < 4; ++n) sums[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2] = lane.d[n];
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 8; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(arguments[l]);
      for (int n = 0; n < 4; ++n) lane.d[n] = sums[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2];
    }
  };
  meet(&mine, together, place);
}

inline float without_subnormals(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
inline float fast_exp2(float x) {
  return without_subnormals(exp2f(without_subnormals(x)));
}
inline float fast_log2(float x) {
  return log2f(without_subnormals(x));
}
inline float fast_reciprocal(float x) {
  return without_subnormals(1 / without_subnormals(x));
}

}  // namespace cuda_shim
