// The launchers as C functions, for ctypes.
#include <cuda_runtime.h>

#include "../../csrc/common/cfc_scan.h"
#include "../../csrc/common/lif_attention.h"
#include "../../csrc/common/lif_gate.h"
#include "../../csrc/common/ltc_scan.h"
#include "../../csrc/common/refractory_lif_attention.h"

#define ENTRY(name, Params)                             \
  namespace ember {                                     \
  namespace cuda {                                      \
  cudaError_t name(const Params&, cudaStream_t);        \
  }                                                     \
  }                                                     \
  extern "C" int ember_##name(const ember::Params* p) { \
    return ember::cuda::name(*p, nullptr);              \
  }

ENTRY(lif_gate_forward, LifGateParams)
ENTRY(lif_gate_backward, LifGateParams)

namespace ember {
namespace cuda {
int64_t lif_gate_partial_gradients(const LifGateParams&);
}
}  // namespace ember
extern "C" int64_t ember_lif_gate_partial_gradients(const ember::LifGateParams* p) {
  return ember::cuda::lif_gate_partial_gradients(*p);
}
extern "C" size_t ember_lif_gate_params_size() {
  return sizeof(ember::LifGateParams);
}

ENTRY(lif_attention_forward, LifAttentionParams)
ENTRY(lif_attention_backward, LifAttentionParams)

namespace ember {
namespace cuda {
int64_t lif_attention_scratch_bytes(const LifAttentionParams&, bool backward);
}
}  // namespace ember
extern "C" int64_t ember_lif_attention_scratch_bytes(const ember::LifAttentionParams* p,
                                                     int backward) {
  return ember::cuda::lif_attention_scratch_bytes(*p, backward);
}

ENTRY(cfc_scan_forward, CfcScanParams)
ENTRY(cfc_scan_backward, CfcScanParams)

namespace ember {
namespace cuda {
int64_t cfc_scan_workspace(const CfcScanParams&, bool backward);
}
}  // namespace ember
extern "C" int64_t ember_cfc_scan_workspace(const ember::CfcScanParams* p, int backward) {
  return ember::cuda::cfc_scan_workspace(*p, backward);
}
extern "C" void ember_cfc_scan_lay_out(ember::CfcScanParams* p, ember::CfcLayer* layers) {
  ember::cfc_lay_out(*p, layers);
}
extern "C" int64_t ember_cfc_scan_tape_size(const ember::CfcScanParams* p) {
  return ember::cfc_tape_size(*p, p->steps);
}
extern "C" size_t ember_cfc_scan_params_size() {
  return sizeof(ember::CfcScanParams);
}

ENTRY(ltc_scan_forward, LtcScanParams)
ENTRY(ltc_scan_backward, LtcScanParams)

namespace ember {
namespace cuda {
int64_t ltc_scan_workspace(const LtcScanParams&, bool backward);
}
}  // namespace ember
extern "C" int64_t ember_ltc_scan_workspace(const ember::LtcScanParams* p, int backward) {
  return ember::cuda::ltc_scan_workspace(*p, backward);
}
extern "C" int64_t ember_ltc_scan_saved_size(const ember::LtcScanParams* p) {
  return ember::ltc_saved_size(*p);
}
extern "C" size_t ember_ltc_scan_params_size() {
  return sizeof(ember::LtcScanParams);
}

ENTRY(refractory_lif_attention_forward, RefractoryLifAttentionParams)
ENTRY(refractory_lif_attention_backward, RefractoryLifAttentionParams)

namespace ember {
namespace cuda {
int64_t refractory_lif_attention_scratch_bytes(const RefractoryLifAttentionParams&, bool backward);
}
}  // namespace ember
extern "C" int64_t ember_refractory_lif_attention_scratch_bytes(
    const ember::RefractoryLifAttentionParams* p, int backward) {
  return ember::cuda::refractory_lif_attention_scratch_bytes(*p, backward);
}
extern "C" size_t ember_refractory_lif_attention_params_size() {
  return sizeof(ember::RefractoryLifAttentionParams);
}
