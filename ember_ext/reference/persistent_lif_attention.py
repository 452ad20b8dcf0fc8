"""Persistent LIF attention: thresholds that follow how much a head has fired in earlier layers.

Everything here stores the matrix of weights, several times over, and there is no fused operator.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_fired,
    visible_keys,
)
from ember_ext.reference.lif_gate import fire_mask

PersistenceMode = Literal["causal", "look_ahead"]


class PersistenceState(NamedTuple):
    """What one layer's heads have fired over the S tokens so far, to carry a sequence on.

    Examples::

        >>> import torch
        >>> from ember_ext.models import PersistenceState
        >>> batch, heads = 2, 4
        >>> nothing_yet = PersistenceState(torch.zeros(batch, heads), torch.zeros(batch, heads))
    """

    fired: Tensor
    """Sum of f over the S x S pairs of a query and a key, hidden ones included, [B, H]."""
    hidden: Tensor
    """Sum over the S queries of the f of a hidden key: what one more key adds, [B, H]."""


def persistent_weights(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    persistence: Tensor,
    coupling: Tensor,
    *,
    mode: PersistenceMode = "causal",
    trace: Tensor | None = None,
    past: PersistenceState | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, PersistenceState]:
    r"""The weights of causal attention whose thresholds rise with the trace of earlier layers.

    For a head with the trace h, which is 0 before the first layer,

    .. math::

        \theta_i = \theta + \mathrm{coupling} \cdot h_i, \qquad
        h_i \leftarrow \mathrm{persistence} \cdot h_i + \overline{f}_i,

    where :math:`\overline{f}_i` is the mean of :math:`f = \sigma(k (p - \theta_i))` over pairs of a
    query and a key. As in the paper's code, a key that the causal mask hides counts with p = 0. In
    mode "look_ahead" the mean is over all pairs, as in that code, so the future leaks into the
    past. In mode "causal" it is over the pairs of the tokens up to i: the mean of a text that ends
    there.

    Args:
        query: [B, H, T, D].
        key: [B, G, S + T, D]; S tokens lie before the first query.
        threshold: [H], and so are the four below.
        leak: as in `lif_attention`.
        steepness: as in `lif_attention`.
        persistence: what is left of the trace after a layer, within (0, 1).
        coupling: how much the trace raises the threshold.
        mode: "causal" or "look_ahead". Default: "causal".
        trace: what the layer below returned, [B, H, T, 1], where each dimension may be 1. Default:
            zero.
        past: the state after the S tokens. Default: that of none.
        scale: as in `lif_attention`.
        eps: as in `lif_attention`.

    Returns:
        The weights before dropout [B, H, T, S + T]; the trace for the next layer, [B, H, T, 1] in
        mode "causal" and [B, H, 1, 1] in mode "look_ahead"; and the state to carry on from, which
        is of no use in mode "look_ahead". All are in fp32 (fp64 for fp64 input).
    """
    visible = visible_keys(query, key, None, True)
    assert visible is not None
    p = attention_probabilities(query, key, visible, scale)
    theta, lam, k, persistence, coupling = (
        v.to(p.dtype).view(-1, 1, 1) for v in (threshold, leak, steepness, persistence, coupling)
    )
    trace = p.new_zeros(1) if trace is None else trace.to(p.dtype)
    theta = theta + coupling * trace
    fire = fire_mask(p, theta, k)
    w = gate_fired(p, fire, lam, eps)

    of_hidden = fire_mask(torch.zeros_like(theta), theta, k).expand(*fire.shape[:-1], 1)
    if mode == "look_ahead":
        mean, state = fire.mean((-2, -1), keepdim=True), _no_tokens(p)
    else:
        seen = fire.masked_fill(~visible, 0).sum(-1, keepdim=True)
        mean, state = _running_mean(seen, of_hidden, past or _no_tokens(p), key.shape[2])
    return w, persistence * trace + mean, state


def _running_mean(
    seen: Tensor, of_hidden: Tensor, past: PersistenceState, tokens: int
) -> tuple[Tensor, PersistenceState]:
    """Mean of f over the pairs of the tokens up to each query, [B, H, T, 1], and the new state.

    `seen` [B, H, T, 1] is the sum of f over the keys that a query sees, and `of_hidden` the f of a
    key that it does not see.
    """
    fired, hidden = (total.to(seen.dtype)[..., None, None] for total in past)
    # A token adds its own row, and one hidden key to the row of each earlier query.
    hidden_sums = torch.cat([hidden, hidden + of_hidden.cumsum(-2)], -2)
    sums = fired + (seen + hidden_sums[..., :-1, :]).cumsum(-2)
    counts = torch.arange(tokens - seen.shape[2] + 1, tokens + 1, device=seen.device)
    state = PersistenceState(sums[..., -1, 0], hidden_sums[..., -1, 0])
    return sums / counts.square().unsqueeze(-1), state


def _no_tokens(like: Tensor) -> PersistenceState:
    zeros = like.new_zeros(like.shape[:2])
    return PersistenceState(zeros, zeros)
