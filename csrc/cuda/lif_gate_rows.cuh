// The LIF gate's kernels for rows that a norm is taken of and that lie in the registers of a team
// of threads, of fp32, bf16 and fp16, whose columns are units: what Transformers have.
//
// Unlike the kernels for all cases they know that the row is held, that it can be accessed by 16
// bytes, and which norm it is. Rows to come are copied to shared memory while others are worked on.
// A thread reads there what it has copied itself, so these copies need no barrier.
#pragma once

#include "lif_gate_row_team.cuh"

namespace ember {
namespace cuda {

template <typename T, Norm norm>
__device__ __forceinline__ void lif_gate_rows_forward(const LifGateParams& p,
                                                      const LifGateRowsPlan& plan) {
  using Rows = LifGateRows<T, kLifGateForwardColumns, 1>;
  constexpr int kVectors = Rows::kVectors, kWidth = Rows::kWidth;
  const Rows rows(p, plan);
  float theta[kVectors][kWidth], leak[kVectors][kWidth], rate[kVectors][kWidth];
  rows.load_parameters(p, theta, leak, rate);
  const T* const x = static_cast<const T*>(p.x);
  rows.walk({x}, [&](int done, int stage, int64_t offset) {
    float out[kVectors][kWidth], sums[2] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float xs[kWidth];
      rows.read(stage, 0, v, xs);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = xs[i];
        float fire, smoulder;
        gate_firing(absolute(value) - theta[v][i], rate[v][i], fire, smoulder);
        out[v][i] = value * gate_value(fire, smoulder, leak[v][i]);
        sums[0] += norm_term(norm, value);
        sums[1] += norm_term(norm, out[v][i]);
      }
    }
    rows.team.sum(sums, rows.turns, done & 1);
    const bool exists = done < rows.rows;
    const T* const row = x + offset;
    const float ratio =
        row_of_sums<true>(p, rows.team, exists ? p.cols : 0, 0, row, row, sums).ratio();
    if (exists) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (float& value : out[v]) value *= ratio;
        rows.store(out[v], static_cast<T*>(p.y) + offset, v);
      }
    }
  });
}

template <typename T, Norm norm>
__device__ __forceinline__ void lif_gate_rows_backward(const LifGateParams& p,
                                                       const LifGateRowsPlan& plan) {
  using Rows = LifGateRows<T, kLifGateBackwardColumns, 2>;
  constexpr int kVectors = Rows::kVectors, kWidth = Rows::kWidth;
  const Rows rows(p, plan);
  float theta[kVectors][kWidth], leak[kVectors][kWidth], rate[kVectors][kWidth];
  rows.load_parameters(p, theta, leak, rate);
  // k (1 - lambda); and of each column the sums that its gradients are made of.
  float slope[kVectors][kWidth], column_sums[3][kVectors][kWidth] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slope[v][i] = gate_steepness(rate[v][i]) * (1 - leak[v][i]);
  }
  const T* const x = static_cast<const T*>(p.x);
  const T* const grad_y = static_cast<const T*>(p.grad_y);
  rows.walk({x, grad_y}, [&](int done, int stage, int64_t offset) {
    float fires[kVectors][kWidth], smoulders[kVectors][kWidth];
    LifGateRowBackward<float> r;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float xs[kWidth], grad_ys[kWidth];
      rows.read(stage, 0, v, xs);
      rows.read(stage, 1, v, grad_ys);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = xs[i];
        gate_firing(absolute(value) - theta[v][i], rate[v][i], fires[v][i], smoulders[v][i]);
        const float y = value * gate_value(fires[v][i], smoulders[v][i], leak[v][i]);
        r.sums[0] += norm_term(norm, value);
        r.sums[1] += norm_term(norm, y);
        r.sums[2] += grad_ys[i] * y;
      }
    }
    rows.team.sum(r.sums, rows.turns, done & 1);
    const bool exists = done < rows.rows;
    r.finish(norm, row_of_sums<true>(p, rows.team, exists ? p.cols : 0, 0, x + offset,
                                     grad_y + offset, r.sums));
    if (exists) {
      // Read again, since registers are short between the norms and here.
      const int again = in_place(stage);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float xs[kWidth], grad_ys[kWidth], out[kWidth];
        rows.read(again, 0, v, xs);
        rows.read(again, 1, v, grad_ys);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float value = xs[i], fire = fires[v][i], rest = smoulders[v][i];
          const float g = gate_value(fire, rest, leak[v][i]), scaled = value * r.inverse;
          const float dy = r.ratio * grad_ys[i] + r.from_y * norm_slope(norm, scaled * g);
          // x (1 - f), and x f (1 - f), which is 0 where x is large.
          const float open = value * rest, sloped = open * fire;
          column_sums[0][v][i] += dy * sloped;
          column_sums[1][v][i] += dy * open;
          column_sums[2][v][i] += dy * ((absolute(value) - theta[v][i]) * sloped);
          out[i] = r.from_x * norm_slope(norm, scaled) + dy * (g + slope[v][i] * absolute(sloped));
        }
        rows.store(out, static_cast<T*>(p.grad_x) + offset, v);
      }
    }
  });
  if (p.grad_parameters == nullptr) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      column_sums[0][v][i] *= -slope[v][i];
      // Computed here, not kept since `slope` was.
      const float leak_again = bit_cast<float>(in_place(bit_cast<int>(leak[v][i])));
      column_sums[2][v][i] *= 1 - leak_again;
    }
  }
  rows.store_sums(column_sums, p.units,
                  static_cast<float*>(p.partial_gradients) + int64_t(blockIdx.x) * 3 * p.units);
}

template <typename T>
__global__ void __launch_bounds__(kLifGateRowThreads<T>, 512 / kLifGateRowThreads<T>)
    lif_gate_rows_forward_kernel(LifGateParams p, LifGateRowsPlan plan) {
  if (p.norm == Norm::l2) {
    lif_gate_rows_forward<T, Norm::l2>(p, plan);
  } else {
    lif_gate_rows_forward<T, Norm::l1>(p, plan);
  }
}

template <typename T>
__global__ void __launch_bounds__(kLifGateRowThreads<T>, 512 / kLifGateRowThreads<T>)
    lif_gate_rows_backward_kernel(LifGateParams p, LifGateRowsPlan plan) {
  if (p.norm == Norm::l2) {
    lif_gate_rows_backward<T, Norm::l2>(p, plan);
  } else {
    lif_gate_rows_backward<T, Norm::l1>(p, plan);
  }
}

}  // namespace cuda
}  // namespace ember
