// The schemas of all operators and the functions that register them, compiled into the operator
// library of each device.
//
// Registration runs from an exported function, not from a static object: an error there reaches
// Python as a message, and the package can go on with the reference implementation.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

#include "binding/device.h"

// Every operator that this library has kernels for: X(<stem>).
#define EMBER_FOR_EACH_KERNEL(X) \
  X(lif_gate) X(lif_attention) X(refractory_lif_attention) X(cfc_scan) X(ltc_scan)
#ifdef EMBER_CUDA
#define EMBER_FOR_EACH_OPERATOR(X) EMBER_FOR_EACH_KERNEL(X)
#else
#define EMBER_FOR_EACH_OPERATOR(X) EMBER_FOR_EACH_KERNEL(X) X(watch)
#endif

namespace {

// <stem> is differentiable (ember_ext/ops registers its gradient); <stem>_forward and
// <stem>_backward are the raw kernels.
constexpr const char* schemas[] = {
    "lif_gate(Tensor x, Tensor threshold, Tensor leak, Tensor steepness, int norm, int unit_dim, "
    "float eps) -> Tensor",
    "lif_gate_forward(Tensor x, Tensor threshold, Tensor leak, Tensor steepness, int norm, "
    "int unit_dim, float eps) -> Tensor",
    "lif_gate_backward(Tensor grad_y, Tensor x, Tensor threshold, Tensor leak, Tensor steepness, "
    "int norm, int unit_dim, float eps, bool parameter_gradients) -> (Tensor, Tensor)",
    "lif_attention(Tensor query, Tensor key, Tensor value, Tensor threshold, Tensor leak, "
    "Tensor steepness, Tensor? mask, Tensor? seed, float dropout_p, bool is_causal, float scale, "
    "float eps, bool tf32, bool summary) -> (Tensor, Tensor, Tensor, Tensor)",
    "lif_attention_forward(Tensor query, Tensor key, Tensor value, Tensor threshold, Tensor leak, "
    "Tensor steepness, Tensor? mask, Tensor? seed, float dropout_p, bool is_causal, float scale, "
    "float eps, bool tf32, bool summary) -> (Tensor, Tensor, Tensor, Tensor)",
    "lif_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor threshold, Tensor leak, Tensor steepness, Tensor? out, Tensor row_stats, "
    "Tensor? mask, Tensor? seed, float dropout_p, bool is_causal, float scale, float eps, "
    "bool tf32) -> (Tensor, Tensor, Tensor, Tensor)",
    "refractory_lif_attention(Tensor query, Tensor key, Tensor value, Tensor threshold, "
    "Tensor leak, Tensor steepness, Tensor within, Tensor across, Tensor? previous_load, "
    "Tensor? past_probabilities, Tensor? past_weights, Tensor? seed, float dropout_p, "
    "bool look_ahead, float scale, float eps, int block) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "refractory_lif_attention_forward(Tensor query, Tensor key, Tensor value, Tensor threshold, "
    "Tensor leak, Tensor steepness, Tensor within, Tensor across, Tensor? previous_load, "
    "Tensor? past_probabilities, Tensor? past_weights, Tensor? seed, float dropout_p, "
    "bool look_ahead, float scale, float eps, int block) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "refractory_lif_attention_backward(Tensor grad_out, Tensor? grad_next_load, "
    "Tensor? grad_probabilities, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, "
    "Tensor threshold, Tensor leak, Tensor steepness, Tensor within, Tensor across, "
    "Tensor row_stats, Tensor block_loads, Tensor? previous_load, Tensor? seed, float dropout_p, "
    "bool look_ahead, float scale, float eps, int block, bool previous_load_gradient, "
    "bool past_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cfc_scan(Tensor x, Tensor h0, Tensor[] weights, Tensor? timespans, Tensor? lengths, "
    "Tensor? dropout_scale, Tensor? decay, int mode, int activation, int chunk) "
    "-> (Tensor, Tensor, Tensor)",
    "cfc_scan_forward(Tensor x, Tensor h0, Tensor[] weights, Tensor? timespans, Tensor? lengths, "
    "Tensor? dropout_scale, Tensor? decay, int mode, int activation, int chunk) "
    "-> (Tensor, Tensor, Tensor)",
    "cfc_scan_backward(Tensor grad_y, Tensor grad_h_last, Tensor saved, Tensor? x, "
    "Tensor[] weights, Tensor? timespans, Tensor? lengths, Tensor? dropout_scale, Tensor? decay, "
    "int mode, int activation, int chunk, bool input_gradient, bool weight_gradients) "
    "-> (Tensor, Tensor, Tensor[], Tensor, Tensor)",
    "ltc_scan(Tensor x, Tensor h0, Tensor unit_weights, Tensor sensory_weights, "
    "Tensor recurrent_weights, Tensor sensory, Tensor recurrent, Tensor timespans, "
    "Tensor? lengths, int unfolds, int outputs, float eps, int chunk) -> (Tensor, Tensor, Tensor)",
    "ltc_scan_forward(Tensor x, Tensor h0, Tensor unit_weights, Tensor sensory_weights, "
    "Tensor recurrent_weights, Tensor sensory, Tensor recurrent, Tensor timespans, "
    "Tensor? lengths, int unfolds, int outputs, float eps, int chunk) -> (Tensor, Tensor, Tensor)",
    "ltc_scan_backward(Tensor grad_y, Tensor grad_h_last, Tensor saved, Tensor x, "
    "Tensor unit_weights, Tensor sensory_weights, Tensor recurrent_weights, Tensor sensory, "
    "Tensor recurrent, Tensor timespans, Tensor? lengths, int unfolds, float eps, int chunk, "
    "bool input_gradient, bool weight_gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    // Inference by a network packed once; CPU only.
    "ltc_scan_pack(Tensor unit_weights, Tensor sensory_weights, Tensor recurrent_weights, "
    "Tensor sensory, Tensor recurrent, Tensor? input_map, Tensor? output_map, int[] plan) "
    "-> Tensor",
    "ltc_scan_packed(Tensor x, Tensor h, Tensor timespans, Tensor? lengths, Tensor packed, "
    "int[] plan, float eps, int watch) -> (Tensor, Tensor)",
    // A number that changes with what the tensors hold; CPU only.
    "fingerprint(Tensor[] tensors) -> int",
    "watch(Tensor[] tensors) -> int",
    // Inference by stacked cells from weights packed once; CPU only.
    "cfc_scan_pack(Tensor[] weights, int[] plan) -> Tensor",
    "cfc_scan_packed(Tensor x, Tensor h, Tensor? timespans, Tensor? lengths, Tensor packed, "
    "int[] plan, int watch) -> (Tensor, Tensor)",
};

}  // namespace

namespace ember {
namespace binding {
#define EMBER_DECLARE(stem) void register_##stem(torch::stable::detail::StableLibrary&);
EMBER_FOR_EACH_OPERATOR(EMBER_DECLARE)
#undef EMBER_DECLARE
}  // namespace binding
}  // namespace ember

// Returns 0, or writes a message of at most `size` bytes to `error` and returns 1. The library
// objects are never freed: taking operators back while Python may call them is not safe.
extern "C" __attribute__((visibility("default"))) int ember_ext_register(char* error, size_t size) {
  using torch::stable::detail::StableLibrary;
  try {
#ifndef EMBER_CUDA
    auto* definitions =
        new StableLibrary(StableLibrary::Kind::DEF, "ember_ext", nullptr, __FILE__, __LINE__);
    for (const char* schema : schemas) definitions->def(schema);
#else
    (void)schemas;
#endif
    auto* kernels = new StableLibrary(StableLibrary::Kind::IMPL, "ember_ext", EMBER_DISPATCH_KEY,
                                      __FILE__, __LINE__);
#define EMBER_REGISTER(stem) ember::binding::register_##stem(*kernels);
    EMBER_FOR_EACH_OPERATOR(EMBER_REGISTER)
#undef EMBER_REGISTER
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
    return 1;
  }
}

#ifndef EMBER_CUDA
extern "C" __attribute__((visibility("default"))) const char* ember_ext_isa() {
  return ember::isa_name(ember::selected_isa());
}
#endif
