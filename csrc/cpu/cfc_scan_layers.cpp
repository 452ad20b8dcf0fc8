// The layers of the CfC scan on the CPU, forward: each applied to the rows of one step.
#include <type_traits>

#include "cfc_scan.h"
#include "panels.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

template <typename C>
class Layers {
 public:
  Layers(const CfcTapes<C>& tapes, const C* packed) : p_(tapes.p), tapes_(tapes), packed_(packed) {}

  void work(const CfcJob& job, const Share& share) const {
    if (share.members > 1 && job.kind == CfcJob::layer_step) {
      // Parts of the rows come from other cores: asked for at once, they arrive at once.
      const PanelRows<C> rows = layer_rows(job);
      for (int64_t r = 0; r < rows.count; ++r) {
        for (int64_t k = 0; k < rows.length; k += 64 / int64_t(sizeof(C))) {
          __builtin_prefetch(rows.values + r * rows.lda + k);
        }
      }
    }
    if (job.kind == CfcJob::inputs_part) {
      inputs_part(job, share);
    } else if (job.layer + 1 < p_.num_layers) {
      backbone_step(job, share);
    } else {
      heads_step(job, share);
    }
  }

 private:
  const C* packed(int64_t layer) const {
    const C* weights = packed_;
    for (int64_t l = 0; l < layer; ++l) {
      weights += packed_width<C>(p_.layers[l].units) * (1 + p_.layers[l].inputs);
    }
    return weights;
  }

  const C* dropout_scale(int64_t layer, int64_t b, int64_t t) const {
    const int64_t scaled = p_.num_layers - 2;
    if (!p_.dropout_scale || layer == 0) return nullptr;
    return static_cast<const C*>(p_.dropout_scale) +
           ((b * p_.steps + t) * scaled + layer - 1) * p_.layers[layer].units;
  }

  // The rows that a layer is applied to, or if it resumes, what of them is left: the states.
  PanelRows<C> layer_rows(const CfcJob& job) const {
    const CfcLayer& layer = p_.layers[job.layer];
    const CfcStep& step = job.step;
    const int64_t skipped = job.resumes ? 1 + p_.inputs : 0;
    return {step.end - step.begin,      tapes_.input(job.layer, step.slot, step.begin) + skipped,
            layer.input_stride,         1,
            1 + layer.inputs - skipped, 0};
  }

  // Sums over the inputs, left where the layer's kept values go afterwards.
  void inputs_part(const CfcJob& job, const Share& share) const {
    const CfcLayer& layer = p_.layers[0];
    const int64_t stride = p_.batch * layer.input_stride, from = job.step.slot;
    for (int64_t b = job.step.begin; b < job.step.end; ++b) {
      const PanelRows<C> rows{job.steps, tapes_.input(0, from, b), stride, 1, 1 + p_.inputs, 0};
      if (p_.num_layers > 1) {
        multiply(rows, PackedMatrix<C>{packed(0), 1 + layer.inputs, 0, layer.units}, share,
                 FromZero{}, [&](int64_t unit, int64_t first, int count, const C* sums) {
                   for (int r = 0; r < count; ++r) {
                     copy_vector(sums + r * lanes<C>,
                                 tapes_.kept(layer, from + first + r, b) + unit);
                   }
                 });
        continue;
      }
      dispatch_heads([&](auto heads, auto) {
        constexpr int K = decltype(heads)::value;
        multiply_panels<K>(
            rows, head_panels<K>(0, share), FromZero{},
            [&](int64_t panel, int64_t first, int count, const C* sums) {
              for (int r = 0; r < count; ++r) {
                C* to = tapes_.kept(tapes_.heads, from + first + r, b) + panel * lanes<C>;
                for (int k = 0; k < K; ++k) {
                  copy_vector(sums + (k * count + r) * lanes<C>, to + k * cfc_pad(p_.hidden));
                }
              }
            });
      });
    }
  }

  template <int K>
  Panels<C> head_panels(int64_t skipped, const Share& share) const {
    const int64_t panels = (p_.hidden + lanes<C> - 1) / lanes<C>;
    return {packed(p_.num_layers - 1) + skipped * K * lanes<C>,
            (1 + tapes_.heads.inputs) * K * lanes<C>, share.begin(panels), share.end(panels)};
  }

