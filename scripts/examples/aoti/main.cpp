// Runs a model that AOTInductor compiled, without Python:
//
//   aoti_example libember_ext_ops.so model.pt2
//
// The model is that of export.py. What calls ember-ext's operators needs them registered first:
// load libember_ext_ops.so, which lies in the installed ember_ext, and call ember_ext_register.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <stdexcept>

// On a GPU, do the same with libember_ext_cuda.so afterwards.
void register_operators(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto* register_all =
      reinterpret_cast<int (*)(char*, size_t)>(dlsym(library, "ember_ext_register"));
  if (!register_all) throw std::runtime_error(dlerror());
  char error[1024] = "";
  if (register_all(error, sizeof(error))) throw std::runtime_error(error);
}

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("give libember_ext_ops.so and a model's .pt2");
  register_operators(argv[1]);
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (int64_t steps : {1, 5, 2000}) {
    // Row b holds 0.1 (b + 1) at every step and feature.
    at::Tensor x = (at::arange(2) + 1).mul(0.1).view({2, 1, 1}).expand({2, steps, 4}).contiguous();
    at::Tensor y = model.run({x})[0];
    std::cout << steps << " steps: " << y.abs().sum().item<float>() << "\n";
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
