"""A liquid time-constant (LTC) cell over a sequence (Hasani et al., AAAI 2021), as in ncps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ember_ext.reference.time_loop import conditions, over_time


class LTCWeights(NamedTuple):
    """The effective parameters of an LTC cell with S units and I inputs.

    They have the names that ncps gives them. Whatever keeps `w`, `sensory_w`, `cm` and `gleak`
    positive was applied before. Synapses are [from, to].

    Examples::

        >>> import torch
        >>> from ember_ext.ops import LTCWeights
        >>> inputs, units = 3, 4
        >>> per_unit = [torch.rand(units) for _ in range(3)]
        >>> between_units = [torch.rand(units, units) for _ in range(4)]
        >>> from_inputs = [torch.rand(inputs, units) for _ in range(4)]
        >>> weights = LTCWeights(*per_unit, *between_units, *from_inputs)
    """

    cm: Tensor
    """[S]: membrane capacitances."""
    gleak: Tensor
    """[S]: leak conductances."""
    vleak: Tensor
    """[S]: resting potentials."""
    w: Tensor
    """[S, S]: the conductance of a synapse that is fully open."""
    mu: Tensor
    """[S, S]: the potential at which it is half open."""
    sigma: Tensor
    """[S, S]: how steeply it opens."""
    erev: Tensor
    """[S, S]: the potential that it draws its target to."""
    sensory_w: Tensor
    """[I, S]"""
    sensory_mu: Tensor
    """[I, S]"""
    sensory_sigma: Tensor
    """[I, S]"""
    sensory_erev: Tensor
    """[I, S]"""


class LTCSynapses(NamedTuple):
    """The synapses that exist. :func:`~ember_ext.ltc_synapses` makes this of masks.

    Each tensor is [3, E], int64, and sorted by target, then source. It holds the sources, the
    targets, and the positions in the list in the order that sorts it by source, then target.

    Examples::

        >>> import torch
        >>> from ember_ext import ltc_synapses
        >>> synapses = ltc_synapses(torch.ones(2, 2), torch.ones(3, 2))
        >>> synapses.recurrent.shape, synapses.sensory.shape
        (torch.Size([3, 4]), torch.Size([3, 6]))
    """

    recurrent: Tensor
    sensory: Tensor


def list_synapses(mask: Tensor) -> Tensor:
    """The non-zero entries of a mask [from, to] as one of the two tensors of `LTCSynapses`."""
    target, source = mask.t().nonzero(as_tuple=True)
    return torch.stack([source, target, torch.argsort(source, stable=True)])


def all_synapses(sources: int, units: int, device: torch.device) -> Tensor:
    """The list that `list_synapses` makes of a mask [sources, units] of ones."""
    index = torch.arange(sources * units, device=device)
    by_source = index.view(units, sources).t().reshape(-1)
    if not sources:
        return index.expand(3, 0)
    return torch.stack([index % sources, index // sources, by_source])


def ltc_cell(
    x: Tensor,
    h: Tensor,
    weights: LTCWeights,
    timespan: Tensor | float,
    synapses: LTCSynapses | None,
    *,
    ode_unfolds: int = 6,
    eps: float = 1e-8,
) -> Tensor:
    """One time step: the next state [B, S] from the input [B, I], the state [B, S] and a time span.

    Args:
        x: input, [B, I].
        h: state, [B, S].
        weights: of the cell, in the dtype of `x` and `h`.
        timespan: a number, or [B, 1].
        synapses: those that exist, or None for all.
        ode_unfolds: solver steps in one time step.
        eps: added to the denominator.
    """

    def sums(v: Tensor, index: Tensor | None, prefix: str = "") -> tuple[Tensor, Tensor]:
        w, mu, sigma, erev = (
            getattr(weights, prefix + name) for name in ("w", "mu", "sigma", "erev")
        )
        if index is None:
            a = w * torch.sigmoid(sigma * (v.unsqueeze(2) - mu))
            return (a * erev).sum(1), a.sum(1)
        source, target, _ = index
        entries = source * h.shape[1] + target
        w, mu, sigma, erev = (
            value.flatten().index_select(0, entries) for value in (w, mu, sigma, erev)
        )
        a = w * torch.sigmoid(sigma * (v.index_select(1, source) - mu))
        zeros = torch.zeros_like(h)
        return zeros.index_add(1, target, a * erev), zeros.index_add(1, target, a)

    sensory_numerator, sensory_denominator = sums(x, synapses and synapses.sensory, "sensory_")
    c = weights.cm / (timespan / ode_unfolds)
    for _ in range(ode_unfolds):
        numerator, denominator = sums(h, synapses and synapses.recurrent)
        numerator = c * h + weights.gleak * weights.vleak + (numerator + sensory_numerator)
        denominator = c + weights.gleak + (denominator + sensory_denominator)
        h = numerator / (denominator + eps)
    return h


def ltc_scan(
    x: Tensor,
    weights: LTCWeights,
    h0: Tensor | None = None,
    *,
    synapses: LTCSynapses | None = None,
    timespans: Tensor | float = 1.0,
    lengths: Tensor | None = None,
    ode_unfolds: int = 6,
    eps: float = 1e-8,
    outputs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Define the operator :func:`ember_ext.ltc_scan`, with the same arguments but `chunk_size`.

    bf16 and fp16 are computed in fp32, the state included, and the results are rounded once.

    Returns:
        The states [B, T, outputs] and the final state [B, S].

    Examples::

        >>> import torch
        >>> from ember_ext import reference
        >>> from ember_ext.ops import LTCWeights
        >>> per_unit = [torch.rand(4) for _ in range(3)]
        >>> synapses = [torch.rand(4, 4) for _ in range(4)] + [torch.rand(3, 4) for _ in range(4)]
        >>> weights = LTCWeights(*per_unit, *synapses)
        >>> y, h = reference.ltc_scan(torch.randn(2, 7, 3), weights, outputs=1)
        >>> y.shape, h.shape
        (torch.Size([2, 7, 1]), torch.Size([2, 4]))
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    units = weights.cm.shape[0]
    weights = LTCWeights(*(value.to(dtype) for value in weights))
    h = x.new_zeros(x.shape[0], units, dtype=dtype) if h0 is None else h0.to(dtype)
    number, fixed, spans, running = conditions(x, timespans, lengths, dtype)
    width = units if outputs is None else outputs

    def step(constants: Any, h: Tensor, now: Any) -> tuple[Tensor, Tensor]:
        weights, synapses, fixed = constants
        u, span, running = now
        v = h
        if running is not None:
            # Values beyond the end of a row must not come back as NaN times zero in a gradient.
            u, v = torch.where(running, u, 0), torch.where(running, h, 0)
            span = None if span is None else torch.where(running, span, 1)
        if span is None:
            span = number if fixed is None else fixed
        new = ltc_cell(u, v, weights, span, synapses, ode_unfolds=ode_unfolds, eps=eps)
        if running is None:
            return new, new.narrow(1, 0, width)
        return torch.where(running, new, h), torch.where(running, new, 0).narrow(1, 0, width)

    constants = weights, synapses, fixed
    h, y = over_time(step, h, (x.to(dtype), spans, running), constants, width)
    return y.to(x.dtype), h.to(x.dtype)
