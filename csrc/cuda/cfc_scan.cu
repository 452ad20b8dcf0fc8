// Launchers of the CfC scan's kernels.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "cfc_product.cuh"
#include "cfc_scan.cuh"
#include "cluster_launch.cuh"

namespace ember {
namespace cuda {
namespace {

// Where the parts of the workspace begin, in elements of C.
struct Workspace {
  int64_t packed, packed_back, tape, grads, partial_grads, decay_grads, vectors, size;
};

// Columns of a layer's output, and the depth of what it multiplies at every step: of the first
// layer's input only the state.
int64_t columns_of(const CfcLayer& layer) {
  return layer.segments * layer.units;
}
int64_t depth_of(const CfcScanParams& p, int64_t l) {
  return l ? p.layers[l].inputs : p.hidden;
}

// Steps to a chunk: as many as were asked for where only states are kept, else enough to keep a GPU
// busy with the products of a chunk.
int64_t chunk_steps(const CfcScanParams& p, bool backward) {
  int64_t steps = 16384 / std::max<int64_t>(p.batch, 1);
  if (steps < 16) steps = 16;
  if (p.chunk && (backward || p.saved)) steps = p.chunk;
  return std::max<int64_t>(std::min(steps, p.steps), 1);
}

// Elements of a layer's weights as one pass multiplies by them.
int64_t packed_size(const CfcScanParams& p, int64_t l, bool backward) {
  const CfcLayer& layer = p.layers[l];
  const int64_t depth = backward ? columns_of(layer) : depth_of(p, l);
  const int64_t heads = backward ? 1 : layer.segments;
  const int64_t units = backward ? depth_of(p, l) : layer.units;
  return depth * heads * ceil_div(units, kCfcParts) * kCfcParts;
}

// How the rows that a weight's gradient is summed over are split: into enough blocks to fill a GPU,
// and into so few rows that fp32 sums of kCfcStretch of them stay accurate.
int64_t rows_of_split(const CfcLayer& layer, int64_t rows) {
  const int64_t tiles =
      ceil_div(columns_of(layer), kCfcProductTile) * ceil_div(1 + layer.inputs, kCfcProductTile);
  const int64_t enough_blocks = 512;
  const int64_t splits = std::max(ceil_div(enough_blocks, std::max<int64_t>(tiles, 1)),
                                  ceil_div(rows, kCfcStretch * kCfcStretch));
  return std::max<int64_t>(ceil_div(rows, splits), kCfcProductTile);
}

// Vectors of a block, each of as many values as it has rows.
int64_t vectors_of(const CfcScanParams& p, bool backward) {
  int64_t vectors = backward ? p.hidden : 2 * p.hidden;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    vectors += backward ? columns_of(p.layers[l]) : l ? p.layers[l].inputs : 0;
  }
  return vectors;
}

Workspace workspace_of(const CfcScanParams& p, bool backward) {
  const int64_t steps = chunk_steps(p, backward), rows = steps * p.batch;
  const bool runs_forward = !backward || p.chunk;
  int64_t packed = 0, packed_back = 0, grads = 0, partial_grads = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const CfcLayer& layer = p.layers[l];
    packed += packed_size(p, l, false);
    packed_back += packed_size(p, l, true);
    grads += rows * columns_of(layer);
    if (layer.grad_weight) {
      const int64_t splits = ceil_div(rows, rows_of_split(layer, rows));
      partial_grads = std::max(partial_grads, splits * columns_of(layer) * (1 + layer.inputs));
    }
  }
  Workspace w{};
  const auto take = [&w](int64_t& part, int64_t elements) {
    part = w.size;
    w.size += cfc_pad(elements);
  };
  if (runs_forward) {
    take(w.packed, packed);
    take(w.tape, p.saved && !p.chunk ? 0 : cfc_tape_size(p, steps));
  }
  if (backward) {
    take(w.packed_back, packed_back);
    take(w.grads, grads);
    take(w.partial_grads, partial_grads);
    take(w.decay_grads, p.grad_decay ? p.batch * 2 * p.hidden : 0);
  }
  // Rows of the batch, rounded up to blocks of 4.
  take(w.vectors, (p.batch + 3) * std::max(vectors_of(p, false), vectors_of(p, backward)));
  return w;
}

template <typename T>
class Scan {
 public:
  using C = compute_t<T>;

