// Kernels with one fault each, and their sound twin: what the shim must and must not report.
#include <cuda_runtime.h>
#include <mma.h>

#include "../../csrc/cuda/attention_warp_sums.cuh"
#include "../../csrc/cuda/cluster.cuh"
#include "../../csrc/cuda/cluster_launch.cuh"
#include "../../csrc/cuda/matrix_units.cuh"
#include "../../csrc/cuda/team.cuh"

namespace ember {
namespace cuda {

// Reverses 64 values through shared memory.
__global__ void sound(const float* in, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void missing_barrier(const float* in, float* out) {
  float* shared = shared_memory<float>();
  if (blockIdx.x > 0) return;
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void divergent_barrier(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void divergent_shuffle(const float* in, float* out) {
  float value[1] = {in[threadIdx.x]};
  if (threadIdx.x != 7) Team<float>{32, nullptr}.reduce<Sum>(value);
  out[threadIdx.x] = value[0];
}

__global__ void out_of_bounds(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

__global__ void shared_out_of_bounds(const float* in, float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0;
}

__global__ void uninitialised(const float* in, float* out) {
  float* shared = shared_memory<float>();
  if (threadIdx.x > 0) shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void misaligned(const float* in, float* out) {
  struct alignas(16) Four {
    float values[4];
  };
  out[threadIdx.x] = reinterpret_cast<const Four*>(in + 1)->values[0];
}

// Writes 32 of the 256 products of a bf16 matrix [16, 16] with itself, from shared memory.
__device__ void multiply(const float* in, float* out, int offset, bool loads, bool takes_part) {
  using namespace nvcuda::wmma;
  bfloat16* shared = shared_memory<bfloat16>();
  for (int i = threadIdx.x; i < 264; i += 64) narrow(in[i % 64], shared[i]);
  __syncthreads();
  fragment<matrix_a, 16, 16, 16, bfloat16, row_major> a;
  fragment<matrix_b, 16, 16, 16, bfloat16, col_major> b;
  fragment<accumulator, 16, 16, 16, float> sums;
  fill_fragment(sums, 0.0f);
  if (loads) load_matrix_sync(a, shared + offset, 16);
  load_matrix_sync(b, shared + offset, 16);
  if (takes_part) mma_sync(sums, a, b, sums);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float* products = shared_memory<float>();
  store_matrix_sync(products, sums, 16, mem_row_major);
  __syncwarp();
  out[threadIdx.x] = products[threadIdx.x];
  out[threadIdx.x + 32] = 0;
}
__global__ void sound_product(const float* in, float* out) {
  multiply(in, out, 0, true, true);
}
__global__ void divergent_product(const float* in, float* out) {
  multiply(in, out, 0, true, threadIdx.x != 7);
}
__global__ void misaligned_product(const float* in, float* out) {
  multiply(in, out, 8, true, true);
}
__global__ void unloaded_product(const float* in, float* out) {
  multiply(in, out, 0, false, true);
}

// Brings 64 values to shared memory by copies of 16 bytes, then the same with their halves swapped,
// and reverses these. Every fourth thread copies.
__device__ void copy(const float* in, float* out, int source, bool waits, bool meets, bool leaves) {
  float* shared = shared_memory<float>();
  const int i = int(threadIdx.x);
  const auto start = [&](int from) {
    if (i % 4 == 0) copy_async(shared_address(shared + i), in + from + source, true);
    commit_copies();
  };
  start(i);
  wait_for_copies<0>();
  __syncthreads();
  const float first = shared[63 - i];
  if (meets) __syncthreads();
  start((i + 32) % 64);
  if (waits) {
    wait_for_copies<0>();
  } else {
    wait_for_copies<1>();
  }
  __syncthreads();
  out[i] = first == in[63 - i] ? shared[63 - i] : NAN;
  if (!leaves) wait_for_copies<0>();
}
__global__ void sound_copy(const float* in, float* out) {
  copy(in, out, 0, true, true, false);
}
__global__ void unawaited_copy(const float* in, float* out) {
  copy(in, out, 0, false, true, false);
}
__global__ void copy_over_what_is_read(const float* in, float* out) {
  copy(in, out, 0, true, false, false);
}
__global__ void misaligned_copy(const float* in, float* out) {
  copy(in, out, 1, true, true, false);
}
__global__ void abandoned_copy(const float* in, float* out) {
  copy(in, out, 0, false, true, true);
}

// Writes 64 of the 128 products of a [16, 16] with b [8, 16], small whole numbers, transposed.
__device__ void multiply_fragments(const float* in, float* out, int offset, bool takes_part) {
  bfloat16* shared = shared_memory<bfloat16>();
  for (int i = int(threadIdx.x); i < 256; i += 64) narrow(in[i % 64] - 32, shared[i]);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = int(threadIdx.x);
  const uint32_t rows = shared_address(shared);
  uint32_t a[4], b[4];
  load_matrices(a, rows + uint32_t(lane % 16 * 32 + lane / 16 * 16 + offset));
  // Columns of b are rows in memory: pieces (0, 0) and (0, 1) of these.
  if (takes_part) load_matrices(b, rows + uint32_t(lane % 8 * 32 + lane / 8 % 2 * 16));
  float sums[4] = {};
  multiply_add<bfloat16>(sums, a, b[0], b[1], sums);
  for (int n = 0; n < 2; ++n) out[(lane % 4 * 2 + n) * 8 + lane / 4] = sums[n];
}
// Transposes an 8 x 8 matrix that the first warp has in registers.
__device__ void transpose_fragment(const float* in, float* out, bool takes_part) {
  if (threadIdx.x >= 32) return;
  const int place = int(threadIdx.x) * 2;
  uint32_t pair = rounded_pair<bfloat16>(in[place], in[place + 1]);
  if (takes_part) pair = transposed_matrix(pair);
  widen_pair<bfloat16>(pair, out[place], out[place + 1]);
}
__global__ void sound_transposed(const float* in, float* out) {
  transpose_fragment(in, out, true);
}
__global__ void divergent_transposed(const float* in, float* out) {
  transpose_fragment(in, out, threadIdx.x != 7);
}
__global__ void sound_fragments(const float* in, float* out) {
  multiply_fragments(in, out, 0, true);
}
__global__ void divergent_fragments(const float* in, float* out) {
  multiply_fragments(in, out, 0, threadIdx.x != 7);
}
__global__ void misaligned_fragments(const float* in, float* out) {
  multiply_fragments(in, out, 8, true);
}
__global__ void fragments_past_the_end(const float* in, float* out) {
  multiply_fragments(in, out, 512, true);
}

// Products of a [16, 8] with b [32, 8] as attention makes them in tf32: the first warp's of b by
// rows, the second's of b transposed. Of each warp's 16 x 32 the elements (l % 16, l) are written.
// Element i of a is number(i), and of b number(255 - i).
enum class Fault { none, no_barrier, unrounded_a, unrounded_b, rows_for_columns, absent_lane };
__device__ float number(const float* in, int i) {
  return 1 + (in[i % 64] + float(i / 64 * 64)) * 0x3p-12f;  // two bits more than tf32 has
}
__device__ void multiply_tf32(const float* in, float* out, Fault fault) {
  using Sums = WarpSums<float>;
  constexpr int kRows = 16, kColumns = 32, kTerms = 8, kWide = kColumns + Sums::kWidePad;
  float* a = shared_memory<float>();
  float* b = a + kRows * kTerms;
  float* transposed = b + kColumns * kTerms;
  float* products = transposed + kTerms * kWide;
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  // What is not there yet is 0.
  for (int i = thread; i < products - a; i += 64) a[i] = 0;
  __syncthreads();
  for (int i = thread; i < kColumns * kTerms; i += 64) {
    if (i < kRows * kTerms) {
      const float x = number(in, i);
      a[i] = fault == Fault::unrounded_a ? x : Sums::round(x);
    }
    const float x = number(in, 255 - i);
    b[i] = fault == Fault::unrounded_b ? x : Sums::round(x);
    transposed[i % kTerms * kWide + i / kTerms] = b[i];
  }
  if (fault != Fault::no_barrier) __syncthreads();
  Sums sums;
  if (fault == Fault::absent_lane && thread == 7) return;
  if (warp == 0) {
    sums.add<kTerms, kTerms, false>(a, b);
  } else if (fault == Fault::rows_for_columns) {
    sums.add<kTerms, kTerms, true>(a, b);
  } else {
    sums.add<kTerms, kWide, true>(a, transposed);
  }
  products += warp * kRows * kColumns;
  sums.store<kColumns>(products);
  __syncwarp();
  out[thread] = products[lane % kRows * kColumns + lane];
}
__global__ void sound_tf32(const float* in, float* out) {
  multiply_tf32(in, out, Fault::none);
}
__global__ void unpublished_tf32(const float* in, float* out) {
  multiply_tf32(in, out, Fault::no_barrier);
}
__global__ void unrounded_tf32_a(const float* in, float* out) {
  multiply_tf32(in, out, Fault::unrounded_a);
}
__global__ void unrounded_tf32_b(const float* in, float* out) {
  multiply_tf32(in, out, Fault::unrounded_b);
}
__global__ void tf32_rows_for_columns(const float* in, float* out) {
  multiply_tf32(in, out, Fault::rows_for_columns);
}
__global__ void divergent_tf32(const float* in, float* out) {
  multiply_tf32(in, out, Fault::absent_lane);
}

// A cluster of two blocks of 32 threads. Each hands 32 values to the other, twice, through the same
// shared memory, and writes the second 32 that it gets: the halves of the input swapped.
struct Exchange {
  bool starts, publishes, frees, stays, arrives, is_late;
};
__device__ void exchange(const float* in, float* out, Exchange does) {
  float* shared = shared_memory<float>();
  const int rank = cluster_rank(), i = int(threadIdx.x);
  const auto barrier = [](bool happens) {
    if (!happens) return;
    cluster_arrive();
    cluster_wait();
  };
  barrier(does.starts);
  float* there = shared_of_rank(shared, 1 - rank) + i;
  *there = -in[rank * 32 + i];
  barrier(does.publishes);
  const float first = shared[i];
  barrier(does.frees);
  *there = in[rank * 32 + i];
  float& of_other = out[(1 - rank) * 32 + i];
  if (!does.is_late) of_other = 0;
  if (does.arrives || i != 7) cluster_arrive();
  if (does.is_late) of_other = 0;
  cluster_wait();
  if (!does.stays && rank == 0) return;
  out[rank * 32 + i] = first + 2 * shared[i];
  barrier(does.stays);
  if (!does.stays) *shared_of_rank(shared, 0) = first;
}
__global__ void sound_exchange(const float* in, float* out) {
  exchange(in, out, {true, true, true, true, true, false});
}
__global__ void unstarted_exchange(const float* in, float* out) {
  exchange(in, out, {false, true, true, true, true, false});
}
__global__ void unpublished_exchange(const float* in, float* out) {
  exchange(in, out, {true, false, true, true, true, false});
}
__global__ void exchange_over_what_is_read(const float* in, float* out) {
  exchange(in, out, {true, true, false, true, true, false});
}
__global__ void exchange_with_the_absent(const float* in, float* out) {
  exchange(in, out, {true, true, true, false, true, false});
}
__global__ void divergent_exchange(const float* in, float* out) {
  exchange(in, out, {true, true, true, true, false, false});
}
__global__ void exchange_after_arrival(const float* in, float* out) {
  exchange(in, out, {true, true, true, true, true, true});
}

}  // namespace cuda
}  // namespace ember

// in and out: float [64].
#define FAULT(name, shared)                                                                   \
  extern "C" int name(const float* in, float* out) {                                          \
    return ember::cuda::launch(ember::cuda::name, 1, 64, shared * sizeof(float), nullptr, in, \
                               out);                                                          \
  }
FAULT(sound, 64)
extern "C" int sound_with_much_memory(const float* in, float* out) {
  return ember::cuda::launch(ember::cuda::sound, 1, 64, 60 << 10, nullptr, in, out);
}
FAULT(missing_barrier, 64)
FAULT(divergent_barrier, 64)
FAULT(divergent_shuffle, 64)
FAULT(out_of_bounds, 64)
FAULT(shared_out_of_bounds, 64)
FAULT(uninitialised, 64)
FAULT(misaligned, 64)
FAULT(sound_product, 256)
FAULT(divergent_product, 256)
FAULT(misaligned_product, 256)
FAULT(unloaded_product, 256)
FAULT(sound_copy, 64)
FAULT(unawaited_copy, 64)
FAULT(copy_over_what_is_read, 64)
FAULT(misaligned_copy, 64)
FAULT(abandoned_copy, 64)
FAULT(sound_transposed, 64)
FAULT(divergent_transposed, 64)
FAULT(sound_fragments, 128)
FAULT(divergent_fragments, 128)
FAULT(misaligned_fragments, 128)
FAULT(fragments_past_the_end, 128)
FAULT(sound_tf32, 1792)
FAULT(unpublished_tf32, 1792)
FAULT(unrounded_tf32_a, 1792)
FAULT(unrounded_tf32_b, 1792)
FAULT(tf32_rows_for_columns, 1792)
FAULT(divergent_tf32, 1792)

#define CLUSTER_FAULT(name)                                                                       \
  extern "C" int name(const float* in, float* out) {                                              \
    return ember::cuda::launch_clusters(ember::cuda::name, 1, 2, 32, 32 * sizeof(float), nullptr, \
                                        in, out);                                                 \
  }
CLUSTER_FAULT(sound_exchange)
CLUSTER_FAULT(unstarted_exchange)
CLUSTER_FAULT(unpublished_exchange)
CLUSTER_FAULT(exchange_over_what_is_read)
CLUSTER_FAULT(exchange_with_the_absent)
CLUSTER_FAULT(divergent_exchange)
CLUSTER_FAULT(exchange_after_arrival)
