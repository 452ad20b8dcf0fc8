"""Refractory LIF attention: thresholds that rise with the attention that a key has drawn.

Everything here stores the matrix of weights, several times over.
`ember_ext.refractory_lif_attention` does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ember_ext.reference.lif_attention import (
    attention_probabilities,
    gate_probabilities,
    visible_keys,
    weighted_sum,
)

RefractoryMode = Literal["causal", "look_ahead"]


class RefractoryState(NamedTuple):
    """The attention that each of S keys has drawn, summed over the queries so far.

    :func:`~ember_ext.refractory_lif_attention` returns it, and takes it as `past` to carry on.

    Examples::

        >>> import torch
        >>> from ember_ext.ops import RefractoryState
        >>> batch, heads = 2, 4
        >>> nothing_yet = RefractoryState(torch.zeros(batch, heads, 0), torch.zeros(batch, 0))
    """

    probabilities: Tensor
    """Before the gate, [B, H, S]."""
    weights: Tensor
    """After it, averaged over heads, [B, S]."""


def refractory_lif_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    within: Tensor,
    across: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    mode: RefractoryMode = "causal",
    previous_load: Tensor | None = None,
    past: RefractoryState | None = None,
    eps: float = 1e-8,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, RefractoryState]:
    """Define the operator :func:`ember_ext.refractory_lif_attention`, with the same arguments.

    bf16 and fp16 are computed in fp32 and rounded once, at the end. Dropout needs a seed.

    Raises:
        ValueError: `is_causal` is not True.

    Examples::

        >>> import torch
        >>> from ember_ext import reference
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16)
        >>> gates = torch.tensor([[0.1], [0.7], [9.0], [0.2], [0.1]]).expand(5, 4)
        >>> out, load, state = reference.refractory_lif_attention(
        ...     query, key, value, *gates, is_causal=True
        ... )
        >>> out.shape, load.shape
        (torch.Size([2, 4, 10, 16]), torch.Size([2, 10, 10]))
    """
    require_causal(is_causal)
    w, next_load, state = refractory_weights(
        query,
        key,
        threshold,
        leak,
        steepness,
        within,
        across,
        mode=mode,
        previous_load=previous_load,
        past=past,
        scale=scale,
        eps=eps,
    )
    return weighted_sum(w, value, dropout_p, seed).to(query.dtype), next_load, state


def require_causal(is_causal: bool) -> None:
    """Raise unless the caller has said that attention is causal: thresholds are defined there."""
    if not is_causal:
        raise ValueError(
            "ember_ext.refractory_lif_attention: is_causal must be True, as refractory thresholds "
            f"are defined for causal attention only, in both modes; got {is_causal}"
        )


def refractory_weights(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,
    leak: Tensor,
    steepness: Tensor,
    within: Tensor,
    across: Tensor,
    *,
    mode: RefractoryMode = "causal",
    previous_load: Tensor | None = None,
    past: RefractoryState | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, RefractoryState]:
    """The weights of `refractory_lif_attention` before dropout, and its other two results."""
    p = attention_probabilities(query, key, visible_keys(query, key, None, True), scale)
    theta, lam, k, r, c = (
        v.to(p.dtype).view(-1, 1, 1) for v in (threshold, leak, steepness, within, across)
    )
    load, sum_p = _mean_over_queries(p, None if past is None else past.probabilities, mode)
    theta = theta + r * load
    if previous_load is not None:
        theta = theta + c * previous_load.to(p.dtype).unsqueeze(1)
    w = gate_probabilities(p, theta, lam, k, eps)
    mean_w = w.sum(1) / max(w.shape[1], 1)
    next_load, sum_w = _mean_over_queries(mean_w, None if past is None else past.weights, mode)
    return w, next_load, RefractoryState(sum_p, sum_w)


def _mean_over_queries(
    weights: Tensor, past: Tensor | None, mode: RefractoryMode
) -> tuple[Tensor, Tensor]:
    """Mean of `weights` [..., T, S + T] over all queries, or at each over those up to it; the sum.

    `past` [..., S] is the sum over the S queries before these.
    """
    queries, keys = weights.shape[-2:]
    total = weights.sum(-2)
    if mode == "look_ahead":
        return total.unsqueeze(-2) / max(queries, 1), total
    sums = weights.cumsum(-2)
    if past is not None:
        past = F.pad(past.to(sums.dtype), (0, queries))
        sums, total = sums + past.unsqueeze(-2), total + past
    counts = torch.arange(keys - queries + 1, keys + 1, device=sums.device)
    return sums / counts.unsqueeze(-1), total