  Scan(const CfcScanParams& p, bool backward, cudaStream_t stream)
      : p_(p),
        stream_(stream),
        backward_(backward),
        at_(workspace_of(p, backward)),
        chunk_(chunk_steps(p, backward)),
        clusters_(ceil_div(p.batch, kCfcRows<C>)),
        has_tape_(p.saved && !p.chunk),
        workspace_(static_cast<C*>(p.workspace)),
        tape_(has_tape_ ? static_cast<C*>(p.saved) : workspace_ + at_.tape),
        slots_(has_tape_ ? p.steps : chunk_) {}

  cudaError_t forward() {
    cudaError_t status = prepare();
    if (status == cudaSuccess) status = pack(false);
    // Without steps the state still has to be handed on.
    for (int64_t first = 0; status == cudaSuccess && (first == 0 || first < p_.steps);
         first += chunk_) {
      CfcScanPlan plan = plan_for(false, first);
      plan.keep = has_tape_;
      plan.from = first ? p_.h_last : p_.h0;
      plan.from_stride = plan.to_stride = p_.h_stride;
      plan.to = p_.h_last;
      if (p_.saved && p_.chunk && p_.steps) plan.border = border(first);
      status = forward_chunk(plan);
    }
    return status;
  }

  cudaError_t backward() {
    cudaError_t status = prepare();
    if (status == cudaSuccess && p_.chunk) status = pack(false);
    if (status == cudaSuccess) status = pack(true);
    if (status == cudaSuccess && p_.grad_decay) {
      status = sum(nullptr, 0, p_.batch * 2 * p_.hidden, false, workspace_ + at_.decay_grads);
    }
    const int64_t chunks = std::max<int64_t>(ceil_div(p_.steps, chunk_), 1);
    for (int64_t c = chunks - 1; status == cudaSuccess && c >= 0; --c) {
      const bool is_last = c == chunks - 1;
      if (p_.chunk && p_.steps) {
        CfcScanPlan plan = plan_for(false, c * chunk_);
        plan.keep = true;
        plan.from = border(plan.first);
        plan.from_stride = p_.hidden;
        status = forward_chunk(plan);
        if (status != cudaSuccess) return status;
      }
      CfcScanPlan plan = plan_for(true, c * chunk_);
      plan.from = is_last ? p_.grad_h_last : p_.grad_h0;
      plan.to = p_.grad_h0;
      plan.from_stride = plan.to_stride = p_.hidden;
      if (p_.grad_decay) plan.decay_grads = workspace_ + at_.decay_grads;
      status = scan(true, plan);
      if (status == cudaSuccess && p_.grad_x) status = input_gradient(plan);
      for (int64_t l = 0; status == cudaSuccess && l < p_.num_layers; ++l) {
        if (p_.layers[l].grad_weight) status = weight_gradient(l, plan, !is_last);
      }
    }
    if (status == cudaSuccess && p_.grad_decay) {
      status = sum(workspace_ + at_.decay_grads, p_.batch, 2 * p_.hidden, false,
                   static_cast<C*>(p_.grad_decay));
    }
    return status;
  }

 private:
  // What plan_for() rests on.
  cudaError_t prepare() {
    const int64_t most = 1 << 24;
    int64_t widest = p_.hidden;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      widest = std::max(widest, std::max(p_.layers[l].inputs, columns_of(p_.layers[l])));
    }
    if (p_.num_layers > kCfcMostLayers || widest > most || chunk_ > 0x7fffffff) {
      return cudaErrorInvalidValue;
    }
    int bytes = 0;
    const cudaError_t status = most_shared_memory(bytes);
    shared_limit_ = bytes / int(sizeof(C));
    if (status != cudaSuccess) return status;
    if (!backward_ || p_.chunk) cluster_log2_[false] = choose_cluster(false);
    if (backward_) cluster_log2_[true] = choose_cluster(true);
    return status;
  }

  // The smallest clusters whose blocks hold all weights, or else the largest; of those the largest
  // that the device runs. What does not fit in a cluster's shared memory, either, its blocks read
  // at every step as a single block does, each its share.
  int choose_cluster(bool backward) {
    CfcScanPlan plan = plan_for(backward, 0, 0);
    while (plan.cluster_log2 < kCfcMostClusterLog2 && !holds_all_weights(plan)) {
      plan = plan_for(backward, 0, plan.cluster_log2 + 1);
    }
    while (plan.cluster_log2 > 0 && !runs_in_clusters(backward, plan)) {
      plan = plan_for(backward, 0, plan.cluster_log2 - 1);
    }
    return plan.cluster_log2;
  }