  template <typename Body>
  void dispatch_activation(const Body& body) const {
    using A = CfcActivation;
    switch (p_.activation) {
      case A::lecun_tanh:
        return body(std::integral_constant<A, A::lecun_tanh>());
      case A::tanh:
        return body(std::integral_constant<A, A::tanh>());
      case A::relu:
        return body(std::integral_constant<A, A::relu>());
      case A::silu:
        return body(std::integral_constant<A, A::silu>());
      case A::gelu:
        return body(std::integral_constant<A, A::gelu>());
    }
  }

  void backbone_step(const CfcJob& job, const Share& share) const {
    dispatch_activation([&](auto activation) {
      if (job.resumes) {
        const CfcLayer& layer = p_.layers[0];
        backbone_step<decltype(activation)::value>(
            job, share, [&](int64_t unit, int64_t first, int count, C* sums) {
              for (int r = 0; r < count; ++r) {
                copy_vector(tapes_.kept(layer, job.step.slot, job.step.begin + first + r) + unit,
                            sums + r * lanes<C>);
              }
            });
      } else {
        backbone_step<decltype(activation)::value>(job, share, FromZero{});
      }
    });
  }

  template <CfcActivation activation, typename Start>
  void backbone_step(const CfcJob& job, const Share& share, const Start& start) const {
    const CfcLayer& layer = p_.layers[job.layer];
    const CfcStep& step = job.step;
    for (int64_t b = step.begin; b < step.end && share.index == 0; ++b) {
      tapes_.input(job.layer + 1, step.slot, b)[0] = C(1);
    }
    const auto epilogue = [&](int64_t unit, int64_t first, int count, const C* u) {
      alignas(64) C value[product_size<C>], slope[product_size<C>];
#pragma GCC ivdep
      for (int i = 0; i < count * lanes<C>; ++i) {
        const Activated<C> v = activated<activation>(u[i]);
        value[i] = v.value;
        slope[i] = v.slope;
      }
      for (int r = 0; r < count; ++r) {
        const int64_t b = step.begin + first + r;
        if (!tapes_.runs(b, step.t)) {
          for (int64_t j = 0; j < lanes<C>; ++j)
            value[r * lanes<C> + j] = slope[r * lanes<C> + j] = 0;
        } else if (const C* scale = dropout_scale(job.layer, b, step.t)) {
          for (int64_t j = 0; j < lanes<C> && unit + j < layer.units; ++j) {
            value[r * lanes<C> + j] *= scale[unit + j];
            slope[r * lanes<C> + j] *= scale[unit + j];
          }
        }
        copy_vector(value + r * lanes<C>, tapes_.input(job.layer + 1, step.slot, b) + 1 + unit);
        if (job.keep) copy_vector(slope + r * lanes<C>, tapes_.kept(layer, step.slot, b) + unit);
      }
    };
    const PanelRows<C> rows = layer_rows(job);
    const int64_t depth = 1 + layer.inputs;
    multiply(rows, PackedMatrix<C>{packed(job.layer), depth, depth - rows.length, layer.units},
             share, start, epilogue);
  }

  // body(number of heads, mode), both as constants.
  template <typename Body>
  void dispatch_heads(const Body& body) const {
    using std::integral_constant;
    using M = CfcMode;
    const integral_constant<M, M::gated> gated;
    const integral_constant<M, M::no_gate> no_gate;
    switch (p_.heads) {
      case 1:
        return body(integral_constant<int, 1>(), integral_constant<M, M::pure>());
      case 3:
        return p_.mode == M::no_gate ? body(integral_constant<int, 3>(), no_gate)
                                     : body(integral_constant<int, 3>(), gated);
      default:
        return p_.mode == M::no_gate ? body(integral_constant<int, 4>(), no_gate)
                                     : body(integral_constant<int, 4>(), gated);
    }
  }

  void heads_step(const CfcJob& job, const Share& share) const {
    dispatch_heads([&](auto heads, auto mode) {
      constexpr int K = decltype(heads)::value;
      if (job.resumes) {
        heads_step<K, decltype(mode)::value>(
            job, share, [&](int64_t panel, int64_t first, int count, C* sums) {
              for (int r = 0; r < count; ++r) {
                const C* from =
                    tapes_.kept(tapes_.heads, job.step.slot, job.step.begin + first + r) +
                    panel * lanes<C>;
                for (int k = 0; k < K; ++k) {
                  copy_vector(from + k * cfc_pad(p_.hidden), sums + (k * count + r) * lanes<C>);
                }
              }
            });
      } else {
        heads_step<K, decltype(mode)::value>(job, share, FromZero{});
      }
    });
  }

