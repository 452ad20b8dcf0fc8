// Launches in clusters of blocks (cluster.cuh), and whether a GPU can do them.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "launch.cuh"

namespace ember {
namespace cuda {

// A launch in clusters of `size` blocks.
struct ClusterLaunch {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attribute;

  ClusterLaunch(int64_t clusters, int size, int threads, size_t shared, cudaStream_t stream)
      : config{}, attribute{} {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
    config.gridDim = dim3(unsigned(clusters * size));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// As `launch`, in clusters of `size` blocks.
template <typename... P>
cudaError_t launch_clusters(void (*kernel)(P...), int64_t clusters, int size, int threads,
                            size_t shared, cudaStream_t stream,
                            typename Identity<P>::type... arguments) {
  if (clusters == 0) return cudaSuccess;
  if (clusters > 0x7fffffff / size) return cudaErrorInvalidConfiguration;
  const cudaError_t status = allow_shared_memory(kernel, shared);
  if (status != cudaSuccess) return status;
  ClusterLaunch launch(clusters, size, threads, shared, stream);
  return cleared(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

// Asks the driver what runs_in_clusters() says.
template <typename... P>
cudaError_t ask_for_clusters(void (*kernel)(P...), int device, int size, int threads, size_t shared,
                             bool& runs) {
  runs = false;
  int has = 0, clusters = 0;
  cudaError_t status = cleared(cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device));
  if (status != cudaSuccess || !has) return status;
  cudaFuncAttributes attributes;
  status = cleared(cudaFuncGetAttributes(&attributes, kernel));
  if (status != cudaSuccess || attributes.ptxVersion < 90) return status;
  status = allow_shared_memory(kernel, shared);
  if (status != cudaSuccess) return status;
  const ClusterLaunch launch(1, size, threads, shared, nullptr);
  status = cleared(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
  runs = status == cudaSuccess && clusters > 0;
  return status;
}

// What drivers have answered, for all host threads.
class ClusterAnswers {
 public:
  // Device, kernel, blocks of a cluster, threads and bytes of shared memory of a block.
  using Question = std::tuple<int, const void*, int, int, size_t>;

  static ClusterAnswers& all() {
    static ClusterAnswers answers;
    return answers;
  }

  // Whether the answer is known, which `answer` then is.
  bool knows(const Question& question, bool& answer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(question);
    if (found == answers_.end()) return false;
    answer = found->second;
    return true;
  }

  void keep(const Question& question, bool answer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    answers_[question] = answer;
  }

 private:
  std::mutex mutex_;
  std::map<Question, bool> answers_;
};

// Whether the current device runs the kernel in clusters of `size` blocks with so much shared
// memory each, and the kernel was compiled for it: it may also be there for older GPUs alone.
//
// The driver is asked once, since its answer takes longer than a short scan. An error is no answer.
template <typename... P>
bool runs_in_clusters(void (*kernel)(P...), int size, int threads, size_t shared) {
  int device = 0;
  if (cleared(cudaGetDevice(&device)) != cudaSuccess) return false;
  const ClusterAnswers::Question question{device, reinterpret_cast<const void*>(kernel), size,
                                          threads, shared};
  bool runs = false;
  if (ClusterAnswers::all().knows(question, runs)) return runs;
  if (ask_for_clusters(kernel, device, size, threads, shared, runs) == cudaSuccess) {
    ClusterAnswers::all().keep(question, runs);
  }
  return runs;
}

}  // namespace cuda
}  // namespace ember
