// ember_ext::cfc_scan_forward and cfc_scan_backward: tensors to CfcScanParams.
//
// Shapes, dtypes, devices and values are checked and explained in ember_ext/ops/cfc_scan.py. Here
// those checks are repeated, tersely, that memory safety rests on.
#include "../common/cfc_scan.h"

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/chunks.h"
#include "arguments.h"
#ifndef EMBER_CUDA
#include "watch.h"
#endif

EMBER_KERNEL(cfc_scan_forward, CfcScanParams)
EMBER_KERNEL(cfc_scan_backward, CfcScanParams)
#ifdef EMBER_CUDA
namespace ember {
namespace cuda {
int64_t cfc_scan_workspace(const CfcScanParams& p, bool backward);
}
}  // namespace ember
#else
EMBER_KERNEL(cfc_scan_pack, CfcScanParams)
#endif

namespace ember {
namespace binding {
namespace {

// The parameter struct and what it points to.
struct CfcArguments : Arguments {
  CfcScanParams p{};
  std::vector<CfcLayer> layers;

  explicit CfcArguments(const Tensor& like) : Arguments("cfc_scan", like) {}

  // p.dtype, batch, steps, inputs, hidden and chunk are set.
  void describe(const Tensors& weights, const MaybeTensor& timespans, const MaybeTensor& lengths,
                const MaybeTensor& dropout_scale, const MaybeTensor& decay, int64_t mode,
                int64_t activation) {
    p.mode = static_cast<CfcMode>(mode);
    p.activation = static_cast<CfcActivation>(activation);
    p.num_layers = int64_t(weights.size());
    expect(p.num_layers > 0 && p.inputs >= 0 && p.chunk >= 0);
    const ScalarType compute = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    const int64_t cells = p.batch * p.steps;
    int64_t inputs = p.inputs + p.hidden;
    layers.resize(weights.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      const bool is_heads = l + 1 == weights.size();
      CfcLayer& layer = layers[l];
      expect(weights[l].dim() == 2);
      layer.segments = !is_heads ? 1 : p.mode == CfcMode::pure ? 1 : timespans ? 4 : 3;
      layer.units = is_heads ? p.hidden : weights[l].size(0);
      layer.inputs = inputs;
      inputs = layer.units;
      expect(weights[l].size(0) == layer.segments * layer.units);
      expect(weights[l], (1 + layer.inputs) * weights[l].size(0), compute);
      layer.weight = hold(weights[l]);
    }
    expect(timespans, cells, compute);
    expect(lengths, p.batch, ScalarType::Long);
    const int64_t scaled = p.num_layers - 2;
    expect(dropout_scale, scaled > 0 ? cells * scaled * layers[0].units : 0, compute);
    for (int64_t l = 1; dropout_scale && l <= scaled; ++l) {
      expect(layers[l].units == layers[0].units);
    }
    expect(decay, 2 * p.hidden, compute);
    expect(p.mode != CfcMode::pure || (timespans && decay));
    p.heads = layers.back().segments;
    p.timespans = hold(timespans);
    p.lengths = static_cast<const int64_t*>(hold(lengths));
    p.dropout_scale = hold(dropout_scale);
    p.decay = hold(decay);
    cfc_lay_out(p, layers.data());
  }

