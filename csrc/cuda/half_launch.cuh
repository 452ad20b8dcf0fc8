// Which launches of attention take the kernels for 16-bit types whose scores stay in registers.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "attention_fragments.cuh"

namespace ember {
namespace cuda {

// What the kernels for 16-bit types in registers hold at most.
constexpr int64_t kHalfSize = 128;

template <typename T>
constexpr bool is_half() {
  return sizeof(T) == 2;
}
inline bool may_be_half(const LifAttentionParams& p) {
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.size <= kHalfSize &&
         p.size % 8 == 0;
}

// Calls `body` with the number of columns, as a type, that the kernels for 16-bit types hold.
template <typename Body>
cudaError_t dispatch_size(const LifAttentionParams& p, const Body& body) {
  if (p.size <= 64) return body(std::integral_constant<int, 64>());
  return body(std::integral_constant<int, 128>());
}

// Whether these kernels run: with rows that they can copy, and on a GPU for which their code is
// more than an empty shell. `kernel` is any one of them; all are compiled for the same GPUs.
// `others` are aligned like the inputs.
template <typename T, typename Kernel>
cudaError_t runs_half(const LifAttentionParams& p, Kernel kernel,
                      std::initializer_list<AttentionTensor> others, bool& runs) {
  runs = is_half<T>() && may_be_half(p);
  for (const AttentionTensor* t : {&p.query, &p.key, &p.value}) runs = runs && copies_whole(*t);
  for (const AttentionTensor& t : others) runs = runs && copies_whole(t);
  if (!runs) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t status = cleared(cudaFuncGetAttributes(&attributes, kernel));
  runs = status == cudaSuccess && attributes.ptxVersion >= 80;
  return status;
}

}  // namespace cuda
}  // namespace ember