  bool runs_in_clusters(bool backward, const CfcScanPlan& plan) const {
    return !plan.vectors && cuda::runs_in_clusters(recurrence(backward), 1 << plan.cluster_log2,
                                                   kCfcThreads, size_t(shared_limit_) * sizeof(C));
  }

  bool holds_all_weights(const CfcScanPlan& plan) const {
    return std::all_of(plan.layers, plan.layers + p_.num_layers, [](const CfcScanLayer& layer) {
      const CfcMap& map = layer.map;
      return map.resident * map.slices >= map.depth;
    });
  }

  C* border(int64_t first) const {
    return static_cast<C*>(p_.saved) + first / chunk_ * p_.batch * p_.hidden;
  }

  CfcScanPlan plan_for(bool backward, int64_t first) {
    return plan_for(backward, first, cluster_log2_[backward]);
  }

  // Depends on shapes, the size of a cluster and, for what is resident, on the device.
  CfcScanPlan plan_for(bool backward, int64_t first, int cluster_log2) {
    CfcScanPlan plan{};
    plan.cluster_log2 = cluster_log2;
    const int blocks = 1 << cluster_log2;
    plan.first = first;
    plan.steps = int(std::min(chunk_, p_.steps - first));
    const int64_t slot = has_tape_ ? first : 0;
    const C* packed = packed_weights(backward);
    C* grads = workspace_ + at_.grads;
    int64_t exchange = 0, vectors = backward ? p_.hidden : 2 * p_.hidden;
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& from = p_.layers[l];
      CfcScanLayer& layer = plan.layers[l];
      CfcMap& map = layer.map;
      map.weight = packed;
      packed += packed_size(p_, l, backward);
      map.heads = backward ? 1 : int(from.segments);
      map.depth = int(backward ? columns_of(from) : depth_of(p_, l));
      map.units = int(backward ? depth_of(p_, l) : from.units);
      map.packs = int(ceil_div(map.units, kCfcParts));
      map.row = map.packs * map.heads;
      map.width = int(ceil_div(map.packs, blocks)) * map.heads;
      layer.vector = int(backward || l ? vectors : 0);
      vectors += backward ? columns_of(from) : l ? from.inputs : 0;
      share_out(map, blocks);
      map.turn = kWarp / std::gcd(map.lanes, kWarp);
      exchange =
          std::max(exchange, int64_t(map.slices) * kCfcParts * map.part_stride() * kCfcRows<C>);
      layer.bias = from.weight;
      layer.bias_stride = 1 + from.inputs;
      layer.input_stride = from.input_stride;
      layer.kept_stride = from.kept_stride;
      const int64_t rows = slots_ * p_.batch, at = slot * p_.batch;
      layer.input = tape_ + from.input_offset * rows + at * from.input_stride;
      layer.kept = tape_ + from.kept_offset * rows + at * from.kept_stride;
      layer.grads = grads;
      grads += chunk_ * p_.batch * columns_of(from);
    }
    plan.sums_at = int(exchange);
    // What exchanges of a cluster need twice, see CfcBlock::turn.
    const int turns = blocks > 1 ? 2 : 1;
    if (backward) vectors += (turns - 1) * columns_of(p_.layers[p_.num_layers - 1]);
    plan.vectors_at = plan.sums_at + turns * blocks * kCfcThreads / kWarp * kCfcRows<C>;
    shared_ = plan.vectors_at;
    plan.vectors_size = vectors;
    if (shared_ + vectors * kCfcRows<C> <= shared_limit_) {
      shared_ += vectors * kCfcRows<C>;
    } else {
      plan.vectors = workspace_ + at_.vectors;
    }
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      CfcMap& map = plan.layers[l].map;
      const int64_t row = std::max(map.width, 1) * kCfcParts;
      const int64_t left = std::max<int64_t>(shared_limit_ - shared_, 0);
      map.resident = int(std::min(left / (row * map.slices), ceil_div(map.depth, map.slices)));
      map.resident_at = int(shared_);
      shared_ += row * map.slices * map.resident;
    }
    return plan;
  }

  // Lanes and slices of a map.
  static void share_out(CfcMap& map, int blocks) {
    map.lanes = std::max(std::min(map.width, kCfcThreads / map.heads * map.heads), 1);
    // More slices than that spend their time adding up. A cluster's blocks have few lanes: there,
    // enough slices to give each of a multiprocessor's four schedulers two warps.
    const int most = blocks > 1 ? std::max(4, std::min(24, 8 * kWarp / map.lanes)) : 8;
    map.slices = std::max(std::min({kCfcThreads / map.lanes, map.depth / 8, most}), 1);
  }

  C* packed_weights(bool backward) const {
    return workspace_ + (backward ? at_.packed_back : at_.packed);
  }

  // Forward the depth runs along the weights' columns, backward along their rows.
  cudaError_t pack(bool backward) {
    C* to = packed_weights(backward);
    for (int64_t l = 0; l < p_.num_layers; ++l) {
      const CfcLayer& layer = p_.layers[l];
      const int64_t row = 1 + layer.inputs, size = packed_size(p_, l, backward);
      const C* weight = static_cast<const C*>(layer.weight) + row - depth_of(p_, l);
      const cudaError_t status =
          launch(cfc_scan_pack_kernel<C>, ceil_div(size, kCfcRowThreads), kCfcRowThreads, 0,
                 stream_, weight, backward ? row : 1, backward ? 1 : row,
                 backward ? columns_of(layer) : depth_of(p_, l), backward ? 1 : layer.segments,
                 backward ? depth_of(p_, l) : layer.units, to);
      if (status != cudaSuccess) return status;
      to += size;
    }
    return cudaSuccess;
  }

  cudaError_t forward_chunk(const CfcScanPlan& plan) {
    const CfcLayer& first = p_.layers[0];
    const CfcScanLayer& layer = plan.layers[0];
    cudaError_t status = launch(
        cfc_scan_input_kernel<T>, ceil_div(plan.steps * p_.batch, kCfcRowThreads / kWarp),
        kCfcRowThreads, 0, stream_, p_, plan.first, plan.steps, layer.input, layer.input_stride);
    if (status != cudaSuccess) return status;
    CfcProduct product = product_of(plan.steps * p_.batch, columns_of(first), 1 + p_.inputs);
    product.a = layer.input;
    product.a_row = layer.input_stride;
    product.a_depth = 1;
    product.b = first.weight;
    product.b_row = 1 + first.inputs;
    product.b_depth = 1;
    product.out = layer.kept;
    product.row = layer.kept_stride;
    product.columns = std::max<int64_t>(first.units, 1);
    product.outer_column = cfc_pad(first.units);
    status = multiply<C, true, true>(product);
    if (status != cudaSuccess) return status;
    return scan(false, plan);
  }

  using Recurrence = void (*)(CfcScanParams, CfcScanPlan);

  Recurrence recurrence(bool backward) const {
    switch (p_.heads) {
      case 1:
        return backward ? cfc_scan_backward_kernel<T, 1> : cfc_scan_forward_kernel<T, 1>;
      case 3:
        return backward ? cfc_scan_backward_kernel<T, 3> : cfc_scan_forward_kernel<T, 3>;
      default:
        return backward ? cfc_scan_backward_kernel<T, 4> : cfc_scan_forward_kernel<T, 4>;
    }
  }

  size_t shared_bytes() const { return size_t(shared_) * sizeof(C); }

  cudaError_t scan(bool backward, const CfcScanPlan& plan) {
    const Recurrence kernel = recurrence(backward);
    if (plan.cluster_log2 == 0) {
      return launch(kernel, clusters_, kCfcThreads, shared_bytes(), stream_, p_, plan);
    }
    return launch_clusters(kernel, clusters_, 1 << plan.cluster_log2, kCfcThreads, shared_bytes(),
                           stream_, p_, plan);
  }

  cudaError_t input_gradient(const CfcScanPlan& plan) {
    const CfcLayer& first = p_.layers[0];
    CfcProduct product = product_of(plan.steps * p_.batch, p_.inputs, columns_of(first));
    product.a = plan.layers[0].grads;
    product.a_row = columns_of(first);
    product.a_depth = 1;
    product.b = static_cast<const C*>(first.weight) + 1;
    product.b_row = 1;
    product.b_depth = 1 + first.inputs;
    product.out = static_cast<T*>(p_.grad_x) + plan.first * p_.inputs;
    product.rows = std::max<int64_t>(p_.batch, 1);
    product.outer_row = p_.inputs;
    product.row = p_.steps * p_.inputs;
    return multiply<T, true, false>(product);
  }

  cudaError_t weight_gradient(int64_t l, const CfcScanPlan& plan, bool accumulate) {
    const CfcLayer& layer = p_.layers[l];
    const int64_t rows = plan.steps * p_.batch, columns = columns_of(layer);
    CfcProduct product = product_of(columns, 1 + layer.inputs, rows);
    product.a = plan.layers[l].grads;
    product.a_row = 1;
    product.a_depth = columns;
    product.b = plan.layers[l].input;
    product.b_row = 1;
    product.b_depth = layer.input_stride;
    product.depth_of_split = rows_of_split(layer, chunk_ * p_.batch);
    C* partial = workspace_ + at_.partial_grads;
    product.out = partial;
    product.split_stride = columns * (1 + layer.inputs);
    product.row = 1 + layer.inputs;
    if (rows > 0) {
      const cudaError_t status = multiply<C, false, false>(product);
      if (status != cudaSuccess) return status;
    }
    return sum(partial, ceil_div(rows, product.depth_of_split), product.split_stride, accumulate,
               static_cast<C*>(layer.grad_weight));
  }

  // Undivided, and dense but for the stride of its rows, which the caller sets.
  static CfcProduct product_of(int64_t m, int64_t n, int64_t depth) {
    CfcProduct product{};
    product.m = m;
    product.n = n;
    product.depth = depth;
    product.depth_of_split = std::max<int64_t>(depth, 1);
    product.rows = std::max<int64_t>(m, 1);
    product.columns = std::max<int64_t>(n, 1);
    return product;
  }

  template <typename Out, bool a_along_depth, bool b_along_depth>
  cudaError_t multiply(CfcProduct& product) {
    const int64_t tiles_m = ceil_div(product.m, kCfcProductTile);
    const int64_t tiles_n = ceil_div(product.n, kCfcProductTile);
    if (std::max(tiles_m, tiles_n) > 0x7fffffff) return cudaErrorInvalidConfiguration;
    product.tiles_m = unsigned(tiles_m);
    product.tiles_n = unsigned(tiles_n);
    const int64_t splits = std::max<int64_t>(ceil_div(product.depth, product.depth_of_split), 1);
    const size_t shared = 2 * kCfcProductDepth * CfcProductTile<C, true>::kStride * sizeof(C);
    return launch(cfc_scan_product_kernel<C, Out, a_along_depth, b_along_depth>,
                  tiles_m * tiles_n * splits, kCfcProductThreads, shared, stream_, product);
  }

  cudaError_t sum(const C* terms, int64_t count, int64_t size, bool accumulate, C* out) {
    return launch(cfc_scan_sum_kernel<C>, ceil_div(size, kCfcRowThreads), kCfcRowThreads, 0,
                  stream_, terms, count, size, accumulate, out);
  }

  const CfcScanParams& p_;
  cudaStream_t stream_;
  const bool backward_;
  const Workspace at_;
  const int64_t chunk_, clusters_;  // a block is a cluster of one
  const bool has_tape_;
  C *workspace_, *tape_;
  const int64_t slots_;
  int64_t shared_limit_ = 0;  // elements that a block may have
  int64_t shared_ = 0;        // those that the last plan takes
  int cluster_log2_[2] = {};  // of the blocks to a cluster, forward and backward
};

}  // namespace

int64_t cfc_scan_workspace(const CfcScanParams& p, bool backward) {
  return workspace_of(p, backward).size;
}

cudaError_t cfc_scan_forward(const CfcScanParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    status = Scan<std::remove_pointer_t<decltype(element)>>(p, false, stream).forward();
  });
  return status;
}

cudaError_t cfc_scan_backward(const CfcScanParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    status = Scan<std::remove_pointer_t<decltype(element)>>(p, true, stream).backward();
  });
  return status;
}

}  // namespace cuda
}  // namespace ember
