"""A closed-form continuous-time (CfC) cell over a sequence; section 2.3 of the paper."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ember_ext.reference.time_loop import conditions, over_time


class Affine(NamedTuple):
    """An affine map from z to weight z + bias, with weight [out, in] and bias [out].

    Examples::

        >>> import torch
        >>> from ember_ext.ops import Affine
        >>> layer = torch.nn.Linear(5, 4)
        >>> affine = Affine(layer.weight, layer.bias)
    """

    weight: Tensor
    bias: Tensor


class CfCWeights(NamedTuple):
    """The parameters of one CfC cell with H units.

    Z is I + H, or the width U of the backbone if there is one. Cells of mode "pure" have `ff1`,
    `w_tau` and `amplitude`. Those of the other modes have the four heads.

    Examples::

        >>> import torch
        >>> from ember_ext.ops import Affine, CfCWeights
        >>> inputs, units = 3, 4
        >>> def head():
        ...     return Affine(torch.randn(units, inputs + units), torch.zeros(units))
        >>> weights = CfCWeights(ff1=head(), ff2=head(), time_a=head(), time_b=head())
    """

    ff1: Affine
    """[H, Z]"""
    ff2: Affine | None = None
    """[H, Z]"""
    time_a: Affine | None = None
    """[H, Z]: how fast the gate between ff1 and ff2 moves with the time span."""
    time_b: Affine | None = None
    """[H, Z]"""
    mask: Tensor | None = None
    """[H, Z], multiplied onto the weights of ff1 and ff2 (not of time_a and time_b, as in ncps)."""
    w_tau: Tensor | None = None
    """[H]"""
    amplitude: Tensor | None = None
    """[H]; ncps calls it A."""
    backbone: tuple[Affine, ...] = ()
    """[U, I + H], then [U, U] for each further layer."""


def activate(u: Tensor, activation: str) -> Tensor:
    """The backbone's activation: "lecun_tanh", "tanh", "relu", "silu" or "gelu"."""
    if activation == "lecun_tanh":
        return 1.7159 * torch.tanh(0.666 * u)
    if activation == "tanh":
        return torch.tanh(u)
    if activation == "relu":
        return F.relu(u)
    return F.silu(u) if activation == "silu" else F.gelu(u)


def cfc_cell(
    x: Tensor,
    h: Tensor,
    weights: CfCWeights,
    timespan: Tensor | float,
    *,
    mode: str = "default",
    activation: str = "lecun_tanh",
    dropout_scale: Tensor | None = None,
) -> Tensor:
    """One time step: the next state [B, H] from the input [B, I], the state [B, H] and a time span.

    Args:
        x: input, [B, I].
        h: state, [B, H].
        weights: of the cell, in the dtype of `x` and `h`.
        timespan: a number, or [B, 1].
        mode: "default", "pure" or "no_gate".
        activation: of the backbone, see `activate`.
        dropout_scale: [B, layers - 1, U], multiplied onto the output of every backbone layer but
            the first.
    """
    z = torch.cat([x, h], 1)
    for layer, affine in enumerate(weights.backbone):
        z = activate(F.linear(z, *affine), activation)
        if dropout_scale is not None and layer > 0:
            z = z * dropout_scale[:, layer - 1]

    def head(affine: Affine | None, masked: bool = False) -> Tensor:
        assert affine is not None
        weight = affine.weight * weights.mask if masked and weights.mask is not None else affine[0]
        return F.linear(z, weight, affine.bias)

    ff1 = head(weights.ff1, masked=True)
    if mode == "pure":
        assert weights.w_tau is not None
        assert weights.amplitude is not None
        decay = torch.exp(-timespan * (weights.w_tau.abs() + ff1.abs()))
        return weights.amplitude - weights.amplitude * decay * ff1
    ff1, ff2 = torch.tanh(ff1), torch.tanh(head(weights.ff2, masked=True))
    gate = torch.sigmoid(head(weights.time_a) * timespan + head(weights.time_b))
    if mode == "no_gate":
        return ff1 + gate * ff2
    return ff1 * (1 - gate) + gate * ff2


def cfc_scan(
    x: Tensor,
    weights: CfCWeights,
    h0: Tensor | None = None,
    *,
    timespans: Tensor | float = 1.0,
    lengths: Tensor | None = None,
    mode: str = "default",
    activation: str = "lecun_tanh",
    dropout_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define the operator :func:`ember_ext.cfc_scan`, with the same arguments but `chunk_size`.

    bf16 and fp16 are computed in fp32, the state included, and the results are rounded once.

    Returns:
        All states [B, T, H] and the final state [B, H].

    Examples::

        >>> import torch
        >>> from ember_ext import reference
        >>> from ember_ext.ops import Affine, CfCWeights
        >>> heads = [Affine(torch.randn(4, 3 + 4), torch.zeros(4)) for _ in range(4)]
        >>> y, h = reference.cfc_scan(torch.randn(2, 7, 3), CfCWeights(*heads))
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([2, 7, 4]), True)
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = to_dtype(weights, dtype)
    hidden = weights.ff1.bias.shape[0]
    h = x.new_zeros(x.shape[0], hidden, dtype=dtype) if h0 is None else h0.to(dtype)
    number, fixed, spans, running = conditions(x, timespans, lengths, dtype)
    scale = None if dropout_scale is None else dropout_scale.to(dtype)

    def step(constants: Any, h: Tensor, now: Any) -> tuple[Tensor, Tensor]:
        weights, fixed = constants
        u, span, scale, running = now
        v = h
        if running is not None:
            # Values beyond the end of a row must not come back as NaN in a gradient.
            u, v = torch.where(running, u, 0), torch.where(running, h, 0)
            span = None if span is None else torch.where(running, span, 1)
            scale = None if scale is None else torch.where(running[..., None], scale, 0)
        if span is None:
            span = number if fixed is None else fixed
        new = cfc_cell(u, v, weights, span, mode=mode, activation=activation, dropout_scale=scale)
        if running is None:
            return new, new
        return torch.where(running, new, h), torch.where(running, new, 0)

    constants = weights, fixed
    h, y = over_time(step, h, (x.to(dtype), spans, scale, running), constants, hidden)
    return y.to(x.dtype), h.to(x.dtype)


def to_dtype(weights: CfCWeights, dtype: torch.dtype) -> CfCWeights:
    """The same weights in another dtype."""

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    def cast_affine(affine: Affine | None) -> Affine | None:
        return None if affine is None else Affine(affine.weight.to(dtype), affine.bias.to(dtype))

    return CfCWeights(
        ff1=Affine(weights.ff1.weight.to(dtype), weights.ff1.bias.to(dtype)),
        ff2=cast_affine(weights.ff2),
        time_a=cast_affine(weights.time_a),
        time_b=cast_affine(weights.time_b),
        mask=cast(weights.mask),
        w_tau=cast(weights.w_tau),
        amplitude=cast(weights.amplitude),
        backbone=tuple(Affine(w.to(dtype), b.to(dtype)) for w, b in weights.backbone),
    )
