// Clusters: blocks that run at the same time, wait for each other, and write to each other's shared
// memory. GPUs have them from sm_90 on.
//
// A block may touch another's shared memory only between the first barrier of the cluster, before
// which the other may not have started, and the last, after which it may have left. A host compiler
// takes each function from python_tests/cuda_shim/cuda_runtime.h.
#pragma once

#include "launch.cuh"

namespace ember {
namespace cuda {

#ifdef __NVCC__
#define EMBER_CLUSTER_PLACE
#define EMBER_CLUSTER_PLACE_ARGUMENT
#define EMBER_AND_CLUSTER_PLACE
#else
// Where in the source the blocks wait.
#define EMBER_CLUSTER_PLACE EMBER_SHIM_PLACE
#define EMBER_AND_CLUSTER_PLACE , EMBER_SHIM_PLACE
#define EMBER_CLUSTER_PLACE_ARGUMENT {file, line}
#endif

// Whether the code is compiled for GPUs that have clusters.
__host__ __device__ constexpr bool has_clusters() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return false;
#else
  return true;
#endif
}

// The block's number within its cluster; 0 in a launch without clusters.
__device__ __forceinline__ int cluster_rank() {
#ifndef __NVCC__
  return cuda_shim::cluster_rank();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The two halves of a barrier of the cluster: no thread of it returns from cluster_wait() before
// all threads of all blocks have called cluster_arrive(). What a thread wrote before it arrived, to
// whatever memory, the others then see. To arrive takes until those writes are done: what need not
// be seen is better written between the two calls.
__device__ __forceinline__ void cluster_arrive(EMBER_CLUSTER_PLACE) {
#ifndef __NVCC__
  cuda_shim::arrive_at_cluster(EMBER_CLUSTER_PLACE_ARGUMENT);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait(EMBER_CLUSTER_PLACE) {
#ifndef __NVCC__
  cuda_shim::wait_for_cluster(EMBER_CLUSTER_PLACE_ARGUMENT);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where the block of that rank has what this block has at `shared`.
template <typename T>
__device__ __forceinline__ T* shared_of_rank(T* shared, int rank EMBER_AND_CLUSTER_PLACE) {
#ifndef __NVCC__
  return static_cast<T*>(cuda_shim::shared_of_rank(shared, rank, EMBER_CLUSTER_PLACE_ARGUMENT));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#else
  return shared;
#endif
}

}  // namespace cuda
}  // namespace ember
