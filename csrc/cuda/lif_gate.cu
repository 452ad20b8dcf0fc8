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
  const bool normed = p.norm != Norm::none;
  const int most = normed ? kLifGateMostThreads : kLifGateThreads;
  LifGatePlan plan{};
  plan.team = 1;
  while (plan.team < most && plan.team * width < p.cols) plan.team *= 2;
  plan.threads = plan.team > kLifGateThreads ? plan.team : kLifGateThreads;
  const int64_t held = plan.team * width;
  plan.tile_cols = normed || p.cols < held ? p.cols : held;
  plan.tiles = unsigned(ceil_div(p.cols, plan.tile_cols));
  plan.vectors =
      p.cols % width == 0 && aligned(p.x) && aligned(p.y) && aligned(p.grad_y) &&
      aligned(p.grad_x) &&
      (p.unit_rows != 0 || (aligned(p.threshold) && aligned(p.leak) && aligned(p.steepness)));
  // Enough blocks to fill the largest GPU a few times; beyond that, rows that follow each other on
  // one team save partial sums. 64 keeps fp32 sums accurate.
  const int64_t teams = plan.threads / plan.team, blocks = 512, rounds = p.rows / (teams * blocks);
  plan.rounds = rounds < 1 ? 1 : rounds > 64 ? 64 : int(rounds);
  plan.row_blocks = ceil_div(p.rows, teams * plan.rounds);
  plan.inner = p.unit_rows ? p.unit_rows * plan.tiles : 1;
  plan.outer = p.unit_rows ? ceil_div(p.rows, p.unit_rows * p.units) : plan.row_blocks;
  return plan;
}

template <typename T, bool normed>
cudaError_t forward(const LifGateParams& p, cudaStream_t stream) {
  const LifGatePlan plan = plan_for<T>(p);
  const size_t exchange = 2 * plan.threads / kWarp * sizeof(compute_t<T>);
  return launch(lif_gate_forward_kernel<T, normed>, plan.row_blocks * plan.tiles, plan.threads,
                exchange, stream, p, plan);
}

template <typename T, bool normed, bool per_column>
cudaError_t backward(const LifGateParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  const LifGatePlan plan = plan_for<T>(p);
  const bool adds_teams = per_column && plan.team < plan.threads;
  const size_t exchange =
      adds_teams ? 3 * kLifGatePack<T> * plan.threads : 3 * plan.threads / kWarp;
  const cudaError_t status =
      launch(lif_gate_backward_kernel<T, normed, per_column>, plan.row_blocks * plan.tiles,
             plan.threads, exchange * sizeof(C), stream, p, plan);
  if (status != cudaSuccess || !p.grad_parameters) return status;
  const int64_t count = 3 * p.units;
  const int slices = plan.inner == 1 ? 8 : kLifGateThreads, outputs = kLifGateThreads / slices;
  return launch(lif_gate_sum_kernel<C>, ceil_div(count, outputs), kLifGateThreads,
                kLifGateThreads * sizeof(double), stream,
                static_cast<const C*>(p.partial_gradients), plan.outer, count, plan.inner, slices,
                static_cast<C*>(p.grad_parameters));
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
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    status = p.norm == Norm::none ? forward<T, false>(p, stream) : forward<T, true>(p, stream);
  });
  return status;
}

cudaError_t lif_gate_backward(const LifGateParams& p, cudaStream_t stream) {
  if (p.rows * p.cols == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    if (p.unit_rows) {
      status = p.norm == Norm::none ? backward<T, false, false>(p, stream)
                                    : backward<T, true, false>(p, stream);
    } else {
      status = p.norm == Norm::none ? backward<T, false, true>(p, stream)
                                    : backward<T, true, true>(p, stream);
    }
  });
  return status;
}

}  // namespace cuda
}  // namespace ember