  template <int K, CfcMode mode, typename Start>
  void heads_step(const CfcJob& job, const Share& share, const Start& start) const {
    const int64_t padded = cfc_pad(p_.hidden), t = job.step.t, slot = job.step.slot;
    const auto epilogue = [&](int64_t panel, int64_t first, int count, C* products) {
      alignas(64) C h[product_size<C>];
      const int64_t unit = panel * lanes<C>, b = job.step.begin + first;
      cells<K, mode>(unit, b, t, count, products, h);
      for (int r = 0; r < count; ++r) {
        C* next = tapes_.state(slot + 1, b + r) + unit;
        copy_vector(tapes_.runs(b + r, t) ? h + r * lanes<C> : tapes_.state(slot, b + r) + unit,
                    next);
        if (!job.keep) continue;
        C* to = tapes_.kept(tapes_.heads, slot, b + r) + unit;
        for (int k = 0; k < K; ++k) {
          copy_vector(products + (k * count + r) * lanes<C>, to + k * padded);
        }
      }
    };
    const PanelRows<C> rows = layer_rows(job);
    multiply_panels<K>(rows, head_panels<K>(1 + tapes_.heads.inputs - rows.length, share), start,
                       epilogue);
  }

  // products [K, rows, lanes] -> h [rows, lanes]; what the derivatives need replaces the products.
  template <int K, CfcMode mode>
  void cells(int64_t unit, int64_t b, int64_t t, int rows, C* products, C* h) const {
    const int n = rows * lanes<C>;
    if constexpr (mode == CfcMode::pure) {
      const C *w = static_cast<const C*>(p_.decay) + unit, *amplitude = w + p_.hidden;
      for (int r = 0; r < rows; ++r) {
        const C dt = tapes_.timespan(b + r, t);
        const int64_t width = p_.hidden - unit < lanes<C> ? p_.hidden - unit : lanes<C>;
        C *a = products + r * lanes<C>, *out = h + r * lanes<C>;
        for (int64_t j = width; j < lanes<C>; ++j) out[j] = 0;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) out[j] = pure_state(a[j], w[j], amplitude[j], dt);
      }
    } else {
      C *a = products, *b_ = products + n, *s = products + 2 * n;
      if constexpr (K == 4) {
        const C* offset = products + 3 * n;
        alignas(64) C scaled[product_size<C>];
        for (int r = 0; r < rows; ++r) {
          const C dt = tapes_.timespan(b + r, t);
          for (int j = 0; j < lanes<C>; ++j) {
            const int i = r * lanes<C> + j;
            scaled[i] = dt * s[i] + offset[i];
          }
        }
        gated<mode == CfcMode::no_gate>(n, a, b_, scaled, h);
        // Kept as tanh(ff1), tanh(ff2), time_a, gate.
        for (int i = 0; i < n; ++i) products[3 * n + i] = scaled[i];
      } else {
        gated<mode == CfcMode::no_gate>(n, a, b_, s, h);
      }
    }
  }

  template <bool no_gate>
  static void gated(int n, C* a, C* b, C* s, C* h) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      const GatedCell<C> c = gated_cell(a[i], b[i], s[i]);
      a[i] = c.first;
      b[i] = c.second;
      s[i] = c.gate;
      h[i] = gated_state<no_gate>(c);
    }
  }

  const CfcScanParams& p_;
  const CfcTapes<C> tapes_;
  const C* const packed_;
};

}  // namespace

template <typename C>
void cfc_pack(const CfcScanParams& p, C* packed) {
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const CfcLayer& layer = p.layers[l];
    const C* weight = static_cast<const C*>(layer.weight);
    const int64_t depth = 1 + layer.inputs;
    if (&layer == &p.layers[p.num_layers - 1]) {
      pack_segments(weight, layer.segments, layer.units, depth, packed);
    } else {
      pack_matrix(depth, layer.units, packed,
                  [&](int64_t k, int64_t unit) { return weight[unit * depth + k]; });
    }
    packed += layer.segments * packed_width<C>(layer.units) * depth;
  }
}

template <typename C>
void cfc_layer_job(const CfcTapes<C>& tapes, const C* packed, const CfcJob& job,
                   const Share& share) {
  Layers<C>(tapes, packed).work(job, share);
}

template void cfc_pack(const CfcScanParams&, float*);
template void cfc_pack(const CfcScanParams&, double*);
template void cfc_layer_job(const CfcTapes<float>&, const float*, const CfcJob&, const Share&);
template void cfc_layer_job(const CfcTapes<double>&, const double*, const CfcJob&, const Share&);

}  // namespace EMBER_ISA
}  // namespace ember
