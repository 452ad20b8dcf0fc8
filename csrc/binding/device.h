// What differs between the CPU and the CUDA build of a binding: how a kernel is called.
//
// Binding files turn tensors into a parameter struct, allocate results and call EMBER_LAUNCH. They
// are compiled once for each device, with EMBER_CUDA defined in the CUDA library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <string>

#include "../common/types.h"

#ifdef EMBER_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// Declares the launcher `cudaError_t <name>(const Params&, cudaStream_t)`.
#define EMBER_KERNEL(name, Params)                        \
  namespace ember {                                       \
  namespace cuda {                                        \
  cudaError_t name(const Params& p, cudaStream_t stream); \
  }                                                       \
  }
#define EMBER_DISPATCH_KEY "CUDA"
#define EMBER_LAUNCH(name, params, on)                                                           \
  ember::binding::launch([&](cudaStream_t stream) { return ember::cuda::name(params, stream); }, \
                         on, #name)
#else
#include "../cpu/isa.h"

#define EMBER_KERNEL(name, Params) EMBER_CPU_KERNEL(name, Params)
#define EMBER_DISPATCH_KEY "CPU"
#define EMBER_LAUNCH(name, params, on) ember::cpu::name(params, ember::binding::torch_threads())
#endif

namespace ember {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "ember_ext: unsupported dtype");
  }
}

// The dtype that values of `t` are computed and accumulated in.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `t` itself where it is dense and row-major, else one copy.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Whether theta is finite, lambda within [0, 1] and k finite and positive, for all n gates. Looked
// at on a CPU only, where it costs nothing: a GPU would have to be waited for.
template <typename C>
bool valid_gates(int64_t n, const C* threshold, const C* leak, const C* steepness) {
#ifndef EMBER_CUDA
  const C infinity = std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::fabs(threshold[i]) < infinity && leak[i] >= 0 && leak[i] <= 1 && steepness[i] > 0 &&
          steepness[i] < infinity)) {
      return false;
    }
  }
#endif
  return true;
}

inline bool valid_gates(DType dtype, int64_t n, const void* threshold, const void* leak,
                        const void* steepness) {
  if (dtype == DType::f64) {
    return valid_gates(n, static_cast<const double*>(threshold), static_cast<const double*>(leak),
                       static_cast<const double*>(steepness));
  }
  return valid_gates(n, static_cast<const float*>(threshold), static_cast<const float*>(leak),
                     static_cast<const float*>(steepness));
}

#ifdef EMBER_CUDA

template <typename Launcher>
void launch(const Launcher& launcher, const Tensor& on, const char* name) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t status = launcher(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(status == cudaSuccess, "ember_ext: ", name, ": ", cudaGetErrorString(status));
}

#else

inline ThreadPool torch_threads() {
  return {[](int64_t n, int64_t grain, ThreadPool::Task task, void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, task, context));
          },
          [] {
            uint32_t index = 0;
            torch_get_thread_idx(&index);
            return int64_t(index);
          },
          int64_t(torch::stable::get_num_threads())};
}

#endif

}  // namespace binding
}  // namespace ember
