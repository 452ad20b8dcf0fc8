// Kernels with one fault each, and their sound twin: what the shim must and must not report.
#include <cuda_runtime.h>

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

}  // namespace cuda
}  // namespace ember

// in and out: float [64].
#define FAULT(name)                                                                             \
  extern "C" int name(const float* in, float* out) {                                            \
    return ember::cuda::launch(ember::cuda::name, 1, 64, 64 * sizeof(float), nullptr, in, out); \
  }
FAULT(sound)
FAULT(missing_barrier)
FAULT(divergent_barrier)
FAULT(divergent_shuffle)
FAULT(out_of_bounds)
FAULT(shared_out_of_bounds)
FAULT(uninitialised)
FAULT(misaligned)
