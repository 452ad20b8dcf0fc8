"""Weights of LTC networks as the raw operators take them, and laid out for many calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ember_ext.ops import _checks
from ember_ext.ops._ltc_checks import OP
from ember_ext.ops._packed import Packed
from ember_ext.ops._watch import Watch
from ember_ext.reference.ltc_scan import LTCSynapses, LTCWeights, all_synapses


def raw_arguments(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None,
    synapses: LTCSynapses | None,
    timespans: Tensor | float,
    lengths: Tensor | None,
    ode_unfolds: int,
    eps: float,
    outputs: int | None,
) -> tuple[Any, ...]:
    """The arguments of the raw operators, without `chunk`, for checked ones of `ltc_scan`."""
    dtype = _checks.compute_dtype(x.dtype)
    batch, steps, inputs = x.shape
    units = weights.cm.shape[0]
    if synapses is None:
        synapses = LTCSynapses(
            all_synapses(units, units, x.device), all_synapses(inputs, units, x.device)
        )
    if not isinstance(timespans, Tensor):
        # A product keeps the float symbolic. To fill a tensor, torch.compile would make a constant
        # of it.
        spans = (x.new_ones((), dtype=dtype) * timespans).expand(batch, steps)
    elif timespans.dim():
        spans = timespans.to(dtype).reshape(batch, steps)
    else:
        spans = timespans.to(dtype).expand(batch, steps)
    return (
        x,
        x.new_zeros(batch, units, dtype=dtype) if h0 is None else h0.to(dtype),
        torch.stack([weights.cm, weights.gleak, weights.vleak]).to(dtype),
        _listed(weights[7:], synapses.sensory, dtype),
        _listed(weights[3:7], synapses.recurrent, dtype),
        synapses.sensory,
        synapses.recurrent,
        spans,
        lengths,
        ode_unfolds,
        units if outputs is None else outputs,
        eps,
    )


def _listed(matrices: tuple[Tensor, ...], index: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of matrices [from, to] for listed synapses, [matrices, E]."""
    entries = index[0] * matrices[0].shape[1] + index[1]
    return torch.stack(matrices).to(dtype).flatten(1).index_select(1, entries)


class PackedLTC(Packed):
    """A network with its weights laid out once for many calls, inputs' and outputs' maps included.

    Args:
        weights: see `ltc_scan`.
        synapses: those that exist. Default: all.
        input_map: [2, I]: scale and shift of inputs. Default: none.
        output_map: [2, outputs]: scale and shift of outputs. Default: none.
        timespan: the Δt of every step, > 0, or None if it is given with each call. Default: 1.
        ode_unfolds: solver steps per time step.
        eps: added to the denominator.
        outputs: how many units' states to return, beginning with the first. Default: all S.
        watch: of all that the weights come from; begun before they are handed over here. Default:
            none.
    """

    op = OP

    def __init__(
        self,
        weights: LTCWeights,
        synapses: LTCSynapses | None = None,
        *,
        input_map: Tensor | None = None,
        output_map: Tensor | None = None,
        timespan: float | None = 1.0,
        ode_unfolds: int = 6,
        eps: float = 1e-8,
        outputs: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        dtype = _checks.compute_dtype(weights.cm.dtype)
        inputs, units = weights.sensory_w.shape
        x = weights.cm.new_empty(0, 0, inputs)
        _, _, *tensors, _, _, _, outputs, _ = raw_arguments(
            x, weights, None, synapses, 1.0, None, ode_unfolds, eps, outputs
        )
        maps = [None if m is None else m.detach().to(dtype) for m in (input_map, output_map)]
        counts = [index.shape[1] for index in tensors[3:]]
        with_maps = [int(m is not None) for m in maps]
        plan = (inputs, units, outputs, *counts, ode_unfolds, *with_maps)
        super().__init__(
            torch.ops.ember_ext.ltc_scan_packed.default,
            torch.ops.ember_ext.ltc_scan_pack(*(t.detach() for t in tensors), *maps, plan),
            plan,
            float(eps),
            dtype=dtype,
            timespan=timespan,
            watch=watch,
        )
