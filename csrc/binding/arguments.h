// What the bindings of operators over sequences share: checks, dense copies and large buffers.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "device.h"

namespace ember {
namespace binding {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// A large uninitialised buffer. Its first use would fault in every 4 KiB page, which for a tape
// takes as long as a third of the forward pass; huge pages make that a fifth.
inline Tensor new_buffer(const Tensor& like, int64_t size, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, {size}, dtype);
#if defined(__linux__) && !defined(EMBER_CUDA)
  const uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t bytes = uintptr_t(size) * (dtype == ScalarType::Double ? 8 : 4);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

// Tensors that a parameter struct points into: dense copies where needed, kept alive with this.
class Arguments {
 public:
  // `op` names the operator in errors; all tensors must be on the device of `like`.
  Arguments(const char* op, const Tensor& like) : op_(op), like_(like) {}

  const void* hold(const Tensor& t) {
    held_.push_back(dense(t));
    return held_.back().const_data_ptr();
  }
  const void* hold(const MaybeTensor& t) { return t ? hold(*t) : nullptr; }

  // Python explains what is wrong; here only memory safety counts.
  void expect(bool good) const { STD_TORCH_CHECK(good, "ember_ext.", op_, ": invalid arguments"); }
  void expect(const MaybeTensor& t, int64_t size, ScalarType dtype) const {
    expect(!t ||
           (t->numel() == size && t->scalar_type() == dtype && t->device() == like_.device()));
  }

 private:
  const char* op_;
  const Tensor& like_;
  Tensors held_;
};

}  // namespace binding
}  // namespace ember
