// How every kernel here is launched, gets its shared memory and saves registers.
//
// Kernels use no static __shared__ arrays and no <<<>>>: with both behind the functions below, a
// host compiler can build the same source and run it (python_tests/cuda_shim).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ember {
namespace cuda {

constexpr int kWarp = 32;

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The block's dynamic shared memory, aligned for 16-byte accesses, for matrix units and for tiles
// whose addresses are put together from bits (attention_fragments.cuh).
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(256) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

// The same value, but what follows from it is not computed ahead of a loop, in registers that the
// loop is short of.
__device__ __forceinline__ int in_place(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int64_t in_place(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

template <typename T>
struct Identity {
  using type = T;
};

// `status`. CUDA keeps it, too, and whoever asks for the last error next would take it for theirs.
inline cudaError_t cleared(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// The most shared memory that the device gives a block.
inline cudaError_t most_shared_memory(int& bytes) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return cleared(status);
}

// Lets the kernel have `shared` bytes of dynamic shared memory.
template <typename... P>
cudaError_t allow_shared_memory(void (*kernel)(P...), size_t shared) {
  const size_t without_asking = 48 * 1024;
  if (shared <= without_asking) return cudaSuccess;
  // All that there is, not `shared`: what one host thread allows, another that launches the same
  // kernel for another shape must not take back.
  int most = 0;
  const cudaError_t status = most_shared_memory(most);
  if (status != cudaSuccess) return status;
  return cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Launches kernel(arguments...) with `shared` bytes of dynamic shared memory. An empty grid is no
// error.
template <typename... P>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, typename Identity<P>::type... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared_memory(kernel, shared);
  if (status != cudaSuccess) return status;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cleared(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers,
                                  shared, stream));
}

}  // namespace cuda
}  // namespace ember
