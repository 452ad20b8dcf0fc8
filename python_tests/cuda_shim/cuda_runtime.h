// A stand-in for the CUDA toolkit's header: with it a host compiler builds csrc/cuda/*.cu, and
// shim.cpp runs the kernels. Only what those sources use is here; a missing name is a compile
// error.
//
// The threads of a block, or of all blocks of a cluster, are fibres on one OS thread. One runs
// until it waits for others (barrier, shuffle, vote), then the next in the order that the test
// chose.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__  // dynamic shared memory only: `extern` makes it the array that shim.cpp defines
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace cuda_shim {

// Where in the source a thread waits. All threads that meet must do so at the same place.
struct Place {
  const char* file;
  int line;
};

void wait_for_block(Place place);
// Every lane of the mask hands in `value` and gets the values of all lanes.
const uint64_t* wait_for_warp(unsigned mask, uint64_t value, Place place);
bool block_or(bool condition, Place place);
// All 32 lanes of a warp hand in an argument; once they have, `together` is called with all of
// them.
void meet(void* argument, void (*together)(void* const* arguments), Place place);
[[noreturn]] void fault(const char* what, Place place);

// Within a cluster: the block's rank, its barrier in two halves, and where the block of a rank has
// what this block has at `shared`.
int cluster_rank();
void arrive_at_cluster(Place place);
void wait_for_cluster(Place place);
void* shared_of_rank(void* shared, int rank, Place place);
int active_clusters(const cudaLaunchConfig_t& config);

cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t run(const void* kernel, dim3 grid, dim3 block, int cluster, size_t shared,
                const std::function<void()>& body);

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
  static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  if (!(mask >> source & 1)) fault("a shuffle reads a lane outside its mask", place);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  memcpy(&value, &wait_for_warp(mask, bits, place)[source], sizeof(T));
  return value;
}

template <typename... P, size_t... i>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared,
                   std::index_sequence<i...>) {
  return run(reinterpret_cast<const void*>(kernel), grid, block, 1, shared,
             [=] { kernel(*static_cast<P*>(arguments[i])...); });
}

}  // namespace cuda_shim

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return cuda_shim::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

struct cudaFuncAttributes {
  int ptxVersion;
};
#ifdef __CUDA_ARCH__
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->ptxVersion = __CUDA_ARCH__ / 10;
  return cudaSuccess;
}
#endif

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return cuda_shim::launch(kernel, grid, block, arguments, shared, std::index_sequence_for<P...>());
}

// In clusters, if the first attribute says so.
template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               P... arguments) {
  const int cluster = config->numAttrs ? int(config->attrs[0].val.clusterDim.x) : 1;
  return cuda_shim::run(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                        cluster, config->dynamicSmemBytes, [=] { kernel(arguments...); });
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...),
                                           const cudaLaunchConfig_t* config) {
  *clusters = cuda_shim::active_clusters(*config);
  return cudaSuccess;
}

#define EMBER_SHIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMBER_SHIM_PLACE) {
  cuda_shim::wait_for_block({file, line});
}
inline int __syncthreads_or(int condition, EMBER_SHIM_PLACE) {
  return cuda_shim::block_or(condition != 0, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMBER_SHIM_PLACE) {
  cuda_shim::wait_for_warp(mask, 0, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMBER_SHIM_PLACE) {
  const unsigned lane = threadIdx.x % 32, group = lane / unsigned(width) * unsigned(width);
  return cuda_shim::shuffle(mask, value, group + unsigned(source) % unsigned(width), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMBER_SHIM_PLACE) {
  (void)width;
  return cuda_shim::shuffle(mask, value, (threadIdx.x % 32) ^ unsigned(lanes), {file, line});
}
inline int __any_sync(unsigned mask, int condition, EMBER_SHIM_PLACE) {
  const uint64_t* votes = cuda_shim::wait_for_warp(mask, condition != 0, {file, line});
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && votes[lane]) return 1;
  }
  return 0;
}

// Fibres change over at waits only, so this is atomic.
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline float __expf(float x) {
  return expf(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
template <typename T>
T min(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return std::fmin(a, b);  // of NaN and b, b
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return std::fmax(a, b);
  return a < b ? b : a;
}
