// ember_ext::fingerprint and ember_ext::watch.
#include "watch.h"

#include <memory>
#include <mutex>
#include <unordered_map>

#include "../cpu/fingerprint.h"

namespace ember {
namespace binding {
namespace {

struct Watched {
  Tensors tensors;
  int64_t fingerprint;
};

// Never destroyed: Python may release watches until the process ends.
struct Watches {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Watched>> by_number;
  int64_t last = 0;
};

Watches& watches() {
  static Watches& all = *new Watches();
  return all;
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Whether `count` elements fill one stretch of memory, in whatever order of the dimensions.
bool is_dense(const Sizes& sizes, const Sizes& strides, int64_t count) {
  const int64_t dims = int64_t(sizes.size());
  int64_t filled = 1;
  for (int64_t done = 0; done < dims; ++done) {
    int64_t next = dims;
    while (--next >= 0 && (strides[size_t(next)] != filled || sizes[size_t(next)] <= 1)) continue;
    if (next < 0) break;
    filled *= sizes[size_t(next)];
  }
  return filled == count || count == 0;
}

// Asks each tensor for as little as can be: for small networks the questions take longest. Empty if
// a tensor is not on the CPU.
std::optional<int64_t> find_fingerprint(const Tensors& tensors) {
  std::vector<MemoryPiece> pieces;
  pieces.reserve(tensors.size());
  Tensors copies;
  uint64_t kinds = 0;
  for (const Tensor& t : tensors) {
    if (!t.is_cpu()) return std::nullopt;
    const Sizes sizes = t.sizes(), strides = t.strides();
    int64_t count = 1;
    kinds = kinds * 31 + uint64_t(t.scalar_type());
    for (size_t d = 0; d < sizes.size(); ++d) {
      count *= sizes[d];
      kinds = (kinds * 31 + uint64_t(sizes[d])) * 31 + uint64_t(strides[d]);
    }
    const void* data;
    if (is_dense(sizes, strides, count)) {
      data = t.const_data_ptr();
    } else {
      copies.push_back(torch::stable::contiguous(t));
      data = copies.back().const_data_ptr();
    }
    pieces.push_back({data, count * int64_t(t.element_size())});
  }
  uint64_t result = 0;
  const FingerprintParams p{pieces.data(), int64_t(pieces.size()), &result};
  cpu::fingerprint(p, torch_threads());
  return int64_t(result ^ kinds);
}

}  // namespace

int64_t fingerprint(const Tensors& tensors) {
  const std::optional<int64_t> found = find_fingerprint(tensors);
  STD_TORCH_CHECK(found, "ember_ext.fingerprint: tensors must be on the CPU");
  return *found;
}

int64_t watch(Tensors tensors) {
  const int64_t now = fingerprint(tensors);
  auto watched = std::make_shared<const Watched>(Watched{std::move(tensors), now});
  const std::lock_guard<std::mutex> lock(watches().mutex);
  watches().by_number.emplace(++watches().last, std::move(watched));
  return watches().last;
}

bool unchanged(int64_t watch) {
  if (watch == 0) return true;
  std::shared_ptr<const Watched> watched;
  {
    const std::lock_guard<std::mutex> lock(watches().mutex);
    const auto found = watches().by_number.find(watch);
    STD_TORCH_CHECK(found != watches().by_number.end(), "ember_ext: no watch ", watch);
    watched = found->second;
  }
  return find_fingerprint(watched->tensors) == watched->fingerprint;
}

void register_watch(torch::stable::detail::StableLibrary& library) {
  library.impl("fingerprint", TORCH_BOX(&fingerprint));
  library.impl("watch", TORCH_BOX(&watch));
}

}  // namespace binding
}  // namespace ember

// Forgets a watch. Not an operator: a finaliser calls it at any time, within any mode of torch's.
extern "C" __attribute__((visibility("default"))) void ember_ext_unwatch(int64_t watch) {
  std::shared_ptr<const ember::binding::Watched> watched;  // freed after the lock
  auto& all = ember::binding::watches();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_number.find(watch);
  if (found == all.by_number.end()) return;
  watched = std::move(found->second);
  all.by_number.erase(found);
}

// Whether the tensors of a watch hold what they held; false if there is no such watch.
extern "C" __attribute__((visibility("default"))) int ember_ext_unchanged(int64_t watch) {
  try {
    return ember::binding::unchanged(watch);
  } catch (...) {
    return 0;
  }
}
