// Launchers of the LIF gate's kernels.
#include <type_traits>

#include "lif_gate.cuh"

namespace ember {
namespace cuda {
namespace {

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Depends on the shape and the alignment of the pointers that are set, on nothing else.
template <typename T>
LifGatePlan plan_for(const LifGateParams& p) {
  const int width = kLifGatePack<T>;
  const bool normed = p.norm != Norm::none, along = normed || p.unit_rows != 0;
  const int packs = along ? kLifGatePacks : 1, most = normed ? kLifGateThreads : kWarp;
  LifGatePlan plan{};
  plan.team = 1;
  // 8 threads access whole cache lines; beyond those, a thread first takes its packs.
  while (plan.team < most && plan.team * width * (plan.team < 8 ? 1 : packs) < p.cols) {
    plan.team *= 2;
  }
  plan.threads = plan.team > kWarp ? plan.team : kLifGateThreads;
  const int64_t held = plan.team * width * packs;
  plan.tile_cols = normed || p.cols < held ? p.cols : held;
  plan.tiles = unsigned(ceil_div(p.cols, plan.tile_cols));
  plan.vectors =
      p.cols % width == 0 && aligned(p.x) && aligned(p.y) && aligned(p.grad_y) &&
      aligned(p.grad_x) &&
      (p.unit_rows != 0 || (aligned(p.threshold) && aligned(p.leak) && aligned(p.steepness)));
  // Enough blocks to fill the largest GPU once or a few times; beyond that, rows that follow each
  // other on one team save loads of parameters and partial sums. 32 keeps fp32 sums accurate.
  const int64_t teams = plan.threads / plan.team, least = along ? 1 : 2 * kLifGatePacks;
  const int64_t rounds = p.rows * plan.tiles / (teams * (along ? 1024 : 2048)) / least * least;
  plan.rounds = int(rounds < least ? least : rounds > 32 ? 32 : rounds);
  plan.row_blocks = ceil_div(p.rows, teams * plan.rounds);
  plan.inner = p.unit_rows ? p.unit_rows * plan.tiles : 1;
  plan.outer = p.unit_rows ? ceil_div(p.rows, p.unit_rows * p.units) : plan.row_blocks;
  return plan;
}

template <typename T, bool normed, bool per_column>
cudaError_t forward(const LifGateParams& p, cudaStream_t stream) {
  const LifGatePlan plan = plan_for<T>(p);
  const size_t exchange = normed ? 2 * plan.threads / kWarp * sizeof(compute_t<T>) : 0;
  return launch(lif_gate_forward_kernel<T, normed, per_column>, plan.row_blocks * plan.tiles,
                plan.threads, exchange, stream, p, plan);
}

template <typename T, bool normed, bool per_column>
cudaError_t backward(const LifGateParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  const LifGatePlan plan = plan_for<T>(p);
  const bool adds_teams = per_column && plan.team < plan.threads;
  const size_t exchange =
      (adds_teams ? 3 * kLifGatePack<T> * plan.team : 3) * (plan.threads / kWarp);
  const cudaError_t status =
      launch(lif_gate_backward_kernel<T, normed, per_column>, plan.row_blocks * plan.tiles,
             plan.threads, exchange * sizeof(C), stream, p, plan);
  if (status != cudaSuccess || !p.grad_parameters) return status;
  // 8 outputs beside each other are the least that memory gives out.
  const int64_t count = 3 * p.units;
  const int outputs = plan.inner == 1 ? 8 : 1;
  return launch(lif_gate_sum_kernel<C>, ceil_div(count, outputs), kLifGateSumThreads,
                kLifGateSumThreads * sizeof(double), stream,
                static_cast<const C*>(p.partial_gradients), plan.outer, count, plan.inner,
                kLifGateSumThreads / outputs, static_cast<C*>(p.grad_parameters));
}

// Calls `body` with the template arguments of the kernels that `p` takes.
template <typename Body>
cudaError_t dispatch(const LifGateParams& p, const Body& body) {
  using std::false_type;
  using std::true_type;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    if (p.norm == Norm::none) {
      status = p.unit_rows ? body(element, false_type(), false_type())
                           : body(element, false_type(), true_type());
    } else {
      status = p.unit_rows ? body(element, true_type(), false_type())
                           : body(element, true_type(), true_type());
    }
  });
  return status;
}

}  // namespace

int64_t lif_gate_partial_gradients(const LifGateParams& p) {
  int64_t elements = 0;
  dispatch_dtype(p.dtype, [&](auto* element) {
    const auto plan = plan_for<std::remove_pointer_t<decltype(element)>>(p);
    elements = plan.outer * 3 * p.units * plan.inner;
  });
  return elements;
}

cudaError_t lif_gate_forward(const LifGateParams& p, cudaStream_t stream) {
  if (p.rows * p.cols == 0) return cudaSuccess;
  return dispatch(p, [&](auto* element, auto normed, auto per_column) {
    using T = std::remove_pointer_t<decltype(element)>;
    return forward<T, decltype(normed)::value, decltype(per_column)::value>(p, stream);
  });
}

cudaError_t lif_gate_backward(const LifGateParams& p, cudaStream_t stream) {
  if (p.rows * p.cols == 0) return cudaSuccess;
  return dispatch(p, [&](auto* element, auto normed, auto per_column) {
    using T = std::remove_pointer_t<decltype(element)>;
    return backward<T, decltype(normed)::value, decltype(per_column)::value>(p, stream);
  });
}

}  // namespace cuda
}  // namespace ember
