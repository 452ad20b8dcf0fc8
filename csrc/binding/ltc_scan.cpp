// ember_ext::ltc_scan_*: tensors to LtcScanParams.
//
// Shapes, dtypes, devices and values are checked and explained in ember_ext/ops/ltc_scan.py. Here
// those checks are repeated, tersely, that memory safety rests on.
#include "../common/ltc_scan.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "arguments.h"
#ifndef EMBER_CUDA
#include "watch.h"
#endif

EMBER_KERNEL(ltc_scan_forward, LtcScanParams)
EMBER_KERNEL(ltc_scan_backward, LtcScanParams)
#ifdef EMBER_CUDA
namespace ember {
namespace cuda {
int64_t ltc_scan_workspace(const LtcScanParams& p, bool backward);
}
}  // namespace ember
#else
EMBER_KERNEL(ltc_scan_pack, LtcScanParams)
#endif

namespace ember {
namespace binding {
namespace {

// The parameter struct and what it points to.
struct LtcArguments : Arguments {
  LtcScanParams p{};

  explicit LtcArguments(const Tensor& like) : Arguments("ltc_scan", like) {}

  // p.dtype, batch, steps, inputs, units and outputs are set.
  void describe(const Tensor& unit_weights, const Tensor& sensory_weights,
                const Tensor& recurrent_weights, const Tensor& sensory, const Tensor& recurrent,
                const Tensor& timespans, const MaybeTensor& lengths, int64_t unfolds, double eps,
                int64_t chunk) {
    const ScalarType compute = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    expect(unfolds >= 1 && unfolds <= ltc_max_unfolds);
    expect(timespans, p.batch * p.steps, compute);
    expect(lengths, p.batch, ScalarType::Long);
    p.unfolds = unfolds;
    p.eps = eps;
    p.chunk = chunk_within(chunk, p.steps);
    p.timespans = hold(timespans);
    p.lengths = static_cast<const int64_t*>(hold(lengths));
    describe_network(unit_weights, sensory_weights, recurrent_weights, sensory, recurrent);
  }

  // p.dtype, inputs, units and outputs are set.
  void describe_network(const Tensor& unit_weights, const Tensor& sensory_weights,
                        const Tensor& recurrent_weights, const Tensor& sensory,
                        const Tensor& recurrent) {
    const ScalarType compute = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    expect(p.inputs >= 0 && p.outputs >= 0 && p.outputs <= p.units);
    expect(unit_weights, 3 * p.units, compute);
    p.unit_weights = hold(unit_weights);
    p.sensory = list(sensory, sensory_weights, p.inputs, compute);
    p.recurrent = list(recurrent, recurrent_weights, p.units, compute);
  }

  Tensor workspace(const Tensor& like, ScalarType compute, bool backward) {
#ifdef EMBER_CUDA
    const int64_t size = cuda::ltc_scan_workspace(p, backward);
#else
    const int64_t size = ltc_workspace(p, torch_threads().threads, backward);
#endif
    Tensor t = new_buffer(like, size, compute);
    p.workspace = t.mutable_data_ptr();
    return t;
  }

