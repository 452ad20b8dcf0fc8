// How the operator library was built. Python reads it before it registers an operator.

// Lines of the form "name=value". A value is empty where it does not apply.
extern "C" __attribute__((visibility("default"))) const char* ember_ext_build_info() {
  return "version=" EMBER_VERSION "\nschemas=" EMBER_SCHEMAS  // SHA-256 of csrc/registration.cpp
         "\ntorch=" EMBER_TORCH_VERSION "\ncompiler=" EMBER_COMPILER "\ncuda=" EMBER_CUDA_VERSION
         "\ncuda_architectures=" EMBER_CUDA_ARCHS "\ncuda_operators=" EMBER_CUDA_OPERATORS;
}
