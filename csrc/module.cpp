// ember_ext._C: loads the operator libraries and says how they were built. The operators themselves
// go through torch's dispatcher, where torch.compile, export and autocast see them.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

void* symbol(void* library, const char* name) {
  void* address = dlsym(library, name);
  if (!address) throw std::runtime_error(dlerror());
  return address;
}

// Of the loaded CPU library, csrc/binding/watch.cpp.
void (*forget_watch)(int64_t watch) = nullptr;
int (*compare_watch)(int64_t watch) = nullptr;

// Opens the library at `path` and registers its operators; RuntimeError says what went wrong.
// Returns the name of the instruction set that its CPU kernels use, or "" for a CUDA library.
std::string load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto* register_operators =
      reinterpret_cast<int (*)(char*, size_t)>(symbol(library, "ember_ext_register"));
  char error[1024] = "";
  if (register_operators(error, sizeof(error))) throw std::runtime_error(error);
  auto* isa = reinterpret_cast<const char* (*)()>(dlsym(library, "ember_ext_isa"));
  if (isa) {
    forget_watch = reinterpret_cast<void (*)(int64_t)>(symbol(library, "ember_ext_unwatch"));
    compare_watch = reinterpret_cast<int (*)(int64_t)>(symbol(library, "ember_ext_unchanged"));
  }
  return isa ? isa() : "";
}

void unwatch(int64_t watch) {
  if (forget_watch) forget_watch(watch);
}

bool unchanged(int64_t watch) {
  return compare_watch && compare_watch(watch);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = EMBER_VERSION;
  info["schemas"] = EMBER_SCHEMAS;  // of csrc/registration.cpp
  info["torch"] = EMBER_TORCH_VERSION;
  info["compiler"] = EMBER_COMPILER;
  info["cuda"] = EMBER_CUDA_VERSION;              // "" without CUDA
  info["cuda_architectures"] = EMBER_CUDA_ARCHS;  // "" without CUDA
  info["cuda_operators"] = EMBER_CUDA_OPERATORS;  // "" without CUDA
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("load", &load);
  m.def("build_info", &build_info);
  m.def("unwatch", &unwatch);
  m.def("unchanged", &unchanged);
}
