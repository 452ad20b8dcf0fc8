// ember_ext::lif_gate_forward and lif_gate_backward: tensors to LifGateParams.
//
// All that memory safety rests on is checked here, with a terse message: ops/lif_gate.py calls
// first and, if that fails, finds out what to tell the user.
#include "../common/lif_gate.h"

#include <tuple>

#include "device.h"

EMBER_KERNEL(lif_gate_forward, LifGateParams)
EMBER_KERNEL(lif_gate_backward, LifGateParams)

#ifdef EMBER_CUDA
namespace ember {
namespace cuda {
int64_t lif_gate_partial_gradients(const LifGateParams& p);
}
}  // namespace ember
#endif

namespace ember {
namespace binding {
namespace {

void check(bool good) {
  STD_TORCH_CHECK(good, "ember_ext.lif_gate: invalid arguments");
}

LifGateParams describe(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                       const Tensor& steepness, int64_t norm, int64_t unit_dim, double eps) {
  const int64_t dims = x.dim(), unit = unit_dim < 0 ? unit_dim + dims : unit_dim;
  check(unit >= 0 && unit < dims && norm >= 0 && norm <= 2 && eps >= 0);
  for (const Tensor* parameter : {&threshold, &leak, &steepness}) {
    check(parameter->dim() == 1 && parameter->size(0) == x.size(unit) &&
          parameter->scalar_type() == compute_type(x) && parameter->device() == x.device());
  }
  LifGateParams p{};
  p.dtype = dtype_of(x);
  p.norm = static_cast<Norm>(norm);
  p.units = threshold.numel();
  p.eps = eps;
  p.x = x.const_data_ptr();
  p.threshold = threshold.const_data_ptr();
  p.leak = leak.const_data_ptr();
  p.steepness = steepness.const_data_ptr();
  if (unit == dims - 1) {
    p.cols = x.size(dims - 1);
  } else if (p.norm == Norm::none) {
    // Without a norm all that follows the unit's dimension may count as one row.
    p.cols = 1;
    for (int64_t d = unit + 1; d < dims; ++d) p.cols *= x.size(d);
    p.unit_rows = 1;
  } else {
    p.cols = x.size(dims - 1);
    p.unit_rows = 1;
    for (int64_t d = unit + 1; d < dims - 1; ++d) p.unit_rows *= x.size(d);
  }
  p.rows = p.cols ? x.numel() / p.cols : 0;
  check(valid_gates(p.dtype, p.units, p.threshold, p.leak, p.steepness));
  return p;
}

#ifndef EMBER_CUDA
Tensor thread_scratch(LifGateParams& p, const Tensor& x) {
  Tensor scratch = torch::stable::new_empty(
      x, {lif_gate_scratch_bytes(p) * torch_threads().threads}, ScalarType::Byte);
  p.thread_scratch = scratch.mutable_data_ptr();
  return scratch;
}
#endif

Tensor lif_gate_forward(const Tensor& x_, const Tensor& threshold_, const Tensor& leak_,
                        const Tensor& steepness_, int64_t norm, int64_t unit_dim, double eps) {
  const Tensor x = dense(x_), threshold = dense(threshold_), leak = dense(leak_),
               steepness = dense(steepness_);
  LifGateParams p = describe(x, threshold, leak, steepness, norm, unit_dim, eps);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  p.y = y.mutable_data_ptr();
#ifndef EMBER_CUDA
  const Tensor scratch = thread_scratch(p, x);
#endif
  EMBER_LAUNCH(lif_gate_forward, p, x);
  return y;
}

// Gradients of x and of the parameters [3, units]; the latter are empty unless asked for.
std::tuple<Tensor, Tensor> lif_gate_backward(const Tensor& grad_y_, const Tensor& x_,
                                             const Tensor& threshold_, const Tensor& leak_,
                                             const Tensor& steepness_, int64_t norm,
                                             int64_t unit_dim, double eps,
                                             bool parameter_gradients) {
  const Tensor x = dense(x_), grad_y = dense(grad_y_), threshold = dense(threshold_),
               leak = dense(leak_), steepness = dense(steepness_);
  LifGateParams p = describe(x, threshold, leak, steepness, norm, unit_dim, eps);
  check(grad_y.numel() == x.numel() && grad_y.scalar_type() == x.scalar_type() &&
        grad_y.device() == x.device());
  const ScalarType compute = compute_type(x);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_parameters =
      torch::stable::new_empty(x, {parameter_gradients ? 3 : 0, threshold.numel()}, compute);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_parameters)};
  p.grad_y = grad_y.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  Tensor partial;
  if (parameter_gradients) {
#ifdef EMBER_CUDA
    const int64_t partials = cuda::lif_gate_partial_gradients(p);
#else
    const int64_t partials = lif_gate_blocks(p) * 3 * p.units;
#endif
    partial = torch::stable::new_empty(x, {partials}, compute);
    p.grad_parameters = grad_parameters.mutable_data_ptr();
    p.partial_gradients = partial.mutable_data_ptr();
  }
#ifndef EMBER_CUDA
  const Tensor scratch = thread_scratch(p, x);
#endif
  EMBER_LAUNCH(lif_gate_backward, p, x);
  return {grad_x, grad_parameters};
}

}  // namespace

void register_lif_gate(torch::stable::detail::StableLibrary& library) {
  library.impl("lif_gate", TORCH_BOX(&lif_gate_forward));
  library.impl("lif_gate_forward", TORCH_BOX(&lif_gate_forward));
  library.impl("lif_gate_backward", TORCH_BOX(&lif_gate_backward));
}

}  // namespace binding
}  // namespace ember