 private:
  LtcSynapses list(const Tensor& index, const Tensor& weights, int64_t sources,
                   ScalarType compute) {
    expect(index.dim() == 2 && index.size(0) == 3);
    LtcSynapses s{};
    s.count = index.size(1);
    s.num_sources = sources;
    expect(s.count <= ltc_max_synapses);
    expect(index, 3 * s.count, ScalarType::Long);
    expect(weights, 4 * s.count, compute);
    s.sources = static_cast<const int64_t*>(hold(index));
    s.targets = s.sources + s.count;
    s.by_source = s.targets + s.count;
    s.weights = hold(weights);
#ifndef EMBER_CUDA
    // At most one of each pair, so that a unit has no more synapses than there are sources.
    int64_t source = -1, target = 0;
    for (int64_t e = 0; e < s.count; ++e) {
      const bool next = s.targets[e] > target;
      expect(next ? s.targets[e] < p.units : s.targets[e] == target && s.sources[e] > source);
      expect(s.sources[e] >= 0 && s.sources[e] < sources);
      source = s.sources[e];
      target = s.targets[e];
    }
    expect(s.count == 0 || target < p.units);
#endif
    return s;
  }
};

// chunk < 0: nothing is saved; 0: the states after all solver steps; > 0: those at the chunks'
// borders.
std::tuple<Tensor, Tensor, Tensor> ltc_scan_forward(
    const Tensor& x, const Tensor& h0, const Tensor& unit_weights, const Tensor& sensory_weights,
    const Tensor& recurrent_weights, const Tensor& sensory, const Tensor& recurrent,
    const Tensor& timespans, MaybeTensor lengths, int64_t unfolds, int64_t outputs, double eps,
    int64_t chunk) {
  const ScalarType compute = compute_type(x);
  LtcArguments a(x);
  LtcScanParams& p = a.p;
  a.expect(x.dim() == 3 && h0.dim() == 2 && outputs >= 0);
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.steps = x.size(1);
  p.inputs = x.size(2);
  p.units = h0.size(1);
  p.outputs = outputs;
  a.describe(unit_weights, sensory_weights, recurrent_weights, sensory, recurrent, timespans,
             lengths, unfolds, eps, chunk);
  a.expect(h0, p.batch * p.units, compute);
  p.x = a.hold(x);
  p.h0 = a.hold(h0);
  Tensor y = torch::stable::new_empty(x, {p.batch, p.steps, p.outputs});
  Tensor h_last = torch::stable::new_empty(x, {p.batch, p.units}, compute);
  Tensor saved = new_buffer(x, chunk < 0 ? 0 : ltc_saved_size(p), compute);
  p.y = y.mutable_data_ptr();
  p.h_last = h_last.mutable_data_ptr();
  p.saved = chunk < 0 ? nullptr : saved.mutable_data_ptr();
  if (p.batch * p.units > 0) {
    const Tensor workspace = a.workspace(x, compute, false);
    EMBER_LAUNCH(ltc_scan_forward, p, x);
  }
  return {y, h_last, saved};
}

// Gradients of x, h0, the weights of units and of synapses, and the time spans; empty where not
// asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ltc_scan_backward(
    const Tensor& grad_y, const Tensor& grad_h_last, const Tensor& saved, const Tensor& x,
    const Tensor& unit_weights, const Tensor& sensory_weights, const Tensor& recurrent_weights,
    const Tensor& sensory, const Tensor& recurrent, const Tensor& timespans, MaybeTensor lengths,
    int64_t unfolds, double eps, int64_t chunk, bool input_gradient, bool weight_gradients) {
  const ScalarType compute = compute_type(x);
  LtcArguments a(x);
  LtcScanParams& p = a.p;
  a.expect(x.dim() == 3 && grad_y.dim() == 3 && grad_h_last.dim() == 2);
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.steps = x.size(1);
  p.inputs = x.size(2);
  p.units = grad_h_last.size(1);
  p.outputs = grad_y.size(2);
  a.describe(unit_weights, sensory_weights, recurrent_weights, sensory, recurrent, timespans,
             lengths, unfolds, eps, chunk);
  a.expect(chunk >= 0);
  a.expect(grad_y, p.batch * p.steps * p.outputs, x.scalar_type());
  a.expect(grad_h_last, p.batch * p.units, compute);
  a.expect(saved, ltc_saved_size(p), compute);
  p.x = a.hold(x);
  p.grad_y = a.hold(grad_y);
  p.grad_h_last = a.hold(grad_h_last);
  p.saved = saved.mutable_data_ptr();
  const int64_t rows = input_gradient ? p.batch : 0;
  Tensor grad_x = torch::stable::new_empty(x, {rows, p.steps, p.inputs});
  Tensor grad_h0 = torch::stable::new_empty(x, {p.batch, p.units}, compute);
  Tensor grad_timespans = torch::stable::new_empty(x, {p.batch, p.steps}, compute);
  const auto grad = [&](int64_t kinds, int64_t count) {
    return torch::stable::new_empty(x, {weight_gradients ? kinds : 0, count}, compute);
  };
  Tensor grad_units = grad(3, p.units), grad_sensory = grad(4, p.sensory.count),
         grad_recurrent = grad(4, p.recurrent.count);
  p.grad_x = input_gradient ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_h0 = grad_h0.mutable_data_ptr();
  p.grad_timespans = grad_timespans.mutable_data_ptr();
  if (weight_gradients) {
    p.grad_unit_weights = grad_units.mutable_data_ptr();
    p.sensory.grad_weights = grad_sensory.mutable_data_ptr();
    p.recurrent.grad_weights = grad_recurrent.mutable_data_ptr();
  }
  if (p.batch * p.units > 0) {
    const Tensor workspace = a.workspace(x, compute, true);
    EMBER_LAUNCH(ltc_scan_backward, p, x);
  } else {
    for (Tensor* t :
         {&grad_x, &grad_h0, &grad_units, &grad_sensory, &grad_recurrent, &grad_timespans}) {
      torch::stable::zero_(*t);
    }
  }
  return {grad_x, grad_h0, grad_units, grad_sensory, grad_recurrent, grad_timespans};
}

#ifndef EMBER_CUDA

// A packed network: what ltc_packed_size() says, then the maps of input, C [2, inputs], and output,
// C [2, outputs]. plan: inputs, units, outputs, numbers of synapses from inputs and from units,
// solver steps, and whether there are the maps.
struct Plan {
  LtcScanParams p{};
  bool has_input_map, has_output_map;

