// Values that are loaded and stored together.
#pragma once

namespace ember {
namespace cuda {

// n values, aligned so that they take one access, or, beyond 16 bytes, one for each 16.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  static constexpr int kElements = n;
  T values[n];
};

// As many values as one access brings.
template <typename T>
using WidestPack = Pack<T, 16 / int(sizeof(T))>;

}  // namespace cuda
}  // namespace ember
