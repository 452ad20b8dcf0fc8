"""A liquid time-constant (LTC) cell over a sequence (Hasani et al., AAAI 2021), as in ncps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LTCWeights(NamedTuple):
    """The effective parameters of an LTC cell with S units and I inputs.

    They have the names that ncps gives them. Whatever keeps `w`, `sensory_w`, `cm` and `gleak`
    positive was applied before. Synapses are [from, to].
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
    """The synapses that exist; `ember_ext.ops.ltc_synapses` makes this of masks.

    Each tensor is [3, E], int64, and sorted by target, then source: the sources, the targets, and
    the positions in the list in the order that sorts it by source, then target.
    """

    recurrent: Tensor
    sensory: Tensor


def list_synapses(mask: Tensor) -> Tensor:
    """The non-zero entries of a mask [from, to] as one of the two tensors of `LTCSynapses`."""
    target, source = mask.t().nonzero(as_tuple=True)
    return torch.stack([source, target, torch.argsort(source, stable=True)])


def all_synapses(sources: int, units: int, device: torch.device) -> Tensor:
    """What `list_synapses` makes of a mask [sources, units] of ones."""
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
    synapses: LTCSynapses,
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
        synapses: those that exist.
        ode_unfolds: solver steps in one time step.
        eps: added to the denominator.
    """

    def sums(v: Tensor, index: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
        source, target, _ = index
        entries = source * h.shape[1] + target
        w, mu, sigma, erev = (
            getattr(weights, prefix + name).flatten().index_select(0, entries)
            for name in ("w", "mu", "sigma", "erev")
        )
        a = w * torch.sigmoid(sigma * (v.index_select(1, source) - mu))
        zeros = torch.zeros_like(h)
        return zeros.index_add(1, target, a * erev), zeros.index_add(1, target, a)

    sensory_numerator, sensory_denominator = sums(x, synapses.sensory, "sensory_")
    c = weights.cm / (timespan / ode_unfolds)
    for _ in range(ode_unfolds):
        numerator, denominator = sums(h, synapses.recurrent)
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
    """States [B, T, outputs] and the final state [B, S]; see `ember_ext.ops.ltc_scan`.

    bf16 and fp16 are computed in fp32, the state included, and the results rounded once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, steps, inputs = x.shape
    units = len(weights.cm)
    weights = LTCWeights(*(value.to(dtype) for value in weights))
    if synapses is None:
        synapses = LTCSynapses(
            all_synapses(units, units, x.device), all_synapses(inputs, units, x.device)
        )
    h = x.new_zeros(batch, units, dtype=dtype) if h0 is None else h0.to(dtype)
    varying = isinstance(timespans, Tensor) and timespans.dim() > 0
    spans = timespans.to(dtype) if isinstance(timespans, Tensor) else timespans
    states = []
    for t in range(steps):
        u, v = x[:, t].to(dtype), h
        span = spans.reshape(batch, steps, 1)[:, t] if varying else spans  # type: ignore[union-attr]
        if lengths is not None:
            # What a row's end hides must not come back as NaN times zero in a gradient.
            running = (t < lengths)[:, None]
            u, v = torch.where(running, u, 0), torch.where(running, h, 0)
            span = torch.where(running, span, 1) if varying else span
        new = ltc_cell(u, v, weights, span, synapses, ode_unfolds=ode_unfolds, eps=eps)
        h = new if lengths is None else torch.where(running, new, h)
        y = h if lengths is None else torch.where(running, new, 0)
        states.append(y[:, :outputs])
    y = torch.stack(states, 1) if states else h[:, None, :outputs].expand(batch, 0, -1)
    return y.to(x.dtype), h.to(x.dtype)
