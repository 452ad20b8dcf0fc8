// Launchers of the LIF gate's kernels.
#include <algorithm>
#include <type_traits>

#include "lif_gate.cuh"

namespace ember {
namespace cuda {
namespace {

// Rows to a team at most. Backward adds them up term by term, in fp32: equal terms let such a sum
// err by up to 4 epsilon with 32 rows, which is what a result may err by, and by up to 8 with 64.
// Forward adds up no rows.
constexpr int kLifGateMostRounds = 32, kLifGateForwardMostRounds = 64;

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
  // other on one team save loads of parameters and partial sums.
  const int64_t teams = plan.threads / plan.team, least = along ? 1 : 2 * kLifGatePacks;
  const int64_t rounds = p.rows * plan.tiles / (teams * (along ? 1024 : 2048)) / least * least;
  plan.rounds = int(std::clamp<int64_t>(rounds, least, kLifGateMostRounds));
  plan.row_blocks = ceil_div(p.rows, teams * plan.rounds);
  plan.inner = p.unit_rows ? p.unit_rows * plan.tiles : 1;
  plan.outer = p.unit_rows ? ceil_div(p.rows, p.unit_rows * p.units) : plan.row_blocks;
  return plan;
}

// For rows of which a thread has `columns`, and a team `most_rounds` at most.
LifGateRowsPlan rows_plan_for(const LifGateParams& p, int columns, int most_rounds) {
  LifGateRowsPlan plan{};
  const int64_t lanes = ceil_div(p.cols, columns);
  plan.team = 1;
  while (plan.team < kWarp && plan.team < lanes) plan.team *= 2;
  if (lanes > kWarp) plan.team = int(ceil_div(lanes, kWarp)) * kWarp;
  plan.threads = plan.team > kWarp ? plan.team : kLifGateThreads;
  // Enough blocks to fill the largest GPU, see plan_for().
  const int64_t teams = plan.threads / plan.team, rounds = p.rows / (teams * 1024);
  plan.rounds = int(std::clamp<int64_t>(rounds, 1, most_rounds));
  plan.row_blocks = ceil_div(p.rows, teams * plan.rounds);
  return plan;
}

// Whether rows have the shape that lif_gate_rows.cuh is for.
template <typename T>
bool rows_are_held(const LifGateParams& p, int columns) {
  return sizeof(T) < 8 && p.norm != Norm::none && p.unit_rows == 0 &&
         p.cols % (16 / int(sizeof(T))) == 0 && p.cols <= int64_t(columns) * kLifGateRowThreads<T>;
}

// Whether they can be accessed by 16 bytes, too.
bool rows_are_aligned(const LifGateParams& p) {
  return aligned(p.x) && aligned(p.y) && aligned(p.grad_y) && aligned(p.grad_x) &&
         aligned(p.threshold) && aligned(p.leak) && aligned(p.steepness) &&
         aligned(p.partial_gradients);
}

template <typename T, bool normed, bool per_column>
cudaError_t forward(const LifGateParams& p, cudaStream_t stream) {
  if constexpr (normed && per_column && sizeof(T) < 8) {
    if (rows_are_held<T>(p, kLifGateForwardColumns) && rows_are_aligned(p)) {
      const LifGateRowsPlan plan =
          rows_plan_for(p, kLifGateForwardColumns, kLifGateForwardMostRounds);
      return launch(lif_gate_rows_forward_kernel<T>, plan.row_blocks, plan.threads,
                    lif_gate_rows_shared<T>(plan.threads, kLifGateForwardColumns, 1), stream, p,
                    plan);
    }
  }
  const LifGatePlan plan = plan_for<T>(p);
  const size_t exchange = normed ? 2 * plan.threads / kWarp * sizeof(compute_t<T>) : 0;
  return launch(lif_gate_forward_kernel<T, normed, per_column>, plan.row_blocks * plan.tiles,
                plan.threads, exchange, stream, p, plan);
}

// Adds up the partial sums that a backward kernel has left.
template <typename C>
cudaError_t sum_gradients(const LifGateParams& p, int64_t outer, int64_t inner,
                          cudaStream_t stream) {
  if (!p.grad_parameters) return cudaSuccess;
  // 8 outputs beside each other are the least that memory gives out.
  const int64_t count = 3 * p.units;
  const int outputs = inner == 1 ? 8 : 1;
  return launch(lif_gate_sum_kernel<C>, ceil_div(count, outputs), kLifGateSumThreads,
                kLifGateSumThreads * sizeof(double), stream,
                static_cast<const C*>(p.partial_gradients), outer, count, inner,
                kLifGateSumThreads / outputs, static_cast<C*>(p.grad_parameters));
}

template <typename T, bool normed, bool per_column>
cudaError_t backward(const LifGateParams& p, cudaStream_t stream) {
  using C = compute_t<T>;
  if constexpr (normed && per_column && sizeof(T) < 8) {
    if (rows_are_held<T>(p, kLifGateBackwardColumns) && rows_are_aligned(p)) {
      const LifGateRowsPlan plan = rows_plan_for(p, kLifGateBackwardColumns, kLifGateMostRounds);
      const cudaError_t status = launch(
          lif_gate_rows_backward_kernel<T>, plan.row_blocks, plan.threads,
          lif_gate_rows_shared<T>(plan.threads, kLifGateBackwardColumns, 2), stream, p, plan);
      return status == cudaSuccess ? sum_gradients<C>(p, plan.row_blocks, 1, stream) : status;
    }
  }
  const LifGatePlan plan = plan_for<T>(p);
  const bool adds_teams = per_column && plan.team < plan.threads;
  const size_t exchange =
      (adds_teams ? 3 * kLifGatePack<T> * plan.team : 3) * (plan.threads / kWarp);
  const cudaError_t status =
      launch(lif_gate_backward_kernel<T, normed, per_column>, plan.row_blocks * plan.tiles,
             plan.threads, exchange * sizeof(C), stream, p, plan);
  return status == cudaSuccess ? sum_gradients<C>(p, plan.outer, plan.inner, stream) : status;
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
    using T = std::remove_pointer_t<decltype(element)>;
    const auto plan = plan_for<T>(p);
    elements = plan.outer * 3 * p.units * plan.inner;
    // Pointers, which may not be set yet, say which kernel it will be: enough for either.
    if (rows_are_held<T>(p, kLifGateBackwardColumns)) {
      const int64_t held =
          rows_plan_for(p, kLifGateBackwardColumns, kLifGateMostRounds).row_blocks * 3 * p.units;
      elements = held > elements ? held : elements;
    }
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
