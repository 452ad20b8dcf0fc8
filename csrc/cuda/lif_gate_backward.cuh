// The LIF gate's backward kernel for all shapes, dtypes and alignments.
#pragma once

#include "lif_gate_norms.cuh"
#include "lif_gate_sums.cuh"

namespace ember {
namespace cuda {

template <typename T, bool normed, bool per_column, bool vectors>
__device__ __forceinline__ void lif_gate_backward(const LifGateParams& p, const LifGatePlan& plan) {
  using C = compute_t<T>;
  constexpr bool along = normed || !per_column;
  constexpr int kWidth = kLifGatePack<T>, kStrips = along ? kLifGatePacks : 1;
  // With a norm, registers for a row's columns go to their sums: parameters are loaded anew.
  constexpr bool kept = !(normed && per_column);
  // Nor is there room for x and grad_y, but in fp64, which has less of them: they are loaded anew.
  constexpr bool again = !kept && (!vectors || sizeof(T) < 8);
  using Place = LifGatePlace<T, along, vectors>;
  const Team<C> team{plan.team, shared_memory<C>()};
  const Place place(p, plan, team.lane(), team.index(), team.count());
  const auto& strip = place.strip;
  const bool want_sums = p.grad_parameters != nullptr;
  int64_t offset = place.offset;
  C* const partial = static_cast<C*>(p.partial_gradients);
  // The block's sums, where units are columns.
  const auto columns = [&] {
    return partial + int64_t(in_place(place.row_block)) * 3 * p.units + place.first;
  };
  C column_sums[per_column ? kStrips : 1][3][kWidth] = {};
  LifGateThreadUnits<T, along && kept, per_column> units;
  int64_t unit = place.first;
  if (per_column && kept) units.load(p, place, unit);
  const int rounds = along ? plan.rounds : place.rows;
  for (int done = 0; done < rounds; done += Place::kRows) {
    const int left = place.rows - done;
    const int64_t count = left > 0 ? place.cols : 0;
    const int64_t row = place.row + int64_t(done) * place.row_gap;
    const auto x = [&] { return static_cast<const T*>(p.x) + in_place(offset); };
    const auto grad_y = [&] { return static_cast<const T*>(p.grad_y) + in_place(offset); };
    const auto grad_x = [&] { return static_cast<T*>(p.grad_x) + in_place(offset); };
    Pack<T, kWidth> xs[Place::kPacks], grad_ys[Place::kPacks];
    place.load(x(), left, xs);
    place.load(grad_y(), left, grad_ys);
    if (!per_column) {
      unit = lif_gate_unit(p, row);
      units.load(p, place, unit);
    }
    const auto gates_of = [&](int j) {
      LifGateUnits<T, per_column> gates;
      if constexpr (kept) {
        gates = units.pack(j);
      } else {
        const int first = in_place(j * strip.cols);
        gates.load(p, unit + first, strip, place.held - first);
      }
      return gates;
    };

    LifGateRowBackward<C> r;
    C row_sums[3][1] = {};
    // Columns beyond those that are held: what they add to the sums, or their gradients.
    const auto beyond = [&](bool store) {
      for (int64_t at = place.held; at < count; at += strip.cols) {
        const int limit = int(min(count - at, int64_t(strip.cols)));
        const Pack<T, kWidth> pack = strip.load(x() + at, limit);
        const Pack<T, kWidth> grad_pack = strip.load(grad_y() + at, limit);
        LifGateUnits<T, per_column> gates;
        if constexpr (per_column) {
          gates.load(p, unit + at, strip, limit);
        } else {
          gates = units.pack(0);
        }
        if (!store) {
          r.add(p.norm, gates, pack, grad_pack);
          continue;
        }
        C out[kWidth];
        if constexpr (per_column) {
          C gradients[3][kWidth] = {};
          r.template differentiate<normed>(p.norm, gates, pack, grad_pack, out, gradients);
          for (int k = 0; want_sums && k < 3; ++k) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              // A row of this length has the block to itself, and this thread its columns.
              C* sum = columns() + k * p.units + at + strip.column(i);
              if (strip.column(i) < limit) *sum = (done ? *sum : C(0)) + gradients[k][i];
            }
          }
        } else {
          r.template differentiate<normed>(p.norm, gates, pack, grad_pack, out, row_sums);
        }
        strip.store(out, grad_x() + at, limit);
      }
    };
    if constexpr (normed) {
#pragma unroll
      for (int j = 0; j < Place::kPacks; ++j) {
        if (place.has(j)) r.add(p.norm, gates_of(j), xs[j], grad_ys[j]);
      }
      beyond(false);
      team.template reduce<Sum>(r.sums);
      r.finish(p.norm, row_of_sums<per_column>(p, team, count, unit, x(), grad_y(), r.sums));
    }
#pragma unroll
    for (int j = 0; j < Place::kPacks; ++j) {
      if (!place.has(j)) continue;
      if constexpr (again) {
        xs[j] = strip.load(x() + place.at(j), place.limit(j, left));
        grad_ys[j] = strip.load(grad_y() + place.at(j), place.limit(j, left));
      }
      C out[kWidth];
      if constexpr (per_column) {
        r.template differentiate<normed>(p.norm, gates_of(j), xs[j], grad_ys[j], out,
                                         column_sums[along ? j : 0]);
      } else {
        r.template differentiate<normed>(p.norm, gates_of(j), xs[j], grad_ys[j], out, row_sums);
      }
      strip.store(out, grad_x() + place.at(j), place.limit(j, left));
    }
    if constexpr (normed) beyond(true);
    if (!per_column && want_sums) {
      C sums[3] = {row_sums[0][0], row_sums[1][0], row_sums[2][0]};
      team.template reduce<Sum>(sums);
      if (left > 0 && team.lane() == 0) {
        const int64_t group = row / p.unit_rows / p.units;
        const int64_t spot = row % p.unit_rows * plan.tiles + place.tile;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          partial[((group * 3 + k) * p.units + unit) * plan.inner + spot] = sums[k];
        }
      }
    }
    offset += Place::kRows * (in_place(place.row_gap) * p.cols);
  }
  if constexpr (per_column) {
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      if (!want_sums || !place.has(j)) return;
      store_column_sums(team, strip, column_sums[j], place.held - j * strip.cols, p.units,
                        columns() + j * strip.cols);
    }
  }
}

template <typename T, bool normed, bool per_column>
__global__ void __launch_bounds__(kLifGateThreads, (kLifGateBackwardBlocks<T, normed, per_column>))
    lif_gate_backward_kernel(LifGateParams p, LifGatePlan plan) {
  if (plan.vectors) {
    lif_gate_backward<T, normed, per_column, true>(p, plan);
  } else {
    lif_gate_backward<T, normed, per_column, false>(p, plan);
  }
}

}  // namespace cuda
}  // namespace ember