  explicit Plan(const std::vector<int64_t>& plan) {
    STD_TORCH_CHECK(plan.size() == 8, "ember_ext.ltc_scan: invalid arguments");
    p.inputs = p.sensory.num_sources = plan[0];
    p.units = p.recurrent.num_sources = plan[1];
    p.outputs = plan[2];
    p.sensory.count = plan[3];
    p.recurrent.count = plan[4];
    p.unfolds = plan[5];
    has_input_map = plan[6];
    has_output_map = plan[7];
  }
  int64_t size() const {
    return ltc_packed_size(p) + (has_input_map ? 2 * p.inputs : 0) +
           (has_output_map ? 2 * p.outputs : 0);
  }
};

Tensor ltc_scan_pack(const Tensor& unit_weights, const Tensor& sensory_weights,
                     const Tensor& recurrent_weights, const Tensor& sensory,
                     const Tensor& recurrent, MaybeTensor input_map, MaybeTensor output_map,
                     std::vector<int64_t> plan_) {
  const Plan plan(plan_);
  const ScalarType compute = unit_weights.scalar_type();
  LtcArguments a(unit_weights);
  LtcScanParams& p = a.p = plan.p;
  p.dtype = dtype_of(unit_weights);
  a.describe_network(unit_weights, sensory_weights, recurrent_weights, sensory, recurrent);
  a.expect(p.sensory.count == plan.p.sensory.count && p.recurrent.count == plan.p.recurrent.count);
  a.expect(plan.has_input_map == input_map.has_value());
  a.expect(plan.has_output_map == output_map.has_value());
  a.expect(input_map, 2 * p.inputs, compute);
  a.expect(output_map, 2 * p.outputs, compute);
  Tensor packed = torch::stable::new_empty(unit_weights, {plan.size()});
  p.packed = packed.mutable_data_ptr();
  EMBER_LAUNCH(ltc_scan_pack, p, unit_weights);
  const size_t element = compute == ScalarType::Double ? 8 : 4;
  char* to = static_cast<char*>(p.packed) + size_t(ltc_packed_size(p)) * element;
  for (const MaybeTensor* map : {&input_map, &output_map}) {
    if (!*map) continue;
    const size_t bytes = size_t((*map)->numel()) * element;
    std::memcpy(to, a.hold(**map), bytes);
    to += bytes;
  }
  return packed;
}

// Runs a packed network without a gradient. x is [batch, steps, inputs], or [batch, inputs] for a
// single step; timespans is shaped likewise. Returns the outputs, shaped as x, and the final state
// [batch, units]; or two empty tensors [0] if what the weights were packed from, under `watch`,
// holds something else now.
std::tuple<Tensor, Tensor> ltc_scan_packed(const Tensor& x_, const Tensor& h_,
                                           const Tensor& timespans, MaybeTensor lengths,
                                           const Tensor& packed, std::vector<int64_t> plan_,
                                           double eps, int64_t watch) {
  if (!unchanged(watch)) {
    return {torch::stable::new_empty(x_, {0}), torch::stable::new_empty(h_, {0})};
  }
  const Plan plan(plan_);
  const ScalarType compute = compute_type(x_);
  const Tensor x = dense(x_), h = dense(h_);
  const bool single = x.dim() == 2;
  LtcArguments a(x);
  LtcScanParams& p = a.p = plan.p;
  p.dtype = dtype_of(x);
  p.eps = eps;
  a.expect((single || x.dim() == 3) && h.dim() == 2);
  p.batch = x.size(0);
  p.steps = single ? 1 : x.size(1);
  a.expect(x.size(single ? 1 : 2) == p.inputs && h.size(0) == p.batch && h.size(1) == p.units);
  a.expect(h, h.numel(), compute);
  a.expect(packed, plan.size(), compute);
  a.expect(timespans, p.batch * p.steps, compute);
  a.expect(lengths, p.batch, ScalarType::Long);
  Tensor y = single ? torch::stable::new_empty(x, {p.batch, p.outputs})
                    : torch::stable::new_empty(x, {p.batch, p.steps, p.outputs});
  Tensor last = torch::stable::new_empty(h, {p.batch, p.units});
  if (p.batch * p.units == 0) return {y, last};
  const int64_t element = compute == ScalarType::Double ? 8 : 4;
  char* memory = static_cast<char*>(packed.mutable_data_ptr());
  p.packed = memory;
  memory += ltc_packed_size(p) * element;
  if (plan.has_input_map) {
    p.input_map = memory;
    memory += 2 * p.inputs * element;
  }
  if (plan.has_output_map) p.output_map = memory;
  p.x = x.const_data_ptr();
  p.h0 = h.const_data_ptr();
  p.timespans = a.hold(timespans);
  p.lengths = static_cast<const int64_t*>(a.hold(lengths));
  p.y = y.mutable_data_ptr();
  p.h_last = last.mutable_data_ptr();
  // A tensor would take as long as a solver step of a small network.
  alignas(64) char small[1 << 15];
  Tensor large;
  p.workspace = small;
  const int64_t size = ltc_workspace(p, torch_threads().threads, false);
  if (size * element > int64_t(sizeof(small))) {
    large = new_buffer(x, size, compute);
    p.workspace = large.mutable_data_ptr();
  }
  EMBER_LAUNCH(ltc_scan_forward, p, x);
  return {y, last};
}

#endif

}  // namespace

void register_ltc_scan(torch::stable::detail::StableLibrary& library) {
  library.impl("ltc_scan", TORCH_BOX(&ltc_scan_forward));
  library.impl("ltc_scan_forward", TORCH_BOX(&ltc_scan_forward));
  library.impl("ltc_scan_backward", TORCH_BOX(&ltc_scan_backward));
#ifndef EMBER_CUDA
  library.impl("ltc_scan_pack", TORCH_BOX(&ltc_scan_pack));
  library.impl("ltc_scan_packed", TORCH_BOX(&ltc_scan_packed));
#endif
}

}  // namespace binding
}  // namespace ember

#ifndef EMBER_CUDA
// For ember_ext/ops/_sizes.py: elements of a packed network without its maps.
extern "C" __attribute__((visibility("default"))) int64_t
ember_ext_ltc_packed_size(int64_t inputs, int64_t units, int64_t sensory, int64_t recurrent) {
  ember::LtcScanParams p{};
  p.inputs = inputs;
  p.units = units;
  p.sensory.num_sources = inputs;
  p.sensory.count = sensory;
  p.recurrent.num_sources = units;
  p.recurrent.count = recurrent;
  return ember::ltc_packed_size(p);
}
#endif