  Tensor workspace(const Tensor& like, ScalarType compute, bool backward) {
#ifdef EMBER_CUDA
    const int64_t size = cuda::cfc_scan_workspace(p, backward);
#else
    const int64_t size = cfc_workspace(p, backward).size;
#endif
    Tensor t = new_buffer(like, size, compute);
    p.workspace = t.mutable_data_ptr();
    return t;
  }
};

int64_t saved_size(const CfcScanParams& p) {
  if (!p.chunk) return cfc_tape_size(p, p.steps);
  return count_chunks(p.steps, p.chunk) * p.batch * p.hidden;
}

// chunk < 0: nothing is saved; 0: the tape; > 0: the states at the chunks' borders.
std::tuple<Tensor, Tensor, Tensor> cfc_scan_forward(const Tensor& x, const Tensor& h0,
                                                    Tensors weights, MaybeTensor timespans,
                                                    MaybeTensor lengths, MaybeTensor dropout_scale,
                                                    MaybeTensor decay, int64_t mode,
                                                    int64_t activation, int64_t chunk) {
  const ScalarType compute = compute_type(x);
  CfcArguments a(x);
  CfcScanParams& p = a.p;
  a.expect(x.dim() == 3 && h0.dim() == 2);
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.steps = x.size(1);
  p.inputs = x.size(2);
  p.hidden = h0.size(1);
  p.chunk = chunk_within(chunk, p.steps);
  a.describe(weights, timespans, lengths, dropout_scale, decay, mode, activation);
  a.expect(h0, p.batch * p.hidden, compute);
  p.x = a.hold(x);
  p.h0 = a.hold(h0);
  p.h_stride = p.hidden;
  Tensor y = torch::stable::new_empty(x, {p.batch, p.steps, p.hidden});
  Tensor h_last = torch::stable::new_empty(x, {p.batch, p.hidden}, compute);
  Tensor saved = new_buffer(x, chunk < 0 ? 0 : saved_size(p), compute);
  p.y = y.mutable_data_ptr();
  p.h_last = h_last.mutable_data_ptr();
  p.saved = chunk < 0 ? nullptr : saved.mutable_data_ptr();
  if (p.batch * p.hidden > 0) {
    const Tensor workspace = a.workspace(x, compute, false);
    EMBER_LAUNCH(cfc_scan_forward, p, x);
  }
  return {y, h_last, saved};
}

// Gradients of x, h0, the weights, the time spans and decay; empty where not asked for.
std::tuple<Tensor, Tensor, Tensors, Tensor, Tensor> cfc_scan_backward(
    const Tensor& grad_y, const Tensor& grad_h_last, const Tensor& saved, MaybeTensor x,
    Tensors weights, MaybeTensor timespans, MaybeTensor lengths, MaybeTensor dropout_scale,
    MaybeTensor decay, int64_t mode, int64_t activation, int64_t chunk, bool input_gradient,
    bool weight_gradients) {
  const ScalarType compute = compute_type(grad_y);
  CfcArguments a(grad_y);
  CfcScanParams& p = a.p;
  a.expect(grad_y.dim() == 3 && !weights.empty() && weights[0].dim() == 2);
  p.dtype = dtype_of(grad_y);
  p.batch = grad_y.size(0);
  p.steps = grad_y.size(1);
  p.hidden = grad_y.size(2);
  p.inputs = weights[0].size(1) - 1 - p.hidden;
  p.chunk = chunk_within(chunk, p.steps);
  a.describe(weights, timespans, lengths, dropout_scale, decay, mode, activation);
  a.expect(grad_h_last, p.batch * p.hidden, compute);
  a.expect(saved, saved_size(p), compute);
  a.expect(x, p.batch * p.steps * p.inputs, grad_y.scalar_type());
  a.expect(x || !chunk);
  p.x = a.hold(x);
  p.grad_y = a.hold(grad_y);
  p.grad_h_last = a.hold(grad_h_last);
  p.saved = saved.mutable_data_ptr();
  const int64_t wanted = input_gradient ? 1 : 0;
  Tensor grad_x =
      torch::stable::new_empty(grad_y, {wanted * p.batch, p.steps, p.inputs}, grad_y.scalar_type());
  Tensor grad_h0 = torch::stable::new_empty(grad_y, {p.batch, p.hidden}, compute);
  Tensor grad_timespans =
      torch::stable::new_empty(grad_y, {timespans ? p.batch : 0, p.steps}, compute);
  Tensor grad_decay =
      torch::stable::new_empty(grad_y, {decay && weight_gradients ? 2 : 0, p.hidden}, compute);
  Tensors grad_weights;
  for (size_t l = 0; l < weights.size(); ++l) {
    const int64_t rows = weight_gradients ? weights[l].size(0) : 0;
    grad_weights.push_back(torch::stable::new_empty(grad_y, {rows, weights[l].size(1)}, compute));
    if (weight_gradients) a.layers[l].grad_weight = grad_weights[l].mutable_data_ptr();
  }
  p.grad_x = input_gradient ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_h0 = grad_h0.mutable_data_ptr();
  p.grad_timespans = timespans ? grad_timespans.mutable_data_ptr() : nullptr;
  p.grad_decay = decay && weight_gradients ? grad_decay.mutable_data_ptr() : nullptr;
  if (p.batch * p.hidden > 0) {
    const Tensor workspace = a.workspace(grad_y, compute, true);
    EMBER_LAUNCH(cfc_scan_backward, p, grad_y);
  } else {
    // Nothing depends on anything, and forward has not been there to write `saved`.
    for (Tensor* t : {&grad_x, &grad_h0, &grad_timespans, &grad_decay}) torch::stable::zero_(*t);
    for (Tensor& t : grad_weights) torch::stable::zero_(t);
  }
  return {grad_x, grad_h0, grad_weights, grad_timespans, grad_decay};
}

#ifndef EMBER_CUDA

// The layers of a cell whose backbone has these widths; p has the other sizes.
void describe_layers(CfcScanParams& p, std::vector<CfcLayer>& layers, const int64_t* widths) {
  layers.assign(size_t(p.num_layers), CfcLayer{});
  int64_t inputs = p.inputs + p.hidden;
  for (CfcLayer& layer : layers) {
    const bool is_heads = &layer == &layers.back();
    layer.inputs = inputs;
    layer.segments = is_heads ? p.heads : 1;
    layer.units = inputs = is_heads ? p.hidden : *widths++;
  }
  cfc_lay_out(p, layers.data());
}

// Elements of a packed cell: its weights, and room for decay.
int64_t packed_size(const CfcScanParams& p) {
  return cfc_packed_size(p) + 2 * p.hidden;
}

// Cells stacked on each other, for inference. plan: activation, mode, then for each cell inputs,
// hidden, heads, the number of layers and the backbone's widths. packed: for each cell its weights
// and, in mode pure, decay.
class Stack {
 public:
  Stack(const Arguments& arguments, const std::vector<int64_t>& plan)
      : arguments_(arguments), plan_(plan), at_(2) {
    arguments_.expect(plan.size() >= 2);
  }

  bool next(CfcScanParams& p, std::vector<CfcLayer>& layers) {
    if (at_ == plan_.size()) return false;
    arguments_.expect(at_ + 4 <= plan_.size());
    p.activation = static_cast<CfcActivation>(plan_[0]);
    p.mode = static_cast<CfcMode>(plan_[1]);
    p.inputs = plan_[at_];
    p.hidden = plan_[at_ + 1];
    p.heads = plan_[at_ + 2];
    p.num_layers = plan_[at_ + 3];
    at_ += 4;
    arguments_.expect(p.num_layers > 0 && at_ + size_t(p.num_layers) - 1 <= plan_.size());
    describe_layers(p, layers, plan_.data() + at_);
    at_ += size_t(p.num_layers) - 1;
    return true;
  }

 private:
  const Arguments& arguments_;
  const std::vector<int64_t>& plan_;
  size_t at_;
};

// weights: for each cell its layers' matrices and, in mode pure, decay.
Tensor cfc_scan_pack(Tensors weights, std::vector<int64_t> plan) {
  STD_TORCH_CHECK(!weights.empty(), "ember_ext.cfc_scan: no weights to pack");
  const Tensor& like = weights[0];
  CfcArguments a(like);
  const int64_t element = dtype_of(like) == DType::f64 ? 8 : 4;
  int64_t size = 0;
  CfcScanParams p{};
  p.dtype = dtype_of(like);
  std::vector<CfcLayer> layers;
  for (Stack stack(a, plan); stack.next(p, layers);) size += packed_size(p);
  Tensor packed = torch::stable::new_empty(like, {size});
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  size_t i = 0;
  for (Stack stack(a, plan); stack.next(p, layers);) {
    for (CfcLayer& layer : layers) {
      a.expect(i < weights.size());
      a.expect(weights[i], layer.segments * layer.units * (1 + layer.inputs), like.scalar_type());
      layer.weight = a.hold(weights[i++]);
    }
    p.packed = to;
    EMBER_LAUNCH(cfc_scan_pack, p, like);
    to += cfc_packed_size(p) * element;
    if (p.mode == CfcMode::pure) {
      a.expect(i < weights.size());
      a.expect(weights[i], 2 * p.hidden, like.scalar_type());
      std::memcpy(to, a.hold(weights[i++]), size_t(2 * p.hidden * element));
    }
    to += 2 * p.hidden * element;
  }
  return packed;
}

// Runs the whole stack, each cell over the states of the one before, without a gradient. x is
// [batch, steps, inputs], or [batch, inputs] for a single step; timespans is shaped likewise.
// Returns the last cell's states, shaped as x, and the final states [batch, all hidden]; or two
// empty tensors [0] if what the weights were packed from, under `watch`, holds something else now.
std::tuple<Tensor, Tensor> cfc_scan_packed(const Tensor& x_, const Tensor& h_,
                                           MaybeTensor timespans, MaybeTensor lengths,
                                           const Tensor& packed, std::vector<int64_t> plan,
                                           int64_t watch) {
  const ScalarType compute = compute_type(x_);
  if (!unchanged(watch)) {
    return {torch::stable::new_empty(x_, {0}), torch::stable::new_empty(h_, {0})};
  }
  const Tensor x = dense(x_), h = dense(h_);
  const bool single = x.dim() == 2;
  CfcArguments a(x);
  a.expect((single || x.dim() == 3) && h.dim() == 2);
  CfcScanParams& p = a.p;
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.steps = single ? 1 : x.size(1);
  a.expect(h.size(0) == p.batch);
  a.expect(h, h.numel(), compute);
  a.expect(timespans, p.batch * p.steps, compute);
  a.expect(lengths, p.batch, ScalarType::Long);
  const int64_t element = compute == ScalarType::Double ? 8 : 4;
  char* weights = static_cast<char*>(packed.mutable_data_ptr());
  p.packed = weights;
  int64_t scratch = 0, between = 0, states = 0, packed_elements = 0,
          inputs = x.size(single ? 1 : 2);
  for (Stack stack(a, plan); stack.next(p, a.layers);) {
    a.expect(p.inputs == inputs);
    a.expect(p.heads == 3 || (timespans && p.heads == (p.mode == CfcMode::pure ? 1 : 4)));
    const int64_t own = cfc_workspace(p, false).size;
    scratch = own > scratch ? own : scratch;
    between = p.hidden > between ? p.hidden : between;
    states += p.hidden;
    packed_elements += packed_size(p);
    inputs = p.hidden;
  }
  a.expect(states > 0 && states == h.size(1));
  a.expect(packed, packed_elements, compute);
  Tensor y = single ? torch::stable::new_empty(x, {p.batch, inputs})
                    : torch::stable::new_empty(x, {p.batch, p.steps, inputs});
  Tensor last = torch::stable::new_empty(h, {p.batch, states});
  if (p.batch == 0) return {y, last};
  // A cell reads its input from the buffer that the cell before wrote its output to. One step of
  // one row fits the stack, which saves asking torch for memory.
  between = cfc_pad(p.batch * p.steps * between);
  alignas(64) char on_stack[1 << 16];
  MaybeTensor on_heap;
  char* workspace = on_stack;
  if ((scratch + 2 * between) * element > int64_t(sizeof(on_stack))) {
    on_heap = new_buffer(x, scratch + 2 * between, compute);
    workspace = static_cast<char*>(on_heap->mutable_data_ptr());
  }
  char* buffers[2] = {workspace + scratch * element, workspace + (scratch + between) * element};
  p.x = x.const_data_ptr();
  p.timespans = a.hold(timespans);
  p.lengths = static_cast<const int64_t*>(a.hold(lengths));
  p.workspace = workspace;
  p.h_stride = states;
  const char* from = static_cast<const char*>(h.const_data_ptr());
  char* to = static_cast<char*>(last.mutable_data_ptr());
  int64_t done = 0;
  for (Stack stack(a, plan); stack.next(p, a.layers); std::swap(buffers[0], buffers[1])) {
    p.packed = weights;
    weights += cfc_packed_size(p) * element;
    p.decay = weights;
    weights += 2 * p.hidden * element;
    p.h0 = from + done * element;
    p.h_last = to + done * element;
    done += p.hidden;
    p.y = done == states ? y.mutable_data_ptr() : buffers[0];
    EMBER_LAUNCH(cfc_scan_forward, p, x);
    p.x = p.y;
  }
  return {y, last};
}

#endif

}  // namespace

void register_cfc_scan(torch::stable::detail::StableLibrary& library) {
  library.impl("cfc_scan", TORCH_BOX(&cfc_scan_forward));
  library.impl("cfc_scan_forward", TORCH_BOX(&cfc_scan_forward));
  library.impl("cfc_scan_backward", TORCH_BOX(&cfc_scan_backward));
#ifndef EMBER_CUDA
  library.impl("cfc_scan_pack", TORCH_BOX(&cfc_scan_pack));
  library.impl("cfc_scan_packed", TORCH_BOX(&cfc_scan_packed));
#endif
}

}  // namespace binding
}  // namespace ember

#ifndef EMBER_CUDA
// For ember_ext/ops/_sizes.py: elements of a cell's tape for each row and step, of the tape for
// each row besides, and of the packed cell.
extern "C" __attribute__((visibility("default"))) void ember_ext_cfc_sizes(
    int64_t inputs, int64_t hidden, int64_t heads, int64_t backbone_layers,
    const int64_t* backbone_widths, int64_t* sizes) {
  ember::CfcScanParams p{};
  p.batch = 1;
  p.inputs = inputs;
  p.hidden = hidden;
  p.heads = heads;
  p.num_layers = backbone_layers + 1;
  std::vector<ember::CfcLayer> layers;
  ember::binding::describe_layers(p, layers, backbone_widths);
  sizes[1] = ember::cfc_tape_size(p, 0);
  sizes[0] = ember::cfc_tape_size(p, 1) - sizes[1];
  sizes[2] = ember::binding::packed_size(p);
}
#endif
